"""Greedy elimination: which unit can go with the least harm when all the others adapt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import blas, lapack, solve_triangular

from resect.errors import ScoreError
from resect.scoring.scores import scorer
from resect.scoring.weights import activation_weight
from resect.tracing import Evidence

RIDGE = 1e-5
# Wider groups lose several units a step, in about so many steps: what that costs in accuracy is in benchmarks/elimination.py.
EXACT = 4096
STEPS = 1024
# Downdates wait until there are so many columns of them: then they are one matrix product, and the exactness is looked at.
PENDING = 64
SHRINK_BELOW = 0.8
# Largest error of (inverse x second moments) on a probe, as a share of it, before the inverse is made anew.
DRIFT = 1e-6
# A reader whose outputs vary less than this beside their size makes a constant, up to rounding: it asks for no unit.
CONSTANT = 1e-12


@scorer
def reconstruction(evidence: Evidence) -> np.ndarray:
    """Share of the readers' output energy that is lost once this unit and all before it are gone; (units,) from 0 to 1.

    Units leave one at a time, the cheapest first: removing columns J from a least-squares reader W with inverse second moments
    H raises its error by tr(W_J (H_JJ)^-1 W_J^T) when the others adapt. Then W and H are downdated, so later choices know what
    earlier ones left. Groups of over 4096 units lose the cheapest few at a time. Cost O(columns^3) per group. Where no reader's
    output varies (a single example), a constant restores all of it, and units score as under `activation_weight`. Needs
    `trace(..., grams=True)`, else ScoreError.

    Source: Optimal Brain Surgeon (Hassibi & Stork 1993), in structured form SlimGPT, arXiv 2412.18110, and OSSCAR.
    """
    lost = eliminated(evidence).lost if evidence.readers else np.zeros(0)
    return lost if lost.any() else activation_weight(evidence).max(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Elimination:
    """What leaves when, and what is lost by then.

    order: (units,) the first to leave first. lost: (units,) share of the output energy, mean over readers, that is lost once
    this unit and all before it are gone.
    """

    order: np.ndarray
    lost: np.ndarray

    @property
    def curve(self) -> np.ndarray:
        """(units + 1,) error against units kept, from none to all, on the data that the second moments were taken from."""
        return np.append(self.lost[self.order][::-1], 0.0)


def eliminated(evidence: Evidence, *, together: int | None = None) -> Elimination:
    """Greedy elimination of a group's units from its evidence; raises ScoreError without second moments for every reader.

    together: units that leave in one step, each the cheapest on its own (default: 1 up to 4096 units).
    """
    if len(evidence.systems) < len(evidence.readers):
        raise ScoreError(
            f"reconstruction needs second moments for group {evidence.group}: trace with grams=True "
            "(transposed, grouped and 3-d convolutions have none: name another scorer)"
        )
    several = max(1, evidence.units // STEPS) if evidence.units > EXACT else 1
    return eliminate([System(*system) for system in evidence.systems], together=several if together is None else together)


def eliminate(systems: Sequence[System], *, together: int = 1) -> Elimination:
    """Remove units, the cheapest first; together: units that leave in one step, 1 is exact greedy elimination."""
    lost, order, total = np.zeros(len(systems[0].columns)), list[int](), 0.0
    while len(left := systems[0].units):
        losses = np.sum([system.losses() / system.energy for system in systems], axis=0) / len(systems)
        chosen = np.argsort(losses, kind="stable")[:together]
        # What is lost is what they take with them together, which is more than the sum of what each would take alone.
        taken = np.sum([system.remove(chosen) / system.energy for system in systems], axis=0) / len(systems)
        lost[left[chosen]] = total + np.cumsum(taken)
        total = float(lost[left[chosen[-1]]])
        order += left[chosen].tolist()
    return Elimination(order=np.array(order), lost=lost)


class System:
    """One reader's least-squares problem under elimination, around its outputs' mean: a constant adapts at no cost.

    The inverse H and the weight W of what is left are kept as they were some removals ago, with what has left since as products
    of few rows: H - P^T P and W - Q^T P, as in a blocked Cholesky factorisation. What a choice looks at, the blocks H_JJ and
    W_J^T W_J of every unit J, is up to date. All in float64.

    inverse, weight: H and W. taken, made: P and Q, (columns that wait, columns) and (columns that wait, outputs). block, size:
    (units left, width, width) H_JJ and W_J^T W_J.
    """

    inverse: np.ndarray
    weight: np.ndarray
    taken: np.ndarray
    made: np.ndarray
    block: np.ndarray
    size: np.ndarray

    def __init__(self, weight: np.ndarray, moments: np.ndarray, columns: np.ndarray):
        """weight: (outputs, columns); moments: (columns + 1, columns + 1), a constant 1 last; columns: (units, width)."""
        self.dense, self.moments, self.columns = weight, moments, columns
        self.mean = moments[:-1, -1] / np.sqrt(max(moments[-1, -1], 1.0))
        self.ridge = RIDGE * float(np.mean(np.diag(moments)[:-1])) or 1.0
        self.energy = self._energy()
        # Units that are left; reader columns that the matrices hold, which shrink as units go; and where each column stands.
        self.units = np.arange(len(columns))
        self.held = np.arange(weight.shape[1])
        self.alive, self.place = np.ones(len(self.held), dtype=bool), np.arange(len(self.held))
        self.factorise()

    def losses(self) -> np.ndarray:
        """(units left,) increase of the squared error when one of the units goes now."""
        if self.columns.shape[1] == 1:
            return (self.size / self.block)[:, 0, 0]
        return np.trace(np.linalg.solve(self.block, self.size), axis1=1, axis2=2)

    def remove(self, chosen: np.ndarray) -> np.ndarray:
        """Take some of the units that are left out (positions among them) and let the others adapt; (chosen,) increase of the
        squared error as they leave one after the other."""
        gone = self.place[self.columns[self.units[chosen]]].ravel()
        rows = self.inverse[gone] - self.taken[:, gone].T @ self.taken
        factor = np.linalg.cholesky(rows[:, gone])
        taken = solve_triangular(factor, rows, lower=True, check_finite=False)
        weight = self.weight[:, gone] - self.made.T @ self.taken[:, gone]
        made = solve_triangular(factor, weight.T, lower=True, check_finite=False)
        change = made @ self.weight - (made @ self.made.T) @ self.taken
        self.units = np.delete(self.units, chosen)
        self.alive[gone] = False
        self._follow(taken, change, made @ made.T, chosen)
        self.taken, self.made = np.concatenate([self.taken, taken]), np.concatenate([self.made, made])
        if len(self.taken) >= PENDING and len(self.units):
            self._settle()
        return np.square(made).sum(1).reshape(len(chosen), -1).sum(1)

    def _follow(self, taken: np.ndarray, change: np.ndarray, square: np.ndarray, chosen: np.ndarray) -> None:
        """Bring the blocks of the units that are left up to date: (H - p^T p)_JJ, and the same of (W - q^T p)^T (W - q^T p)."""
        columns = self.place[self.columns[self.units]]
        p, g = taken[:, columns].transpose(1, 0, 2), change[:, columns].transpose(1, 0, 2)
        turned = p.transpose(0, 2, 1)
        cross = turned @ (g - 0.5 * (square @ p))
        self.block = np.delete(self.block, chosen, 0) - turned @ p
        self.size = np.delete(self.size, chosen, 0) - cross - cross.transpose(0, 2, 1)

    def _settle(self) -> None:
        """Do what has waited; drop the rows and columns that are gone once they are many; begin anew where rounding shows."""
        blas.dgemm(-1.0, self.taken.T, self.taken.T, beta=1.0, c=self.inverse.T, trans_b=True, overwrite_c=True)
        self.weight -= self.made.T @ self.taken
        if self.alive.mean() < SHRINK_BELOW:
            self._shrink()
        self._look()
        if self.drift() > DRIFT:
            self.factorise()

    def _shrink(self) -> None:
        self.place[self.held] = np.where(self.alive, np.cumsum(self.alive) - 1, -1)
        self.inverse = self.inverse[np.ix_(self.alive, self.alive)]
        self.weight = np.ascontiguousarray(self.weight[:, self.alive])
        self.held, self.alive = self.held[self.alive], np.ones(self.alive.sum(), dtype=bool)

    def drift(self) -> float:
        """How far H is from the inverse of the second moments of what is left, on a probe, as a share of it."""
        probe = np.where(np.random.default_rng(0).random(len(self.held)) < 0.5, -1.0, 1.0) * self.alive
        through = np.zeros(len(self.moments) - 1)
        through[self.held] = (self.inverse @ probe - self.taken.T @ (self.taken @ probe)) * self.alive
        back = self.moments[:-1, :-1] @ through - self.mean * (self.mean @ through) + self.ridge * through
        return float(np.linalg.norm(back[self.held] * self.alive - probe) / np.linalg.norm(probe))

    def factorise(self) -> None:
        """H and W of what is left, straight from the second moments."""
        if not self.alive.all():
            self._shrink()
        regular = self._centred(self.held, self.held).T
        regular[np.diag_indices_from(regular)] += self.ridge
        factor, _ = lapack.dpotrf(regular, lower=True, overwrite_a=True)
        self.inverse = lapack.dpotri(factor, lower=True, overwrite_c=True)[0].T
        for row in range(1, len(self.held)):
            self.inverse[row, :row] = self.inverse[:row, row]
        gone = np.setdiff1d(np.arange(self.dense.shape[1]), self.held)
        self.weight = self.dense[:, self.held] + (self.dense[:, gone] @ self._centred(gone, self.held)) @ self.inverse
        self._look()

    def _look(self) -> None:
        """The blocks of the units that are left, read off H and W; nothing waits."""
        columns = self.place[self.columns[self.units]]
        self.block = self.inverse[columns[:, :, None], columns[:, None, :]]
        weight = self.weight[:, columns].transpose(1, 0, 2)
        self.size = weight.transpose(0, 2, 1) @ weight
        self.taken, self.made = np.zeros((0, len(self.held))), np.zeros((0, len(self.dense)))

    def _centred(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return self.moments[np.ix_(rows, columns)] - np.outer(self.mean[rows], self.mean[columns])

    def _energy(self) -> float:
        """Squared size of the outputs around their mean; infinite where that is rounding, so that nothing is lost there."""
        moments = self.moments[:-1, :-1]
        size = np.einsum("oi,ij,oj->", self.dense, moments, self.dense, optimize=True) - np.square(self.dense @ self.mean).sum()
        rounding = CONSTANT * np.square(np.abs(self.dense) @ np.sqrt(np.diag(moments))).sum()
        return float(size) if size > max(rounding, 0.0) else np.inf
