"""The whole job on MNIST: what the search costs, what it delivers, and how fast the cut network is.

    python benchmarks/search.py --data FOLDER [--seeds 5]

Per seed a 784-512-256-10 network is trained on the train split, and `resect.prune` is run with its defaults for each floor:
calibrate, search and certify splits as the command line makes them, 10,000 test digits opened at the end. Passes are forward
passes of the dense network over the search split, with every candidate charged by its MACs and by the examples its race needed.
Latency: one thread, CPU time, dense and cut interleaved, median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from publish import data_folder, publish, spread, table
from resect import Floor, evaluate, latency, prune
from resect.sources import Splits, load_data
from resect.sources.demo import mlp, recipe, train

FLOORS = (Floor(accuracy=0.95), Floor(accuracy=0.97), Floor(drop=0.005), Floor(drop=0.01))


def one_run(model: Any, splits: Splits, floor: Floor, seed: int, dense: float, allocation: str) -> dict[str, Any]:
    start = time.perf_counter()
    found = prune(
        model,
        splits.calibrate,
        splits.search,
        certify=splits.certify,
        floor=floor,
        seed=seed,
        allocation=allocation,
        minimise="units",
    )
    seconds = time.perf_counter() - start
    small = evaluate(found.model, splits.test).accuracy
    times = latency(model, found.model, splits.test.inputs[:1], batches=(1, 64))
    return {
        "seed": seed,
        "floor": str(floor),
        "allocation": allocation,
        "certified": found.certified,
        "removed": 1 - found.plan.share,
        "kept": found.plan.kept,
        "macs": found.cost.macs / found.dense_cost.macs,
        "test": small,
        "drop": dense - small,
        "kept_on_test": small >= floor.threshold(dense),
        "passes": found.passes,
        "trials": len(found.trials),
        "seconds": seconds,
        "latency": [entry.to_dict() for entry in times],
        "speedup": [entry.ratio for entry in times],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder or hub id of MNIST (default $RESECT_DATA/mnist)")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    splits, runs = load_data(data_folder("mnist", arguments.data), seed=0), []
    for seed in range(arguments.seeds):
        widths, settings = recipe(splits)
        model = train(mlp(widths, seed), splits.train, seed=seed, **settings)
        dense = evaluate(model, splits.test).accuracy
        for floor in FLOORS:
            for allocation in ("auto", "threshold"):
                runs.append(one_run(model, splits, floor, seed, dense, allocation))
                print(
                    {key: runs[-1][key] for key in ("seed", "floor", "allocation", "certified", "removed", "drop", "passes")},
                    flush=True,
                )
    publish("search", {"runs": runs}, report(runs))


def report(runs: list[dict[str, Any]]) -> str:
    rows = []
    for floor in map(str, FLOORS):
        for allocation in ("auto", "threshold"):
            mine = [run for run in runs if run["floor"] == floor and run["allocation"] == allocation]
            rows.append(
                [
                    floor,
                    allocation,
                    f"{sum(run['certified'] for run in mine)} of {len(mine)}",
                    f"{sum(run['kept_on_test'] for run in mine)} of {len(mine)}",
                    spread([run["removed"] for run in mine], 1, 100),
                    spread([run["macs"] for run in mine], 3),
                    spread([run["drop"] for run in mine], 2, 100),
                    spread([run["passes"] for run in mine], 1),
                    spread([run["seconds"] for run in mine], 1),
                    *(spread([run["speedup"][i] for run in mine], 1) for i in (0, 1)),
                ]
            )
    columns = [
        "floor", "allocation", "certified", "kept on test", "neurons removed, %", "MACs kept", "test loss, points",
        "search passes", "seconds", "speedup, batch 1", "speedup, batch 64",
    ]  # fmt: skip
    head = "# MNIST 784-512-256-10: the whole job, from a trained network to a certified one\n\n"
    return head + "Mean ± standard deviation over seeds. Made by benchmarks/search.py.\n\n" + table(columns, rows)


if __name__ == "__main__":
    main()
