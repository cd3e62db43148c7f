"""Stop judging a candidate as soon as its side of the floor is known: for the search only, never for the certificate.

A race answers one question: would the whole search split put this candidate at or above the floor, or below? It sees the
examples in a seeded order, so they are draws without replacement from a finite set, and the answer can be bounded exactly.
Two gamblers bet, one that the mean is above the floor and one that it is below. Under the hypothesis that the whole split lies
exactly on the floor, the mean of the next draw is known (what the drawn examples left over), so each gambler's wealth is a
supermartingale, and reaches 2 / level with probability at most level / 2, however often one looks: looking after every batch
costs nothing, which a Clopper-Pearson interval per look does not allow. A race against the floor therefore contradicts the full
split with probability at most `level` (.1 %); how many examples races take is in benchmarks/results/certificate.md.
(Betting without replacement: Waudby-Smith & Ramdas 2023, section 5; the bets are their approximate growth-rate adaptive ones,
which stop soonest when the truth is far from the floor.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from resect.errors import DataError
from resect.searching.floor import Floor

LARGEST_BET = 0.75
# The bets start from no edge and a plausible variance, which weigh as much as this many examples: without that, a run of right
# answers at the start is bet on heavily, and lost again.
PRIOR_WEIGHT = 50


@dataclass(frozen=True, kw_only=True)
class Race:
    """How a race ended: above (the side of the floor), whether it stopped early, and the counts so far.

    dense_correct, and differ (examples that only one of the two answered correctly), are None where the dense network's
    correctness was not given. With stopped=False every example was seen and `above` is exact.
    """

    above: bool
    stopped: bool
    examples: int
    correct: int
    dense_correct: int | None = None
    differ: int | None = None

    @property
    def accuracy(self) -> float:
        """Share of the examples seen that were answered correctly, in [0, 1]."""
        return self.correct / self.examples

    @property
    def drop(self) -> float | None:
        """Accuracy lost against the dense network on the examples seen, in [-1, 1]; None without it."""
        return None if self.dense_correct is None else (self.dense_correct - self.correct) / self.examples

    @property
    def deviation(self) -> float | None:
        """Standard deviation per example of [dense right] - [candidate right], for `ladder`; None without the dense network."""
        if self.differ is None or self.drop is None:
            return None
        return math.sqrt(max(self.differ / self.examples - self.drop**2, 0.0))


class Accumulator:
    """Sees correctness batch by batch and says when the side of the floor is known.

    total: examples of the whole search split. level: probability with which the verdict may contradict the whole split.
    log_wealth: of the gambler who bets on "above", and of the one who bets on "below".
    """

    def __init__(self, floor: Floor, total: int, *, level: float = 0.001) -> None:
        if total < 1:
            raise DataError(f"a race needs at least one example on the search split; total={total}")
        self.floor = floor
        self.total = total
        self.target = floor.accuracy if floor.accuracy is not None else (1 - (floor.drop or 0.0)) / 2
        self.goal = math.log(2 / level)
        self.prior = 0.005 if floor.drop is not None else max(self.target * (1 - self.target), 0.001)
        self.seen = self.correct = 0
        self.dense_correct: int | None = None
        self.differ: int | None = None
        self._sum = self._squares = 0.0
        self.log_wealth = [0.0, 0.0]

    def see(self, correct: np.ndarray, dense_correct: np.ndarray | None = None) -> bool | None:
        """Add a batch, (n,) bool each; True: above or on the floor, False: below, None: not known yet, go on.

        Raises DataError for more examples than `total`, and for a drop floor without the dense network's correctness.
        """
        correct = np.asarray(correct, dtype=bool)
        x = self._variable(correct, dense_correct)
        if self.seen + len(x) > self.total:
            raise DataError(f"a race over {self.total} examples was shown {self.seen + len(x)}")
        verdict = self._bet(x)
        self.seen += len(x)
        self.correct += int(correct.sum())
        if dense_correct is not None:
            dense = np.asarray(dense_correct, dtype=bool)
            self.dense_correct = (self.dense_correct or 0) + int(dense.sum())
            self.differ = (self.differ or 0) + int((dense != correct).sum())
        return verdict

    def _variable(self, correct: np.ndarray, dense_correct: np.ndarray | None) -> np.ndarray:
        """The bounded variable whose mean is compared with `target`: correctness, or (1 - drop) / 2."""
        if self.floor.drop is None:
            return correct.astype(np.float64)
        if dense_correct is None or len(dense_correct) != len(correct):
            raise DataError(f"a race for '{self.floor}' needs the dense network's correctness on the same examples")
        return (1.0 - (np.asarray(dense_correct, dtype=np.float64) - correct)) / 2

    def _bet(self, x: np.ndarray) -> bool | None:
        drawn = self.seen + np.arange(len(x))
        sums = self._sum + np.concatenate([[0.0], np.cumsum(x)])
        squares = self._squares + np.concatenate([[0.0], np.cumsum(x**2)])
        self._sum, self._squares = float(sums[-1]), float(squares[-1])
        settled = self._settled(drawn[-1] + 1 if len(x) else self.seen)
        if settled is not None or not len(x):
            return settled
        left = (self.total * self.target - sums[:-1]) / (self.total - drawn)
        left = np.clip(left, 1e-9, 1 - 1e-9)
        centre = (sums[:-1] + PRIOR_WEIGHT * self.target) / (drawn + PRIOR_WEIGHT)
        spread = np.maximum(
            (squares[:-1] + PRIOR_WEIGHT * (self.target**2 + self.prior)) / (drawn + PRIOR_WEIGHT) - centre**2, 1e-6
        )
        edge = centre - left
        bets = edge / (spread + edge**2)
        above = np.log1p(np.clip(bets, 0, LARGEST_BET / left) * (x - left))
        below = np.log1p(np.clip(bets, -LARGEST_BET / (1 - left), 0) * (x - left))
        for side, gains in enumerate((above, below)):
            path = self.log_wealth[side] + np.cumsum(gains)
            self.log_wealth[side] = float(path[-1])
            if path.max() >= self.goal:
                return side == 0
        return None

    def _settled(self, seen: int) -> bool | None:
        """The side where the examples that are left cannot change it."""
        needed = self.total * self.target - 1e-9
        if self._sum >= needed:
            return True
        if self._sum + (self.total - seen) < needed:
            return False
        return None


def race(
    floor: Floor,
    outcomes: Iterable[np.ndarray | tuple[np.ndarray, np.ndarray]],
    total: int,
    *,
    level: float = 0.001,
) -> Race:
    """Judge one candidate batch by batch until its side of the floor is known.

    outcomes: the candidate's correctness, (n,) bool per batch, or pairs (candidate, dense), which drop floors need; in an order
    drawn from a seed; for a floor on one class, of that class's examples. A generator that runs the network batch by batch is
    run no further than needed.

    Raises DataError when `outcomes` ends before `total` examples without a verdict.

    >>> right = np.ones(2000, dtype=bool)
    >>> race(Floor(accuracy=0.9), np.split(right, 20), 2000)
    Race(above=True, stopped=True, examples=200, correct=200, dense_correct=None, differ=None)
    """
    accumulator = Accumulator(floor, total, level=level)
    verdict = None
    for outcome in outcomes:
        verdict = accumulator.see(*outcome) if isinstance(outcome, tuple) else accumulator.see(outcome)
        if verdict is not None:
            break
    if verdict is None:
        raise DataError(f"a race over {total} examples was shown only {accumulator.seen}")
    return Race(
        above=verdict,
        stopped=accumulator.seen < total,
        examples=accumulator.seen,
        correct=accumulator.correct,
        dense_correct=accumulator.dense_correct,
        differ=accumulator.differ,
    )
