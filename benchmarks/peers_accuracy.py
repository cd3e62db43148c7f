"""Accuracy after a cut without any training: resect beside torch-pruning's magnitude and Taylor pruners, and FastNAS.

    python benchmarks/peers_accuracy.py [--networks resnet20,mnist] [--seeds 3] [--quick]
                                                    (needs: pip install 'resect[compare,data,hf]')

Published after each network, beside what was published of the others.

The same trained networks, the same calibration examples, the same budget of MACs (counted by torch's own flop counter), the
same test set, opened for the final figures only; each tool decides by itself which layers become how narrow.

- torch-pruning 1.6.1: as its documentation reaches a target, in many small steps until the budget is kept (with attention in
  one shot, the ratio bisected: its steps remove the whole share of the heads each time and end in an error). All settings in
  `settings`: the importance (group L2 and L1 norms, L1 norm of the first layer alone; Taylor expansion by weights, within
  units, and with gradients taken anew on the way), local or global ranking, with or without the channels of the residual
  stream; head counts given, whole heads pruned. The best for each budget is taken, by the accuracy on labelled training
  examples that are not calibration examples (first seed). Taylor's gradients come from the labelled calibration examples.
- The same with batch norm statistics re-estimated on the calibration examples (`torch.optim.swa_utils.update_bn`), settings
  chosen again.
- FastNAS of nvidia-modelopt 0.46, where it is installed (pip install --no-deps torchprofile==0.0.4 requests beside it: it needs
  both without saying so, and not torchprofile's newer releases). It installs and runs on a machine without a GPU. As its
  documentation prunes a CNN: widths in multiples of a divisor (16 as in its notebook, and smaller), one constraint on FLOPs
  (it takes no second), the score is the accuracy on the same labelled training examples, batch norm calibrated on the
  calibration examples; the best divisor by that score. Asked for CNNs only: that is what it is made for.
- resect: `fit` with its defaults, labels unused, nothing chosen.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from networks import cifar_images, trained_minilm, trained_resnet
from peers_tuned import DIVISORS, Case, Cuts, Key, best, fastnas_tries, macs, torch_pruning_tries, unlabelled
from publish import RESULTS, data_folder, publish, spread, table
from resect import Budget, dissect, evaluate, fit, score, trace
from resect.pipeline import example_of
from resect.sources import load_data
from resect.sources.demo import mlp, recipe, train
from resect.sources.huggingface import load_images
from sst2 import batches

CNN_SHARES = (59.3 / 81.1, 0.5)


def resnet(depth: int, seed: int, size: int) -> Case:
    train_set, test, _ = load_images(data_folder("cifar10"))
    assert test is not None
    rows = torch.randperm(train_set.examples, generator=torch.Generator().manual_seed(seed))
    images, labels = cifar_images(train_set.inputs[rows[: 2 * size]]), train_set.labels[rows[: 2 * size]]
    mirrored = torch.stack([images[:size], images[:size].flip(3)], 1).flatten(0, 1)
    return Case(
        name=f"ResNet-{depth}",
        model=trained_resnet(depth),
        shares=CNN_SHARES,
        calib=list(zip(mirrored.split(250), labels[:size].repeat_interleave(2).split(250))),
        choose=list(zip(images[size:].split(250), labels[size:].split(250))),
        test=list(zip(cifar_images(test.inputs).split(500), test.labels.split(500))),
        outputs="linear",
        stream=r"conv1|layer.*conv2",
    )


def mnist(seed: int, size: int) -> Case:
    splits = load_data(data_folder("mnist"), seed=0)
    widths, settings = recipe(splits)
    settings = settings if size >= 1000 else {**settings, "epochs": 1}
    rows = torch.randperm(splits.train.examples, generator=torch.Generator().manual_seed(seed))[: 12 * size]
    images, labels = splits.train.inputs[rows], splits.train.labels[rows]
    return Case(
        name="MNIST 784-512-256-10",
        model=train(mlp(widths, seed), splits.train, seed=seed, **settings),
        shares=(0.5, 0.25, 0.1),
        calib=list(zip(images[: 10 * size].split(500), labels[: 10 * size].split(500))),
        choose=list(zip(images[10 * size :].split(500), labels[10 * size :].split(500))),
        test=list(splits.test),
        outputs="output",
    )


def minilm(seed: int, size: int) -> Case:
    import datasets

    model, tokenizer = trained_minilm()
    data = datasets.load_dataset(data_folder("sst2"))
    rows = np.random.default_rng(seed).choice(len(data["train"]), size, replace=False)
    chosen, other = (data["train"].select(part) for part in np.split(rows, 2))
    parts = (chosen, other, data["validation"])
    calib, choose, test = (batches(tokenizer, list(part["sentence"]), list(part["label"])) for part in parts)
    outputs, stream = r"classifier", r"bert.embeddings.*|.*output\.dense|.*pooler\.dense"
    return Case(
        name="MiniLM on SST-2",
        model=model,
        shares=(0.75, 0.5),
        calib=calib,
        choose=choose,
        test=test,
        outputs=outputs,
        stream=stream,
    )


CASES: dict[str, Callable[[int, int], Case]] = {
    "resnet20": lambda seed, size: resnet(20, seed, size),
    "resnet56": lambda seed, size: resnet(56, seed, size),
    "minilm": minilm,
    "mnist": mnist,
}


def by_resect(case: Case) -> Cuts:
    calib = [unlabelled(batch) for batch in case.calib]
    anatomy = dissect(case.model, example_of(calib))
    anatomy = anatomy.without([g.name for g in anatomy.groups if g.kind == "stream"], "residual stream")
    scores = score(trace(case.model, calib, anatomy, token_stride=1), "reconstruction")
    return {(s, False): ("defaults", fit(case.model, scores, Budget(macs=s), calib).model) for s in case.shares}


# the run ------------------------------------------------------------------------------------------------------------------


def one_network(name: str, seeds: int, quick: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """All tools on one network, and what failed on the way."""
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    kept: dict[str, dict[Key, str]] = {}
    for seed in range(seeds):
        case = CASES[name](seed, SIZES[name] // (10 if quick else 1))
        case = replace(case, test=case.test[:2]) if quick else case
        dense = evaluate(case.model, case.test).accuracy
        tools: dict[str, Callable[[dict[Key, str]], Cuts]] = {
            "resect": lambda _: by_resect(case),  # noqa: B023
            "torch-pruning, magnitude": lambda k: best(case, torch_pruning_tries(case, "magnitude", quick), k, failed),  # noqa: B023
            "torch-pruning, Taylor": lambda k: best(case, torch_pruning_tries(case, "taylor", quick), k, failed),  # noqa: B023
        }
        if find_spec("modelopt") is not None and case.name in DIVISORS:
            tools["FastNAS"] = lambda k: best(case, fastnas_tries(case, quick), k, failed)  # noqa: B023
        for tool, run in tools.items():
            start = time.process_time()
            cuts = run(kept.get(tool, {}))
            seconds = time.process_time() - start
            kept.setdefault(tool, {key: setting for key, (setting, _) in cuts.items()})
            rows += [
                measured(case, tool, key, *cut, dense) | {"seed": seed, "cpu_seconds": seconds} for key, cut in cuts.items()
            ]
    return rows, list(dict.fromkeys(failed))


def measured(case: Case, tool: str, key: Key, setting: str, network: nn.Module, dense: float) -> dict[str, Any]:
    """One row: what is left and what it is worth on the test set."""
    share, renew = key
    parameters = [sum(p.numel() for p in model.parameters()) for model in (network, case.model)]
    row = {
        "network": case.name,
        "tool": tool + (" + batch norm" if renew else ""),
        "share": share,
        "test": evaluate(network, case.test).accuracy,
        "dense": dense,
        "macs": macs(network, case.example) / macs(case.model, case.example),
        "parameters": parameters[0] / parameters[1],
        "setting": setting,
    }
    print(row, flush=True)
    return row


def report(rows: list[dict[str, Any]], failed: list[str]) -> str:
    text = ["# Accuracy after a cut without training, side by side\n", PAGE]
    for name in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == name]
        shares = sorted({row["share"] for row in mine}, reverse=True)
        lines = []
        for tool in dict.fromkeys(row["tool"] for row in mine):
            cells = [tool]
            for share in shares:
                runs = [row for row in mine if row["tool"] == tool and row["share"] == share]
                shown = f"{spread([r['test'] for r in runs], 2, 100)} ({100 * np.mean([r['macs'] for r in runs]):.1f})"
                cells.append(shown if runs else "-")
            lines.append([*cells, "; ".join(dict.fromkeys(r["setting"] for r in mine if r["tool"] == tool))])
        dense = spread([row["dense"] for row in mine if row["tool"] == "resect" and row["share"] == shares[0]], 2, 100)
        columns = ["tool", *(f"{100 * share:.1f} % of MACs" for share in shares), "settings chosen, by share"]
        text += [f"## {name}, dense {dense} %\n", table(columns, lines) + "\n"]
    if failed:
        text += ["## What did not run\n", *(f"- {line}" for line in failed)]
    return "\n".join(text)


PAGE = """Test accuracy in % (in brackets: the share of the MACs left), mean and standard deviation over calibration seeds.
Made by benchmarks/peers_accuracy.py, whose text says what each tool was told; settings are chosen on training data.
"""
SIZES = {"resnet20": 500, "resnet56": 500, "minilm": 1024, "mnist": 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="little data, few settings, one seed; printed and not published")
    arguments = parser.parse_args()
    if find_spec("torch_pruning") is None:
        print("skipped: torch-pruning is not installed (pip install 'resect[compare,data,hf]')")
        return
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, failed = ([], []) if arguments.quick else earlier()
    for name in arguments.networks.split(","):
        more, wrong = one_network(name, 1 if arguments.quick else arguments.seeds, arguments.quick)
        again = more[0]["network"]
        rows = [row for row in rows if row["network"] != again] + more
        failed = [line for line in failed if not line.startswith(f"{again},")] + wrong
        text = report(rows, failed)
        if not arguments.quick:
            made = {package: version(package) for package in ("torch-pruning", "nvidia-modelopt") if _installed(package)}
            publish("peers_accuracy", {"versions": made, "runs": rows, "failed": failed}, text)
        print(text, flush=True)


def earlier() -> tuple[list[dict[str, Any]], list[str]]:
    """What was published; networks that run again take the place of their rows."""
    path = RESULTS / "peers_accuracy.json"
    published = json.loads(path.read_text()) if path.exists() else {"runs": [], "failed": []}
    return published["runs"], published["failed"]


def _installed(package: str) -> bool:
    return find_spec({"nvidia-modelopt": "modelopt"}.get(package, package.replace("-", "_"))) is not None


if __name__ == "__main__":
    main()
