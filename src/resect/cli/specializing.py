"""`resect specialize`: one network per class, or for some classes, on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from resect.cli.commands import (
    NOT_CERTIFIED,
    Architecture,
    CertifyFrom,
    Data,
    Delta,
    Drop,
    Evaluations,
    FloorOption,
    Json,
    Model,
    Quiet,
    Seed,
    _as_json,
    _exit_codes,
    _goal,
    _status,
    app,
)
from resect.errors import GoalError

if TYPE_CHECKING:
    from resect.reporting import SpecialistReport
    from resect.sources import Source, Splits
    from resect.specializing import Specialised, Specialists


@dataclass(frozen=True, kw_only=True)
class Task:
    """What specialists are asked for, and where they go."""

    classes: list[str] | None
    options: dict[str, Any]
    seed: int
    out: Path
    json: bool
    quiet: bool
    notes: tuple[str, ...]


@app.command()
def specialize(
    model: Model,
    data: Data,
    each_class: Annotated[bool, typer.Option("--each-class", help="One specialist for every class.")] = False,
    classes: Annotated[
        str | None, typer.Option(help="One specialist for these classes: numbers or names, with commas.")
    ] = None,
    other: Annotated[
        str, typer.Option(help="reject: several classes with a background score, so that strangers are refused.")
    ] = "none",
    floor: FloorOption = None,
    drop: Drop = None,
    false_positives: Annotated[
        float | None, typer.Option(help="Promise: at most this share of other examples is accepted, such as 0.01.")
    ] = None,
    delta: Delta = 0.05,
    method: Annotated[
        str, typer.Option(help="repair, or threshold: the original program's method, to compare with.")
    ] = "repair",
    evaluations: Evaluations = None,
    certify_from: Annotated[
        CertifyFrom, typer.Option(help="train: the network was trained on this resect's train split only.")
    ] = CertifyFrom.test,
    architecture: Architecture = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Directory to write.")] = Path("specialists"),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cut MODEL to the leanest network that answers for one class, or for some, certify it, and write it."""
    with _exit_codes():
        from resect.sources import fitted, load_data, load_model

        if each_class == (classes is not None):
            raise GoalError("say which classes: --each-class for one specialist a class, or --classes 3,8 for one specialist.")
        goal = _goal(floor, 0.01 if floor is None and drop is None else drop, delta)
        source = load_model(model, architecture=architecture)
        with _status(f"reading {data}", quiet=quiet or json):
            splits = fitted(source.model, load_data(data, seed=seed, certify_from=certify_from.value))
        options = {"floor": goal, "false_positives": false_positives, "other": other, "method": method}
        options |= {"evaluations": evaluations} if evaluations is not None else {}
        notes = (splits.note,) if splits.note and source.trained_on != splits.train.fingerprint else ()
        named = None if classes is None else [part.strip() for part in classes.split(",") if part.strip()]
        _run(source, splits, Task(classes=named, options=options, seed=seed, out=out, json=json, quiet=quiet, notes=notes))


def _run(source: Source, splits: Splits, task: Task) -> None:
    from resect.exporting import check_panel_writable, check_writable, save, save_panel
    from resect.reporting import specialist_files
    from resect.specializing import Specialists

    (check_writable if task.classes else check_panel_writable)(task.out)
    report = _report(source, splits, task, _made(source, splits, task))
    origin: dict[str, Any] = {
        "architecture": source.architecture,
        "arguments": source.arguments,
        "seed": task.seed,
        "data": splits.fingerprints,
    }
    files, result = specialist_files(report), report.result
    if isinstance(result, Specialists):
        save_panel(result, task.out, files=files, **origin)
    else:
        save(result.model, result.plan, task.out, found=result, files=files, **origin)
    _tell(report, task)


def _made(source: Source, splits: Splits, task: Task) -> Specialised | Specialists:
    from resect.pipeline import specialize as make

    arguments: dict[str, Any] = {"certify": splits.certify, "names": splits.class_names, "seed": task.seed, **task.options}
    arguments["quiet"] = task.quiet or task.json
    if task.classes is None:
        return make(source.model, splits.calibrate, splits.search, each_class=True, **arguments)
    return make(source.model, splits.calibrate, splits.search, classes=task.classes, **arguments)


def _report(source: Source, splits: Splits, task: Task, result: Specialised | Specialists) -> SpecialistReport:
    from resect.evaluation import latency
    from resect.reporting import SpecialistReport
    from resect.specializing import Specialists, collapse
    from resect.specializing.judging import Seen, rates_of
    from resect.specializing.results import as_mapping
    from resect.tracing import trace

    named, seen = as_mapping(result), Seen.of(source.model, list(splits.test), "test")
    anatomy = next(iter(named.values())).plan.anatomy
    inner = anatomy.without([next(iter(named.values())).output], "the output layer")
    return SpecialistReport(
        result=result,
        model=source.name,
        data=splits.name,
        test={name: rates_of(one.model, seen) for name, one in named.items()},
        latency={name: latency(source.model, one.model, splits.test.inputs[:1]) for name, one in list(named.items())[:10]},
        panel=_together(source, splits, result) if isinstance(result, Specialists) else None,
        collapse=collapse(source.model, trace(source.model, splits.calibrate, inner, grams=False), list(splits.test)),
        settings={"seed": str(task.seed), **{name: str(value) for name, value in task.options.items()}},
        notes=task.notes,
        fingerprints=splits.fingerprints,
    )


def _together(source: Source, splits: Splits, result: Specialists) -> tuple[float, float]:
    """Accuracy of the dense network and of the panel on test."""
    from resect.evaluation import evaluate

    return evaluate(source.model, splits.test).accuracy, evaluate(result.panel(), splits.test).accuracy


def _tell(report: SpecialistReport, task: Task) -> None:
    """Print what was asked for, and exit with 3 where a promise is not certified."""
    from resect.reporting import print_specialists, record_specialists

    if task.json:
        typer.echo(_as_json(record_specialists(report)))
    elif task.quiet:
        for one in report.by_name.values():
            typer.echo(one.certificate.promise)
    else:
        print_specialists(report)
        Console().print(f"\nwritten to {task.out}/ (open {task.out / 'report.html'})", highlight=False)
    if not report.result.certified:
        missed = [name for name, one in report.by_name.items() if not one.certified]
        typer.echo(f"resect: not certified: {', '.join(missed)}; the safest networks found are in {task.out}", err=True)
        raise typer.Exit(NOT_CERTIFIED)
