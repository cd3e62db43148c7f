"""From any cost to just below a limit: the last few units are given out one at a time, so that a target is met to the unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from resect.anatomy import Anatomy
from resect.plan import Plan, count_step
from resect.scoring import Scores
from resect.searching.allocation import Curves, Knapsack, Measure, uniform

Gain = Callable[[str, int, int], float]
BISECTIONS = 40
# A limit is met when at most this share of it is left over; short of that, units of one group are exchanged for another's.
CLOSE = 1e-3
EXCHANGES, MOST_FOR_ONE = 50, 4


def leanest(anatomy: Anatomy) -> dict[str, int]:
    """The fewest units that every group may keep."""
    return {group.name: count_step(group) for group in anatomy.groups}


def by_share(scores: Scores, measure: Measure, limit: float) -> Plan:
    """Every group keeps the same share of its best units, the largest that costs at most `limit`; then to the unit."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(uniform(scores, middle).kept) <= limit else (low, middle)
    units = {group.name: group.units for group in scores.anatomy.groups}
    return filled(scores, uniform(scores, low).kept, measure, limit, lambda name, now, _: 1 - now / units[name])


def by_rank(scores: Scores, measure: Measure, limit: float) -> Plan:
    """Units leave by their normalised scores, the lowest of all groups first, until the cost is at most `limit`.

    A unit whose leaving is too much stays where another one, of a higher score, is enough.
    """
    normal = scores.normalised()
    order = {name: np.sort(values)[::-1] for name, values in normal.items()}
    steps = leanest(scores.anatomy)
    values = np.concatenate([order[name][steps[name] :] for name in order])
    owner = np.concatenate([np.full(len(order[name]) - steps[name], place) for place, name in enumerate(order)])
    ranked = owner[np.argsort(values, kind="stable")]

    def counts(gone: int) -> dict[str, int]:
        left = np.bincount(ranked[:gone], minlength=len(order))
        kept = {name: len(order[name]) - int(left[place]) for place, name in enumerate(order)}
        return Plan.top(scores.anatomy, scores.values, kept).kept

    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if measure(counts(middle)) <= limit else (middle + 1, high)
    return filled(scores, counts(low), measure, limit, lambda name, now, then: float(order[name][now:then].mean()))


def by_curves(scores: Scores, curves: Curves, measure: Measure, limit: float) -> Plan:
    """The knapsack's plan, then to the unit by the error that is saved for the cost; by rank where its leanest is too much."""
    plan = Knapsack(scores=scores, curves=curves, measure=measure).within(limit)
    if measure(plan.kept) > limit:
        return by_rank(scores, measure, limit)

    def gain(name: str, now: int, then: int) -> float:
        before, after = np.interp([now, then], curves.counts[name], curves.errors[name])
        return float(before - after)

    return filled(scores, plan.kept, measure, limit, gain, per_cost=True)


def filled(
    scores: Scores, kept: Mapping[str, int], measure: Measure, limit: float, gain: Gain, *, per_cost: bool = False
) -> Plan:
    """Give units back, one step of one group at a time, the largest gain first, as long as the cost stays within `limit`.

    Where more than a thousandth of the limit is left then, single units are exchanged for others while that comes closer.
    """
    groups = scores.anatomy.groups
    counts = np.array([kept[group.name] for group in groups])
    steps, units = np.array([count_step(group) for group in groups]), np.array([group.units for group in groups])
    while len(groups):
        offers = counts + np.diag(steps)
        costs = measure.many(offers)
        fits = (counts + steps <= units) & (costs <= limit)
        if not fits.any():
            break
        now = measure.many(counts[None])[0] if per_cost else 0.0
        gains = np.full(len(groups), -np.inf)
        for place in np.flatnonzero(fits):
            worth = gain(groups[place].name, int(counts[place]), int(counts[place] + steps[place]))
            gains[place] = worth / max(costs[place] - now, 1e-300) if per_cost else worth
        counts = offers[int(np.argmax(gains))]
    counts = _closest(counts, steps, units, measure, limit)
    return Plan.top(scores.anatomy, scores.values, {group.name: int(n) for group, n in zip(groups, counts)})


def _closest(counts: np.ndarray, steps: np.ndarray, units: np.ndarray, measure: Measure, limit: float) -> np.ndarray:
    """Counts whose cost is as near below the limit as exchanging a unit of one group for a few of another brings it."""
    places = range(len(counts))
    moves = [
        more * steps[up] * np.eye(len(counts), dtype=int)[up] - steps[down] * np.eye(len(counts), dtype=int)[down]
        for down in places
        for up in places
        for more in range(1, MOST_FOR_ONE + 1)
        if up != down
    ]
    for _ in range(EXCHANGES if moves else 0):
        now = float(measure.many(counts[None])[0])
        if now > limit or now >= limit * (1 - CLOSE):
            break
        offers = counts + np.array(moves)
        costs = measure.many(offers)
        costs[(offers < steps).any(1) | (offers > units).any(1) | (costs > limit)] = -np.inf
        if costs.max() <= now:
            break
        counts = offers[int(np.argmax(costs))]
    return counts
