"""Which of the searched networks to freeze for the certificate: at most 12, safest first, each cheaper than the one before.

The walk over the list (certificate.py) may only go on while networks pass, so a list has two ways to lose: its first rungs are
too bold and nothing passes, or its steps are so wide that the walk stops far above the leanest network that would have passed.
`ladder` chooses the list that is expected to deliver the lowest cost, from what the search measured:

1. The chance that a network passes. What it will score on the certify split is, given the search, normal around its search
   estimate with variance v (1/n_search + 1/n_certify); it passes above the critical score of the test at n_certify. Estimates
   made on training data, or the best of thousands, flatter: with probability .1 they are taken to say nothing except that a
   costlier network is safer.
2. Only networks that no other one beats in both cost and chance are considered.
3. After network i has passed, network j passes with probability min(1, q_j / q_i) where both fail on the same examples (the
   rule: pruned versions of one network do), and with q_j where they are independent; .02 of the latter. So one more rung
   between two others costs little and saves much, and the last rungs may be long shots: failing there loses nothing.
4. Dynamic programming over (last rung, rungs left) maximises the expected saving; delivering nothing counts as the cost of two
   dense networks, which is what makes the first rung safe.

On 800 pruned MNIST networks (benchmarks/results/certificate.md), whose accuracy is far from monotone in cost, 12 rungs deliver
within .005 of the MACs that walking every undominated network delivers, and .02 to .20 less than one best guess; estimates
that hide half of all errors cost about .02. Without the tenth of point 1 such estimates end in empty hands.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binom, norm

from resect.errors import DataError
from resect.searching.evidence import LARGEST_BET
from resect.searching.floor import Floor

RUNGS = 12
MISLED = 0.1
INDEPENDENT = 0.02
NOTHING = 2.0


def ladder(
    costs: ArrayLike,
    estimates: ArrayLike,
    floor: Floor,
    *,
    n_search: ArrayLike,
    n_certify: int,
    deviation: ArrayLike | None = None,
    labelled: bool = True,
    level: float | None = None,
    rungs: int = RUNGS,
) -> tuple[int, ...]:
    """The places, in the arrays given, of at most `rungs` networks to freeze: safest first, of strictly decreasing cost.

    costs: (candidates,) shares of the dense network's cost, in the unit that is to be saved. estimates: (candidates,) on the
    search split: accuracies for an accuracy floor, drops against the dense network for a drop floor (without labels: shares of
    predictions that differ). n_search: examples behind each estimate, one number or (candidates,) where races stopped early.
    deviation: (candidates,) standard deviations per example of [dense right] - [candidate right], for drop floors; without it,
    2 points of extra disagreement are assumed. level: what each test will be held to (default: the floor's delta).

    Raises DataError for arrays that are empty, of different lengths, or not finite.

    >>> ladder([0.9, 0.5, 0.3, 0.2], [0.99, 0.98, 0.96, 0.80], Floor(accuracy=0.95), n_search=2000, n_certify=2000)
    (0, 1, 2, 3)
    """
    cost, estimate, seen = _arrays(costs, estimates, n_search)
    if n_certify < 1 or rungs < 1:
        raise DataError(f"a ladder needs certify examples and rungs; got n_certify={n_certify} and rungs={rungs}")
    spread = None if deviation is None else np.broadcast_to(np.asarray(deviation, dtype=np.float64), cost.shape)
    score = margins(estimate, floor, seen, n_certify, spread, labelled=labelled, level=level)
    front = _undominated(cost, score)
    return tuple(int(front[rung]) for rung in climb(cost[front], chances(score[front]), rungs))


def margins(
    estimate: np.ndarray,
    floor: Floor,
    n_search: np.ndarray,
    n_certify: int,
    deviation: np.ndarray | None = None,
    *,
    labelled: bool = True,
    level: float | None = None,
) -> np.ndarray:
    """How far each network is predicted to be above what the test asks for, in standard deviations, (candidates,)."""
    level = floor.delta if level is None else level
    if floor.drop is not None and labelled:
        variance = np.abs(estimate) + 0.02 if deviation is None else np.maximum(deviation, 1e-3) ** 2
        # The margin at which p_drop's bets win half of the time: see evidence.needed_for_drop, solved for the margin.
        evidence = math.log(1 / level)
        capped = (1 - floor.drop) / LARGEST_BET * math.expm1(min(evidence / n_certify, 50.0))
        ahead = floor.drop - estimate - np.maximum(np.sqrt(2 * variance * evidence / n_certify), capped)
    else:
        target = floor.accuracy if floor.accuracy is not None else 1 - (floor.drop or 0.0)
        critical = (binom.isf(level, n_certify, target) + 1) / n_certify
        variance = np.full(len(estimate), max(target * (1 - target), 1e-4))
        ahead = (estimate if floor.accuracy is not None else 1 - estimate) - critical
    return ahead / np.sqrt(variance * (1 / n_search + 1 / n_certify))


def chances(margin: np.ndarray) -> np.ndarray:
    """The chance of each network to pass, for networks of decreasing cost: by its margin, or, one time in ten, by its place."""
    place = 1 - np.arange(1, len(margin) + 1) / (len(margin) + 1)
    return (1 - MISLED) * norm.cdf(margin) + MISLED * place


def _arrays(costs: ArrayLike, estimates: ArrayLike, n_search: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cost, estimate = np.asarray(costs, dtype=np.float64), np.asarray(estimates, dtype=np.float64)
    if cost.ndim != 1 or cost.shape != estimate.shape or not len(cost):
        raise DataError(f"a ladder needs one cost and one estimate per candidate; got shapes {cost.shape} and {estimate.shape}")
    seen = np.broadcast_to(np.asarray(n_search, dtype=np.float64), cost.shape)
    if not (np.isfinite(cost).all() and np.isfinite(estimate).all() and (seen >= 1).all()):
        raise DataError("a ladder needs finite costs and estimates, and at least one search example behind each")
    return cost, estimate, seen


def _undominated(cost: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Places of the networks that no cheaper (or equally costly) one equals in score, costliest first."""
    front: list[int] = []
    for place in np.lexsort((-score, cost)):
        if not front or score[place] > score[front[-1]]:
            front.append(int(place))
    return np.array(front[::-1])


def climb(cost: np.ndarray, chance: np.ndarray, rungs: int) -> list[int]:
    """The rungs with the largest expected saving; cost strictly decreasing, chance that of each alone."""
    costs, alone = np.concatenate([[NOTHING], cost / max(1.0, cost.max())]), np.concatenate([[1.0], chance])
    after = (1 - INDEPENDENT) * np.minimum(1, alone / np.maximum(alone[:, None], 1e-12)) + INDEPENDENT * alone
    onwards = np.triu(np.ones_like(after), k=1) > 0
    value, choices = np.zeros(len(costs)), []
    for _ in range(rungs):
        gain = np.where(onwards, after * (costs[:, None] - costs + value), 0.0)
        choices.append(gain.argmax(axis=1))
        value = gain.max(axis=1)
    path, here = [], 0
    for choice in reversed(choices):
        if choice[here] <= here:
            break
        here = int(choice[here])
        path.append(here - 1)
    return path
