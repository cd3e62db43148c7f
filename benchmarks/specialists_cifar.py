"""Specialists of a trained CIFAR-10 ResNet-20: each class, and some subsets of the classes.

    python benchmarks/specialists_cifar.py                 # ten classes and four subsets
    python benchmarks/specialists_cifar.py --quick         # one class and one subset on few images; nothing is written

Weights from $RESECT_WEIGHTS, trained elsewhere on all 50,000 training images; so the calibrate images are drawn from these, and
the 10,000 test images are split by the seed: 3,000 to search, 3,000 to certify, and 4,000 that are opened at the end. The
promise for one class: recall at most 3 points below the dense network and false-positive rate at most 1 point above it (with
300 certify images of a class no drop below 1.3 points can be shown). For a subset: accuracy among its classes at most 2 points
below the dense network told to choose among them; with rejection (cat, dog), the false-accept rate at most 2 points above the
dense network's too. Nothing is trained.

Repaired from the trace alone no size keeps these promises, so that the search is cut short (evaluations=2) and sizes are tried
with the final repair, on about 490 of the 4,000 calibrate images (own ones and the hardest others). Published after the ten
classes, and after every subset.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import resect
from networks import cifar_images, trained_resnet
from publish import data_folder, publish, spread, table
from resect import Floor, latency
from resect.sources.huggingface import load_images
from resect.specializing.judging import Seen, rates_of
from resect.specializing.results import Specialised

SUBSETS = {
    "cat, dog": ["cat", "dog"],
    "airplane, ship, truck": ["airplane", "ship", "truck"],
    "animals": ["bird", "cat", "deer", "dog", "frog", "horse"],
    "vehicles": ["airplane", "automobile", "ship", "truck"],
}
ONE, SUBSET = Floor(drop=0.03), Floor(drop=0.02)
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def images(calibrate: int, seed: int) -> tuple[dict[str, Batches], tuple[str, ...]]:
    """Batches by split, and the names of the classes."""
    train, test, names = load_images(data_folder("cifar10"))
    assert test is not None
    draw = torch.Generator().manual_seed(seed)
    rows = {"calibrate": torch.randperm(train.examples, generator=draw)[:calibrate]}
    search, certify, rest = torch.randperm(test.examples, generator=draw).split([3000, 3000, 4000])
    rows |= {"search": search, "certify": certify, "test": rest}

    def batches(name: str) -> Batches:
        source = train if name == "calibrate" else test
        chosen = rows[name]
        return list(zip(cifar_images(source.inputs[chosen]).split(250), source.labels[chosen].split(250)))

    return {name: batches(name) for name in rows}, names


def figures(model: torch.nn.Module, one: Specialised, what: str, test: Seen, seconds: float) -> dict[str, Any]:
    dense, small = rates_of(one.model, test)
    share = one.cost.share_of(one.dense_cost)
    times = latency(model, one.model, test.batches[0][0][:1], batches=(1, 32), rounds=10)
    return {
        "what": what, "certified": one.certified, "removed": one.removed, "kept": one.kept,
        "parameters": share["parameters"], "macs": share["macs"], "dense": dense.to_dict(), "small": small.to_dict(),
        "latency": [entry.to_dict() for entry in times], "speedup": [entry.ratio for entry in times],
        "certificate": one.certificate.promise, "cpu_seconds": seconds,
    }  # fmt: skip


def report(rows: list[dict[str, Any]], panel: dict[str, float]) -> str:
    def share(row: dict[str, Any], who: str, key: str) -> str:
        value = row[who][key]
        return "" if value is None else f"{100 * value:.1f}"

    columns = [
        "classes", "certified", "parameters kept, %", "MACs kept, %", "recall or accuracy, %: dense", "specialist",
        "false positives, %: dense", "specialist", "balanced accuracy, %", "AUROC", "faster, batch 1", "faster, batch 32",
        "CPU seconds",
    ]  # fmt: skip
    cells = [
        [
            row["what"], "yes" if row["certified"] else "no", f"{100 * row['parameters']:.1f}", f"{100 * row['macs']:.1f}",
            share(row, "dense", "recall"), share(row, "small", "recall"), share(row, "dense", "false_positive_rate"),
            share(row, "small", "false_positive_rate"), share(row, "small", "balanced_accuracy"),
            "" if row["small"]["auroc"] is None else f"{row['small']['auroc']:.4f}",
            *(f"{ratio:.2f}x" for ratio in row["speedup"]), f"{row['cpu_seconds']:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    single = [row for row in rows if "," not in row["what"] and row["small"]["auroc"] is not None]
    text = ["# Specialists of ResNet-20 on CIFAR-10, no gradient step\n", (__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    text += [table(columns, cells), ""]
    if single:
        text.append(f"One class, mean ± standard deviation: MACs kept {spread([row['macs'] for row in single], 1, 100)} %.\n")
    if panel:
        text.append(
            f"All ten together: {100 * panel['panel']:.2f} % of test, the dense network {100 * panel['dense']:.2f} %.\n"
        )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=4000, help="calibrate images")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, rows, panel = trained_resnet(20), [], {}
    data, names = images(250 if arguments.quick else arguments.images, arguments.seed)
    test = Seen.of(model, data["test"], "test")
    parts = (model, data["calibrate"], data["search"])
    shared: dict[str, Any] = {"certify": data["certify"], "names": names, "seed": arguments.seed, "evaluations": 2}
    start = time.process_time()
    if arguments.quick:
        found = [resect.specialize(*parts, classes=["ship"], floor=ONE, false_positives=Floor(drop=0.01), **shared)]
    else:
        every = resect.specialize(*parts, each_class=True, floor=ONE, false_positives=Floor(drop=0.01), **shared)
        found = list(every)
        panel = {
            "panel": resect.evaluate(every.panel(), data["test"]).accuracy,
            "dense": resect.evaluate(model, data["test"]).accuracy,
        }
    seconds = (time.process_time() - start) / len(found)
    rows += [figures(model, one, one.question.name, test, seconds) for one in found]

    def published() -> None:
        print(rows[-1]["what"], rows[-1]["certified"], rows[-1]["macs"], f"{rows[-1]['cpu_seconds']:.0f} s", flush=True)
        if not arguments.quick:
            publish("specialists_cifar", {"runs": rows, "panel": panel}, report(rows, panel))

    published()
    for what, classes in list(SUBSETS.items())[: 1 if arguments.quick else None]:
        for other in ("none", "reject") if len(classes) == 2 else ("none",):
            start = time.process_time()
            cap = SUBSET if other == "reject" else None
            one = resect.specialize(*parts, classes=classes, other=other, floor=SUBSET, false_positives=cap, **shared)
            seconds = time.process_time() - start
            label = f"{{{what}}}" + (", rejecting" if other == "reject" else "")
            rows.append(figures(model, one, label, test, seconds))
            published()
    print(report(rows, panel))


if __name__ == "__main__":
    main()
