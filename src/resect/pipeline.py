"""prune(): the steps joined, from a trained network and data to a certified smaller one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resect.anatomy import Anatomy, dissect
from resect.batches import select, unpack
from resect.errors import DataError, FileError, GoalError
from resect.repair import Method
from resect.scoring import Scorer, Scores, needs, score
from resect.searching import Budget, Floor, Found, Trial, fit, search
from resect.searching.rounding import RoundTo, check_round_to
from resect.searching.search import Allocation, Minimise
from resect.tracing import Trace, trace
from resect.tracing.trace import check_ready


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
