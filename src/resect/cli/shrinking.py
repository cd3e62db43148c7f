"""`resect shrink`: cut in rounds to a cost, then one recovery."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resect.cli import commands
from resect.cli.commands import (
    Allocation,
    Architecture,
    CertifyFrom,
    Data,
    Delta,
    Drop,
    FloorOption,
    Json,
    LatencyMs,
    Macs,
    Model,
    Out,
    Parameters,
    Quiet,
    Repair,
    Run,
    Scorer,
    Seed,
    app,
)
from resect.errors import GoalError

if TYPE_CHECKING:
    from resect.recovery import Recovery
    from resect.reporting import Report
    from resect.searching import Budget, Floor
    from resect.sources import Source, Splits

Rounds = Annotated[int, typer.Option(min=1, help="Cut in so many rounds; 1 cuts at once.")]
Epochs = Annotated[float, typer.Option(min=0, help="Epochs of recovery on the train split; 0 leaves it out.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps of recovery, in place of epochs.")]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate of the recovery (default: a short sweep).")]
Adapters = Annotated[
    int | None, typer.Option(min=1, help="Recover low-rank adapters of this rank alone (needs the extra `adapters`).")
]


@app.command()
def shrink(
    model: Model,
    data: Data,
    parameters: Parameters = None,
    macs: Macs = None,
    latency_ms: LatencyMs = None,
    rounds: Rounds = 5,
    scorer: Scorer = None,
    repair: Repair = "least_squares",
    allocation: Allocation = None,
    epochs: Epochs = 3.0,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    adapters: Adapters = None,
    floor: FloorOption = None,
    drop: Drop = None,
    delta: Delta = 0.05,
    certify_from: Annotated[
        CertifyFrom, typer.Option(help="train: the network was trained on this resect's train split only.")
    ] = CertifyFrom.test,
    architecture: Architecture = None,
    seed: Seed = 0,
    out: Out = Path("small"),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cut MODEL in rounds to a cost, recover it once, and write it; interrupted, the same command goes on where it was."""
    work = Path(f"{out}.rounds")
    with commands._exit_codes(rounds=work):
        from resect.sources import fitted, load_data, load_model

        goal = _budget({"parameters": parameters, "macs": macs, "latency_ms": latency_ms})
        promise = None if floor is None and drop is None else commands._goal(floor, drop, delta)
        recovery = _recovery(epochs, steps, learning_rate, adapters, seed)
        source = load_model(model, architecture=architecture)
        with commands._status(f"reading {data}", quiet=quiet or json):
            splits = fitted(source.model, load_data(data, seed=seed, certify_from=certify_from.value))
        search = {"scorer": scorer, "repair": repair, "allocation": allocation, "rounds": rounds}
        given = {name: value for name, value in search.items() if value is not None}
        notes = (splits.note,) if promise is not None and splits.note and source.trained_on != splits.train.fingerprint else ()
        run = Run(goal=goal, seed=seed, out=out, json=json, quiet=quiet, search=given, notes=notes)
        commands._finish(_shrunk(source, splits, run, promise, recovery, work), run)


def _budget(limits: dict[str, float | None]) -> Budget:
    from resect.searching import Budget

    named: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    if not named:
        raise GoalError("say how small it is to become: --parameters 0.5, --macs 0.5 or --latency-ms 4.")
    return Budget(**named)


def _recovery(
    epochs: float, steps: int | None, learning_rate: float | None, adapters: int | None, seed: int
) -> Recovery | None:
    from resect.recovery import Recovery

    if not epochs and steps is None:
        return None
    length: dict[str, Any] = {"epochs": epochs} if steps is None else {"steps": steps}
    return Recovery(**length, learning_rate=learning_rate, adapters=adapters, seed=seed)


def _shrunk(
    source: Source, splits: Splits, run: Run, promise: Floor | Budget | None, recovery: Recovery | None, work: Path
) -> Report:
    """Shrink, measure on test, write, and drop the rounds."""
    from resect.exporting import check_writable
    from resect.shrinking import shrink as shrink_network

    check_writable(run.out)
    promised: dict[str, Any] = {} if promise is None else {"floor": promise, "certify": splits.certify}
    found = shrink_network(
        source.model,
        splits.calibrate,
        to=run.goal,  # type: ignore[arg-type]
        recovery=recovery,
        train=splits.train,
        val=splits.search,
        work=work,
        seed=run.seed,
        quiet=run.quiet or run.json,
        **promised,
        **run.search,
    )
    report = commands._written(source, splits, run, found, {})
    shutil.rmtree(work, ignore_errors=True)
    return report
