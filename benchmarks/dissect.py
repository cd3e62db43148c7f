"""What dissection costs: seconds and memory for real sizes, and how the time grows with depth.

    python benchmarks/dissect.py

One thread. Networks up to BERT-base have weights and are verified; the Llama-7B- and Mixtral-8x7B-shaped ones are on meta and
never have any. Growth: a Llama-shaped network of 2 to 32 layers on meta, exponent of the fitted power law (1 is linear).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from publish import publish, table
from resect.anatomy import dissect

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def words(length: int = 16) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 1000, (1, length))}


def networks() -> dict[str, Any]:
    """Name -> (make the network, example, on meta)."""
    import transformers as T

    from zoo.convolutional import ResNet

    image = torch.randn(1, 3, 32, 32)
    photo = {"pixel_values": torch.randn(1, 3, 224, 224)}
    return {
        "ResNet-56 (CIFAR)": (lambda: ResNet((16, 32, 64), 9, padded=True), image, False),
        "ResNet-50": (
            lambda: T.ResNetForImageClassification(T.ResNetConfig()),
            {"pixel_values": torch.randn(1, 3, 64, 64)},
            False,
        ),
        "ViT-base": (lambda: T.ViTForImageClassification(T.ViTConfig()), photo, False),
        "BERT-base": (lambda: T.BertForSequenceClassification(T.BertConfig()), words(), False),
        "GPT-2": (lambda: T.GPT2LMHeadModel(T.GPT2Config(use_cache=False)), words(), False),
        "Llama-7B": (lambda: T.LlamaForCausalLM(T.LlamaConfig(use_cache=False)), words(), True),
        "Mixtral-8x7B": (lambda: T.MixtralForCausalLM(T.MixtralConfig(use_cache=False)), words(), True),
    }


def measure(make: Any, example: Any, meta: bool, verify: bool) -> dict[str, Any]:
    """One dissection in this process, after a first one of something small."""
    dissect(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), torch.ones(1, 4))
    with torch.device("meta" if meta else "cpu"):
        model = make().eval()
    start = time.perf_counter()
    anatomy = dissect(model, example, verify=verify)
    seconds = time.perf_counter() - start
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": len(anatomy.groups),
        "prunable": anatomy.prunable,
        "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def alone(*arguments: str) -> dict[str, Any]:
    """A measurement in a process of its own, so that its peak memory is its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def one(name: str, verify: bool) -> dict[str, Any]:
    make, example, meta = networks()[name]
    return measure(make, example, meta, verify)


def depth(layers: int) -> dict[str, Any]:
    import transformers as T

    config = T.LlamaConfig(num_hidden_layers=layers, use_cache=False)
    return measure(lambda: T.LlamaForCausalLM(config), words(), True, False)


def main() -> None:
    rows = []
    for name, (_, _, meta) in networks().items():
        plain, verified = alone("one", name, ""), None if meta else alone("one", name, "verify")
        rows.append({"name": name, **plain, "verified_seconds": verified and verified["seconds"]})
        print(rows[-1], flush=True)
    depths = {n: alone("depth", str(n))["seconds"] for n in (2, 4, 8, 16, 32)}
    slope = float(np.polyfit(np.log(list(depths)), np.log(list(depths.values())), 1)[0])
    columns = ["network", "parameters", "groups", "prunable", "seconds", "seconds, verified", "peak MB"]
    cells = [
        [
            *(r["name"], f"{r['parameters']:,}", r["groups"], f"{r['prunable']:.0%}", f"{r['seconds']:.2f}"),
            *(f"{r['verified_seconds']:.2f}" if r["verified_seconds"] else "on meta", f"{r['peak_mb']:.0f}"),
        ]
        for r in rows
    ]
    text = f"{table(columns, cells)}\n\nLlama-shaped, by layers: "
    text += ", ".join(f"{n}: {s:.2f} s" for n, s in depths.items()) + f"; time grows as layers^{slope:.2f}."
    publish("dissect", {"networks": rows, "depths": depths, "slope": slope}, text)
    print(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(sys.argv[2], bool(sys.argv[3]))))
    elif sys.argv[1:2] == ["depth"]:
        print(json.dumps(depth(int(sys.argv[2]))))
    else:
        main()
