"""fit(): the best network a budget allows, where the goal is a cost and not a promise."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from torch import nn

from resect.errors import GoalError
from resect.evaluation import evaluate, latency
from resect.plan import Plan
from resect.repair import Method
from resect.scoring import Scores
from resect.searching.allocation import Curves, Knapsack, against, measure
from resect.searching.finishing import ALTERNATIONS, finish
from resect.searching.floor import Budget
from resect.searching.found import Found
from resect.searching.sensitivity import weighed
from resect.surgery import check_deterministic, cut
from resect.tracing.trace import check_ready

BISECTIONS = 8


def fit(
    model: nn.Module,
    scores: Scores,
    budget: Budget,
    calib: Iterable[Any],
    *,
    val: Iterable[Any] | None = None,
    method: Method = "least_squares",
    sweeps: int = 1,
    alternations: int = ALTERNATIONS,
    seed: int = 0,
    quiet: bool = True,
) -> Found:
    """Cut a network to a budget, with the least predicted harm to its answers.

    budget: shares of parameters, MACs and bytes that may remain (all that are named must hold), or milliseconds at batch 1.
    calib: batches on which groups are weighed and the cut network is repaired; labels are not used. val: labelled batches, only
    to report the accuracy. sweeps, alternations: of the sequential repair; with alternations=0 the units that stay compute
    what they did.

    The allocation is a knapsack: predicted error of every group (weighed by how much the network's answers suffer from it)
    against the exact joint cost. Latency is measured on the cut network itself, one thread, CPU time, and MACs are bisected
    until it is met. Raises GoalError where even the leanest network exceeds the budget, saying what can be reached.
    """
    started = time.monotonic()
    check_ready(model)
    check_deterministic(model, Plan.all(scores.anatomy))
    data = list(calib)
    curves, passes = weighed(Curves.of(scores, method), model, scores, data, method, quiet=quiet)
    curves = curves.filled(scores.anatomy)
    plan = _fastest_enough(model, scores, curves, budget) if budget.latency_ms is not None else _within(scores, curves, budget)
    small, repaired = finish(model, scores, plan, data, method, sweeps=sweeps, alternations=alternations, quiet=quiet)
    judged = None if val is None else list(val)
    return Found(
        model=small,
        plan=plan,
        goal=budget,
        trials=(),
        certificate=None,
        frozen=(),
        passes=passes,
        cost=plan.cost(),
        dense_cost=Plan.all(scores.anatomy).cost(),
        search_accuracy=float("nan") if judged is None else evaluate(small, judged).accuracy,
        dense_search_accuracy=float("nan") if judged is None else evaluate(model, judged).accuracy,
        repaired=repaired,
        seconds=time.monotonic() - started,
        seed=seed,
    )


def _within(scores: Scores, curves: Curves, budget: Budget) -> Plan:
    goal = against(scores.anatomy, budget)
    plan = Knapsack(scores=scores, curves=curves, measure=goal).within(1.0)
    if goal(plan.kept) > 1 + 1e-9:
        shares = plan.cost().share_of(Plan.all(scores.anatomy).cost())
        reached = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        raise GoalError(f"{budget}: not even the leanest network keeps to it; it has {reached}. Write a budget above that")
    return plan


def _fastest_enough(model: nn.Module, scores: Scores, curves: Curves, budget: Budget) -> Plan:
    """Bisection on the share of MACs, each candidate cut and timed; the largest that is fast enough."""
    knapsack = Knapsack(scores=scores, curves=curves, measure=measure(scores.anatomy, "macs"))
    limit = budget.latency_ms or 0.0
    low, high, best, fastest = 0.0, 1.0, None, float("inf")
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        plan = knapsack.within(middle * knapsack.dense)
        taken = _milliseconds(model, plan)
        fastest = min(fastest, taken)
        low, high, best = (middle, high, plan) if taken <= limit else (low, middle, best)
    if best is None:
        raise GoalError(f"{budget}: not even the leanest network tried is that fast; the fastest took {fastest:.3g} ms")
    return best


def _milliseconds(model: nn.Module, plan: Plan) -> float:
    args, kwargs = plan.anatomy.example
    (measured,) = latency(model, cut(model, plan, verify=False), kwargs or args, batches=(1,), rounds=10)
    return measured.small_ms.median
