"""Greedy elimination: what several units at a time lose against one at a time, and what the elimination and a whole fit cost.

    python benchmarks/elimination.py [--quick]

*Loss*: groups of real networks (MNIST 784-512-256-10 trained here, ResNet-20 on CIFAR-10, MiniLM on SST-2) are eliminated one
unit at a time and several at a time; errors are shares of the readers' output energy on the calibrate data, read off the curve
where 30, 50, 70 and 90 % of the units are kept, as a multiple of the error of one at a time.

*Growth*: one reader with a quarter as many outputs as units, second moments of rectified features of 2,048 random examples,
each width in a process of its own; CPU seconds of one thread and the growth of the peak memory, beside the moments themselves.

*Fit*: trace, score and fit to half of the MACs, in forward passes of the dense network over the same calibrate data (CPU
seconds, one thread), and the growth of the peak memory of the process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar import images
from networks import trained_minilm, trained_resnet
from publish import RESULTS, data_folder, publish, table
from resect import Budget, Trace, dissect, fit, score, trace
from resect.batches import forward, unpack
from resect.pipeline import example_of
from resect.scoring.reconstruction import System, eliminate, eliminated
from resect.sources import load_data
from resect.sources.demo import mlp, recipe, train
from sst2 import batches

KEPT = (0.9, 0.7, 0.5, 0.3)
SEVERAL = (256, 64, 16)  # steps in which a group leaves
WIDTHS = (256, 512, 1024, 2048, 4096, 8192)

Loaded = tuple[torch.nn.Module, list[Any]]


def mnist(quick: bool) -> Loaded:
    """The demonstration's network, trained, and calibrate digits."""
    splits = load_data(data_folder("mnist"), seed=0)
    widths, settings = recipe(splits)
    model = train(mlp(widths, 0), splits.train, seed=0, **{**settings, "epochs": 1 if quick else settings["epochs"]})
    return model, list(splits.train.inputs[: 2_000 if quick else 20_000].split(500))


def resnet20(quick: bool) -> Loaded:
    return trained_resnet(20), images(50 if quick else 500, 0)[0]


def minilm(quick: bool) -> Loaded:
    import datasets

    model, tokenizer = trained_minilm()
    data = datasets.load_dataset(data_folder("sst2"))["train"]
    rows = np.random.default_rng(0).choice(len(data), 64 if quick else 512, replace=False)
    return model, batches(tokenizer, list(data.select(rows)["sentence"]))


NETWORKS: dict[str, Callable[[bool], Loaded]] = {"MNIST MLP": mnist, "ResNet-20": resnet20, "MiniLM": minilm}


def traced(model: torch.nn.Module, calib: list[Any]) -> Trace:
    """The trace of a network's groups, residual streams left out."""
    anatomy = dissect(model, example_of(calib))
    anatomy = anatomy.without([g.name for g in anatomy.groups if g.kind == "stream"], "residual stream")
    return trace(model, calib, anatomy, token_stride=1)


def losses(name: str, seen: Trace) -> list[dict[str, Any]]:
    """Per group and number of steps: errors at KEPT over those of exact elimination."""
    rows = []
    for group in seen.anatomy.groups:
        if group.units < 16:
            continue
        evidence = seen.evidence(group)
        exact = eliminated(evidence, together=1).curve
        places = [round(share * group.units) for share in KEPT]
        for steps in SEVERAL:
            together = -(-group.units // steps)
            curve = exact if together == 1 else eliminated(evidence, together=together).curve
            ratios = [float(curve[p] / exact[p]) if exact[p] > 1e-9 else 1.0 for p in places]
            entry = {"network": name, "group": group.name, "units": group.units, "steps": steps, "together": together}
            rows.append({**entry, "exact": exact[places].tolist(), "ratios": ratios})
    return rows


def apart(measured: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """A measurement in a process of its own, so that its peak of memory is its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measured, arguments)


def resident() -> float:
    """Megabytes this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak() -> float:
    """The most megabytes this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def wide(width: int, together: int) -> dict[str, float]:
    """CPU seconds and memory of one elimination of so many units, and the errors at KEPT."""
    draw = np.random.default_rng(0)
    hidden = draw.normal(size=(2048, 256)) @ draw.normal(size=(256, width)) + 8 * draw.normal(size=(2048, width))
    rows = np.concatenate([np.maximum(hidden, 0), np.ones((2048, 1))], axis=1)
    weight, moments = draw.normal(size=(width // 4, width)), rows.T @ rows
    del hidden, rows
    before, start = resident(), time.process_time()
    curve = eliminate([System(weight, moments, np.arange(width)[:, None])], together=together).curve
    seconds = time.process_time() - start
    errors = {f"error at {share:.0%}": float(curve[round(share * width)]) for share in KEPT}
    return {"width": width, "together": together, "seconds": seconds, "megabytes": peak() - before, **errors}


def whole(name: str, quick: bool) -> dict[str, float]:
    """What trace, score and fit of a network cost beside one forward pass over the calibrate data."""
    model, calib = NETWORKS[name](quick)
    seconds = {"forward": 0.0}
    for _ in range(2):
        start = time.process_time()
        with torch.inference_mode():
            for item in calib:
                forward(model, unpack(item))
        seconds["forward"] = time.process_time() - start
    before, start = resident(), time.process_time()
    seen = traced(model, calib)
    seconds["trace"], start = time.process_time() - start, time.process_time()
    scores = score(seen, "reconstruction")
    seconds["score"], start = time.process_time() - start, time.process_time()
    fit(model, scores, Budget(macs=0.5), calib)
    seconds["fit"] = time.process_time() - start
    seconds["all"] = seconds["trace"] + seconds["score"] + seconds["fit"]
    return {**seconds, "examples": sum(unpack(item).size for item in calib), "megabytes": peak() - before}


def slope(rows: list[dict[str, float]]) -> float:
    """The power of the width that the seconds grow with, fitted from 1,024 units on."""
    big = [row for row in rows if row["width"] >= 1024]
    widths, seconds = (np.log([row[key] for row in big]) for key in ("width", "seconds"))
    return float(np.polyfit(widths, seconds, 1)[0]) if len(big) > 1 else float("nan")


def report(lost: list[dict[str, Any]], grown: list[dict[str, float]], fits: dict[str, dict[str, float]]) -> str:
    rows: list[list[Any]] = []
    for name in dict.fromkeys(row["network"] for row in lost):
        for steps in SEVERAL:
            mine = [row for row in lost if row["network"] == name and row["steps"] == steps and row["together"] > 1]
            if mine:
                ratios = np.array([row["ratios"] for row in mine])
                units = f"{min(row['units'] for row in mine)} to {max(row['units'] for row in mine)}"
                cells = [f"{middle:.3f} ({worst:.3f})" for middle, worst in zip(np.median(ratios, axis=0), ratios.max(0))]
                rows.append([name, len(mine), units, steps, *cells])
    first = table(["network", "groups", "units", "steps", *(f"{share:.0%} kept" for share in KEPT)], rows)
    second = table(
        ["units", "at a time", "CPU seconds", "MB beside the moments", *(f"error, {share:.0%} kept" for share in KEPT)],
        [
            [int(r["width"]), int(r["together"]), f"{r['seconds']:.2f}", f"{r['megabytes']:.0f}"]
            + [f"{r[f'error at {share:.0%}']:.4f}" for share in KEPT]
            for r in grown
        ],
    )
    exact = slope([row for row in grown if row["together"] == 1])
    steps = ("trace", "score", "fit")
    third = table(
        ["network", "examples", "one pass, CPU s", *(f"{step}, passes" for step in steps), "all, passes", "MB"],
        [
            [
                name,
                int(f["examples"]),
                f"{f['forward']:.2f}",
                *(f"{f[step] / f['forward']:.1f}" for step in (*steps, "all")),
                f"{f['megabytes']:.0f}",
            ]
            for name, f in fits.items()
        ],
    )
    return (
        "# Greedy elimination: several units at a time, and cost\n\nMade by benchmarks/elimination.py; one thread.\n\n"
        "## Several at a time\n\nError over that of one at a time, median over groups (worst in brackets). "
        f"Steps: in how many a group leaves.\n\n{first}\n\n## Growth\n\nSeconds grow with the width to the power of "
        f"{exact:.2f}, one at a time, from 1,024 units on.\n\n{second}\n\n## A whole fit to half of the MACs\n\n{third}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small data and widths, printed and not published")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    lost: list[dict[str, Any]] = []
    for name, make in NETWORKS.items():
        lost += losses(name, traced(*make(quick)))
        print(name, len(lost), flush=True)
    grown = []
    for width in WIDTHS[: 3 if quick else None]:
        for together in (1, width // 256) if width > 256 else (1,):
            grown.append(apart(wide, width, together))
            print(grown[-1], flush=True)
    fits = {}
    for name in ("MNIST MLP", "ResNet-20"):
        fits[name] = apart(whole, name, quick)
        print(name, fits[name], flush=True)
    text = report(lost, grown, fits)
    if not quick:
        publish("elimination", {"loss": lost, "growth": grown, "fit": fits}, text)
        text = (RESULTS / "elimination.md").read_text()
    print(text)


if __name__ == "__main__":
    main()
