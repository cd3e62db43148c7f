"""What a report says, before any layout: the promise and its verdict, before and after, units kept, notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from resect.evaluation import Evaluation, Latency
from resect.searching.evidence import lower_bound

if TYPE_CHECKING:
    from resect.searching import Found, Trial
    from resect.tracing import Trace


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """Everything a report may show; what is None or empty is left out.

    dense, small: both networks on the test examples, which nothing else has seen. trace: for the class x unit activity map.
    settings: how it was run, by name (scorer, repair, seed, ...). versions, data: for reproduction.
    """

    found: Found
    model: str
    data: str
    dense: Evaluation | None = None
    small: Evaluation | None = None
    latency: tuple[Latency, ...] = ()
    trace: Trace | None = None
    class_names: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def class_name(self, label: int) -> str:
        """The name of class `label`, or its number."""
        return self.class_names[label] if label < len(self.class_names) else str(label)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the promise is kept: True, False, or None where nothing was promised; and how sure, in words."""

    kept: bool | None
    word: str
    promise: str
    evidence: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the before/after table; `share` is what remains, in [0, 1], where that has a meaning, else a `remark`."""

    name: str
    dense: str
    small: str
    change: str
    share: float | None = None
    remark: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """How many units of a group stay, and which: mask of shape (units,)."""

    group: str
    kept: int
    units: int
    mask: np.ndarray


def verdict(report: Report) -> Verdict:
    """The promise, whether it is kept, and the evidence in the certificate's own sentences."""
    found = report.found
    if found.floor is None:
        return Verdict(kept=None, word="No floor", promise=f"Asked for: {found.goal}.", evidence=())
    if found.certificate is None:
        return Verdict(kept=False, word="Not certified", promise=f"Asked for: {found.floor}.", evidence=("No certify data.",))
    promise, *evidence = str(found.certificate).splitlines()
    word = "Certified" if found.certified else "Not certified"
    promise = promise.removeprefix(f"{word}: ")
    return Verdict(kept=found.certified, word=word, promise=promise[:1].upper() + promise[1:], evidence=tuple(evidence))


def before_after(report: Report) -> tuple[Row, ...]:
    """The before/after table: accuracy on unseen data, then sizes, then measured latency."""
    return (*_accuracy_rows(report), *_cost_rows(report), *map(_latency_row, report.latency))


def _accuracy_rows(report: Report) -> list[Row]:
    rows, found, certificate = [], report.found, report.found.certificate
    if report.dense is not None and report.small is not None:
        row = _accuracy_row("test", report.dense.accuracy, report.small.accuracy)
        low, high = interval(report.small)
        rows.append(replace(row, remark=f"{100 * low:.1f}-{100 * high:.1f} % (n = {report.small.examples:,})"))
    if certificate is not None and certificate.dense_correct is not None and certificate.labelled:
        row = _accuracy_row("certify", certificate.dense_correct / certificate.examples, certificate.accuracy)
        rows.append(replace(row, remark=f"(n = {certificate.examples:,})"))
    if found.search_accuracy == found.search_accuracy:  # NaN where a budget was fitted without labelled data
        rows.append(_accuracy_row("search", found.dense_search_accuracy, found.search_accuracy))
    return rows


def interval(evaluation: Evaluation, delta: float = 0.05) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval of an accuracy, both ends in [0, 1]."""
    right, n = evaluation.right, evaluation.examples
    return lower_bound(right, n, delta / 2), 1 - lower_bound(n - right, n, delta / 2)


def _accuracy_row(split: str, dense: float, small: float) -> Row:
    return Row(
        name=f"accuracy, {split}", dense=f"{dense:.2%}", small=f"{small:.2%}", change=f"{100 * (small - dense):+.2f} points"
    )


def _cost_rows(report: Report) -> list[Row]:
    dense, small = report.found.dense_cost, report.found.cost
    rows = []
    for name, before, after in (
        ("units", sum(entry.units for entry in units(report)), sum(entry.kept for entry in units(report))),
        ("parameters", dense.parameters, small.parameters),
        ("MACs", dense.macs, small.macs),
        ("bytes", dense.bytes, small.bytes),
    ):
        share = after / before if before else 1.0
        rows.append(Row(name=name, dense=count(before), small=count(after), change=f"-{1 - share:.1%}", share=share))
    return rows


def _latency_row(latency: Latency) -> Row:
    verdict = f"{latency.ratio:.2f}x as fast" if latency.faster else "not faster here"
    return Row(
        name=f"latency, batch {latency.batch}",
        dense=f"{latency.dense_ms.median:.3g} ms",
        small=f"{latency.small_ms.median:.3g} ms",
        change=verdict,
        share=min(1.0, 1 / latency.ratio) if latency.ratio else None,
    )


def units(report: Report) -> tuple[Units, ...]:
    """Units kept, group by group, in execution order."""
    keep = report.found.plan.keep
    return tuple(Units(group=name, kept=int(mask.sum()), units=len(mask), mask=mask) for name, mask in keep.items())


def best_trials(report: Report, limit: int | None = None) -> tuple[Trial, ...]:
    """Trials that met the floor on search by cost, leanest first, then the others by accuracy, best first."""

    def rank(trial: Trial) -> tuple[bool, float, int]:
        return (not trial.above, trial.cost.macs if trial.above else -trial.accuracy, trial.number)

    return tuple(sorted(report.found.trials, key=rank)[:limit])


def notes(report: Report) -> tuple[str, ...]:
    """Everything a reader should know besides the figures, each once."""
    slow = [
        f"At batch {entry.batch} the small network is not faster on this device."
        for entry in report.latency
        if not entry.faster
    ]
    warnings = [f"Latency: {entry.warning}." for entry in report.latency if entry.warning][:1]
    return tuple(dict.fromkeys([*_below_on_test(report), *report.found.notes, *report.notes, *slow, *warnings]))


def _below_on_test(report: Report) -> list[str]:
    """A certified network may still miss the floor on one small test set; say how much that set leaves open."""
    floor, dense, small = report.found.floor, report.dense, report.small
    if floor is None or dense is None or small is None or small.accuracy >= floor.threshold(dense.accuracy):
        return []
    low, high = interval(small)
    return [
        f"On the test examples accuracy is below the floor: {small.accuracy:.2%}. {small.examples:,} examples leave "
        f"{low:.2%} to {high:.2%} open (95 % sure)."
    ]


def count(value: float) -> str:
    """A count that a person can read.

    >>> count(17226), count(5.2e6), count(3.1e9)
    ('17,226', '5.20 M', '3.10 G')
    """
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.2f} {letter}"
    return f"{value:,.0f}"
