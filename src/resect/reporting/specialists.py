"""The report on specialists: what each was promised and reached, what they reach together, and which units they share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from resect.evaluation import Latency
from resect.reporting import charts
from resect.reporting.html import _html_table, _section
from resect.reporting.record import RESULT_VERSION, _plain
from resect.specializing.results import Specialised, Specialists, as_mapping

if TYPE_CHECKING:
    from resect.specializing import Collapse, Rates


@dataclass(frozen=True, kw_only=True, eq=False)
class SpecialistReport:
    """Everything a report on specialists may show; what is empty is left out.

    test: by name, the rates of the dense network and of the specialist on the test examples, which nothing else has seen.
    panel: accuracy of the dense network and of all specialists together on the full question. collapse: what each class loses
    without the units most selective for it.
    """

    result: Specialised | Specialists
    model: str
    data: str
    test: Mapping[str, tuple[Rates, Rates]] = field(default_factory=dict)
    latency: Mapping[str, tuple[Latency, ...]] = field(default_factory=dict)
    panel: tuple[float, float] | None = None
    collapse: tuple[Collapse, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def by_name(self) -> Mapping[str, Specialised]:
        return as_mapping(self.result)


COLUMNS = (
    "class", "promise", "#hidden units removed", "#parameters kept", "#MACs kept", "#recall, dense", "#recall",
    "#false positives, dense", "#false positives", "#balanced accuracy", "#AUROC", "#precision (at prevalence)",
)  # fmt: skip


def specialist_rows(report: SpecialistReport) -> list[list[str]]:
    """One row a specialist, as COLUMNS; rates on test, or on certify where no test examples were given."""
    return [_row(name, one, report.test.get(name, (one.dense_certify, one.certify))) for name, one in report.by_name.items()]


def _row(name: str, one: Specialised, rates: tuple[Rates, Rates]) -> list[str]:
    dense, small = rates
    share = one.cost.share_of(one.dense_cost)
    prevalence = "" if small.prevalence is None else f" ({small.prevalence:.1%})"
    return [
        name,
        "certified" if one.certified else "not certified",
        f"{one.removed:.1%}",
        f"{share['parameters']:.1%}",
        f"{share['macs']:.1%}",
        _share(dense.recall),
        _share(small.recall),
        _share(dense.false_positive_rate),
        _share(small.false_positive_rate),
        _share(small.balanced_accuracy),
        "" if small.auroc is None else f"{small.auroc:.4f}",
        _share(small.precision) + prevalence,
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def summary(report: SpecialistReport) -> tuple[str, ...]:
    """What is to be said of all specialists together, and every note, each once."""
    lines = []
    if report.panel is not None:
        dense, together = report.panel
        lines.append(f"All together, by the highest own margin: {together:.2%} of test right, the dense network {dense:.2%}.")
    if isinstance(report.result, Specialists):
        removed = [one.removed for one in report.result]
        lines.append(f"Hidden units removed: {np.mean(removed):.1%} in the mean, {min(removed):.1%} to {max(removed):.1%}.")
        lines.append(f"{report.result.overlap()}.")
    for name, one in report.by_name.items():
        lines += [f"{name}: {note}" for note in one.notes]
        lines += [f"{name}: {note}" for note in one.certificate.advice]
    return tuple(dict.fromkeys([*lines, *report.notes]))


def print_specialists(report: SpecialistReport, console: Console | None = None) -> None:
    """Print the table of specialists and what there is to say of them."""
    console = console or Console()
    table = Table(
        title=f"{report.model} on {report.data}", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for name in COLUMNS:
        table.add_column(name.lstrip("#"), justify="right" if name.startswith("#") else "left")
    for row in specialist_rows(report):
        table.add_row(*row)
    console.print(table)
    for one in report.by_name.values():
        console.print(one.certificate.promise, highlight=False)
    for line in summary(report):
        console.print(line, highlight=False)


def record_specialists(report: SpecialistReport) -> dict[str, Any]:
    """The report as values that JSON can hold."""
    return {
        "result_version": RESULT_VERSION,
        "model": report.model,
        "data": report.data,
        "certified": report.result.certified,
        **(report.result.to_dict() if isinstance(report.result, Specialists) else {"specialists": [report.result.to_dict()]}),
        "test": {name: {"dense": d.to_dict(), "small": s.to_dict()} for name, (d, s) in report.test.items()},
        "latency": {name: [entry.to_dict() for entry in entries] for name, entries in report.latency.items()},
        "panel": None if report.panel is None else {"dense": report.panel[0], "specialists": report.panel[1]},
        "collapse": [vars(entry) for entry in report.collapse],
        "settings": dict(report.settings),
        "data_fingerprints": dict(report.fingerprints),
        "notes": list(summary(report)),
    }


def specialist_files(report: SpecialistReport) -> dict[str, str]:
    """The report's files by name."""
    text = json.dumps(record_specialists(report), indent=2, default=_plain) + "\n"
    return {"result.json": text, "report.html": html_specialists(report)}


def html_specialists(report: SpecialistReport) -> str:
    """The report as the text of an HTML file without external resources."""
    style = resources.files("resect.reporting").joinpath("report.css").read_text(encoding="utf-8")
    title = escape(f"resect: specialists of {report.model} on {report.data}")
    body = "".join((_promises(report), _table(report), _latencies(report), _units(report), _shared(report), _collapse(report)))
    items = "".join(f"<li>{escape(line)}</li>" for line in summary(report))
    body += _section("Notes", f"<ul>{items}</ul>") if items else ""
    prints = {f"{name} data, SHA-256": value for name, value in report.fingerprints.items()}
    rows = [(escape(name), f"<code>{escape(str(value))}</code>") for name, value in {**report.settings, **prints}.items()]
    body += _section("How it was made", _html_table(("", ""), rows)) if rows else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body><main>\n<h1>{title}</h1>\n{body}</main></body>\n</html>\n"
    )


def _promises(report: SpecialistReport) -> str:
    css = "kept" if report.result.certified else "broken"
    word = "Certified" if report.result.certified else "Not all certified"
    lines = "".join(f"<p>{escape(one.certificate.promise)}</p>" for one in report.by_name.values())
    return f'<section class="verdict {css}"><span class="badge">{word}</span>{lines}</section>\n'


def _table(report: SpecialistReport) -> str:
    rows = [[escape(cell) for cell in row] for row in specialist_rows(report)]
    return _section("Specialists" + (", on test" if report.test else ", on certify"), _html_table(COLUMNS, rows))


def _latencies(report: SpecialistReport) -> str:
    rows = [[escape(name), escape(str(entry))] for name, entries in report.latency.items() for entry in entries]
    return _section("Latency beside the dense network", _html_table(("class", "measured"), rows)) if rows else ""


def _units(report: SpecialistReport) -> str:
    """Which units every specialist keeps, group by group, so that columns line up."""
    parts = []
    for name, one in report.by_name.items():
        for group, mask in one.plan.keep.items():
            if group != one.output:
                kept = f"{int(mask.sum()):,} of {len(mask):,}"
                label = f"<p><span>{escape(name)}, {escape(group)}</span><span class='soft'>{kept}</span></p>"
                parts.append(
                    f'<div class="group">{label}<img class="strip" alt="{kept} kept" src="{charts.strip(mask)}"></div>'
                )
    return _section("Units kept", "".join(parts))


def _shared(report: SpecialistReport) -> str:
    if not isinstance(report.result, Specialists):
        return ""
    overlap = report.result.overlap()
    rows = [[escape(name), *(f"{share:.0%}" for share in shares)] for name, shares in zip(overlap.names, overlap.shared)]
    counts = overlap.by_users
    users = _html_table(
        tuple(f"#{n}" for n in ("kept by", *range(len(counts)))), [["units", *(str(count) for count in counts)]]
    )
    caption = (
        '<p class="soft">Share of the row\'s units that the column keeps too; below, units by how many classes keep them.</p>'
    )
    matrix = _html_table(("", *(f"#{name}" for name in overlap.names)), rows)
    return _section("What the classes share", caption + matrix + users)


def _collapse(report: SpecialistReport) -> str:
    rows = [
        [
            str(entry.label),
            *(f"{v:.1%}" for v in (entry.own_before, entry.own_after, entry.others_before, entry.others_after)),
        ]
        for entry in report.collapse
    ]
    columns = ("class", "#own, before", "#own, after", "#others, before", "#others, after")
    title = "Accuracy of the dense network without the tenth of its units most selective for a class"
    return _section(title, _html_table(columns, rows)) if rows else ""
