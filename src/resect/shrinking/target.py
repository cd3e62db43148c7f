"""Where the rounds go: the cost that is to fall, its waypoints, and latency, which can only be measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import nn

from resect.anatomy import Anatomy, dissect
from resect.errors import GoalError
from resect.evaluation import latency
from resect.plan import Cost, Plan
from resect.searching import Budget
from resect.searching.allocation import Measure, against, measure
from resect.searching.landing import leanest
from resect.surgery import cut

CLOSE = 0.001
BISECTIONS = 8


class Target:
    """Where the rounds go: a measure of cost, relative to the target, and the waypoints on the way to 1."""

    def __init__(self, anatomy: Anatomy, to: Budget, rounds: int, model: nn.Module):
        self.anatomy, self.to, self.count, self.model = anatomy, to, rounds, model
        shares = [name for name in ("parameters", "macs", "bytes") if getattr(to, name) is not None]
        whole = measure(anatomy, "macs")
        self.dense = Plan.all(anatomy)
        self.measure = (
            against(anatomy, to) if shares else replace(whole, weights={"macs": 1 / max(whole(self.dense.kept), 1.0)})
        )
        self.start = self.measure(self.dense.kept)
        self.start_ms = None if to.latency_ms is None else milliseconds(model, self.dense)
        self.met = (not shares or self.start <= 1 + 1e-9) and (to.latency_ms is None or (self.start_ms or 0) <= to.latency_ms)
        self.limited = bool(shares)
        if not self.met:
            self._check_reachable()

    def _check_reachable(self) -> None:
        counts = leanest(self.anatomy)
        plan = Plan.top(self.anatomy, {g.name: -np.arange(g.units) for g in self.anatomy.groups}, counts)
        if self.limited and self.measure(plan.kept) > 1 + 1e-9:
            shares = plan.cost().share_of(self.dense.cost())
            reached = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            raise GoalError(
                f"{self.to}: with one unit left in every group there still are {reached}. Write a budget above that"
            )
        if self.to.latency_ms is not None and (fastest := milliseconds(self.model, plan)) > self.to.latency_ms:
            raise GoalError(f"{self.to}: with one unit left in every group the network still takes {fastest:.3g} ms here")

    def on(self, anatomy: Anatomy) -> Measure:
        """The measure for a network on the way, still relative to the target."""
        return replace(self.measure, anatomy=anatomy)

    def limit(self, number: int) -> float:
        """The waypoint of a round, from 1: what the measure may be after it."""
        start = self.start if self.limited else 1.0
        return max(start, 1.0) ** (1 - number / self.count) * (1 + 1e-9)

    def limit_ms(self, number: int) -> float | None:
        if self.to.latency_ms is None or self.start_ms is None:
            return None
        return self.to.latency_ms * max(self.start_ms / self.to.latency_ms, 1.0) ** (1 - number / self.count)

    def counted(self, small: nn.Module, plan: Plan) -> Cost:
        """The cost of the smaller network, counted on itself."""
        args, kwargs = self.anatomy.example
        return Plan.all(dissect(small, (args, kwargs), verify=False)).cost() if plan.share < 1 else plan.cost()

    def notes(self, plan: Plan, taken: float | None) -> list[str]:
        """What a user should know of how the target was met; taken: milliseconds of the last round, where they count."""
        if self.met:
            return [f"The network keeps to the target as it is ({self.to}): nothing was cut."]
        told = []
        if taken is not None and self.to.latency_ms is not None and taken > self.to.latency_ms:
            told.append(
                f"Measured once more, the network took {taken:.3g} ms, above the {self.to.latency_ms:.3g} ms asked for."
            )
        if self.limited and taken is None and self.measure(plan.kept) < 1 - CLOSE:
            shares = plan.cost().share_of(self.dense.cost())
            named = ", ".join(f"{name} {share:.2%}" for name, share in shares.items() if getattr(self.to, name))
            told.append(f"Whole units do not come closer to {self.to} without going above it: {named} remain.")
        return told


def fast_enough(small: nn.Module, within: Callable[[float], Plan], limit: float, limit_ms: float) -> Plan:
    """Bisection on the cost, each candidate cut and timed: the largest that is fast enough, else the smallest tried."""
    low, high, best = 0.0, limit, None
    plan = within(limit)
    if milliseconds(small, plan) <= limit_ms:
        return plan
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        plan = within(middle)
        low, high, best = (middle, high, plan) if milliseconds(small, plan) <= limit_ms else (low, middle, best)
    return plan if best is None else best


def milliseconds(model: nn.Module, plan: Plan | None, anatomy: Anatomy | None = None) -> float:
    """Median milliseconds at batch 1 of a network as a plan would leave it, one thread."""
    if plan is not None:
        model, anatomy = cut(model, plan, verify=False), plan.anatomy
    assert anatomy is not None
    args, kwargs = anatomy.example
    (measured,) = latency(model, model, kwargs or args, batches=(1,), rounds=10)
    return min(measured.dense_ms.median, measured.small_ms.median)
