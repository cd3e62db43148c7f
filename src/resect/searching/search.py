"""search(): the smallest network that keeps the floor, and the certificate that it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from resect.batches import divide, unpack
from resect.errors import DataError, GoalError
from resect.evaluation import Evaluation, evaluate
from resect.plan import Plan
from resect.repair import Method
from resect.scoring import Scores
from resect.searching import allocation as allocate
from resect.searching.certificate import Certificate, certify
from resect.searching.finishing import finish
from resect.searching.floor import Floor
from resect.searching.found import Found, Trial
from resect.searching.judging import Judge, OutOfBudget
from resect.searching.ladder import ladder
from resect.searching.rounding import Rounding, RoundTo
from resect.searching.timing import Times, told
from resect.surgery import check_deterministic, state_digest
from resect.tracing.trace import check_ready

Allocation = Literal["auto", "uniform", "threshold", "knapsack"]
Minimise = Literal["macs", "parameters", "bytes", "units", "latency"]
BISECTIONS = 8
RUNGS = 12
# Sizes around the best trial, as factors of its cost, that are prepared for the certificate's list: a few leaner ones, because
# the final repair often keeps more than the search saw, and safer ones up to the dense network.
AROUND = (0.72, 0.8, 0.88, 0.94, 1.0, 1.07, 1.15, 1.25, 1.4, 1.65, 2.1, 3.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A network prepared for the certificate: finally repaired, judged on the whole search split, and frozen by its digest."""

    plan: Plan
    model: nn.Module
    search: Evaluation
    cost: float
    digest: str
    repaired: dict[str, str]


def search(
    model: nn.Module,
    scores: Scores,
    val: Iterable[Any],
    floor: Floor,
    *,
    certify_on: Iterable[Any] | None = None,
    calib: Iterable[Any] | None = None,
    allocation: Allocation = "auto",
    minimise: Minimise = "macs",
    method: Method = "least_squares",
    evaluations: int = 30,
    seconds: float | None = None,
    reserve: float = 0.0,
    round_to: RoundTo | None = None,
    seed: int = 0,
    on_trial: Callable[[Trial], None] | None = None,
) -> Found:
    """Find the smallest network that keeps a floor, and certify it on data the search never saw.

    val: labelled batches; split (seeded, halves) into search and certify, unless `certify_on` brings the certify split. calib:
    the calibrate data; with it the networks on the certificate's list are repaired once more, reader by reader in execution
    order. allocation: "uniform" bisects on one share for all groups; "knapsack" on the price of cost against predicted harm;
    "threshold" on one threshold for all normalised scores (the seed method); "auto" does the first two and then trades between
    groups, or tries every size, leanest first, where the network is so small that the budget allows it. minimise: what is to be
    small; "latency" is predicted at batch 1 from measured times of the layers, and the outcome is measured (see `notes`).
    evaluations, seconds: budget of the search. reserve: share of delta kept for a network made later (see `certify`).
    round_to: "auto" or a number: only widths that are multiples of what the device handles at once are chosen (see
    `Rounding.of`). It pays where time is what counts, in convolutions at larger batches or images, where 33 channels cost as
    much as 48; parameters and MACs, and convolutions of few values, it only makes coarser.

    A floor that no network meets is an outcome: `Found.certified` is False and the certificate says what would help. Raises
    GoalError for a floor above the dense network's own accuracy on the search split, DataError for unusable data, and
    ModelError for a network in training mode or with outputs that change from call to call.

    Source: Learn then Test, arXiv 2110.01052; split and fixed sequence as in Pareto Testing, arXiv 2210.07913.
    """
    _check(allocation, minimise, evaluations)
    rounding = Rounding.of(scores.anatomy, round_to)
    check_ready(model)
    check_deterministic(model, Plan.all(scores.anatomy))
    started = time.monotonic()
    parts = divide(val, (0.5, 0.5), seed=seed) if certify_on is None else (list(val), list(certify_on))
    if not parts[1]:
        raise DataError("the certify data are empty: the loader gave no batch; give at least 100 labelled examples")
    judge = Judge(
        model=model,
        trace=scores.trace,
        data=parts[0],
        floor=floor,
        method=method,
        evaluations=evaluations,
        seconds=seconds,
        seed=seed,
        on_trial=on_trial,
    )
    _check_floor(floor, judge.dense)
    times = Times.of(model, scores.anatomy) if minimise == "latency" else None
    measure = allocate.measure(scores.anatomy, minimise, times)
    family, best = _explore(scores, judge, measure, allocation, method, rounding)
    candidates = _prepare(model, scores, judge, measure, family, best, calib, method, rounding)
    frozen = _freeze(candidates, judge, floor, _count(parts[1]), floor.delta * (1 - reserve))
    dense = evaluate(model, parts[1])
    certificate = certify(
        floor, dense, (evaluate(c.model, parts[1]) for c in frozen), reserve=reserve, seed=seed, frozen=len(frozen)
    )
    chosen = frozen[certificate.delivered or 0]
    return Found(
        model=chosen.model,
        plan=chosen.plan,
        goal=floor,
        trials=tuple(judge.trials),
        certificate=certificate,
        frozen=tuple(candidate.digest for candidate in frozen),
        passes=judge.spent,
        cost=chosen.plan.cost(),
        dense_cost=judge.dense_cost,
        search_accuracy=chosen.search.accuracy,
        dense_search_accuracy=judge.dense.accuracy,
        repaired=chosen.repaired,
        seconds=time.monotonic() - started,
        seed=seed,
        notes=_notes(certificate, best) + ((told(times.beside(model, chosen.model)),) if times is not None else ()),
    )


def _check(allocation: str, minimise: str, evaluations: int) -> None:
    if allocation not in get_args(Allocation):
        raise GoalError(f"there is no allocation {allocation!r}; write one of {', '.join(get_args(Allocation))}")
    if minimise not in get_args(Minimise):
        raise GoalError(f"minimise={minimise!r} is not a cost; write one of {', '.join(get_args(Minimise))}")
    if evaluations < 1:
        raise GoalError(f"evaluations={evaluations} leaves nothing to judge; write at least 1")


def _check_floor(floor: Floor, dense: Evaluation) -> None:
    if floor.label is not None:
        raise GoalError(
            f"search() keeps a floor over all classes, and was given one on class {floor.label} alone; leave label out"
        )
    if floor.accuracy is not None and floor.accuracy > dense.accuracy:
        raise GoalError(
            f"the floor is {floor.accuracy:.2%}, but the dense network itself has {dense.accuracy:.2%} on the search split "
            f"({dense.examples:,} examples); write a floor of at most {dense.accuracy:.2%}, or Floor(drop=0.01)"
        )


def _count(data: Sequence[Any]) -> int:
    return sum(unpack(batch).size for batch in data)


Family = Callable[[float], Plan]


def _explore(
    scores: Scores, judge: Judge, measure: allocate.Measure, allocation: Allocation, method: Method, rounding: Rounding
) -> tuple[Family, Plan | None]:
    """Judge candidates until the budget is spent; the family of plans to prepare the list from, and the leanest that passed."""
    everything = allocate.every_plan(scores, judge.evaluations, rounding) if allocation == "auto" else None
    if everything is not None:
        ranked = sorted(everything, key=lambda plan: measure(plan.kept))
        best = next((plan for plan in ranked if judge.judge(plan, "exhaustive").above), None)
        return (lambda share: allocate.uniform(scores, share, rounding)), best
    families: dict[str, Family] = {}
    curves = None
    if allocation in ("auto", "uniform"):
        families["uniform"] = lambda share: allocate.uniform(scores, share, rounding)
    if allocation == "threshold":
        at = allocate.threshold_levels(scores)
        families["threshold"] = lambda share: allocate.threshold(scores, at[int((1 - share) * (len(at) - 1))], rounding)
    if allocation in ("auto", "knapsack"):
        # Where milliseconds count, fast widths are worth trying also where others are allowed.
        tried = Rounding.of(scores.anatomy, "auto") if measure.times is not None and not rounding.steps else rounding
        curves = allocate.Curves.of(scores, method, rounding=tried)
        knapsack = allocate.Knapsack(scores=scores, curves=curves, measure=measure, rounding=rounding)
        families["knapsack"] = lambda share: knapsack.within(share * knapsack.dense)
    family, best = next(iter(families.values())), None
    try:
        for name, make in families.items():
            found = _bisect(judge, make, name)
            if found is not None and (best is None or measure(found.kept) < measure(best.kept)):
                family, best = make, found
        if allocation == "auto" and best is not None and curves is not None:
            best = _trade(scores, judge, best, curves, measure, rounding)
    except OutOfBudget:
        best = _leanest(judge, measure)
    return family, best


def _bisect(judge: Judge, make: Family, name: str) -> Plan | None:
    """Halve the interval of sizes BISECTIONS times; the leanest plan that met the floor. Accuracy is not monotone in size:
    this is a heuristic, and the certificate is what protects."""
    low, high, best = 0.0, 1.0, None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        plan = make(middle)
        if judge.judge(plan, name).above:
            high, best = middle, plan
        else:
            low = middle
    return best


def _trade(
    scores: Scores, judge: Judge, best: Plan, curves: allocate.Curves, measure: allocate.Measure, rounding: Rounding
) -> Plan:
    """Move to leaner neighbours while one of the gentlest few meets the floor and the budget lasts."""
    try:
        improved = True
        while improved:
            improved = False
            for offer in allocate.trades(scores, best, curves, measure, most=3, rounding=rounding):
                if judge.judge(offer, "trade").above:
                    best, improved = offer, True
                    break
    except OutOfBudget:
        pass
    return best


def _leanest(judge: Judge, measure: allocate.Measure) -> Plan | None:
    passed = [judge.plans[trial.digest] for trial in judge.trials if trial.above]
    return min(passed, key=lambda plan: measure(plan.kept)) if passed else None


def _prepare(
    model: nn.Module,
    scores: Scores,
    judge: Judge,
    measure: allocate.Measure,
    family: Family,
    best: Plan | None,
    calib: Iterable[Any] | None,
    method: Method,
    rounding: Rounding,
) -> list[Candidate]:
    """Networks of falling cost around the best trial, each finally repaired and judged on the whole search split."""
    dense = measure(Plan.all(scores.anatomy).kept)
    # A candidate that did not come from the family (a trade) is scaled: all its groups grow or shrink together.
    centre = best or family(0.75)
    plans = {centre.digest: centre}
    for factor in AROUND:
        plan = _at_cost(scores, centre, measure, min(factor * measure(centre.kept), dense), rounding)
        plans.setdefault(plan.digest, plan)
    data = None if calib is None else list(calib)
    candidates = []
    for plan in sorted(plans.values(), key=lambda plan: measure(plan.kept), reverse=True):
        small, repaired = finish(model, scores, plan, data, method)
        evaluation = evaluate(small, judge.data)
        judge.charge(plan.cost(), evaluation.examples)
        digest = state_digest(small)
        candidates.append(
            Candidate(plan=plan, model=small, search=evaluation, cost=measure(plan.kept), digest=digest, repaired=repaired)
        )
    return candidates


def _at_cost(scores: Scores, centre: Plan, measure: allocate.Measure, target: float, rounding: Rounding) -> Plan:
    """The plan whose groups keep their proportions to `centre`, towards all or towards nothing, at about a target cost."""
    low, high, plan = -1.0, 1.0, centre
    units = {group.name: group.units for group in scores.anatomy.groups}
    for _ in range(20):
        middle = (low + high) / 2
        counts = {
            name: kept + middle * (units[name] - kept) if middle > 0 else kept * (1 + middle)
            for name, kept in centre.kept.items()
        }
        plan = rounding.top(scores, {name: round(count) for name, count in counts.items()})
        low, high = (middle, high) if measure(plan.kept) < target else (low, middle)
    return plan


def _freeze(candidates: list[Candidate], judge: Judge, floor: Floor, n_certify: int, level: float) -> list[Candidate]:
    """The list for the certificate: strictly decreasing cost, safest first, fixed before the certify split is opened."""
    drops = [judge.dense.accuracy - c.search.accuracy for c in candidates]
    paired = [np.std(judge.dense.correct.astype(float) - c.search.correct) for c in candidates]
    dense = max(candidate.cost for candidate in candidates)
    chosen = ladder(
        [c.cost / dense for c in candidates],
        [c.search.accuracy for c in candidates] if floor.accuracy is not None else drops,
        floor,
        n_search=judge.examples,
        n_certify=n_certify,
        deviation=paired,
        level=level,
        rungs=RUNGS,
    )
    return [candidates[index] for index in chosen]


def _notes(certificate: Certificate, best: Plan | None) -> tuple[str, ...]:
    notes = []
    if best is None:
        notes.append("No candidate met the floor on the search split; the networks certified are the safest that were tried.")
    if not certificate.passed:
        notes.append("The floor is not certified; the network delivered is the safest of the frozen list.")
    return tuple(notes)
