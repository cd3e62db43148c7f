"""The networks of the demonstration: plain ReLU perceptrons, trained on the spot."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from resect.sources.splits import ArrayData, Splits

ARCHITECTURE = "resect.sources.demo:mlp"


def mlp(widths: Sequence[int] = (64, 128, 64, 10), seed: int = 0) -> nn.Sequential:
    """A ReLU perceptron with the given widths, from input to output; images are flattened on the way in.

    >>> [tuple(p.shape) for p in mlp((4, 3, 2)).parameters()]
    [(3, 4), (3,), (2, 3), (2,)]
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    last = len(widths) - 2
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            if layer == last:
                layers["output"] = nn.Linear(inputs, outputs)
            else:
                layers[f"hidden{layer + 1}"] = nn.Linear(inputs, outputs)
                layers[f"relu{layer + 1}"] = nn.ReLU()
    return nn.Sequential(layers)


def train(
    model: nn.Module,
    data: ArrayData,
    *,
    epochs: int,
    seed: int = 0,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    noise: float = 0.0,
    progress: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Train `model` in place on `data` with Adam and one learning-rate cycle; the same seed gives the same weights.

    noise: standard deviation of Gaussian noise added to the inputs, which stands in for examples where there are few
    (Bishop 1995, "Training with noise is equivalent to Tikhonov regularization"). progress: called after every epoch with
    its number and mean loss. Returns the model in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    steps = epochs * -(-data.examples // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(data.examples, generator=generator).split(batch_size):
            inputs, labels = data.inputs[rows], data.labels[rows]
            if noise:
                inputs = inputs + noise * torch.randn(inputs.shape, generator=generator)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        if progress:
            progress(epoch + 1, total / data.examples)
    return model.eval()


def recipe(splits: Splits) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Widths and training settings of the demonstration for a data set: small for few pixels, 512-256 hidden for many.

    Few examples are made to last by noise on the inputs and more epochs.
    """
    features = splits.train.inputs[0].numel()
    hidden = (128, 64) if features < 256 else (512, 256)
    few = splits.train.examples < 5_000
    settings = {"epochs": 80, "batch_size": 32, "noise": 0.15} if few else {"epochs": 10, "batch_size": 128, "noise": 0.0}
    return (features, *hidden, splits.classes), settings
