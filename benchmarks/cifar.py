"""Trained CIFAR-10 ResNets cut to a budget without any gradient step: accuracy over the whole curve, and what matters for it.

    python benchmarks/cifar.py --depth 20 --part budget      # the budget of a published notebook, 3 calibration seeds
    python benchmarks/cifar.py --depth 20 --part curve       # 10 to 70 % of the MACs removed
    python benchmarks/cifar.py --depth 20 --part scorers     # scorers x repairs at the budget, 1 seed

Weights from $RESECT_WEIGHTS (trained elsewhere on all 50,000 training images), images from $RESECT_DATA. Calibration images are
drawn from the training set by the seed, without labels, each with its mirror image; nothing is chosen by accuracy. The 10,000
test images are opened for the figures only. FLOPs are two per multiply-accumulate.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from networks import cifar_images, trained_resnet
from publish import RESULTS, data_folder, publish, spread, table
from resect import Budget, cut, dissect, evaluate, fit, repair, score, trace
from resect.repair import reestimate, repair_sequentially
from resect.searching.allocation import Curves, Knapsack, against
from resect.searching.finishing import ALTERNATIONS
from resect.searching.sensitivity import from_dense, weighed
from resect.sources.huggingface import load_images

# At most 59.3M of 81.1M FLOPs and 174k of 268k parameters, as in the notebook (REFERENCES: 60.4 % before any training).
NOTEBOOK = Budget(macs=59.3 / 81.1, parameters=174 / 268)
HALF = Budget(macs=1 / 2.1)


def images(
    count: int, seed: int, *, mirrored: bool = True
) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Calibration batches drawn from the training images, and the test set in batches."""
    train, test, _ = load_images(data_folder("cifar10"))
    assert test is not None
    rows = torch.randperm(train.examples, generator=torch.Generator().manual_seed(seed))[:count]
    chosen = cifar_images(train.inputs[rows])
    if mirrored:
        chosen = torch.stack([chosen, chosen.flip(3)], dim=1).flatten(0, 1)
    return list(chosen.split(250)), list(zip(cifar_images(test.inputs).split(500), test.labels.split(500)))


def budget_runs(depth: int, budgets: dict[str, Budget], seeds: int, count: int, sweeps: int) -> list[dict[str, Any]]:
    model, runs = trained_resnet(depth), []
    for seed in range(seeds):
        calib, test = images(count, seed)
        start = time.process_time()
        seen = trace(model, calib, dissect(model, calib[0][:2]))
        scores = score(seen, "reconstruction")
        traced = time.process_time() - start
        for name, budget in budgets.items():
            start = time.process_time()
            found = fit(model, scores, budget, calib, sweeps=sweeps, seed=seed)
            seconds = time.process_time() - start + traced
            result = evaluate(found.model, test)
            shares = found.cost.share_of(found.dense_cost)
            runs.append(
                {"depth": depth, "seed": seed, "budget": name, "test": result.accuracy, "cpu_seconds": seconds, **shares}
            )
            runs[-1] |= {"kept": found.plan.kept, "images": count, "flops": 2 * found.cost.macs, "count": found.cost.parameters}
            print(
                {key: runs[-1][key] for key in ("depth", "seed", "budget", "test", "macs", "parameters", "cpu_seconds")},
                flush=True,
            )
    return runs


def scorer_runs(depth: int, budget: Budget, names: list[str], count: int) -> list[dict[str, Any]]:
    """Every scorer with every repair at one budget; the allocation is the knapsack of that scorer's own curves."""
    model, runs = trained_resnet(depth), []
    calib, test = images(count, 0)
    anatomy = dissect(model, calib[0][:2])
    train, _, _ = load_images(data_folder("cifar10"))
    rows = torch.randperm(train.examples, generator=torch.Generator().manual_seed(0))[:count]
    labelled = list(zip(cifar_images(train.inputs[rows]).split(250), train.labels[rows].split(250)))
    with_labels = trace(model, labelled, anatomy, gradients=True)
    for name in names:
        scores = score(with_labels, name)
        curves, _ = weighed(Curves.of(scores, "least_squares"), model, scores, from_dense(model, calib), "least_squares")
        curves = curves.filled(anatomy)
        plan = Knapsack(scores=scores, curves=curves, measure=against(anatomy, budget)).within(1.0)
        networks = {
            m: cut(model, plan, weights=repair(with_labels, plan, m).weights) for m in ("none", "mean", "least_squares")
        }
        networks["none + batch norm"] = reestimate(model, networks["none"], calib)[0]
        networks["sequential"] = repair_sequentially(model, networks["least_squares"], plan, calib)[0]
        networks["sequential, two in turn"] = repair_sequentially(
            model, networks["least_squares"], plan, calib, alternations=ALTERNATIONS
        )[0]
        for method, network in networks.items():
            accuracy = evaluate(network, test).accuracy
            runs.append({"scorer": name, "repair": method, "test": accuracy, "kept": plan.kept, "images": count})
        print(name, {run["repair"]: run["test"] for run in runs[-len(networks) :]}, flush=True)
    return runs


def dense_accuracy(depth: int) -> float:
    return evaluate(trained_resnet(depth), images(1, 0)[1]).accuracy


def report(depth: int, part: str, dense: float, runs: list[dict[str, Any]]) -> str:
    title = f"# ResNet-{depth} on CIFAR-10, no gradient step: {part}"
    head = f"{title}\n\nDense: {100 * dense:.2f} % test. Made by benchmarks/cifar.py.\n\n"
    if part == "scorers":
        methods = list(dict.fromkeys(run["repair"] for run in runs))
        names = list(dict.fromkeys(run["scorer"] for run in runs))
        found = {(run["scorer"], run["repair"]): run["test"] for run in runs}
        head += f"One calibration seed, {runs[0]['images']} images and their mirror images; the budget of `--part budget`.\n\n"
        return head + table(["scorer", *methods], [[n, *(f"{100 * found[n, m]:.2f}" for m in methods)] for n in names])
    rows = []
    for name in dict.fromkeys(run["budget"] for run in runs):
        mine = [run for run in runs if run["budget"] == name]
        cells = [spread([run[key] for run in mine], 1, 100) for key in ("macs", "parameters")]
        rows.append(
            [name, *cells, spread([run["test"] for run in mine], 2, 100), spread([run["cpu_seconds"] for run in mine], 0)]
        )
    seeds = len({run["seed"] for run in runs})
    columns = ["budget", "MACs kept, %", "parameters kept, %", "test accuracy, %", "CPU seconds"]
    return (
        head
        + f"{seeds} calibration seed{'s' * (seeds > 1)}, {runs[0]['images']} images and their mirror images.\n\n"
        + table(columns, rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20)
    parser.add_argument("--part", choices=("budget", "curve", "scorers"), default="budget")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--sweeps", type=int, default=1)
    parser.add_argument("--removed", default="0.1,0.2,0.3,0.4,0.5,0.6,0.7", help="shares of the MACs, for --part curve")
    parser.add_argument("--scorers", default="reconstruction,activation_weight,magnitude,taylor,fluctuation,firing_rate,random")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    depth, dense = arguments.depth, dense_accuracy(arguments.depth)
    if arguments.part == "scorers":
        runs = scorer_runs(depth, NOTEBOOK, arguments.scorers.split(","), arguments.images)
    elif arguments.part == "curve":
        budgets = {
            f"{100 * gone:.0f} % of MACs removed": Budget(macs=1 - gone) for gone in map(float, arguments.removed.split(","))
        }
        runs = budget_runs(depth, budgets, 1, arguments.images, arguments.sweeps)
    else:
        budget = {"59.3M of 81.1M FLOPs, 174k of 268k parameters": NOTEBOOK} if depth == 20 else {"2.1 times fewer MACs": HALF}
        runs = budget_runs(depth, budget, arguments.seeds, arguments.images, arguments.sweeps)
    name = f"cifar-resnet{depth}-{arguments.part}"
    publish(name, {"dense": dense, "runs": runs}, report(depth, arguments.part, dense, runs))
    print((RESULTS / f"{name}.md").read_text())


if __name__ == "__main__":
    main()
