"""What is faster, and by how much: layers by width, rounded and free cuts, and networks in onnxruntime.

    python benchmarks/latency.py [--part widths] [--part resnet] [--part minilm] [--rounds 30] [--quick]

widths: convolutions and linear layers alone, by their number of outputs. resnet: ResNet-20 for CIFAR-10 cut to half of its MACs
with and without round_to="auto", and to two thirds of its milliseconds; predicted and measured, torch and onnxruntime. minilm:
MiniLM cut to half of its MACs (heads and MLP neurons), exported to ONNX, in onnxruntime.

One thread, CPU time; two networks are timed in turn, and ratios are medians over the pairs. Weights from $RESECT_WEIGHTS,
calibration data from $RESECT_DATA; only the widths matter here, accuracy is in other tables.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cifar import images
from networks import trained_resnet
from publish import data_folder, publish, table
from resect import Budget, Latency, dissect, export_onnx, fit, latency, score, trace
from resect.evaluation import inputs_of, milliseconds, paired
from resect.exporting.onnx import session_of
from resect.pipeline import example_of
from resect.searching.timing import Times
from sst2 import batches

CPU = torch.device("cpu")
CONVOLUTIONS = ((1, 16, 16), (1, 56, 64), (64, 16, 32), (64, 32, 16))
LINEARS = ((1, 384), (32, 384), (64, 784))
CHANNELS = (8, 12, 16, 17, 24, 32, 33, 40, 48, 49, 60, 64)
NEURONS = (120, 124, 127, 128, 129, 136, 144, 250, 256, 257, 264)


def widths(rounds: int) -> tuple[dict[str, Any], str]:
    """Milliseconds of single layers by their number of outputs, as a share of the widest that is tried."""
    cases: dict[str, dict[int, Callable[[], Any]]] = {}
    for batch, size, inputs in CONVOLUTIONS:
        x = torch.randn(batch, inputs, size, size)
        kernels = {c: torch.randn(c, inputs, 3, 3) for c in CHANNELS}
        name = f"3x3 convolution, {inputs} channels in, {size}x{size}, batch {batch}"
        cases[name] = {c: lambda x=x, w=w: F.conv2d(x, w, None, 1, 1) for c, w in kernels.items()}
    for batch, inputs in LINEARS:
        x = torch.randn(batch, inputs)
        weights = {c: torch.randn(c, inputs) for c in NEURONS}
        cases[f"linear, {inputs} in, batch {batch}"] = {c: lambda x=x, w=w: F.linear(x, w) for c, w in weights.items()}
    figures, parts = {}, []
    for names in (CHANNELS, NEURONS):
        rows = []
        for name, calls in cases.items():
            if tuple(calls) == names:
                figures[name] = dict(zip(calls, milliseconds(list(calls.values()), CPU, rounds=rounds).tolist()))
                base = figures[name][names[-1]]
                rows.append([name, f"{base:.3g}", *(f"{ms / base:.2f}" for ms in figures[name].values())])
        parts.append(table(["layer", f"ms at {names[-1]}", *map(str, names)], rows))
    head = "Time of one layer by its number of outputs, as a share of the time of the widest.\n\n"
    return {"widths": figures}, head + "\n\n".join(parts)


def resnet(rounds: int, count: int) -> tuple[dict[str, Any], str]:
    """ResNet-20 cut to half, predicted beside measured."""
    model = trained_resnet(20)
    calib, _ = images(count, 0, mirrored=False)
    scores = score(trace(model, calib, dissect(model, calib[0][:2])), "reconstruction")
    times = {batch: Times.of(model, scores.anatomy, batch=batch, rounds=7) for batch in (1, 64)}
    dense = {batch: seen({g.name: g.units for g in scores.anatomy.groups}) for batch, seen in times.items()}
    goals = {
        "half of the MACs": (Budget(macs=0.5), None),
        'half of the MACs, round_to="auto"': (Budget(macs=0.5), "auto"),
        "two thirds of the milliseconds at batch 1": ((1, 2 / 3), None),
        "two thirds of the milliseconds at batch 64": ((64, 2 / 3), None),
        'two thirds of the milliseconds at batch 64, round_to="auto"': ((64, 2 / 3), "auto"),
    }
    figures, rows = {}, []
    for name, (goal, round_to) in goals.items():
        budget = goal if isinstance(goal, Budget) else share_of_time(model, calib[0][:1], *goal, rounds)
        found = fit(model, scores, budget, calib, round_to=round_to)
        predicted = {batch: dense[batch] / seen(found.plan.kept) for batch, seen in times.items()}
        measured = latency(model, found.model, calib[0][:1], batches=(1, 64), rounds=rounds)
        runtime = in_onnxruntime(model, found.model, calib[0][:2], {b: inputs_of(calib[0], b, CPU) for b in (1, 64)}, rounds)
        macs = found.cost.macs / found.dense_cost.macs
        figures[name] = {"macs": macs, "kept": found.plan.kept, "notes": found.notes, "predicted": predicted}
        figures[name] |= {"torch": [m.to_dict() for m in measured], "onnxruntime": [m.to_dict() for m in runtime]}
        cells = [f"{predicted[m.batch]:.2f} / {m.ratio:.2f} / {r.ratio:.2f}" for m, r in zip(measured, runtime)]
        rows.append([name, f"{macs:.3f}", *cells, " ".join(map(str, found.plan.kept.values()))])
        print(rows[-1], flush=True)
    head = "ResNet-20, times as fast as dense: predicted / measured in torch / measured in onnxruntime.\n\n"
    return {"resnet20": figures}, head + table(["cut to", "MACs kept", "batch 1", "batch 64", "channels kept"], rows)


def share_of_time(model: torch.nn.Module, example: Any, batch: int, share: float, rounds: int) -> Budget:
    """A budget of a share of the milliseconds that the network takes just now."""
    (taken,) = latency(model, model, example, batches=(batch,), rounds=rounds)
    return Budget(latency_ms=share * taken.small_ms.median, batch=batch)


def minilm(rounds: int, count: int) -> tuple[dict[str, Any], str]:
    """MiniLM cut to half of its MACs, as ONNX files."""
    import datasets
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if "RESECT_WEIGHTS" not in os.environ:
        sys.exit("no weights: set RESECT_WEIGHTS to the folder that holds minilm_sst2/")
    folder = Path(os.environ["RESECT_WEIGHTS"]) / "minilm_sst2"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train = datasets.load_dataset(data_folder("sst2"))["train"]
    chosen = np.random.default_rng(0).choice(len(train), count, replace=False)
    calib = batches(tokenizer, list(train.select(chosen)["sentence"]))
    anatomy = dissect(model, example_of(calib))
    anatomy = anatomy.without([g.name for g in anatomy.groups if g.kind == "stream"], "residual stream")
    scores = score(trace(model, calib, anatomy, token_stride=1), "reconstruction")
    found = fit(model, scores, Budget(macs=0.5), calib)
    middle = calib[len(calib) // 2]
    inputs = {batch: inputs_of(middle, batch, CPU) for batch in (1, 32)}
    runtime = in_onnxruntime(model, found.model, middle, inputs, rounds)
    measured = latency(model, found.model, middle, batches=(1, 32), rounds=rounds)
    macs, tokens = found.cost.macs / found.dense_cost.macs, middle["input_ids"].shape[1]
    rows = [
        [name, m.batch, f"{m.dense_ms.median:.3g}", f"{m.small_ms.median:.3g}", f"{m.ratio:.2f}", f"{m.wins:.2f}"]
        for name, results in (("onnxruntime", runtime), ("torch", measured))
        for m in results
    ]
    figures = {"macs": macs, "tokens": tokens, "kept": found.plan.kept, "onnxruntime": [m.to_dict() for m in runtime]}
    figures["torch"] = [m.to_dict() for m in measured]
    head = f"MiniLM (SST-2), {macs:.3f} of the MACs kept, {tokens} tokens; both files answer as torch does, to 1e-4.\n\n"
    columns = ["runtime", "batch", "dense, ms", "cut, ms", "times as fast", "pairs won"]
    return {"minilm": figures}, head + table(columns, rows)


def in_onnxruntime(dense: Any, small: Any, example: Any, inputs: dict[int, Any], rounds: int) -> list[Latency]:
    """Both networks exported (and checked to answer as in torch), and timed in turn on inputs by batch size."""
    with tempfile.TemporaryDirectory() as folder:
        files = [export_onnx(model, example, Path(folder) / f"{n}.onnx") for n, model in enumerate((dense, small))]
        sessions = [session_of(file) for file in files]
    results = []
    for batch, (args, kwargs) in inputs.items():
        names = [entry.name for entry in sessions[0].get_inputs()]
        values = dict(zip(names, args)) if args else {name: kwargs[name] for name in names}
        feed = {name: value.numpy() for name, value in values.items()}
        calls = [lambda s=session, feed=feed: s.run(None, feed) for session in sessions]
        results.append(paired(*calls, batch=batch, rounds=rounds))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=("widths", "resnet", "minilm"), help="default: all three")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="few rounds and examples, printed and not published")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    quick = arguments.quick
    rounds = 5 if quick else arguments.rounds
    parts = {
        "widths": lambda: widths(rounds),
        "resnet": lambda: resnet(rounds, 250),
        "minilm": lambda: minilm(rounds, 64 if quick else 256),
    }
    for name in arguments.part or parts:
        figures, text = parts[name]()
        print(text, flush=True)
        if not quick:
            capability = torch.backends.cpu.get_cpu_capability()
            head = (
                f"# Latency: {name}\n\nOne thread, CPU time, {rounds} rounds, {capability}; made by benchmarks/latency.py.\n\n"
            )
            publish(f"latency-{name}", {"capability": capability, "rounds": rounds, **figures}, head + text)


if __name__ == "__main__":
    main()
