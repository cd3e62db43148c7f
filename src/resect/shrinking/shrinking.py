"""shrink(): cut in rounds to a cost, each scored on the network that the one before left; then one recovery."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch import nn

from resect.anatomy import Anatomy, Group, dissect
from resect.batches import divide, unpack
from resect.errors import GoalError
from resect.evaluation import evaluate
from resect.pipeline import cuttable, scored
from resect.plan import Plan
from resect.recovery import Recovered, Recovery, recover
from resect.repair import Method, reestimate, repair_sequentially
from resect.repair import repair as repaired_by
from resect.scoring import Scorer, Scores
from resect.searching import Budget, Floor, Found
from resect.searching import certify as certified
from resect.searching.allocation import Curves
from resect.searching.landing import by_curves, by_rank, by_share
from resect.searching.search import Allocation
from resect.searching.sensitivity import from_dense, weighed
from resect.shrinking.keeping import Keeper, Round, fingerprint
from resect.shrinking.target import Target, fast_enough, milliseconds
from resect.surgery import check_deterministic, cut, state_digest
from resect.tracing.trace import check_ready

RESERVE = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Shrunk(Found):
    """The outcome of `shrink`: what `Found` says, and every round. recovered: None without a recovery."""

    rounds: tuple[Round, ...]
    recovered: Recovered | None

    @property
    def floor(self) -> Floor | None:
        """The promise that was certified or not; None where only a cost was asked for."""
        return None if self.certificate is None else self.certificate.floor

    def to_dict(self) -> dict[str, Any]:
        """Everything but the network, as JSON-able values."""
        recovered = None if self.recovered is None else self.recovered.to_dict()
        return super().to_dict() | {"rounds": [entry.to_dict() for entry in self.rounds], "recovered": recovered}


def shrink(
    model: nn.Module,
    calib: Iterable[Any],
    *,
    to: Budget,
    rounds: int = 5,
    scorer: str | Scorer = "auto",
    repair: Method = "least_squares",
    allocation: Allocation = "auto",
    recovery: Recovery | None = None,
    train: Iterable[Any] | None = None,
    val: Iterable[Any] | None = None,
    floor: Floor | None = None,
    certify: Iterable[Any] | None = None,
    ignore: Iterable[str] = (),
    only: Iterable[str] = (),
    streams: bool = False,
    token_stride: int | None = None,
    work: str | os.PathLike[str] | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> Shrunk:
    """Cut a network to a cost in rounds, without training in between, and recover it once at the end.

    Each round traces the network as it is, scores it and cuts to the next waypoint; waypoints fall by the same factor, and the
    last one is the target, met to the unit: counted on the physically smaller network, no unit more fits (a network whose units
    are more than .1 % of the target says so). Between rounds what is left is repaired in closed form; after the last, reader by
    reader towards the dense network, with batch norms re-estimated. `repair="none"` cuts and nothing else.

    to: shares of parameters, MACs and bytes that may remain, or milliseconds at batch 1, measured. calib: batches to trace and
    repair on. allocation: "knapsack" trades predicted harm against cost, as `fit`; "threshold" cuts the lowest normalised
    scores of all groups; "uniform" the same share of every group; "auto" is "knapsack", and "threshold" without repair.
    token_stride: as in `trace`. recovery: None leaves it out; train: its batches (default: `calib`); val: labelled batches, to
    choose the best network by.
    floor: a promise to certify on `certify`, or on half of `val`, for the network that ships; half of its delta is held back
    for one made from it later. work: a directory that keeps every round and the recovery; called again after it was killed, the
    same call ends with the same network, byte for byte (not where latency is measured).

    A target that is met already is an outcome: nothing is cut. Raises GoalError for one that cannot be reached, saying what
    can; FileError for a `work` of another run; and what `trace`, `score` and `recover` raise.

    Source: iterative pruning with one recovery, as in arXiv 2605.18860.
    """
    started = time.monotonic()
    _check(rounds, allocation, floor, val, certify)
    check_ready(model)
    data = calib if isinstance(calib, list) else list(calib)
    anatomy = cuttable(model, data, ignore, only, streams=streams)
    check_deterministic(model, Plan.all(anatomy))
    judged, held = _splits(val, certify, floor, seed)
    target = Target(anatomy, to, rounds, model)
    options: dict[str, Any] = {"scorer": scorer, "repair": repair, "allocation": _allocation(allocation, repair)}
    options |= {"seed": seed, "token_stride": token_stride}
    settings = {**options, "scorer": _name(scorer), "to": to.to_dict(), "rounds": rounds, "data": fingerprint(data)}
    settings["groups"] = anatomy.fingerprint
    keeper = None if work is None else Keeper(Path(work), model, settings)
    options["quiet"] = quiet
    small, plan, done = _rounds(model, anatomy, data, target, judged, keeper, options)
    repaired: dict[str, str] = {}
    if done and repair == "least_squares":
        small, repaired = _finally_repaired(model, small, plan, data, quiet)
    recovered = None
    if recovery is not None and done:
        folder = None if keeper is None else keeper.folder
        lessons = data if train is None else train
        recovered = recover(model, small, lessons, recovery, val=judged, work=folder, quiet=quiet)
        small = recovered.model
    certificate = None
    if floor is not None and held is not None:
        certificate = certified(floor, evaluate(model, held), [evaluate(small, held)], reserve=RESERVE, seed=seed)
    return Shrunk(
        model=small,
        plan=plan,
        goal=to,
        trials=(),
        certificate=certificate,
        frozen=() if certificate is None else (state_digest(small),),
        passes=0.0,
        cost=target.counted(small, plan),
        dense_cost=Plan.all(anatomy).cost(),
        search_accuracy=_accuracy(small, judged),
        dense_search_accuracy=_accuracy(model, judged),
        repaired=repaired,
        seconds=time.monotonic() - started,
        seed=seed,
        notes=(*target.notes(plan, done[-1].latency_ms if done else None), *(() if recovered is None else recovered.notes)),
        rounds=tuple(done),
        recovered=recovered,
    )


def _check(rounds: int, allocation: str, floor: Floor | None, val: Any, certify: Any) -> None:
    if isinstance(rounds, bool) or rounds != int(rounds) or rounds < 1:
        raise GoalError(f"rounds={rounds!r} is not a number of rounds; write 1 to cut at once, 5 to cut step by step")
    if allocation not in get_args(Allocation):
        raise GoalError(f"there is no allocation {allocation!r}; write one of {', '.join(get_args(Allocation))}")
    if floor is not None and val is None and certify is None:
        raise GoalError("a floor is certified on labelled data: give certify, or val, half of which is taken for it")


def _allocation(allocation: str, repair: Method) -> str:
    if allocation != "auto":
        return allocation
    return "threshold" if repair == "none" else "knapsack"


def _splits(
    val: Iterable[Any] | None, certify: Iterable[Any] | None, floor: Floor | None, seed: int
) -> tuple[list[Any] | None, list[Any] | None]:
    """The search data, and the certify data where a floor was given."""
    if floor is not None and certify is None and val is not None:
        search, held = divide(val, (0.5, 0.5), seed=seed)
        return search, held
    return (None if val is None else list(val)), (None if certify is None else list(certify))


def _rounds(
    model: nn.Module,
    anatomy: Anatomy,
    data: list[Any],
    target: Target,
    judged: list[Any] | None,
    keeper: Keeper | None,
    options: dict[str, Any],
) -> tuple[nn.Module, Plan, list[Round]]:
    """Every round that is not in the work directory yet; the network, its plan for the dense network, and all rounds."""
    done: list[Round] = []
    small, plan = copy.deepcopy(model), Plan.all(anatomy)
    if target.met:
        return small, plan, done
    if keeper is not None:
        small, plan, done = keeper.resume(small, plan)
    for number in range(len(done) + 1, target.count + 1):
        started = time.monotonic()
        scores, later = _chosen(small, plan, data, target, number, options)
        weights = repaired_by(scores.trace, later, options["repair"]).weights
        small, plan = cut(small, later, weights=weights), plan.then(later)
        done.append(
            Round(
                number=number,
                scorer=scores.scorer,
                kept=plan.kept,
                cost=plan.cost(),
                accuracy=_accuracy(small, judged),
                latency_ms=None if target.to.latency_ms is None else milliseconds(small, None, anatomy),
                seconds=time.monotonic() - started,
            )
        )
        if keeper is not None:
            keeper.keep(small, plan, done[-1])
    return small, plan, done


def _chosen(
    small: nn.Module, plan: Plan, data: list[Any], target: Target, number: int, options: dict[str, Any]
) -> tuple[Scores, Plan]:
    """Scores of the network as it is, and the plan of the cut to the next waypoint."""
    anatomy = same_units(dissect(small, plan.anatomy.example), plan)
    tracing = {name: options[name] for name in ("seed", "token_stride", "quiet")}
    scores = scored(small, data, anatomy, options["scorer"], **tracing)
    measure = target.on(scores.anatomy)
    curves = None
    if options["allocation"] == "knapsack":
        curves = Curves.of(scores, options["repair"])
        curves, _ = weighed(curves, small, scores, from_dense(small, data), options["repair"], quiet=options["quiet"])

    def within(limit: float) -> Plan:
        if curves is not None:
            return by_curves(scores, curves, measure, limit)
        return (by_share if options["allocation"] == "uniform" else by_rank)(scores, measure, limit)

    limit, limit_ms = target.limit(number), target.limit_ms(number)
    later = within(limit) if limit_ms is None else fast_enough(small, within, limit, limit_ms)
    if measure(later.kept) > limit:
        raise GoalError(
            f"{target.to}: the units that can be traced do not reach it; with one left in every group "
            f"{measure(later.kept):.3g} times as much as asked for remains. Write a larger budget"
        )
    return scores, later


def same_units(anatomy: Anatomy, plan: Plan) -> Anatomy:
    """The anatomy of a network that `plan` left, without groups that are not groups of the dense network any more.

    Units can become other ones: the query heads of a last remaining key head can go alone, in the dense network only together.
    """
    dense = {group.name: group for group in plan.anatomy.groups}

    def widths(group: Group) -> set[tuple[str, int, int]]:
        return {(part.tensor, part.axis, part.index.shape[1]) for part in group.slices}

    others = [
        group.name
        for group in anatomy.groups
        if group.name not in dense or group.units != plan.kept[group.name] or widths(group) != widths(dense[group.name])
    ]
    return anatomy.without(others, "its units are not those of the dense network")


def _finally_repaired(
    model: nn.Module, small: nn.Module, plan: Plan, data: list[Any], quiet: bool
) -> tuple[nn.Module, dict[str, str]]:
    """The network of the last round, reader by reader towards the dense one, and what was done to each."""
    small, steps = repair_sequentially(model, small, plan, data, quiet=quiet)
    methods = {step.tensor: "sequential" if step.kept else "least_squares" for step in steps}
    small, renewed = reestimate(model, small, data)
    return small, methods | ({"batch norm statistics": "re-estimated"} if renewed else {})


def _accuracy(model: nn.Module, judged: list[Any] | None) -> float:
    if judged is None or unpack(judged[0]).labels is None:
        return float("nan")
    return evaluate(model, judged).accuracy


def _name(scorer: str | Scorer) -> str:
    return scorer if isinstance(scorer, str) else getattr(scorer, "__qualname__", type(scorer).__name__)
