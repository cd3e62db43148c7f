"""80 and 90 % of an MNIST network's hidden neurons gone without a gradient step: what calibration digits and turns do.

    python benchmarks/mnist_deep.py --data FOLDER [--seeds 3]

784-512-256-10, trained and cut as in benchmarks/mnist.py: greedy elimination, the knapsack's widths, the repair in execution
order with two layers fitted in turn. The network knows the digits that it was trained on by heart, so what it does with others
is hardly to be learned from them. Compared, on top of the library's repair:

- calibration digits: 20,000 training digits, or the same and each once more, deformed at random (turned by up to 10 degrees,
  scaled and sheared by up to 10 %, moved by up to 1 pixel, then warped by up to 1.7 pixels on a grid of 5 x 5); no labels.
- turns: how often two layers are fitted in turn, at most.

The held-out column (5,000 training digits that the network was not trained on) is what a choice is made by; test is for the
report. KL is the divergence of the cut network's answers from the dense network's, in nats per held-out digit.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnist import plans_of
from publish import data_folder, publish, spread, table
from resect import cut, dissect, evaluate, repair, repair_sequentially, score, trace
from resect.searching.finishing import ALTERNATIONS
from resect.searching.sensitivity import divergence
from resect.sources import Splits, load_data
from resect.sources.demo import mlp, recipe, train

REMOVED = (0.8, 0.9)
TURNS = (0, ALTERNATIONS, 20)
DIGITS = 20_000


def deformed(images: Tensor, draw: torch.Generator) -> Tensor:
    """Every image turned, scaled, sheared, moved and warped at random; same shape."""
    count, size = len(images), images.shape[-1]

    def uniform(most: float, *shape: int) -> Tensor:
        return (2 * torch.rand(count, *shape, generator=draw) - 1) * most

    angle, scale, shear = uniform(np.pi / 18), 1 + uniform(0.1), uniform(0.1)
    lines = torch.zeros(count, 2, 3)
    lines[:, 0, 0], lines[:, 0, 1] = angle.cos() / scale, shear - angle.sin() / scale
    lines[:, 1, 0], lines[:, 1, 1] = angle.sin() / scale, angle.cos() / scale
    lines[:, :, 2] = uniform(0.07, 2)
    warp = F.interpolate(uniform(0.12, 2, 5, 5), size=(size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    ground = images.min()
    square = images.view(count, 1, size, size) - ground
    turned = F.grid_sample(square, F.affine_grid(lines, list(square.shape), align_corners=False), align_corners=False)
    still = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(square.shape), align_corners=False)
    return (F.grid_sample(turned, still + warp, align_corners=False) + ground).view_as(images)


def one_seed(splits: Splits, seed: int) -> list[dict[str, Any]]:
    widths, settings = recipe(splits)
    model = train(mlp(widths, seed), splits.train, seed=seed, **settings)
    held = list(splits.search)
    with torch.inference_mode():
        answers = [model(images) for images, _ in held]
    dense = {name: evaluate(model, data).accuracy for name, data in (("held", held), ("test", splits.test))}
    draw, rows = torch.Generator().manual_seed(seed), []
    digits = splits.train.inputs[:DIGITS]
    mixed = torch.cat([digits, deformed(digits, draw)])[torch.randperm(2 * DIGITS, generator=draw)]
    for what, images in (("training digits", digits), ("and deformed", mixed)):
        calib = list(images.split(500))
        scores = score(trace(model, calib, dissect(model, images[:2])), "reconstruction")
        plans = plans_of(scores, "least_squares")
        for removed in REMOVED:
            plan = next(plan for plan in plans if plan.share <= 1 - removed + 0.002)
            start = cut(model, plan, weights=repair(scores.trace, plan, "least_squares").weights)
            for turns in TURNS:
                begun = time.process_time()
                small, _ = repair_sequentially(model, start, plan, calib, alternations=turns)
                seconds = time.process_time() - begun
                loss = {name: dense[name] - evaluate(small, d).accuracy for name, d in (("held", held), ("test", splits.test))}
                row = {"seed": seed, "removed": removed, "calibration": what, "turns": turns, "kept": plan.kept, **loss}
                rows.append(row | {"kl": divergence(answers, small, held), "seconds": seconds})
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder or hub id of MNIST (default $RESECT_DATA/mnist)")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    splits = load_data(data_folder("mnist", arguments.data), seed=0)
    runs = [row for seed in range(arguments.seeds) for row in one_seed(splits, seed)]
    rows = []
    for key in dict.fromkeys((run["removed"], run["calibration"], run["turns"]) for run in runs):
        mine = [run for run in runs if (run["removed"], run["calibration"], run["turns"]) == key]
        losses = [spread([run[judge] for run in mine], 2, 100) for judge in ("held", "test")]
        figures = [spread([run["kl"] for run in mine], 4), *losses, spread([run["seconds"] for run in mine], 0)]
        rows.append([f"{100 * key[0]:.0f} %", key[1], key[2], *figures])
    columns = [
        "neurons gone",
        "calibrated on",
        "turns",
        "KL held out",
        "loss held out, points",
        "loss on test, points",
        "CPU s",
    ]
    head = f"# MNIST 784-512-256-10, cut deep\n\n{arguments.seeds} seeds. Made by benchmarks/mnist_deep.py.\n\n"
    publish("mnist_deep", {"runs": runs}, head + table(columns, rows))


if __name__ == "__main__":
    main()
