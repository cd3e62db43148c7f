"""The five networks on which scorers are compared, each with its data in roles: a Case.

784-512-256-10 on MNIST is trained here, once per seed. The others have weights from $RESECT_WEIGHTS; there a seed draws the
calibrate, training and search examples from the training set, and takes its own part of the test set. The MiniLM's embeddings
are as large as all of its layers; shares removed are of the parameters that belong to units.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import cifar_images, trained_resnet
from publish import data_folder
from resect import Anatomy, Recovery, dissect, evaluate
from resect.batches import forward, unpack
from resect.pipeline import cuttable
from resect.sources import load_data
from resect.sources.demo import mlp, recipe, train
from resect.sources.huggingface import load_images
from sst2 import batches as padded

BLOCK = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One network with its data, for one seed.

    judge: accuracy, or perplexity, on test examples that nothing else sees. train, val: of the recovery. trace: options of the
    trace. answering: for a language model, a network that answers with the next token of each example alone, and labelled
    batches for it: the loss whose gradient `taylor` takes.
    """

    model: nn.Module
    anatomy: Anatomy
    calib: list[Any]
    judge: Callable[[nn.Module], float]
    train: list[Any]
    val: list[Any]
    recovery: Recovery
    test: str
    trace: dict[str, Any] = field(default_factory=dict)
    answering: tuple[nn.Module, list[Any]] | None = None
    perplexity: bool = False


def mnist(seed: int, quick: bool) -> Case:
    splits = _mnist()
    widths, settings = recipe(splits)
    model = train(mlp(widths, seed), splits.train, seed=seed, **{**settings, "epochs": 1 if quick else settings["epochs"]})
    rows = torch.randperm(splits.train.examples, generator=torch.Generator().manual_seed(seed))[: 500 if quick else 5000]
    calib = _batches(splits.train.inputs[rows], splits.train.labels[rows], 500)
    return Case(
        model=model,
        anatomy=dissect(model, splits.test.inputs[:2]),
        calib=calib,
        judge=lambda network: evaluate(network, splits.test).accuracy,
        train=list(splits.train),
        val=_batches(splits.search.inputs[:1000], splits.search.labels[:1000], 500),
        recovery=Recovery(steps=10 if quick else 300, batch=128, seed=seed),
        test="10,000 test digits",
    )


@cache
def _mnist() -> Any:
    return load_data(data_folder("mnist"), seed=0)


def _resnet(depth: int, seed: int, quick: bool) -> Case:
    train_set, test_set, _ = _cifar()
    count, judged = (256, 1000) if depth == 20 else (256, 500)
    count, judged = (64, 100) if quick else (count, judged)
    rows = torch.randperm(train_set.examples, generator=torch.Generator().manual_seed(seed))
    drawn = {"calib": rows[:count], "val": rows[count : count + 250], "train": rows[count + 250 :][: 500 if quick else 30_000]}
    parts = {n: _batches(cifar_images(train_set.inputs[r]), train_set.labels[r], 64) for n, r in drawn.items()}
    order = torch.randperm(test_set.examples, generator=torch.Generator().manual_seed(7))[seed * judged :][:judged]
    test = _batches(cifar_images(test_set.inputs[order]), test_set.labels[order], 250)
    model = trained_resnet(depth)
    return Case(
        model=model,
        anatomy=dissect(model, parts["calib"][0][0][:2]),
        judge=lambda network: evaluate(network, test).accuracy,
        recovery=Recovery(steps=5 if quick else 200, batch=128, seed=seed),
        test=f"{judged:,} test images a seed",
        **parts,
    )


@cache
def _cifar() -> Any:
    return load_images(data_folder("cifar10"))


def minilm(seed: int, quick: bool) -> Case:
    model, tokenizer, data = _minilm()
    rows = np.random.default_rng(seed).permutation(len(data["train"]))
    ends = np.cumsum([0, 32, 32, 64] if quick else [0, 256, 256, 6000])

    def part(split: str, some: Any) -> list[Any]:
        chosen = data[split].select(some)
        return padded(tokenizer, list(chosen["sentence"]), list(chosen["label"]))

    calib, val, lessons = (part("train", rows[a:b]) for a, b in pairwise(ends))
    order = np.random.default_rng(7).permutation(len(data["validation"]))
    judged = 32 if quick else 218
    test = part("validation", order[seed * judged :][:judged])
    return Case(
        model=model,
        anatomy=cuttable(model, calib),
        calib=calib,
        judge=lambda network: evaluate(network, test).accuracy,
        train=lessons,
        val=val,
        recovery=Recovery(steps=5 if quick else 150, learning_rate=(1e-4, 3e-4), seed=seed),
        test=f"{judged} validation sentences a seed",
        trace={"token_stride": 1},
    )


@cache
def _minilm() -> Any:
    import datasets
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = weights("minilm_sst2")
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder), datasets.load_dataset(data_folder("sst2"))


def stories(seed: int, quick: bool) -> Case:
    model, blocks = _stories()
    draw = np.random.default_rng(seed)
    own = torch.from_numpy(draw.permutation(len(blocks["train"])))
    count, judged = (8, 4) if quick else (64, 64)
    ends = [0, count, count + 32, len(own)]
    calib, val, lessons = (_tokens(blocks["train"][own[a:b]], 16) for a, b in pairwise(ends))
    test = _tokens(blocks["validation"][seed * judged :][:judged], 16)
    stops = draw.integers(8, BLOCK, (len(calib), 2 if quick else 6))
    asked = [
        {"input_ids": item["input_ids"][:, :end], "labels": item["input_ids"][:, end]}
        for item, some in zip(calib, stops)
        for end in some
    ]
    return Case(
        model=model,
        anatomy=cuttable(model, calib),
        calib=calib,
        judge=lambda network: perplexity(network, test),
        train=lessons,
        val=val,
        recovery=Recovery(steps=5 if quick else 300, batch=16, seed=seed),
        test=f"perplexity on {judged} blocks of {BLOCK} tokens of the validation stories a seed",
        trace={"token_stride": 1},
        answering=(LastToken(model).eval(), asked),
        perplexity=True,
    )


@cache
def _stories() -> Any:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = weights("stories260K")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = datasets.load_dataset(data_folder("tinystories"))
    blocks = {}
    for split in ("train", "validation"):
        ids = torch.tensor([token for text in data[split]["text"] for token in tokenizer(text)["input_ids"]])
        blocks[split] = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
    return model, blocks


def _tokens(blocks: Tensor, size: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": some} for some in blocks.split(size)]


class LastToken(nn.Module):
    """A language model that answers with the token after its input only."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm(input_ids=input_ids).logits[:, -1]


def perplexity(network: nn.Module, data: list[Any]) -> float:
    """exp of the mean cross-entropy of every next token."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for item in data:
            logits, ids = forward(network, unpack(item)), item["input_ids"]
            total += float(F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
    return math.exp(min(total / count, 700.0))


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """A network in place with the shapes of `model` and new weights, as its layers draw them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif "norm" in type(module).__name__.lower() and hasattr(module, "weight"):
                nn.init.ones_(module.weight)
    return model


def weights(name: str) -> Path:
    """A folder of $RESECT_WEIGHTS; ends the script with a sentence where there is none."""
    if "RESECT_WEIGHTS" not in os.environ:
        sys.exit(f"no weights: set RESECT_WEIGHTS to the folder that holds {name}/")
    return Path(os.environ["RESECT_WEIGHTS"]) / name


def _batches(inputs: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(size), labels.split(size)))


CASES: dict[str, tuple[str, Callable[[int, bool], Case]]] = {
    "mnist": ("784-512-256-10 on MNIST", mnist),
    "resnet20": ("ResNet-20 on CIFAR-10", lambda seed, quick: _resnet(20, seed, quick)),
    "resnet56": ("ResNet-56 on CIFAR-10", lambda seed, quick: _resnet(56, seed, quick)),
    "minilm": ("MiniLM on SST-2", minilm),
    "stories": ("stories260K, perplexity", stories),
}
