"""How many units each group keeps: one-parameter families of plans, from all of the network to almost none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np

from resect.anatomy import Anatomy, Group
from resect.plan import Plan, best, costs_of, count_step, valid_count
from resect.repair import Method
from resect.repair.closed_form import predicted_errors
from resect.scoring import Scores
from resect.searching.floor import Budget
from resect.searching.rounding import FREE, Rounding
from resect.searching.timing import Times

COSTS = ("parameters", "macs", "bytes")
LEVELS = 24
FINE_LEVELS = 128
LEAST_SHARE = 0.02


@dataclass(frozen=True, kw_only=True, eq=False)
class Measure:
    """What is to become small, as one number per plan: the largest of the weighted costs named.

    weights: by name of a cost ("parameters", "macs", "bytes", "units", "latency"). times: what predicts "latency".
    """

    anatomy: Anatomy
    weights: Mapping[str, float]
    times: Times | None = None

    def __call__(self, kept: Mapping[str, int]) -> float:
        return float(self.many(np.array([[kept[group.name] for group in self.anatomy.groups]]))[0])

    def many(self, kept: np.ndarray) -> np.ndarray:
        """kept: (plans, groups) in the anatomy's order; (plans,) values."""
        costs = [weight * self._cost(name, kept) for name, weight in self.weights.items()]
        return np.max([np.zeros(len(kept)), *costs], axis=0)

    def _cost(self, name: str, kept: np.ndarray) -> np.ndarray:
        if name == "latency":
            assert self.times is not None
            return self.times.many(kept)
        return kept.sum(1) if name == "units" else costs_of(self.anatomy, kept)[:, COSTS.index(name)]


def measure(anatomy: Anatomy, minimise: str, times: Times | None = None) -> Measure:
    """One cost alone: "macs", "parameters", "bytes", "units" (their number), or "latency" in the milliseconds of `times`."""
    return Measure(anatomy=anatomy, weights={minimise: 1.0}, times=times)


def against(anatomy: Anatomy, budget: Budget, times: Times | None = None) -> Measure:
    """The largest of the costs that remain over those a budget allows: at most 1 where the budget is kept.

    times: predicts milliseconds where the budget has a limit of them.
    """
    dense = Measure(anatomy=anatomy, weights={"macs": 1.0})
    whole = np.array([[group.units for group in anatomy.groups]], dtype=np.float64)
    goals = {name: share for name in ("parameters", "macs", "bytes") if (share := getattr(budget, name)) is not None}
    total = {name: float(replace(dense, weights={name: 1.0}).many(whole)[0]) for name in goals}
    weights = {name: 1 / (share * total[name]) for name, share in goals.items()}
    if budget.latency_ms is not None and times is not None:
        weights["latency"] = 1 / budget.latency_ms
    return Measure(anatomy=anatomy, weights=weights, times=times)


def uniform(scores: Scores, share: float, rounding: Rounding = FREE) -> Plan:
    """Every group keeps the same share of its units, the best ones."""
    return rounding.top(scores, {g.name: share * g.units for g in scores.anatomy.groups})


def threshold(scores: Scores, at: float, rounding: Rounding = FREE) -> Plan:
    """Every unit whose normalised score is at least `at` stays (the seed method's single threshold); groups keep their best."""
    normal = scores.normalised()
    counts = {g.name: max(1, int((normal[g.name] >= at).sum())) for g in scores.anatomy.groups}
    return rounding.top(scores, counts)


def threshold_levels(scores: Scores, count: int = 256) -> np.ndarray:
    """Thresholds from the one that keeps all to the one that keeps least, evenly spaced in the number of units they drop."""
    values = np.sort(np.concatenate(list(scores.normalised().values())))
    return values[np.linspace(0, len(values) - 1, count).astype(int)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """Predicted harm of keeping a number of units of one group and all of the others, from the trace alone.

    counts, errors: (levels,) per group, counts rising: the share of the readers' output variance that repair cannot restore,
    summed over readers, on the held-out fifth of the calibrate data.
    """

    counts: Mapping[str, np.ndarray]
    errors: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, scores: Scores, method: Method, *, levels: int = LEVELS, rounding: Rounding = FREE) -> Curves:
        """Curves with about so many levels per group, by the scores' order and the repair that will be allowed; and with the
        counts that a rounding makes of these levels."""
        counts, errors = {}, {}
        for group in scores.anatomy.groups:
            counts[group.name] = _levels_of(group, levels, rounding)
            masks = [best(group, scores.values[group.name], int(count)) for count in counts[group.name]]
            error = predicted_errors(scores.trace, group, masks, method)
            # More units never make the best possible repair worse; what rises by chance is levelled.
            errors[group.name] = np.minimum.accumulate(error)
        return cls(counts=counts, errors=errors)

    def filled(self, anatomy: Anatomy, *, levels: int = FINE_LEVELS, rounding: Rounding = FREE) -> Curves:
        """The curves at every valid count (of wide groups at so many, and at what a rounding makes of these), interpolated."""
        counts = {group.name: _levels_of(group, levels, rounding) for group in anatomy.groups}
        return Curves(counts=counts, errors={n: _between(counts[n], self.counts[n], self.errors[n]) for n in counts})


def _levels_of(group: Group, levels: int, rounding: Rounding) -> np.ndarray:
    tried = counts_worth_trying(group, levels)
    return np.union1d(tried, [rounding.up(group, count) for count in tried])


def _between(wanted: np.ndarray, counts: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Errors between measured counts: exponential, but linear up to the whole group, where the error is 0."""
    found = np.exp(np.interp(wanted, counts, np.log(np.maximum(errors, 1e-300))))
    top = wanted > counts[-2] if len(counts) > 1 else np.zeros(len(wanted), dtype=bool)
    return np.where(top, np.interp(wanted, counts, errors), found)


def counts_worth_trying(group: Group, levels: int) -> np.ndarray:
    """Counts of units from 2 % to all: all of them, or where they are more than `levels`, evenly spaced in the logarithm."""
    step = count_step(group)
    if group.units // step <= levels:
        return np.arange(valid_count(group, LEAST_SHARE * group.units), group.units + 1, step)
    shares = np.geomspace(LEAST_SHARE, 1.0, levels)
    return np.unique([valid_count(group, share * group.units) for share in shares])


@dataclass(frozen=True, kw_only=True, eq=False)
class Knapsack:
    """Plans that trade predicted harm against real cost: minimise sum of errors + price x cost, one plan per price.

    For a given price the groups are optimised in turn, each over all its levels with the others fixed and the exact cost of
    the joint network, until nothing changes. Only levels that the rounding allows are chosen.
    """

    scores: Scores
    curves: Curves
    measure: Measure
    rounding: Rounding = FREE

    @cached_property
    def dense(self) -> float:
        return self.measure({group.name: group.units for group in self.scores.anatomy.groups})

    @cached_property
    def _levels(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(counts, errors) per group, in the anatomy's order."""
        levels = []
        for group in self.scores.anatomy.groups:
            counts = self.curves.counts[group.name]
            allowed = np.array([self.rounding.up(group, count) == count for count in counts])
            levels.append((counts[allowed], self.curves.errors[group.name][allowed]))
        return levels

    def plan(self, price: float) -> Plan:
        """The plan at a price, in units of error per dense cost (0 keeps everything)."""
        return self._plan(self._at(price))

    def within(self, limit: float) -> Plan:
        """The plan of least predicted error that costs at most `limit`, in the measure's own unit: the first price that
        keeps to it, then units given back where they restore most for what they cost. The leanest plan where none does."""
        low, high = -6.0, 6.0
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (low, middle) if self._cost(self._at(10**middle)) <= limit else (middle, high)
        return self._plan(self._filled(self._at(10**high), limit))

    def _at(self, price: float) -> np.ndarray:
        """(groups,) level per group at a price."""
        chosen = np.array([len(counts) - 1 for counts, _ in self._levels])
        for _ in range(10):
            before = chosen.copy()
            for place, (_, errors) in enumerate(self._levels):
                totals = errors + price * self._costs_along(chosen, place) / self.dense
                chosen[place] = int(np.argmin(totals))
            if np.array_equal(chosen, before):
                break
        return chosen

    def _filled(self, chosen: np.ndarray, limit: float) -> np.ndarray:
        """Levels raised one at a time, the best error per cost first, while the limit allows it."""
        chosen, now = chosen.copy(), self._cost(chosen)
        while True:
            best, where = 0.0, -1
            for place, (_, errors) in enumerate(self._levels):
                level = chosen[place] + 1
                if level == len(errors):
                    continue
                cost = float(self._costs_along(chosen, place)[level])
                gain = (errors[level - 1] - errors[level]) / max(cost - now, 1e-12 * self.dense)
                if cost <= limit and (where < 0 or gain > best):
                    best, where = gain, place
            if where < 0:
                return chosen
            chosen[where] += 1
            now = self._cost(chosen)

    def _costs_along(self, chosen: np.ndarray, place: int) -> np.ndarray:
        """Cost of every level of one group with the others as chosen."""
        counts = self._levels[place][0]
        kept = np.tile(self._kept(chosen), (len(counts), 1))
        kept[:, place] = counts
        return self.measure.many(kept)

    def _cost(self, chosen: np.ndarray) -> float:
        return float(self.measure.many(self._kept(chosen)[None])[0])

    def _kept(self, chosen: np.ndarray) -> np.ndarray:
        return np.array([counts[level] for (counts, _), level in zip(self._levels, chosen)], dtype=np.float64)

    def _plan(self, chosen: np.ndarray) -> Plan:
        names = [group.name for group in self.scores.anatomy.groups]
        return Plan.top(self.scores.anatomy, self.scores.values, dict(zip(names, self._kept(chosen).tolist())))


def every_plan(scores: Scores, most: int, rounding: Rounding = FREE) -> list[Plan] | None:
    """All combinations of counts of a small network, best units first in each group; None where there are more than `most`."""
    choices = [rounding.counts(group) for group in scores.anatomy.groups]
    if np.prod([float(len(choice)) for choice in choices]) > most:
        return None
    names = [group.name for group in scores.anatomy.groups]
    return [Plan.top(scores.anatomy, scores.values, dict(zip(names, counts))) for counts in product(*choices)]


def trades(
    scores: Scores, plan: Plan, curves: Curves, measure: Measure, *, most: int = 12, rounding: Rounding = FREE
) -> list[Plan]:
    """Leaner neighbours of a plan: one group gives up a tenth of what it keeps, another may get some back; gentlest first.

    Ordered by predicted harm; only plans that cost at least 1 % less are offered.
    """
    now = measure(plan.kept)
    offers: list[tuple[float, int, Plan]] = []
    groups = {group.name: group for group in scores.anatomy.groups}
    for down in groups:
        for up in (None, *groups):
            if up == down:
                continue
            counts = dict(plan.kept)
            counts[down] = _moved(groups[down], counts[down], 0.9, rounding.step(groups[down]))
            if up is not None:
                counts[up] = _moved(groups[up], counts[up], 1.1, rounding.step(groups[up]))
            offer = Plan.top(scores.anatomy, scores.values, counts)
            if measure(offer.kept) <= 0.99 * now:
                harm = sum(float(np.interp(offer.kept[n], curves.counts[n], curves.errors[n])) for n in groups)
                offers.append((harm, len(offers), offer))
    return [offer for _, _, offer in sorted(offers, key=lambda entry: entry[:2])[:most]]


def _moved(group: Group, count: int, factor: float, step: int) -> int:
    moved = round(count * factor / step) * step
    if moved == count:
        moved = count + (step if factor > 1 else -step)
    return int(np.clip(moved, step, group.units))
