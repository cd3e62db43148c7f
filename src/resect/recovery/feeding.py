"""Batches in a seeded order that can be entered at any step, so that an interrupted recovery goes on where it was."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from resect.batches import select, shuffled, unpack
from resect.errors import DataError


class Feed(Protocol):
    """Endless training batches; `per_epoch` of them are one pass over the data."""

    per_epoch: int

    def start(self, step: int) -> Iterator[Any]:
        """Batches from this step on; the same step gives the same batches, whatever came before."""


def feed(data: Iterable[Any], batch: int, seed: int) -> Feed:
    """Batches of `data` for training.

    A DataLoader keeps its own batches, order and augmentation, under random states of its own. Anything else is read once,
    and its examples are drawn anew for each epoch in batches of `batch`; where batches do not join (sequences of different
    lengths), they stay as they are and their order is drawn.

    Raises DataError where there are no examples, or a DataLoader has no length.
    """
    if isinstance(data, DataLoader):
        return _Loader(data, seed)
    batches = list(data)
    if not batches:
        raise DataError("the recovery data are empty: the loader gave no batch; give at least one")
    return _Drawn(batches, batch, seed)


class _Drawn:
    def __init__(self, batches: list[Any], batch: int, seed: int):
        self.examples = sum(unpack(item, where="the recovery data").size for item in batches)
        joined = shuffled(batches, size=self.examples, seed=seed)
        self.whole = joined[0] if len(joined) == 1 else None
        self.batches, self.batch, self.seed = batches, batch, seed
        self.per_epoch = len(batches) if self.whole is None else -(-self.examples // batch)

    def start(self, step: int) -> Iterator[Any]:
        epoch, position = divmod(step, self.per_epoch)
        while True:
            draw = np.random.default_rng([self.seed, epoch])
            if self.whole is not None:
                rows = torch.from_numpy(draw.permutation(self.examples)).split(self.batch)
                yield from (select(self.whole, some) for some in rows[position:])
            else:
                yield from (self.batches[number] for number in draw.permutation(len(self.batches))[position:])
            epoch, position = epoch + 1, 0


class _Loader:
    def __init__(self, loader: DataLoader[Any], seed: int):
        try:
            self.per_epoch = len(loader)
        except TypeError:
            raise DataError("a DataLoader without a length cannot be resumed; give a list of batches in its place") from None
        if not self.per_epoch:
            raise DataError("the recovery data are empty: the loader gave no batch; give at least one")
        self.loader, self.seed = loader, seed

    def start(self, step: int) -> Iterator[Any]:
        epoch, position = divmod(step, self.per_epoch)
        while True:
            stream = _Stream([self.seed, epoch])
            with stream.inside():
                batches = iter(self.loader)
            for number in range(self.per_epoch):
                with stream.inside():
                    item = next(batches)
                if number >= position:
                    yield item
            epoch, position = epoch + 1, 0


class _Stream:
    """Random states of its own, so that what the network draws (dropout) and what the data draw do not depend on each other."""

    def __init__(self, seed: list[int]):
        number = int(np.random.SeedSequence(seed).generate_state(1)[0])
        with _restored():
            torch.manual_seed(number)
            np.random.seed(number)  # noqa: NPY002 (what augmentations of users draw from)
            random.seed(number)
            self.states = _states()

    @contextmanager
    def inside(self) -> Iterator[None]:
        with _restored():
            _set(self.states)
            yield
            self.states = _states()


def _states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def _set(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])


@contextmanager
def _restored() -> Iterator[None]:
    before = _states()
    try:
        yield
    finally:
        _set(before)


def fingerprint(feed: Feed) -> str:
    """SHA-256 of the first training batch and the number of batches, to tell two runs apart."""
    digest = hashlib.sha256(str(feed.per_epoch).encode())
    batch = unpack(next(feed.start(0)))
    for value in (*batch.args, *batch.kwargs.values(), batch.labels, batch.tokens):
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
