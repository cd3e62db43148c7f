"""How many hidden neurons of a 784-512-256-10 network can go without any gradient step, for every scorer and repair.

    python benchmarks/mnist.py --data FOLDER [--seeds 5] [--only reconstruction,activation_weight]

Per seed: a network is trained normally (Adam, one cycle, 10 epochs) on the train split, traced on 20,000 of its training
digits, and cut along the knapsack's path for the number of neurons, which the trace alone decides: no accuracy is looked at on
the way. Every point of the path is judged on the 10,000 test digits. The table gives the largest share of the 768 hidden
neurons removed at a test loss of at most 0.1, 0.2, 0.5 and 1.0 points, read off the path from the dense end: the first point
that loses more ends the reading. `sequential` is `least_squares` plus the final repair in execution order, `two in turn` the
same with each layer and the one it feeds fitted in turn, which is what `prune` and `fit` do.

As a yardstick, networks with the widths of the reconstruction path at 80 % are trained from scratch with the same recipe.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from publish import data_folder, publish, spread, table
from resect import Plan, cut, dissect, evaluate, repair, repair_sequentially, score, trace
from resect.scoring import SCORERS, Scores, needs
from resect.searching.allocation import Curves, Knapsack, measure
from resect.searching.finishing import ALTERNATIONS
from resect.sources import Splits, load_data
from resect.sources.demo import mlp, recipe, train

REMOVED = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.725, 0.75, 0.775, 0.8, 0.825, 0.85, 0.875, 0.9, 0.925, 0.95)
LOSSES = (0.001, 0.002, 0.005, 0.010)
REPAIRS = ("none", "mean", "least_squares", "sequential", "two in turn")
# Both start from the least-squares repair of the plan.
IN_ORDER = {"sequential": 0, "two in turn": ALTERNATIONS}


def plans_by_price(knapsack: Knapsack) -> list[Plan]:
    """The knapsack's path from dense to lean."""
    return [knapsack.plan(price) for price in np.geomspace(1e-4, 1e3, 300)]


def plans_of(scores: Scores, method: str) -> list[Plan]:
    """One plan per share in REMOVED, off the knapsack's path."""
    knapsack = Knapsack(scores=scores, curves=Curves.of(scores, method, levels=96), measure=measure(scores.anatomy, "units"))
    plans = plans_by_price(knapsack)
    return [next((plan for plan in plans if plan.share <= 1 - removed + 0.002), plans[-1]) for removed in REMOVED]


def path(
    model: nn.Module, scores: Scores, plans: list[Plan], method: str, splits: Splits, calib: list[Any]
) -> list[dict[str, Any]]:
    """Test accuracy along the path of one scorer and one repair."""
    points = []
    for plan in plans:
        small = cut(model, plan, weights=repair(scores.trace, plan, "least_squares" if method in IN_ORDER else method).weights)
        if method in IN_ORDER:
            small, _ = repair_sequentially(model, small, plan, calib, alternations=IN_ORDER[method])
        points.append(
            {
                "removed": 1 - plan.share,
                "kept": plan.kept,
                "test": evaluate(small, splits.test).accuracy,
                "cost": plan.cost().macs,
            }
        )
    return points


def largest(points: list[dict[str, Any]], dense: float, loss: float) -> float:
    """Share removed at the last point before the first that loses more than `loss`."""
    removed = 0.0
    for point in points:
        if dense - point["test"] > loss + 1e-9:
            break
        removed = point["removed"]
    return removed


def one_seed(splits: Splits, seed: int, names: list[str]) -> dict[str, Any]:
    widths, settings = recipe(splits)
    start = time.perf_counter()
    model = train(mlp(widths, seed), splits.train, seed=seed, **settings)
    trained = time.perf_counter() - start
    calib = [(splits.train.inputs[r], splits.train.labels[r]) for r in torch.arange(20_000).split(500)]
    seen = trace(model, calib, dissect(model, splits.train.inputs[:2]), gradients=True)
    dense = evaluate(model, splits.test).accuracy
    result: dict[str, Any] = {"seed": seed, "dense": dense, "train_seconds": trained, "paths": {}}
    for name in names:
        scores = score(seen, name, seed=seed)
        plans: list[Plan] = []
        for method in REPAIRS:
            plans = plans if method in IN_ORDER else plans_of(scores, method)
            result["paths"][f"{name}/{method}"] = path(model, scores, plans, method, splits, calib)
        best = [largest(result["paths"][f"{name}/{m}"], dense, 0.002) for m in REPAIRS]
        print(f"seed {seed} dense {dense:.4f} {name}: removed at .2 {dict(zip(REPAIRS, np.round(best, 3)))}", flush=True)
    if "reconstruction" in names:
        point = next(p for p in result["paths"]["reconstruction/least_squares"] if p["removed"] >= 0.798)
        shape = (widths[0], *point["kept"].values(), widths[-1])
        scratch = train(mlp(shape, seed), splits.train, seed=seed, **settings)
        result["scratch"] = {"widths": shape, "test": evaluate(scratch, splits.test).accuracy}
    return result


def report(seeds: list[dict[str, Any]], names: list[str]) -> str:
    rows = []
    for name in names:
        for method in REPAIRS:
            key = f"{name}/{method}"
            cells = [spread([largest(s["paths"][key], s["dense"], loss) for s in seeds], 1, 100) for loss in LOSSES]
            at80 = [s["dense"] - next(p for p in s["paths"][key] if p["removed"] >= 0.798)["test"] for s in seeds]
            at90 = [s["dense"] - next(p for p in s["paths"][key] if p["removed"] >= 0.898)["test"] for s in seeds]
            rows.append([name, method, *cells, spread(at80, 2, 100), spread(at90, 2, 100)])
    columns = [
        "scorer",
        "repair",
        *(f"removed at ≤ {100 * loss:.1f} pt, %" for loss in LOSSES),
        "loss at 80 %, pt",
        "loss at 90 %, pt",
    ]
    dense = spread([s["dense"] for s in seeds], 2, 100)
    text = [
        "# MNIST 784-512-256-10: hidden neurons removed without a gradient step\n",
        f"{len(seeds)} seeds (network and scorer), mean ± standard deviation. Dense test accuracy {dense} %.",
        "Made by benchmarks/mnist.py.\n",
        table(columns, rows),
    ]
    if all("scratch" in s for s in seeds):
        loss = spread([s["dense"] - s["scratch"]["test"] for s in seeds], 2, 100)
        text.append(
            f"\nTrained from scratch at the widths of reconstruction's 80 % point, same recipe: {loss} points below dense."
        )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder or hub id of MNIST (default $RESECT_DATA/mnist)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", help="scorers, with commas (default: all)")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else sorted(name for name in SCORERS if not needs(name).get("states"))
    splits = load_data(data_folder("mnist", arguments.data), seed=0)
    seeds = [one_seed(splits, seed, names) for seed in range(arguments.seeds)]
    publish("mnist" if not arguments.only else f"mnist-{'-'.join(names)}", {"seeds": seeds}, report(seeds, names))


if __name__ == "__main__":
    main()
