"""prune() and specialize(): the steps joined, from a trained network and data to certified smaller ones."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from resect.anatomy import Anatomy, dissect
from resect.batches import divide, select, unpack
from resect.errors import DataError, FileError, GoalError
from resect.repair import Method
from resect.scoring import Scorer, Scores, needs, score
from resect.searching import Budget, Floor, Found, Trial, fit, search
from resect.searching.rounding import RoundTo, check_round_to
from resect.searching.search import Allocation, Minimise
from resect.specializing import Specialised, Specialists, specialists
from resect.specializing.judging import check_classifier
from resect.specializing.question import Other
from resect.specializing.specialists import SpecialistMethod
from resect.tracing import Trace, trace
from resect.tracing.trace import check_ready

DEFAULT_FLOOR = Floor(drop=0.01)


def prune(
    model: nn.Module,
    calib: Iterable[Any],
    val: Iterable[Any] | None = None,
    *,
    floor: Floor | None = None,
    budget: Budget | None = None,
    certify: Iterable[Any] | None = None,
    scorer: str | Scorer = "auto",
    repair: Method = "least_squares",
    allocation: Allocation = "auto",
    minimise: Minimise = "macs",
    evaluations: int = 30,
    seconds: float | None = None,
    round_to: RoundTo | None = None,
    ignore: Iterable[str] = (),
    only: Iterable[str] = (),
    streams: bool = False,
    trials: str | os.PathLike[str] | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> Found:
    """Cut a trained network to the smallest one that keeps a floor, or to the best one that a budget allows.

    With a floor: dissect, trace, score, search, cut, repair, certify. With a budget nothing is promised and nothing
    certified, and `val` only tells the accuracy reached.

    calib: batches to trace and repair on, iterable again and again; unlabelled will do for most scorers. val: labelled batches,
    split (seeded, halves) into search and certify unless `certify` is given. scorer: a name, a function, or "auto":
    `reconstruction` where every reader has second moments, else `activation_weight`. ignore, only: regular expressions on the
    names of groups. streams: also cut residual streams that pass through a layer norm, where a cut changes the norm. trials: a
    file to which every trial is appended as a line of JSON as it ends, so that an interrupted search leaves what it learned.
    The other arguments are those of `search`.

    Raises DataError, ModelError and GoalError as `dissect`, `trace` and `search` do. A floor that cannot be met is an outcome.
    """
    if (floor is None) == (budget is None):
        raise GoalError("name one goal: prune(..., floor=Floor(drop=0.01)) or prune(..., budget=Budget(macs=0.5))")
    if floor is not None and val is None:
        raise GoalError("a floor is judged on labelled data: give val, which is split into search and certify")
    check_round_to(round_to)
    record = None if trials is None else _recorder(Path(trials))
    check_ready(model)
    data = calib if isinstance(calib, list) else list(calib)
    anatomy = cuttable(model, data, ignore, only, streams=streams)
    scores = scored(model, data, anatomy, scorer, seed=seed, quiet=quiet)
    if budget is not None:
        return fit(model, scores, budget, data, val=val, method=repair, round_to=round_to, seed=seed, quiet=quiet)
    assert floor is not None
    assert val is not None
    return search(
        model,
        scores,
        val,
        floor,
        certify_on=certify,
        calib=data,
        allocation=allocation,
        minimise=minimise,
        method=repair,
        evaluations=evaluations,
        seconds=seconds,
        round_to=round_to,
        seed=seed,
        on_trial=record,
    )


def cuttable(
    model: nn.Module, data: list[Any], ignore: Iterable[str] = (), only: Iterable[str] = (), *, streams: bool = False
) -> Anatomy:
    """What may be removed, found on the first examples of the data; residual streams only with `streams`."""
    anatomy = dissect(model, example_of(data), ignore=tuple(ignore), only=tuple(only))
    if streams:
        return anatomy
    names = [group.name for group in anatomy.groups if group.kind == "stream"]
    return anatomy.without(names, "residual stream behind a layer norm; streams=True allows it")


def scored(
    model: nn.Module,
    data: list[Any],
    anatomy: Anatomy,
    scorer: str | Scorer,
    *,
    token_stride: int | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> Scores:
    """Trace what a scorer needs, and score."""
    wanted = {} if scorer == "auto" else needs(scorer)
    seen = trace(model, data, anatomy, **wanted, token_stride=token_stride, quiet=quiet)
    return score(seen, best_scorer(seen) if scorer == "auto" else scorer, seed=seed)


@overload
def specialize(
    model: nn.Module,
    calib: Iterable[Any],
    val: Iterable[Any],
    *,
    classes: Sequence[int | str],
    each_class: Literal[False] = False,
    floor: Floor = ...,
    false_positives: float | Floor | None = None,
    other: Other = "none",
    names: Sequence[str] = (),
    certify: Iterable[Any] | None = None,
    method: SpecialistMethod = "repair",
    scorer: str = "auto",
    minimise: Minimise = "macs",
    evaluations: int = 16,
    sweeps: int = 2,
    ignore: Iterable[str] = (),
    only: Iterable[str] = (),
    seed: int = 0,
    quiet: bool = True,
) -> Specialised: ...
@overload
def specialize(
    model: nn.Module,
    calib: Iterable[Any],
    val: Iterable[Any],
    *,
    classes: None = None,
    each_class: Literal[True],
    floor: Floor = ...,
    false_positives: float | Floor | None = None,
    other: Other = "none",
    names: Sequence[str] = (),
    certify: Iterable[Any] | None = None,
    method: SpecialistMethod = "repair",
    scorer: str = "auto",
    minimise: Minimise = "macs",
    evaluations: int = 16,
    sweeps: int = 2,
    ignore: Iterable[str] = (),
    only: Iterable[str] = (),
    seed: int = 0,
    quiet: bool = True,
) -> Specialists: ...
def specialize(
    model: nn.Module,
    calib: Iterable[Any],
    val: Iterable[Any],
    *,
    classes: Sequence[int | str] | None = None,
    each_class: bool = False,
    floor: Floor = DEFAULT_FLOOR,
    false_positives: float | Floor | None = None,
    other: Other = "none",
    names: Sequence[str] = (),
    certify: Iterable[Any] | None = None,
    method: SpecialistMethod = "repair",
    scorer: str = "auto",
    minimise: Minimise = "macs",
    evaluations: int = 16,
    sweeps: int = 2,
    ignore: Iterable[str] = (),
    only: Iterable[str] = (),
    seed: int = 0,
    quiet: bool = True,
) -> Specialised | Specialists:
    """Cut a classifier to the smallest network that answers for one class, for some classes, or one network for each class.

    classes: indices or `names`; one class gives a specialist that says yes or no, several one that tells them apart.
    each_class: one specialist of one class for every class, on one trace. floor: on recall (several classes: on the accuracy
    among them), at most one point below the dense network by default. false_positives: cap on the share of other examples
    accepted, where the specialist rejects, or Floor(drop=0.005) for half a point above the dense network's; by default that,
    and at least 1 %. other:
    "reject" gives a specialist of several classes a background score, so that it can refuse strangers; its false-accept rate is
    certified too.

    calib, val: labelled batches, with examples of other classes too; val is split (seeded, halves) into search and certify
    unless `certify` is given. method: "threshold" is the original program's. minimise: what is to be small. evaluations: trials
    of the search for each specialist. sweeps: how often linear readers are re-solved towards the specialist's own answer.

    A promise that cannot be certified is an outcome. Raises GoalError for classes that are unknown (naming the nearest), named
    twice, or all of them; DataError for unlabelled data and for splits that lack an own class or all others; ModelError for a
    network that is no classifier, or whose logits are not made by a linear layer.
    """
    check_ready(model)
    data, judged = list(calib), list(val)
    parts = (judged, list(certify)) if certify is not None else divide(judged, (0.5, 0.5), seed=seed)
    example = example_of(data)
    check_classifier(model, data[0])
    anatomy = dissect(model, example, ignore=tuple(ignore), only=tuple(only))
    anatomy = anatomy.without([g.name for g in anatomy.groups if g.kind == "stream"], "residual stream behind a layer norm")
    start = time.monotonic()
    seen = trace(model, data, anatomy, quiet=quiet)
    traced = time.monotonic() - start
    found, shared = specialists(
        model,
        seen,
        data,
        *parts,
        classes=classes,
        each_class=each_class,
        names=names,
        other=other,
        floor=floor,
        false_positives=false_positives,
        method=method,
        scorer=best_scorer(seen) if scorer == "auto" else scorer,
        minimise=minimise,
        evaluations=evaluations,
        sweeps=sweeps,
        seed=seed,
        quiet=quiet,
    )
    return Specialists(all=found, shared_seconds=traced + shared) if each_class else found[0]


def example_of(data: list[Any], examples: int = 2) -> Any:
    """Inputs of the first examples of some data, in the form `dissect` takes."""
    if not data:
        raise DataError("the calibrate data are empty: the loader gave no batch; give at least one")
    size = unpack(data[0], where="the calibrate data").size
    batch = unpack(select(data[0], torch.arange(min(examples, size))))
    return batch.kwargs if batch.kwargs else batch.args


def best_scorer(seen: Trace) -> str:
    """`reconstruction` where every reader of every group has second moments, else `activation_weight`."""
    anatomy: Anatomy = seen.anatomy
    parts = [part for group in anatomy.groups for part in group.readers if part.tensor in seen.sums]
    return "reconstruction" if all(seen.system(part) is not None for part in parts) else "activation_weight"


def _recorder(path: Path) -> Callable[[Trial], None]:
    """Appends trials to a file, each at once and whole, so that Ctrl-C keeps those that ended."""
    try:
        path.write_text("", encoding="utf-8")
    except OSError as error:
        raise FileError(
            f"cannot write trials to {path}: {error.strerror}; name a file in a directory you may write to"
        ) from None

    def record(trial: Trial) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(trial.to_dict()) + "\n")

    return record
