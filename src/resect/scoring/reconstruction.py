"""Greedy elimination: which unit can go with the least harm when all the others adapt."""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from resect.errors import ScoreError
from resect.scoring.scores import scorer
from resect.tracing import Evidence

RIDGE = 1e-5
# Wider groups lose several units a step, so that a step costs one matrix product and there are about so many steps.
EXACT = 512
STEPS = 256
SHRINK_BELOW = 0.8


@scorer
def reconstruction(evidence: Evidence) -> np.ndarray:
    """Share of the readers' output energy that is lost once this unit and all before it are gone; (units,) from 0 to 1.

    Units leave one at a time, the cheapest first: removing columns J from a least-squares reader W with inverse second moments
    H raises its error by tr(W_J (H_JJ)^-1 W_J^T) when the others adapt. Then W and H are downdated, so later choices know what
    earlier ones left. Groups of over 512 units lose the cheapest few at a time. Cost O(columns^3) per group. Needs
    `trace(..., grams=True)`, else ScoreError.

    Source: Optimal Brain Surgeon (Hassibi & Stork 1993), in structured form SlimGPT, arXiv 2412.18110, and OSSCAR.
    """
    if len(evidence.systems) < len(evidence.readers):
        raise ScoreError(
            f"reconstruction needs second moments for group {evidence.group}: trace with grams=True "
            "(transposed, grouped and 3-d convolutions have none: name another scorer)"
        )
    if not evidence.systems:
        return np.zeros(evidence.units)
    return eliminate(
        [_System(*system) for system in evidence.systems],
        together=max(1, evidence.units // STEPS) if evidence.units > EXACT else 1,
    )[0]


class _System:
    """One reader's least-squares problem under elimination."""

    def __init__(self, weight: np.ndarray, moments: np.ndarray, columns: np.ndarray):
        ridge = RIDGE * np.mean(np.diag(moments)[:-1]) or 1.0
        size = len(moments)
        regular = moments + ridge * np.eye(size)
        self.inverse = cho_solve(cho_factor(regular), np.eye(size))
        # Without a constant to adapt, the reader's output keeps its mean; energy is measured around what a constant explains.
        self.weight = np.concatenate([weight, np.zeros((len(weight), 1))], axis=1)
        # Where a column of the reader stands in the matrices, which shrink as units go; the constant is their last column.
        self.columns, self.place = columns, np.arange(size)
        self.alive = np.ones(size, dtype=bool)
        mean = moments[-1, :-1] / max(moments[-1, -1], 1.0)
        centred = moments[:-1, :-1] - moments[-1, -1] * np.outer(mean, mean)
        self.energy = max(float(np.einsum("oi,ij,oj->", weight, centred, weight)), 1e-300)

    def losses(self, units: np.ndarray) -> np.ndarray:
        """(units,) increase of the squared error when one of these units goes now."""
        columns = self.place[self.columns[units]]
        if columns.shape[1] == 1:
            column = columns[:, 0]
            return np.square(self.weight[:, column]).sum(0) / np.maximum(self.inverse[column, column], 1e-300)
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
        weights = self.weight[:, columns].transpose(1, 2, 0)
        tiny = 1e-12 * np.trace(blocks, axis1=1, axis2=2)[:, None, None] + 1e-300
        return (weights * np.linalg.solve(blocks + tiny * np.eye(blocks.shape[1]), weights)).sum((1, 2))

    def remove(self, units: np.ndarray) -> None:
        """Take the columns of some units out and let the others adapt (one downdate of their joint rank)."""
        gone = self.place[self.columns[units]].ravel()
        rows = self.inverse[gone]
        step = np.linalg.solve(rows[:, gone] + 1e-300 * np.eye(len(gone)), rows)
        self.weight -= self.weight[:, gone] @ step
        self.inverse -= rows.T @ step
        self.alive[gone] = False
        if self.alive.sum() < SHRINK_BELOW * len(self.alive):
            self._shrink()

    def _shrink(self) -> None:
        """Drop the rows and columns that are gone: what is left is all that later steps look at."""
        renumbered = np.cumsum(self.alive) - 1
        self.place = np.where(self.place >= 0, np.where(self.alive[self.place], renumbered[self.place], -1), -1)
        self.inverse = np.ascontiguousarray(self.inverse[np.ix_(self.alive, self.alive)])
        self.weight = np.ascontiguousarray(self.weight[:, self.alive])
        self.alive = np.ones(len(self.inverse), dtype=bool)


def eliminate(systems: list[_System], *, together: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Remove units, the cheapest first; (units,) share of energy lost when each leaves, and the order of leaving.

    together: units that leave in one step, each the cheapest on its own; 1 is exact greedy elimination.
    """
    units = len(systems[0].columns)
    lost, order, total = np.zeros(units), np.zeros(0, dtype=np.int64), 0.0
    left = np.arange(units)
    while len(left):
        losses = np.sum([system.losses(left) / system.energy for system in systems], axis=0) / len(systems)
        chosen = np.argsort(losses, kind="stable")[:together]
        for unit, loss in zip(left[chosen], losses[chosen]):
            total += max(float(loss), 0.0)
            lost[unit] = total
        order = np.concatenate([order, left[chosen]])
        if len(left) > len(chosen):
            for system in systems:
                system.remove(left[chosen])
        left = np.delete(left, chosen)
    return lost, order
