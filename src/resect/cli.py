"""The command line: every verb is the function of the same name, with its results printed and written.

Exit codes: 0 the floor is certified, 3 it is not (the best network is written all the same), 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.status import Status

from resect.errors import DataError, GoalError, ResectError

if TYPE_CHECKING:
    from resect.reporting import Report
    from resect.searching import Budget, Floor, Found
    from resect.sources import Source, Splits

CERTIFIED, BAD_INPUT, NOT_CERTIFIED, INTERRUPTED = 0, 2, 3, 130

app = typer.Typer(
    name="resect",
    help="Find the smallest network that keeps a promise about accuracy, and prove it on data that the search never saw.",
    epilog="Exit codes: 0 floor certified, 3 floor not certified (the best network is written all the same), 2 bad input.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class CertifyFrom(str, Enum):  # noqa: UP042 (typer shows the values of a str enum on every version)
    train = "train"
    test = "test"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="module:function, or a directory that resect wrote.")]
_DATA = typer.Option(help="digits, a folder or hub id of a Hugging Face image data set, or module:function.")
Data = Annotated[str, _DATA]
FloorOption = Annotated[float | None, typer.Option("--floor", help="Promise: accuracy at least this share, such as 0.95.")]
Macs = Annotated[float | None, typer.Option(help="Budget in place of a promise: share of MACs that may remain, such as 0.5.")]
Parameters = Annotated[float | None, typer.Option(help="Budget: share of parameters that may remain.")]
LatencyMs = Annotated[float | None, typer.Option(help="Budget: milliseconds at batch 1 on this device, one thread.")]
Drop = Annotated[float | None, typer.Option(help="Promise: at most this share below the dense network; 0.01 is one point.")]
Delta = Annotated[float, typer.Option(help="The certificate is wrong with at most this probability.")]
Scorer = Annotated[str | None, typer.Option(help="How units are scored (default: the library's).")]
Repair = Annotated[str, typer.Option(help="none, mean or least_squares.")]
Allocation = Annotated[str | None, typer.Option(help="How cuts are spread over groups; threshold is the seed method's.")]
Evaluations = Annotated[int | None, typer.Option(min=1, help="At most so many candidates are judged.")]
Seconds = Annotated[float | None, typer.Option(min=0, help="At most so many seconds of search.")]
Seed = Annotated[int, typer.Option(help="Seed of splits, training and search.")]
Out = Annotated[Path, typer.Option(help="Directory to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print result.json to standard output instead of the report.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the verdict only.")]
Architecture = Annotated[
    str | None, typer.Option(help="module:function that makes the dense network of a saved directory, where that is your code.")
]
Shape = Annotated[str | None, typer.Option(help="Shape of one batch of inputs, such as 1,3,32,32.")]


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a cut is asked for: the promise, how to search, what to print and where to write."""

    goal: Floor | Budget
    seed: int
    out: Path
    json: bool
    quiet: bool
    search: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def aim(self) -> dict[str, Any]:
        """The goal under the name that `prune` has for it."""
        return {"floor" if hasattr(self.goal, "delta") else "budget": self.goal}

    @property
    def trials(self) -> Path:
        """Where trials are kept while the search goes on; what an interruption leaves."""
        return Path(f"{self.out}.trials.jsonl")


@app.command()
def demo(
    data: Data = "digits",
    floor: FloorOption = None,
    drop: Drop = None,
    delta: Delta = 0.05,
    seed: Seed = 0,
    out: Out = Path("out"),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a small network, cut it to the leanest that keeps 95 % accuracy, certify it, and write both."""
    with _exit_codes():
        from resect.sources import load_data

        goal = _goal(0.95 if floor is None and drop is None else floor, drop, delta)
        with _status(f"reading {data}", quiet=quiet or json):
            splits = load_data(data, seed=seed)
        source = _trained(splits, seed, quiet=quiet or json)
        run = Run(goal=goal, seed=seed, out=out / "small", json=json, quiet=quiet)
        with _exit_codes(run.trials):
            _finish(_cut(source, splits, run, dense_out=out / "dense"), run)


@app.command()
def prune(
    model: Model,
    data: Data,
    floor: FloorOption = None,
    drop: Drop = None,
    macs: Macs = None,
    parameters: Parameters = None,
    latency_ms: LatencyMs = None,
    delta: Delta = 0.05,
    scorer: Scorer = None,
    repair: Repair = "least_squares",
    allocation: Allocation = None,
    evaluations: Evaluations = None,
    seconds: Seconds = None,
    certify_from: Annotated[
        CertifyFrom, typer.Option(help="train: the network was trained on this resect's train split only.")
    ] = CertifyFrom.test,
    architecture: Architecture = None,
    seed: Seed = 0,
    out: Out = Path("small"),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cut MODEL to the leanest network that keeps the floor, certify it, and write it; or to the best a budget allows."""
    with _exit_codes():
        from resect.sources import fitted, load_data, load_model

        goal = _goal(floor, drop, delta, {"macs": macs, "parameters": parameters, "latency_ms": latency_ms})
        source = load_model(model, architecture=architecture)
        with _status(f"reading {data}", quiet=quiet or json):
            splits = fitted(source.model, load_data(data, seed=seed, certify_from=certify_from.value))
        search = {"scorer": scorer, "repair": repair, "allocation": allocation, "evaluations": evaluations, "seconds": seconds}
        given = {name: value for name, value in search.items() if value is not None}
        known = source.trained_on == splits.train.fingerprint
        notes = (splits.note,) if splits.note and not known else ()
        run = Run(goal=goal, seed=seed, out=out, json=json, quiet=quiet, search=given, notes=notes)
        with _exit_codes(run.trials):
            _finish(_cut(source, splits, run), run)


@app.command()
def inspect(
    model: Model,
    data: Annotated[str | None, _DATA] = None,
    shape: Shape = None,
    architecture: Architecture = None,
    json: Json = False,
) -> None:
    """Show what can be removed from MODEL, what goes with it, and what stays and why."""
    with _exit_codes():
        from resect.anatomy import dissect
        from resect.sources import load_model

        source = load_model(model, architecture=architecture)
        anatomy = dissect(source.model, _example(source, model, data, shape))
        typer.echo(_as_json(anatomy.to_json()) if json else str(anatomy))


@app.command()
def bench(
    directory: Annotated[Path, typer.Argument(help="A directory that resect wrote.")],
    batches: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,64",
    rounds: Annotated[int, typer.Option(min=1)] = 30,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    architecture: Architecture = None,
    json: Json = False,
) -> None:
    """Measure the network in DIRECTORY against its dense architecture, side by side."""
    with _exit_codes():
        from resect.evaluation import latency
        from resect.exporting import load, make_dense, make_example

        dense, small = make_dense(directory, architecture), load(directory, architecture)
        sizes = _integers(batches, "--batches")
        measured = latency(dense, small, make_example(directory), batches=sizes, rounds=rounds, threads=threads)
        typer.echo(_as_json([entry.to_dict() for entry in measured]) if json else "\n".join(map(str, measured)))


def main() -> NoReturn:
    """Run the command line and exit."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(CERTIFIED)


@contextmanager
def _exit_codes(trials: Path | None = None) -> Iterator[None]:
    """Errors of the user's making are one line and exit code 2; an interruption is 130 and keeps the trials that ended."""
    try:
        yield
    except ResectError as error:
        _drop_if_empty(trials)
        typer.echo(f"resect: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        kept = "" if _drop_if_empty(trials) else f"; the trials that ended are in {trials}"
        typer.echo(f"resect: interrupted, nothing half-written is left{kept}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _drop_if_empty(trials: Path | None) -> bool:
    """Whether there are no trials to keep; an empty file of them is removed."""
    if trials is None or not trials.exists():
        return True
    if trials.stat().st_size:
        return False
    trials.unlink()
    return True


def _goal(
    accuracy: float | None, drop: float | None, delta: float, budget: Mapping[str, float | None] | None = None
) -> Floor | Budget:
    from resect.searching import Budget, Floor

    limits = {name: value for name, value in (budget or {}).items() if value is not None}
    if sum((accuracy is not None, drop is not None, bool(limits))) != 1:
        raise GoalError(
            "say what must stay true: --floor 0.95 (accuracy at least 95 %) or --drop 0.01 (at most one point lost); "
            "or name a budget in its place: --macs 0.5, --parameters 0.5, --latency-ms 4."
        )
    return Budget(**limits) if limits else Floor(accuracy=accuracy, drop=drop, delta=delta)


def _status(text: str, *, quiet: bool) -> Status:
    """What is going on, on standard error, where somebody watches."""
    return Console(stderr=True, quiet=quiet).status(text)


def _trained(splits: Splits, seed: int, *, quiet: bool) -> Source:
    """The demonstration's network for these data, trained on their train split."""
    from resect.sources import Source
    from resect.sources.demo import ARCHITECTURE, mlp, recipe, train

    widths, settings = recipe(splits)
    name = "-".join(map(str, widths))
    with _status(f"training {name} on {splits.train.examples:,} examples", quiet=quiet) as status:
        model = train(
            mlp(widths, seed),
            splits.train,
            seed=seed,
            progress=lambda epoch, loss: status.update(f"epoch {epoch} of {settings['epochs']}, loss {loss:.4f}"),
            **settings,
        )
    return Source(model=model, name=name, architecture=ARCHITECTURE, arguments={"widths": list(widths)})


def _cut(source: Source, splits: Splits, run: Run, *, dense_out: Path | None = None) -> Report:
    """Prune, measure on test, and write the network, its report, and the dense one where that is asked for."""
    from resect.exporting import check_writable, save
    from resect.pipeline import prune as prune_network
    from resect.plan import Plan
    from resect.reporting import report_files

    check_writable(run.out)
    found = prune_network(
        source.model,
        splits.calibrate,
        splits.search,
        **run.aim,
        certify=splits.certify,
        trials=run.trials,
        seed=run.seed,
        quiet=run.quiet or run.json,
        **run.search,
    )
    report = _report(source, splits, run, found)
    files = {**report_files(report), "trials.jsonl": run.trials.read_text(encoding="utf-8")}
    origin: dict[str, Any] = {"architecture": source.architecture, "arguments": source.arguments, "seed": run.seed}
    save(found.model, found.plan, run.out, found=found, data=report.fingerprints, files=files, **origin)
    run.trials.unlink()
    if dense_out is not None:
        save(source.model, Plan.all(found.plan.anatomy), dense_out, data=report.fingerprints, **origin)
    return report


def _report(source: Source, splits: Splits, run: Run, found: Found) -> Report:
    from resect.evaluation import evaluate, latency
    from resect.reporting import Report
    from resect.tracing import trace

    return Report(
        found=found,
        model=source.name,
        data=splits.name,
        dense=evaluate(source.model, splits.test),
        small=evaluate(found.model, splits.test),
        latency=latency(source.model, found.model, splits.test.inputs[:1]),
        trace=trace(source.model, splits.calibrate, found.plan.anatomy, grams=False, quiet=True),
        class_names=splits.class_names,
        settings={"goal": str(run.goal), "seed": str(run.seed), **run.search},
        notes=run.notes,
        fingerprints=splits.fingerprints,
    )


def _finish(report: Report, run: Run) -> None:
    """Print what was asked for, and exit with 3 where the floor is not certified."""
    from resect.reporting import print_report, record
    from resect.reporting.report import verdict

    outcome = verdict(report)
    if run.json:
        typer.echo(_as_json(record(report)))
    elif run.quiet:
        typer.echo(f"{outcome.word}: {outcome.promise}")
    else:
        print_report(report)
        Console().print(f"\nwritten to {run.out}{'/'} (open {run.out / 'report.html'})", highlight=False)
    if outcome.kept is False:
        typer.echo(f"resect: the floor is not certified; the best network found is in {run.out}", err=True)
        raise typer.Exit(NOT_CERTIFIED)


def _example(source: Source, model: str, data: str | None, shape: str | None) -> Any:
    """An input for `inspect`: from the data, the shape, or the saved directory's own record."""
    import torch

    from resect.exporting import is_saved, make_example
    from resect.sources import fitted, load_data

    if data is not None:
        return fitted(source.model, load_data(data)).search.inputs[:2]
    if shape is not None:
        return torch.zeros(_integers(shape, "--shape"))
    if is_saved(model):
        positional, keyword = make_example(model)
        return keyword or positional
    raise DataError("to watch the network once, its inputs must be known: give --shape 1,3,32,32, or --data.")


def _integers(text: str, option: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise DataError(f"{option} {text!r} is not a list of positive whole numbers; write {option} 1,64.")
    return numbers


def _as_json(value: Any) -> str:
    import numpy as np

    return json.dumps(
        value, indent=2, default=lambda item: item.tolist() if isinstance(item, np.generic | np.ndarray) else str(item)
    )


# Verbs that have a file of their own register themselves with the app above.
from resect import cli_specialize  # noqa: E402, F401
