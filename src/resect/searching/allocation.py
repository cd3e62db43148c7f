"""How many units each group keeps: one-parameter families of plans, from all of the network to almost none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from resect.anatomy import Anatomy, Group
from resect.plan import Plan, best, cost_of, count_step, valid_count
from resect.repair import Method
from resect.repair.closed_form import predicted_errors
from resect.scoring import Scores

Measure = Callable[[Mapping[str, int]], float]
LEVELS = 24
LEAST_SHARE = 0.02


def measure(anatomy: Anatomy, minimise: str) -> Measure:
    """What is to become small, from the units kept per group: "macs", "parameters", "bytes" or "units" (their number)."""
    if minimise == "units":
        return lambda kept: float(sum(kept.values()))
    return lambda kept: float(getattr(cost_of(anatomy, kept), minimise))


def uniform(scores: Scores, share: float) -> Plan:
    """Every group keeps the same share of its units, the best ones."""
    return Plan.top(scores.anatomy, scores.values, {g.name: share * g.units for g in scores.anatomy.groups})


def threshold(scores: Scores, at: float) -> Plan:
    """Every unit whose normalised score is at least `at` stays (the seed method's single threshold); groups keep their best."""
    normal = scores.normalised()
    counts = {g.name: max(1, int((normal[g.name] >= at).sum())) for g in scores.anatomy.groups}
    return Plan.top(scores.anatomy, scores.values, counts)


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
    def of(cls, scores: Scores, method: Method, *, levels: int = LEVELS) -> Curves:
        """Curves with about so many levels per group, by the scores' order and the repair that will be allowed."""
        counts, errors = {}, {}
        for group in scores.anatomy.groups:
            counts[group.name] = counts_worth_trying(group, levels)
            masks = [best(group, scores.values[group.name], int(count)) for count in counts[group.name]]
            error = predicted_errors(scores.trace, group, masks, method)
            # More units never make the best possible repair worse; what rises by chance is levelled.
            errors[group.name] = np.minimum.accumulate(error)
        return cls(counts=counts, errors=errors)


def counts_worth_trying(group: Group, levels: int) -> np.ndarray:
    """Counts of units from 2 % to all, evenly spaced in the logarithm."""
    shares = np.geomspace(LEAST_SHARE, 1.0, levels)
    return np.unique([valid_count(group, share * group.units) for share in shares])


@dataclass(frozen=True, kw_only=True, eq=False)
class Knapsack:
    """Plans that trade predicted harm against real cost: minimise sum of errors + price x cost, one plan per price.

    For a given price the groups are optimised in turn, each over all its levels with the others fixed and the exact cost of
    the joint network, until nothing changes.
    """

    scores: Scores
    curves: Curves
    measure: Measure

    @cached_property
    def dense(self) -> float:
        return self.measure({group.name: group.units for group in self.scores.anatomy.groups})

    def plan(self, price: float) -> Plan:
        """The plan at a price, in units of error per dense cost (0 keeps everything)."""
        groups = {group.name: group for group in self.scores.anatomy.groups}
        chosen = {name: len(self.curves.counts[name]) - 1 for name in groups}
        for _ in range(10):
            before = dict(chosen)
            for name in groups:
                totals = [
                    self.curves.errors[name][level] + price * self._cost({**chosen, name: level}) / self.dense
                    for level in range(len(self.curves.counts[name]))
                ]
                chosen[name] = int(np.argmin(totals))
            if chosen == before:
                break
        return self._plan(chosen)

    def _plan(self, chosen: Mapping[str, int]) -> Plan:
        return Plan.top(self.scores.anatomy, self.scores.values, self._counts(chosen))

    def _counts(self, chosen: Mapping[str, int]) -> dict[str, int]:
        return {name: int(self.curves.counts[name][level]) for name, level in chosen.items()}

    def _cost(self, chosen: Mapping[str, int]) -> float:
        return self.measure(self._counts(chosen))


def every_plan(scores: Scores, most: int) -> list[Plan] | None:
    """All combinations of counts of a small network, best units first in each group; None where there are more than `most`."""
    choices = [range(count_step(g), g.units + 1, count_step(g)) for g in scores.anatomy.groups]
    if np.prod([float(len(choice)) for choice in choices]) > most:
        return None
    names = [group.name for group in scores.anatomy.groups]
    return [Plan.top(scores.anatomy, scores.values, dict(zip(names, counts))) for counts in product(*choices)]


def trades(scores: Scores, plan: Plan, curves: Curves, measure: Measure, *, most: int = 12) -> list[Plan]:
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
            counts[down] = _moved(groups[down], counts[down], 0.9)
            if up is not None:
                counts[up] = _moved(groups[up], counts[up], 1.1)
            offer = Plan.top(scores.anatomy, scores.values, counts)
            if measure(offer.kept) <= 0.99 * now:
                harm = sum(float(np.interp(offer.kept[n], curves.counts[n], curves.errors[n])) for n in groups)
                offers.append((harm, len(offers), offer))
    return [offer for _, _, offer in sorted(offers, key=lambda entry: entry[:2])[:most]]


def _moved(group: Group, count: int, factor: float) -> int:
    step = count_step(group)
    moved = round(count * factor / step) * step
    if moved == count:
        moved = count + (step if factor > 1 else -step)
    return int(np.clip(moved, step, group.units))
