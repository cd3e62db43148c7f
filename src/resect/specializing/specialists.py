"""All specialists of one network: what they share is made once, their lists are frozen, then the certify split is opened."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from rich.progress import track
from torch import nn

from resect.batches import unpack
from resect.errors import DataError, GoalError
from resect.searching import Floor
from resect.specializing.certifying import certified
from resect.specializing.judging import Seen
from resect.specializing.question import Other, Question, asked
from resect.specializing.readout import features, output_layer
from resect.specializing.results import Specialised
from resect.specializing.search import Prepared, Shared, floors_of, prepare
from resect.specializing.threshold import prepare_by_threshold
from resect.tracing import Trace

SpecialistMethod = Literal["repair", "threshold"]


def specialists(
    model: nn.Module,
    trace: Trace,
    calib: Sequence[Any],
    search: Sequence[Any],
    certify: Sequence[Any],
    *,
    classes: Sequence[int | str] | None = None,
    each_class: bool = False,
    names: Sequence[str] = (),
    other: Other = "none",
    floor: Floor,
    false_positives: float | Floor | None = None,
    method: SpecialistMethod = "repair",
    scorer: str = "reconstruction",
    minimise: str = "macs",
    evaluations: int = 16,
    sweeps: int = 2,
    seed: int = 0,
    quiet: bool = True,
) -> tuple[tuple[Specialised, ...], float]:
    """Specialists for the questions asked, and the seconds that were spent once for all of them. Arguments as in `specialize`.

    All lists are frozen before the certify split is opened.
    """
    if method not in ("repair", "threshold"):
        raise GoalError(f'method={method!r} is not a way to make specialists; write "repair" or "threshold"')
    if evaluations < 1:
        raise GoalError(f"evaluations={evaluations} leaves nothing to judge; write at least 1")
    start = time.monotonic()
    layer = output_layer(model, trace.anatomy)
    seen, counts = Seen.of(model, calib, "calibrate"), counted(certify, layer.group.units)
    shared = Shared(
        model=model,
        layer=layer,
        trace=trace,
        x=features(model, layer, calib),
        calib=seen,
        search=Seen.of(model, search, "search"),
        counts=counts,
        minimise=minimise,
        scorer=scorer,
        evaluations=evaluations,
        sweeps=sweeps,
        seed=seed,
    )
    questions = asked(classes, each_class, count=layer.group.units, names=names, other=other)
    for question in questions:
        check_examples(question, shared)
    floors = [floors_of(question, floor, false_positives, shared.search) for question in questions]
    common = time.monotonic() - start
    make = prepare if method == "repair" else prepare_by_threshold
    prepared: list[Prepared] = []
    for question, promises in track(
        list(zip(questions, floors)), description="specialising", disable=quiet or len(questions) < 2, transient=True
    ):
        prepared.append(make(shared, question, promises))
    start = time.monotonic()
    opened = Seen.of(model, certify, "certify")
    found = tuple(certified(shared, one, floor, opened) for one in prepared)
    return found, common + time.monotonic() - start


def counted(data: Sequence[Any], classes: int) -> np.ndarray:
    """(classes,) examples of each class, from the labels alone: the certify split is not shown to any network yet."""
    counts = np.zeros(classes, dtype=np.int64)
    for item in data:
        batch = unpack(item, where="the certify data")
        if batch.labels is None:
            raise DataError("the certify data have no labels, and a specialist is told apart by them; give (inputs, labels)")
        labels = batch.labels.cpu().numpy()
        if labels.min() < 0 or labels.max() >= classes:
            raise DataError(
                f"labels of the certify data run from {labels.min()} to {labels.max()}, but the network has {classes} outputs"
            )
        counts += np.bincount(labels, minlength=classes)
    if not counts.sum():
        raise DataError("the certify data are empty: the loader gave no batch; give at least 300 examples of every own class")
    return counts


def check_examples(question: Question, shared: Shared) -> None:
    """Raise DataError where a split lacks examples of an own class, or has no others to refuse."""
    splits = {
        "calibrate": np.bincount(shared.calib.labels, minlength=question.classes),
        "search": np.bincount(shared.search.labels, minlength=question.classes),
        "certify": shared.counts,
    }
    for where, counts in splits.items():
        absent = next((c for c in question.own if not counts[c]), None)
        if absent is not None:
            raise DataError(
                f"the {where} data hold no example of class {question.class_name(absent)!r} among {counts.sum():,}; "
                "a specialist needs examples of every own class in all three splits"
            )
        if question.rejects and not counts[list(question.others)].sum():
            raise DataError(
                f"the {where} data hold nothing but class {question.name!r}: without examples of other classes a network that "
                "always says yes would pass; add the other classes' examples"
            )
