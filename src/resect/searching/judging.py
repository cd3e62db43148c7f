"""Judging a candidate: repair it from the trace, cut it, race it against the floor on the search split."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from resect.batches import forward, shuffled, unpack
from resect.errors import DataError
from resect.evaluation import Evaluation, evaluate
from resect.plan import Cost, Plan
from resect.repair import Method, repair
from resect.searching.floor import Floor
from resect.searching.found import Trial
from resect.searching.racing import race
from resect.surgery import cut
from resect.tracing import Trace


class OutOfBudget(Exception):
    """The evaluations or seconds granted to the search are spent."""


@dataclass(kw_only=True, eq=False)
class Judge:
    """Judges plans of one network on one search split, remembers every trial, and keeps within the budget.

    evaluations: most candidates to judge. seconds: most wall time, or None. on_trial: called after each (to record it).
    """

    model: nn.Module
    trace: Trace
    data: list[Any]
    floor: Floor
    method: Method
    evaluations: int
    seconds: float | None = None
    seed: int = 0
    on_trial: Callable[[Trial], None] | None = None
    trials: list[Trial] = field(default_factory=list)
    plans: dict[str, Plan] = field(default_factory=dict)
    spent: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.data = shuffled(self.data, seed=self.seed)
        if not self.data:
            raise DataError("the search data are empty: the loader gave no batch; give at least one")
        self.dense: Evaluation = evaluate(self.model, self.data)
        self.dense_cost: Cost = Plan.all(self.trace.anatomy).cost()
        self.spent = 1.0

    @property
    def examples(self) -> int:
        return self.dense.examples

    def judge(self, plan: Plan, allocation: str) -> Trial:
        """Judge a plan once; the recorded trial when it was judged before. Raises OutOfBudget when nothing is left to spend."""
        known = next((trial for trial in self.trials if trial.digest == plan.digest), None)
        if known is not None:
            return known
        elapsed = time.monotonic() - self.started
        if len(self.trials) >= self.evaluations or (self.seconds is not None and elapsed > self.seconds):
            raise OutOfBudget
        start = time.monotonic()
        small = self.make(plan)
        outcome = race(self.floor, self._outcomes(small), self.examples)
        cost = plan.cost()
        trial = Trial(
            number=len(self.trials),
            allocation=allocation,
            kept=plan.kept,
            cost=cost,
            accuracy=outcome.accuracy,
            above=outcome.above,
            examples=outcome.examples,
            stopped=outcome.stopped,
            passes=self.charge(cost, outcome.examples),
            seconds=time.monotonic() - start,
            digest=plan.digest,
        )
        self.trials.append(trial)
        self.plans[plan.digest] = plan
        if self.on_trial is not None:
            self.on_trial(trial)
        return trial

    def make(self, plan: Plan) -> nn.Module:
        """The candidate: repaired in closed form from the trace, physically cut."""
        return cut(self.model, plan, weights=repair(self.trace, plan, self.method).weights, verify=False)

    def charge(self, cost: Cost, examples: int) -> float:
        """Add a judgement to what was spent, in passes of the dense network over the whole split; returns the addition."""
        passes = cost.macs / max(self.dense_cost.macs, 1.0) * examples / self.examples
        self.spent += passes
        return passes

    def _outcomes(self, small: nn.Module) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        start = 0
        for raw in self.data:
            batch = unpack(raw)
            with torch.inference_mode():
                logits = forward(small, batch)
            assert batch.labels is not None
            right = (logits.argmax(-1).cpu() == batch.labels.cpu()).numpy()
            yield right, self.dense.correct[start : start + batch.size]
            start += batch.size
