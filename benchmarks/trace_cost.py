"""What tracing costs: a traced pass against the bare forward pass, interleaved, on a ResNet-18-shaped network.

    python benchmarks/trace_cost.py [--rounds 15] [--size 112]

Random weights, batch 32, one thread, CPU time. Each round times the bare forward (inference mode), the trace without and with
Gram matrices, and with 1,024 rows of hidden states, in this order; ratios are taken within a round and their median is quoted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from networks import ResNet18
from publish import publish, table
from resect import dissect
from resect.batches import unpack
from resect.sources.demo import mlp
from resect.tracing import survey
from resect.tracing.states import Sampler
from resect.tracing.trace import _Pass


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def ratios(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], rounds: int) -> dict[str, list[float]]:
    anatomy = dissect(model, batch[0][:2])
    readers = survey(model, anatomy)
    options = {"gradients": False, "classes": None, "token_stride": 32, "gram_positions": 64}
    passes = {name: _Pass(model, readers, name == "with Gram", **options) for name in ("without Gram", "with Gram")}
    passes["with states"] = _Pass(model, readers, False, **options, sampler=Sampler(model, anatomy, readers, 1024))

    def bare() -> None:
        with torch.inference_mode():
            model(batch[0])

    measured: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 2):
        base = cpu_seconds(bare)
        for name, pass_ in passes.items():
            ratio = cpu_seconds(lambda pass_=pass_: pass_.see(unpack(batch))) / base
            if number >= 2:
                measured[name].append(ratio)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=112, help="side of the images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    labels = torch.randint(0, 10, (32,))
    cases: dict = {
        f"ResNet-18, 10 classes, {arguments.size}x{arguments.size}, batch 32": (
            ResNet18(10).eval(),
            (torch.randn(32, 3, arguments.size, arguments.size), labels),
        ),
        "MLP 784-512-256-10, batch 32": (mlp((784, 512, 256, 10)).eval(), (torch.rand(32, 784), labels)),
        "MLP 784-512-256-10, batch 512": (
            mlp((784, 512, 256, 10)).eval(),
            (torch.rand(512, 784), torch.randint(0, 10, (512,))),
        ),
    }
    figures, rows = {}, []
    for name, (model, batch) in cases.items():
        measured = ratios(model, batch, arguments.rounds if "ResNet" in name else 20 * arguments.rounds)
        figures[name] = {
            key: {"median": np.median(v), "min": min(v), "max": max(v), "rounds": len(v)} for key, v in measured.items()
        }
        rows += [[name, key, *(f"{np.percentile(v, q):.2f}" for q in (50, 10, 90))] for key, v in measured.items()]
    head = (
        "# Cost of tracing\n\nCPU time of a traced pass over that of the bare forward pass; made by benchmarks/trace_cost.py.\n"
    )
    text = head + "\n" + table(["network", "trace", "median ratio", "10 %", "90 %"], rows)
    publish("trace_cost", {"cases": figures}, text)
    print(text)


if __name__ == "__main__":
    main()
