"""The report as one HTML file that needs nothing else: readable offline, in light and dark, on paper and on a phone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from resect.reporting import charts
from resect.reporting.report import (
    Report,
    Row,
    before_after,
    best_trials,
    notes,
    units,
    verdict,
)

if TYPE_CHECKING:
    from resect.anatomy import Group
    from resect.searching import Trial
    from resect.tracing import Trace

_MOST_TRIALS = 200


def html_report(report: Report) -> str:
    """The report as the text of an HTML file without external resources."""
    style = resources.files("resect.reporting").joinpath("report.css").read_text(encoding="utf-8")
    body = "".join(
        section(report) for section in (_verdict, _cards, _table, _curve, _units, _classes, _activity, _trials, _notes)
    )
    title = escape(f"resect: {report.model} on {report.data}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body><main>\n<h1>{title}</h1>\n{body}</main></body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n"


def _verdict(report: Report) -> str:
    outcome = verdict(report)
    css = {True: "kept", False: "broken", None: ""}[outcome.kept]
    evidence = "".join(f"<p>{escape(sentence)}</p>" for sentence in outcome.evidence)
    return (
        f'<section class="verdict {css}"><span class="badge">{escape(outcome.word)}</span>'
        f'<p class="promise">{escape(outcome.promise)}</p>{evidence}</section>\n'
    )


def _cards(report: Report) -> str:
    """The figures that people look for first."""
    cards = [
        (f"{row.share:.1%}", f"of {row.name} remain")
        for row in before_after(report)
        if row.share is not None and row.name in ("units", "parameters", "MACs")
    ]
    if report.small is not None:
        cards.append((f"{report.small.accuracy:.2%}", "accuracy on test"))
    if report.latency:
        first = report.latency[0]
        cards.append((f"{first.ratio:.2f}x" if first.faster else "no gain", f"speed at batch {first.batch}"))
    shown = "".join(f'<div class="card"><b>{escape(b)}</b><span class="soft">{escape(text)}</span></div>' for b, text in cards)
    return f'<div class="cards">{shown}</div>\n'


def _html_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; columns whose name starts with "#" hold numbers."""
    numeric = [' class="number"' if name.startswith("#") else "" for name in columns]
    head = "".join(f"<th{css}>{escape(name.lstrip('#'))}</th>" for css, name in zip(numeric, columns))
    body = "".join("<tr>" + "".join(f"<td{css}>{cell}</td>" for css, cell in zip(numeric, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _table(report: Report) -> str:
    def cells(row: Row) -> list[str]:
        texts = (row.name, row.dense, row.small, row.change)
        last = f'<span class="soft">{escape(row.remark)}</span>' if row.share is None else _bar(row.share)
        return [*map(escape, texts), last]

    table = _html_table(("", "#dense", "#small", "#change", "remains"), map(cells, before_after(report)))
    caption = '<p class="soft">Ranges are 95 % intervals (Clopper-Pearson); latency is the median over rounds.</p>'
    return _section("Before and after", table + caption)


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span> <span class="soft">{share:.1%}</span>'


def _curve(report: Report) -> str:
    """Every trial by size and accuracy; for a promised drop, by the difference to the dense network on the same examples."""
    floor, found = report.found.floor, report.found
    relative = floor is not None and floor.drop is not None
    points = [*_trial_points(report, found.dense_search_accuracy if relative else 0.0), *_certify_points(report, relative)]
    if len(points) < 2:
        return ""
    keys = (
        ("dense", "dense network"),
        ("trial", "trial, on search"),
        ("below", "trial below the floor"),
        ("delivered", "delivered, on certify" + ("" if relative else ", with its lower bound")),
    )
    shown = {point.kind for point in points}
    legend = "".join(
        f'<span class="key"><svg viewBox="0 0 14 14"><circle class="{css}" cx="7" cy="7" r="5"/></svg>{text}</span>'
        for css, text in keys
        if css in shown
    )
    line = None if floor is None else floor.threshold(0.0 if relative else found.dense_search_accuracy)
    chart = charts.curve(points, floor=line, cost="MACs", relative=relative)
    title = "Size, and points of accuracy above or below the dense network" if relative else "Size and accuracy of every trial"
    return _section(title, f'<figure class="scroll">{chart}</figure><div>{legend}</div>')


def _trial_points(report: Report, zero: float) -> Iterable[charts.Point]:
    for trial in sorted(report.found.trials, key=lambda trial: trial.above):
        share = trial.cost.macs / report.found.dense_cost.macs
        where = f"{share:.1%} of MACs"
        label = f"trial {trial.number}, {trial.allocation}: {trial.accuracy:.2%} of {trial.examples:,} examples, {where}"
        yield charts.Point(share=share, accuracy=trial.accuracy - zero, kind="trial" if trial.above else "below", label=label)


def _certify_points(report: Report, relative: bool) -> Iterable[charts.Point]:
    certificate, found = report.found.certificate, report.found
    if certificate is None or certificate.dense_correct is None or not certificate.labelled:
        return
    dense = certificate.dense_correct / certificate.examples
    zero, low = (dense, None) if relative else (0.0, certificate.lower_bound)
    yield charts.Point(share=1.0, accuracy=dense - zero, kind="dense", label=f"dense network: {dense:.2%} on certify")
    share = found.cost.macs / found.dense_cost.macs
    label = f"delivered: {certificate.accuracy:.2%} on certify, {share:.1%} of MACs"
    yield charts.Point(share=share, accuracy=certificate.accuracy - zero, kind="delivered", label=label, low=low)


def _units(report: Report) -> str:
    groups = "".join(
        f'<div class="group"><p><span>{escape(entry.group)}</span>'
        f'<span class="soft">{entry.kept:,} of {entry.units:,}</span></p>{_strip(entry.mask)}</div>'
        for entry in units(report)
    )
    caption = '<p class="soft">One mark a unit, in the order of the dense network; pale units were cut.</p>'
    return _section("Units kept", caption + groups)


def _strip(mask: np.ndarray) -> str:
    kept = f"{int(mask.sum())} of {len(mask)} units kept"
    return f'<img class="strip" alt="{kept}" src="{charts.strip(mask)}">'


def _classes(report: Report) -> str:
    if report.dense is None or report.small is None:
        return ""
    before, after, counts = report.dense.per_class, report.small.per_class, report.small.counts

    def cells(label: int) -> list[str]:
        change = 100 * (after[label] - before[label])
        worse = f'<span class="worse">{change:+.1f}</span>' if change < 0 else f"{change:+.1f}"
        name = escape(report.class_name(label))
        return [name, f"{counts[label]:,}", f"{before[label]:.1%}", f"{after[label]:.1%}", worse]

    table = _html_table(("class", "#examples", "#dense", "#small", "#change, points"), map(cells, sorted(after)))
    return _section("Accuracy on test, by class", table)


def _activity(report: Report) -> str:
    if report.trace is None or not report.trace.labelled:
        return ""
    caption = (
        '<p class="soft">How strongly each unit (column) responds to each class (row), relative to the class that moves it '
        "most, which also orders the units. Blank columns never respond. The strip below shows which units stay.</p>"
    )
    figures = "".join(_map(report, report.trace, group) for group in report.trace.anatomy.groups)
    return _section("What every unit responds to", caption + figures)


def _map(report: Report, trace: Trace, group: Group) -> str:
    strength = np.sqrt(trace.evidence(group).over_readers("mean_square"))
    order = charts.by_preference(strength)
    names = "".join(f"<span>{escape(report.class_name(label))}</span>" for label in range(len(strength)))
    picture = f'<img alt="response of every unit by class" src="{charts.activity(strength[:, order])}">'
    kept = f'<span class="soft">kept</span>{_strip(report.found.plan.keep[group.name][order])}'
    title = f"<figcaption>{escape(group.name)}, {group.units:,} units</figcaption>"
    return f'<figure>{title}<div class="map"><div class="names">{names}</div>{picture}{kept}</div></figure>'


def _trials(report: Report) -> str:
    found = report.found
    if not found.trials:
        return ""

    def cells(trial: Trial) -> list[str]:
        share, kept = trial.cost.macs / found.dense_cost.macs, " · ".join(map(str, trial.kept.values()))
        seen = f"{trial.examples:,}"
        return [str(trial.number), escape(trial.allocation), f"{trial.accuracy:.2%}", seen, _bar(share), escape(kept)]

    columns = ("#trial", "allocation", "#accuracy, search", "#examples", "MACs", "units kept")
    table = _html_table(columns, map(cells, best_trials(report, _MOST_TRIALS)))
    summary = f"All trials ({len(found.trials)}, {found.passes:.1f} full passes over the search split, {found.seconds:.1f} s)"
    return f"<section><details><summary>{escape(summary)}</summary><div>{table}</div></details></section>\n"


def _notes(report: Report) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes(report))
    text = _section("Notes", f"<ul>{items}</ul>") if items else ""
    prints = {f"{name} data, SHA-256": value for name, value in report.fingerprints.items()}
    rows = [(escape(name), f"<code>{escape(str(value))}</code>") for name, value in {**report.settings, **prints}.items()]
    return text + (_section("How it was made", _html_table(("", ""), rows)) if rows else "")
