"""The report in a terminal: what was promised, whether it is kept, and what it cost."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from resect.reporting.report import Report, Units, before_after, best_trials, notes, units, verdict

_BAR = 14


def print_report(report: Report, console: Console | None = None, *, trials: int = 5) -> None:
    """Print `report`, with its best `trials`."""
    (console or Console()).print(rendered(report, trials=trials))


def rendered(report: Report, *, trials: int = 5) -> RenderableType:
    """The report as something rich can print."""
    parts: list[RenderableType] = [_verdict(report), _before_after(report), _units(report)]
    if report.dense is not None and report.small is not None:
        parts.append(_per_class(report))
    if report.found.trials and trials:
        parts.append(_trials(report, trials))
    if notes(report):
        parts.append(Group(*(Text.assemble(("note ", "bold yellow"), note) for note in notes(report))))
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts[:-1]), *parts[-1:])


def _verdict(report: Report) -> RenderableType:
    outcome = verdict(report)
    colour = {True: "green", False: "red", None: "blue"}[outcome.kept]
    lines = [Text.assemble(("Promise   ", "dim"), (outcome.promise, "bold"))]
    lines += [Text(sentence) for sentence in outcome.evidence]
    title = Text(f" {outcome.word} ", style=f"bold {colour}")
    return Panel(
        Group(*lines), title=title, title_align="left", border_style=colour, subtitle=f"{report.model} on {report.data}"
    )


def _before_after(report: Report) -> Table:
    table = Table(
        title="Before and after (ranges: 95 % intervals)", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for name, justify in (("", "left"), ("dense", "right"), ("small", "right"), ("change", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("remains", no_wrap=True)
    for row in before_after(report):
        table.add_row(
            row.name, row.dense, Text(row.small, style="bold"), row.change, Text(row.remark) if row.remark else _bar(row.share)
        )
    return table


def _units(report: Report) -> Table:
    table = Table(title="Units kept", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for entry in units(report):
        table.add_row(entry.group, _kept(entry), _bar(entry.kept / entry.units))
    return table


def _kept(entry: Units) -> str:
    return f"{entry.kept:,} of {entry.units:,}"


def _bar(share: float | None) -> Text:
    if share is None:
        return Text()
    filled = round(share * _BAR)
    return Text.assemble(("█" * filled, "cyan"), ("░" * (_BAR - filled), "dim"), f" {share:.1%}")


def _per_class(report: Report) -> Table:
    assert report.dense is not None
    assert report.small is not None
    table = Table(title="Accuracy on test, by class", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    labels = sorted(report.small.per_class)[:16]
    table.add_column("class")
    for label in labels:
        table.add_column(report.class_name(label), justify="right")
    for name, evaluation in (("dense", report.dense), ("small", report.small)):
        table.add_row(name, *(f"{100 * evaluation.per_class[label]:.1f}" for label in labels))
    return table


def _trials(report: Report, limit: int) -> Table:
    shown = best_trials(report, limit)
    title = (
        f"Best {len(shown)} of {len(report.found.trials)} trials ({report.found.passes:.1f} full passes over the search split)"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, justify in (("trial", "right"), ("allocation", "left"), ("accuracy", "right"), ("examples", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("MACs")
    for trial in shown:
        share = trial.cost.macs / report.found.dense_cost.macs
        seen = f"{trial.examples:,}{' (race decided)' if trial.stopped else ''}"
        table.add_row(str(trial.number), trial.allocation, f"{trial.accuracy:.2%}", seen, _bar(share))
    return table
