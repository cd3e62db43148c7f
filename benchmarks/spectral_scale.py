"""What the spectral scorer costs: seconds and memory of every mode, by the number of units.

    python benchmarks/spectral_scale.py [--quick] [--threads 2] [--faiss]

States are synthetic but not noise: units are sparse mixtures of shared factors, half of them those of the unit's cluster, plus
noise of their own; 1,024 rows, before and behind a rectifier. Each size runs in a process of its own. Seconds are those of the
whole scorer: both graphs and the mode. Memory is the largest resident size beyond what was there once the states were made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from publish import publish, table
from resect.scoring import Spectral
from resect.scoring.spectral.forms import FULL_LIMIT
from resect.testing import example_evidence
from resect.tracing import Evidence, States

SIZES = (1_000, 4_000, 15_000, 50_000, 100_000)
ROWS, FACTORS, SHARED = 1024, 256, 6
MODES = {
    "full": Spectral(mode="full"),
    "jl": Spectral(mode="jl"),
    "proxy": Spectral(mode="proxy"),
    "eig": Spectral(mode="eig", pairs=8),
}
MB = 1 << 20


def clustered(units: int, seed: int = 0) -> Evidence:
    """Evidence with states (1024, units, 1): clusters of about 50 units that share half of their factors."""
    draw = np.random.default_rng(seed)
    signals = draw.normal(size=(ROWS, FACTORS)).astype(np.float32) * (1 + np.arange(FACTORS, dtype=np.float32)) ** -0.3
    pre, post = (np.empty((ROWS, units, 1), dtype=np.float32) for _ in range(2))
    clusters = max(1, units // 50)
    factors = draw.integers(0, FACTORS, (clusters, SHARED))
    centres = draw.normal(size=(clusters, SHARED))
    for first in range(0, units, 2000):
        count = min(2000, units - first)
        cluster, loads = draw.integers(0, clusters, count), np.zeros((FACTORS, count), dtype=np.float32)
        shared = centres[cluster] * draw.uniform(0.5, 1.5, (count, SHARED))
        np.add.at(loads, (factors[cluster].T, np.arange(count)), shared.T.astype(np.float32))
        own = draw.normal(size=(SHARED, count)).astype(np.float32)
        np.add.at(loads, (draw.integers(0, FACTORS, (SHARED, count)), np.arange(count)), own)
        noise = draw.normal(size=(ROWS, count)).astype(np.float32) * draw.uniform(0.3, 1, count).astype(np.float32)
        pre[:, first : first + count, 0] = signals @ loads + noise
        np.maximum(pre[:, first : first + count], 0, out=post[:, first : first + count])
    states = States(keys=np.arange(ROWS, dtype=np.uint64), pre=pre, post=post, most=ROWS)
    return Evidence(**{**vars(example_evidence(units=2)), "units": units, "states": states})


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def measured(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a call returns, its wall and CPU seconds, and the largest resident memory beyond that at its start, in MB."""
    start, largest, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            largest[0] = max(largest[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        result = call()
    finally:
        seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        done.set()
        watcher.join()
    return result, {**seconds, "mb": max(0, largest[0] - start) / MB}


def one_size(units: int, threads: int, search: str) -> dict[str, Any]:
    """Figures of one number of units, in this process."""
    torch.set_num_threads(threads)
    evidence = clustered(units)
    live = np.ones(units, dtype=bool)
    (inputs, outputs, order), graphs = measured(lambda: Spectral(search=search).graphs(evidence, live))
    modes = {}
    for name, scorer in MODES.items():
        if name != "full" or units <= FULL_LIMIT:
            _, figures = measured(lambda scorer=scorer: scorer.of_graphs(inputs, outputs, order))
            modes[name] = figures
    return {"units": units, "edges": [len(inputs.ends), len(outputs.ends)], "search": search, "graphs": graphs, "modes": modes}


def slope(sizes: list[int], seconds: list[float]) -> float:
    """The exponent p of seconds ~ units^p over the sizes from 4,000 up (or all, where those are too few)."""
    chosen = [(n, s) for n, s in zip(sizes, seconds) if n >= 4_000]
    x, y = np.log(np.array(chosen if len(chosen) > 1 else list(zip(sizes, seconds)))).T
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else float("nan")


def report(runs: list[dict[str, Any]], threads: int) -> str:
    head = f"# Cost of the spectral scorer\n\n1,024 rows of states, {threads} threads; made by benchmarks/spectral_scale.py.\n"
    head += "Seconds of the whole scorer, the two graphs included; MB beyond the states; eig: 8 pairs.\n\n"
    rows = []
    for run in runs:
        graphs = run["graphs"]
        cells = [f"{run['units']:,}", run["search"], f"{graphs['seconds']:.1f}"]
        for name in MODES:
            mode = run["modes"].get(name)
            if mode is None:
                cells.append("-")
                continue
            cells.append(f"{graphs['seconds'] + mode['seconds']:.1f} s, {max(graphs['mb'], mode['mb']):,.0f} MB")
        rows.append(cells)
    text = (
        head
        + table(["units", "search", "graphs alone, s", *MODES], rows)
        + "\n\nExponent of the growth of seconds with units: "
    )
    exact = [run for run in runs if run["search"] == "exact"]
    parts = {"graphs": [(run["units"], run["graphs"]["seconds"]) for run in exact]}
    for name in MODES:
        parts[f"{name} without graphs"] = [
            (run["units"], run["modes"][name]["seconds"]) for run in exact if name in run["modes"]
        ]
    return text + ", ".join(f"{name} {slope(*map(list, zip(*points))):.2f}" for name, points in parts.items()) + ".\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 4,000 units; nothing is written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--faiss", action="store_true", help="also with search=faiss from 15,000 units up (the extra `wide`)")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--search", default="exact", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(one_size(arguments.one, arguments.threads, arguments.search)))
        return
    jobs = [(units, "exact") for units in (SIZES[:2] if arguments.quick else SIZES)]
    jobs += [(units, "faiss") for units in SIZES[2:]] if arguments.faiss and not arguments.quick else []
    runs = []
    for units, search in jobs:
        command = [sys.executable, __file__, "--one", str(units), "--threads", str(arguments.threads), "--search", search]
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    text = report(runs, arguments.threads)
    if not arguments.quick:
        publish("spectral_scale", {"threads_used": arguments.threads, "runs": runs}, text)
    print(text)


if __name__ == "__main__":
    main()
