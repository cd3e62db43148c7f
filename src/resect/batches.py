"""Batches of data by the ecosystem's conventions: tensors, tuples, dicts and Hugging Face batches.

Everything above asks here what the inputs, labels and padding of a batch are, so a convention is understood once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from resect.errors import DataError, ModelError

LABEL_KEYS = ("labels", "label", "targets", "target")
MASK_KEYS = ("attention_mask", "padding_mask")


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One batch, taken apart: what the network is called with, and what is known about the examples.

    labels: (size,) int64 or None. mask: (size, tokens) bool, False at padding, or None. tokens: (size, tokens) int64 labels
    of tokens, -100 where there is none, or None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: torch.Tensor | None
    mask: torch.Tensor | None
    size: int
    tokens: torch.Tensor | None = None


def unpack(batch: Any, *, where: str = "data") -> Batch:
    """Take a batch apart.

    A tensor is unlabelled input; of a tuple or list of two or more the last entry is the labels; in a mapping the labels are
    under "labels", "label", "targets" or "target", the padding mask under "attention_mask", and the rest are keyword inputs.
    Labels of the same shape as integer inputs (examples, tokens) label tokens; such examples count as unlabelled.

    Raises DataError for anything else, for labels that are not one integer per example, and for batches of no examples.

    >>> unpack((torch.zeros(4, 8), torch.tensor([0, 1, 1, 0]))).size
    4
    """
    labels: torch.Tensor | None = None
    mask = None
    if isinstance(batch, Mapping):
        kwargs = dict(batch)
        for key in LABEL_KEYS:
            if key in kwargs:
                labels = kwargs.pop(key)
                break
        args: tuple[Any, ...] = ()
        mask = next((kwargs[key].bool() for key in MASK_KEYS if isinstance(kwargs.get(key), torch.Tensor)), None)
        tensors = [value for value in kwargs.values() if isinstance(value, torch.Tensor)]
    elif isinstance(batch, torch.Tensor):
        args, kwargs, tensors = (batch,), {}, [batch]
    elif isinstance(batch, Sequence) and len(batch) and all(isinstance(item, torch.Tensor) for item in batch):
        args, kwargs = (tuple(batch[:-1]), {}) if len(batch) > 1 else ((batch[0],), {})
        labels = batch[-1] if len(batch) > 1 else None
        tensors = list(args)
    else:
        raise DataError(
            f"a batch of {where} is a {type(batch).__name__}; give a tensor, a tuple (inputs, labels), or a dict of tensors"
        )
    if not tensors or tensors[0].ndim == 0:
        raise DataError(f"a batch of {where} holds no input tensor with a batch axis")
    size = int(tensors[0].shape[0])
    if size == 0:
        raise DataError(f"a batch of {where} holds no examples (first input has shape {tuple(tensors[0].shape)})")
    if _label_tokens(labels, tensors[0]):
        assert labels is not None
        return Batch(args=args, kwargs=kwargs, labels=None, mask=mask, size=size, tokens=labels.long())
    return Batch(args=args, kwargs=kwargs, labels=_checked_labels(labels, size, where), mask=mask, size=size)


def _label_tokens(labels: Any, inputs: torch.Tensor) -> bool:
    """Whether labels are those of tokens: whole numbers, two or more an example, one for each of its integer inputs."""
    tensors = isinstance(labels, torch.Tensor) and labels.shape == inputs.shape and labels.ndim == 2 and labels.shape[1] > 1
    return tensors and not labels.is_floating_point() and not inputs.is_floating_point()


def _checked_labels(labels: torch.Tensor | None, size: int, where: str) -> torch.Tensor | None:
    if labels is None:
        return None
    if not isinstance(labels, torch.Tensor):
        labels = torch.as_tensor(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.shape[0] != size or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"labels of a batch of {where} have shape {tuple(labels.shape)} and type {labels.dtype} for {size} examples; "
            "give one integer class per example"
        )
    return labels.long()


def example_batch(example: tuple[tuple[Any, ...], dict[str, Any]]) -> Batch:
    """The example inputs of an anatomy as an unlabelled batch."""
    args, kwargs = example
    size = next((int(v.shape[0]) for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim), 1)
    return Batch(args=args, kwargs=kwargs, labels=None, mask=None, size=size)


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer (cpu for a network without any)."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def forward(model: nn.Module, batch: Batch, *, device: torch.device | None = None) -> torch.Tensor:
    """Run the network on a batch and return its logits (or main output) as one tensor, examples first.

    Understands a tensor, an object or mapping with `logits`, and a tuple whose first entry is a tensor. Raises ModelError when
    the forward fails (wrong shapes) or returns something else.
    """
    device = device or device_of(model)
    args = tuple(_to(value, device) for value in batch.args)
    kwargs = {key: _to(value, device) for key, value in batch.kwargs.items()}
    try:
        output = model(*args, **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        shapes = [tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        raise ModelError(
            f"{type(model).__name__} failed on inputs of shape {', '.join(map(str, shapes))}: {str(error).splitlines()[0]}"
        ) from error
    return main_output(output, type(model).__name__)


def main_output(output: Any, name: str = "the network") -> torch.Tensor:
    """The tensor that counts in a network's output: itself, `.logits`, `["logits"]`, or the first tensor of a tuple.

    >>> main_output({"logits": torch.ones(2, 3), "hidden": torch.zeros(1)}).shape
    torch.Size([2, 3])
    """
    if isinstance(output, torch.Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    entries = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(entries, Sequence) and len(entries) and isinstance(entries[0], torch.Tensor):
        return entries[0]
    raise ModelError(
        f"{name} returned a {type(output).__name__} without a tensor to judge; return logits, a tuple that starts with them, "
        "or a mapping with the key 'logits'"
    )


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def select(batch: Any, rows: torch.Tensor) -> Any:
    """The same batch with only the examples `rows` (int64 indices), whatever its convention."""
    size = unpack(batch).size
    if isinstance(batch, Mapping):
        return {key: _rows(value, rows, size) for key, value in batch.items()}
    if isinstance(batch, torch.Tensor):
        return batch[rows]
    return tuple(_rows(value, rows, size) for value in batch)


def _rows(value: Any, rows: torch.Tensor, size: int) -> Any:
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == size else value


def divide(data: Iterable[Any], shares: Sequence[float], *, seed: int = 0) -> tuple[list[Any], ...]:
    """Split data into disjoint sets, example by example: `shares` sum to 1; same seed, same sets.

    >>> halves = divide([torch.arange(10.)], [0.5, 0.5])
    >>> [sum(len(b) for b in part) for part in halves]
    [5, 5]
    """
    batches = list(data)
    sizes = [unpack(batch).size for batch in batches]
    order = np.random.default_rng(seed).permutation(sum(sizes))
    bounds = np.round(np.cumsum(shares) * len(order)).astype(np.int64)
    owner = np.empty(len(order), dtype=np.int64)
    owner[order] = np.searchsorted(bounds, np.arange(len(order)), side="right")
    parts: tuple[list[Any], ...] = tuple([] for _ in shares)
    start = 0
    for batch, size in zip(batches, sizes):
        for number, part in enumerate(parts):
            rows = np.flatnonzero(owner[start : start + size] == number)
            if len(rows):
                part.append(select(batch, torch.from_numpy(rows)))
        start += size
    return parts


def shuffled(data: Iterable[Any], *, size: int = 256, seed: int = 0) -> list[Any]:
    """All examples in a seeded order, in new batches of `size`; same seed, same order.

    Where batches do not join (sequences padded to different lengths) only the order of the batches is drawn.
    """
    batches = list(data)
    rng = np.random.default_rng(seed)
    try:
        joined = _join(batches)
    except (RuntimeError, TypeError, ValueError):
        return [batches[i] for i in rng.permutation(len(batches))]
    order = torch.from_numpy(rng.permutation(unpack(joined).size)) if batches else torch.empty(0)
    return [select(joined, rows) for rows in order.split(size)] if batches else []


def _join(batches: list[Any]) -> Any:
    first = batches[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(batches)
    if isinstance(first, Mapping):
        return {key: torch.cat([batch[key] for batch in batches]) for key in first}
    return tuple(torch.cat(entries) for entries in zip(*batches))
