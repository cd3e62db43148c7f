"""A fine-tuned MiniLM encoder on SST-2 cut to half of its MACs (heads and MLP neurons) without any gradient step.

    python benchmarks/sst2.py [--seeds 3] [--sentences 512]

Weights from $RESECT_WEIGHTS/minilm_sst2, sentences from $RESECT_DATA/sst2. Calibration sentences are drawn from the training
set by the seed, without labels; nothing is chosen by accuracy. The 872 validation sentences are opened for the figures only.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from publish import data_folder, publish, spread, table
from resect import Budget, dissect, evaluate, fit, score, trace
from resect.pipeline import example_of

BUDGETS = (0.75, 0.5)


def batches(tokenizer: Any, sentences: list[str], labels: list[int] | None = None, size: int = 32) -> list[dict[str, Any]]:
    """Padded batches of sentences of similar length."""
    order = sorted(range(len(sentences)), key=lambda row: len(sentences[row]))
    result = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = dict(tokenizer([sentences[row] for row in rows], padding=True, truncation=True, return_tensors="pt"))
        result.append(batch if labels is None else {**batch, "labels": torch.tensor([labels[row] for row in rows])})
    return result


def main() -> None:
    import datasets
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=1024)
    arguments = parser.parse_args()
    if "RESECT_WEIGHTS" not in os.environ:
        sys.exit("no weights: set RESECT_WEIGHTS to the folder that holds minilm_sst2/")
    folder = Path(os.environ["RESECT_WEIGHTS"]) / "minilm_sst2"
    torch.set_num_threads(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = datasets.load_dataset(data_folder("sst2"))
    test = batches(tokenizer, list(data["validation"]["sentence"]), list(data["validation"]["label"]))
    dense, runs = evaluate(model, test).accuracy, []
    for seed in range(arguments.seeds):
        rows = np.random.default_rng(seed).choice(len(data["train"]), arguments.sentences, replace=False)
        calib = batches(tokenizer, list(data["train"].select(rows)["sentence"]))
        start = time.process_time()
        anatomy = dissect(model, example_of(calib))
        anatomy = anatomy.without([g.name for g in anatomy.groups if g.kind == "stream"], "residual stream")
        scores = score(trace(model, calib, anatomy, token_stride=1), "reconstruction")
        scored = time.process_time() - start
        for share in BUDGETS:
            start = time.process_time()
            found = fit(model, scores, Budget(macs=share), calib, seed=seed)
            seconds = scored + time.process_time() - start
            accuracy = evaluate(found.model, test).accuracy
            kept = found.cost.share_of(found.dense_cost)
            runs.append(
                {"seed": seed, "budget": share, "test": accuracy, "cpu_seconds": seconds, "kept": found.plan.kept, **kept}
            )
            print({key: runs[-1][key] for key in ("seed", "budget", "test", "macs", "cpu_seconds")}, flush=True)
    table_rows = []
    for share in BUDGETS:
        mine = [run for run in runs if run["budget"] == share]
        drop = spread([dense - run["test"] for run in mine], 2, 100)
        seconds = spread([run["cpu_seconds"] for run in mine], 0)
        table_rows.append([share, spread([run["test"] for run in mine], 2, 100), drop, seconds])
    head = f"# MiniLM on SST-2, no gradient step\n\nDense: {100 * dense:.2f} % of 872. Made by benchmarks/sst2.py.\n\n"
    columns = ["share of MACs allowed", "validation accuracy, %", "loss, points", "CPU seconds"]
    text = head + f"{arguments.seeds} calibration seeds, {arguments.sentences} sentences.\n\n" + table(columns, table_rows)
    publish("sst2-minilm", {"dense": dense, "runs": runs}, text)
    print(text)


if __name__ == "__main__":
    main()
