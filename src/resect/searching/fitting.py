"""fit(): the best network a budget allows, where the goal is a cost and not a promise."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.progress import track
from torch import nn

from resect.errors import GoalError
from resect.evaluation import evaluate
from resect.plan import Plan
from resect.repair import Method
from resect.scoring import Scores
from resect.searching.allocation import Curves, Knapsack, against
from resect.searching.finishing import ALTERNATIONS, finish
from resect.searching.floor import Budget
from resect.searching.found import Found
from resect.searching.rounding import Rounding, RoundTo
from resect.searching.sensitivity import from_dense, weighed
from resect.searching.timing import Times, told
from resect.surgery import check_deterministic, cut
from resect.tracing.trace import check_ready

CORRECTIONS = 8
CLOSE = 0.95


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
    round_to: RoundTo | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> Found:
    """Cut a network to a budget, with the least predicted harm to its answers.

    budget: shares of parameters, MACs and bytes that may remain, and milliseconds of one pass (all that are named must hold).
    calib: batches on which groups are weighed and the cut network is repaired; labels are not used. val: labelled batches, only
    to report the accuracy. sweeps, alternations: of the sequential repair; with alternations=0 the units that stay compute
    what they did. round_to: "auto" or a number, only fast widths (see `search`).

    The allocation is a knapsack: predicted error of every group (weighed by how much the network's answers suffer from it)
    against the exact joint cost. Latency is predicted from measured times of the layers (`Times`), then measured on the cut
    network itself, one thread, CPU time, and the prediction corrected until it is met; `notes` tells the measurement. Raises
    GoalError where even the leanest network exceeds the budget, saying what can be reached.
    """
    started = time.monotonic()
    check_ready(model)
    check_deterministic(model, Plan.all(scores.anatomy))
    data = list(calib)
    rounding = Rounding.of(scores.anatomy, round_to)
    # Where milliseconds count, fast widths are worth trying also where others are allowed.
    tried = rounding if budget.latency_ms is None else Rounding.of(scores.anatomy, round_to or "auto")
    unweighed = Curves.of(scores, method, rounding=tried)
    curves, passes = weighed(unweighed, model, scores, from_dense(model, data), method, quiet=quiet)
    curves = curves.filled(scores.anatomy, rounding=tried)
    notes: tuple[str, ...] = ()
    if budget.latency_ms is None:
        plan = _within(scores, curves, budget, rounding)
    else:
        plan, notes = _fastest_enough(model, scores, curves, budget, rounding, quiet)
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
        notes=notes,
    )


def _within(scores: Scores, curves: Curves, budget: Budget, rounding: Rounding) -> Plan:
    """The best plan that keeps to the shares a budget names."""
    goal = against(scores.anatomy, budget)
    plan = Knapsack(scores=scores, curves=curves, measure=goal, rounding=rounding).within(1.0)
    if goal(plan.kept) > 1 + 1e-9:
        shares = plan.cost().share_of(Plan.all(scores.anatomy).cost())
        reached = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        finer = ", or leave out round_to" if rounding.steps else ""
        raise GoalError(
            f"{budget}: not even the leanest network keeps to it; it has {reached}. Write a budget above that{finer}"
        )
    return plan


def _fastest_enough(
    model: nn.Module, scores: Scores, curves: Curves, budget: Budget, rounding: Rounding, quiet: bool
) -> tuple[Plan, tuple[str, ...]]:
    """The best plan by predicted milliseconds, cut and timed; the prediction is corrected by that until the limit is met.

    Returns the plan of most predicted milliseconds that was measured to keep to the limit, and what was measured.
    """
    assert budget.latency_ms is not None
    shares = against(scores.anatomy, budget)
    if shares.weights:
        _within(scores, curves, budget, rounding)  # raises where the shares alone cannot be kept
    times = Times.of(model, scores.anatomy, batch=budget.batch, quiet=quiet)
    best, measured, seen = None, [], set[Plan]()
    for _ in track(range(CORRECTIONS), description="timing cut networks", disable=quiet, transient=True):
        goal = against(scores.anatomy, budget, times)
        plan = Knapsack(scores=scores, curves=curves, measure=goal, rounding=rounding).within(1.0)
        taken = times.beside(model, cut(model, plan, verify=False))
        measured.append(taken)
        kept_to = taken.small_ms.median <= budget.latency_ms and shares(plan.kept) <= 1 + 1e-9
        if kept_to and (best is None or times(plan.kept) > times(best[0].kept)):
            best = plan, taken
        if plan in seen or plan.share == 1 or (kept_to and taken.small_ms.median > CLOSE * budget.latency_ms):
            break
        seen.add(plan)
        times = times.corrected(plan.kept, taken.small_ms.median)
    if best is None:
        fastest = min(measured, key=lambda latency: latency.small_ms.median)
        raise GoalError(
            f"{budget}: not even the leanest network tried is that fast; the fastest took {fastest.small_ms}, the dense one "
            f"{fastest.dense_ms}. Write a budget above that"
        )
    return best[0], (told(best[1]),)
