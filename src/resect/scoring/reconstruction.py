"""Greedy elimination: which unit can go with the least harm when all the others adapt."""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from resect.errors import ScoreError
from resect.scoring.scores import scorer
from resect.tracing import Evidence

RIDGE = 1e-5


@scorer
def reconstruction(evidence: Evidence) -> np.ndarray:
    """Share of the readers' output energy that is lost once this unit and all before it are gone; (units,) from 0 to 1.

    Units leave one at a time, the cheapest first: removing columns J from a least-squares reader W with inverse second moments
    H raises its error by tr(W_J (H_JJ)^-1 W_J^T) when the others adapt. Then W and H are downdated, so later choices know what
    earlier ones left. Cost O(columns^3) per group. Needs `trace(..., grams=True)`, else ScoreError.

    Source: Optimal Brain Surgeon (Hassibi & Stork 1993), in structured form SlimGPT, arXiv 2412.18110, and OSSCAR.
    """
    if len(evidence.systems) < len(evidence.readers):
        raise ScoreError(
            f"reconstruction needs second moments for group {evidence.group}: trace with grams=True "
            "(transposed, grouped and 3-d convolutions have none: name another scorer)"
        )
    if not evidence.systems:
        return np.zeros(evidence.units)
    return eliminate([_System(*system) for system in evidence.systems])[0]


class _System:
    """One reader's least-squares problem under elimination."""

    def __init__(self, weight: np.ndarray, moments: np.ndarray, columns: np.ndarray):
        ridge = RIDGE * np.mean(np.diag(moments)[:-1]) or 1.0
        size = len(moments)
        regular = moments + ridge * np.eye(size)
        self.inverse = cho_solve(cho_factor(regular), np.eye(size))
        # Without a constant to adapt, the reader's output keeps its mean; energy is measured around what a constant explains.
        self.weight = np.concatenate([weight, np.zeros((len(weight), 1))], axis=1)
        self.columns = columns
        mean = moments[-1, :-1] / max(moments[-1, -1], 1.0)
        centred = moments[:-1, :-1] - moments[-1, -1] * np.outer(mean, mean)
        self.energy = max(float(np.einsum("oi,ij,oj->", weight, centred, weight)), 1e-300)

    def losses(self) -> np.ndarray:
        """(units,) increase of the squared error when a unit goes now."""
        if self.columns.shape[1] == 1:
            column = self.columns[:, 0]
            return np.square(self.weight[:, column]).sum(0) / np.maximum(np.diag(self.inverse)[column], 1e-300)
        blocks = self.inverse[self.columns[:, :, None], self.columns[:, None, :]]
        weights = self.weight[:, self.columns].transpose(1, 2, 0)
        tiny = 1e-12 * np.trace(blocks, axis1=1, axis2=2)[:, None, None] + 1e-300
        return (weights * np.linalg.solve(blocks + tiny * np.eye(blocks.shape[1]), weights)).sum((1, 2))

    def remove(self, unit: int) -> None:
        """Take a unit's columns out and let the others adapt (rank-w downdate)."""
        gone = self.columns[unit]
        rows = self.inverse[gone]
        step = np.linalg.solve(rows[:, gone] + 1e-300 * np.eye(len(gone)), rows)
        self.weight -= self.weight[:, gone] @ step
        self.inverse -= rows.T @ step
        # Exact zeros stop rounding from creeping back in through a removed column.
        self.weight[:, gone] = 0.0
        self.inverse[gone] = 0.0
        self.inverse[:, gone] = 0.0


def eliminate(systems: list[_System]) -> tuple[np.ndarray, np.ndarray]:
    """Remove units one by one; (units,) share of energy lost when each leaves, and the order of leaving."""
    units = len(systems[0].columns)
    lost, order, total = np.zeros(units), np.zeros(units, dtype=np.int64), 0.0
    gone = np.zeros(units, dtype=bool)
    for step in range(units):
        losses = sum(system.losses() / system.energy for system in systems) / len(systems)
        losses = np.where(gone, np.inf, losses)
        unit = int(np.argmin(losses))
        total += max(float(losses[unit]), 0.0)
        lost[unit], order[step], gone[unit] = total, unit, True
        for system in systems:
            system.remove(unit)
    return lost, order
