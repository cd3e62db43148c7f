"""Labelled data in memory, and the five disjoint roles that an operation needs of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from resect.errors import DataError

ROLES = ("train", "calibrate", "search", "certify", "test")


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayData:
    """Labelled examples in memory: iterating yields (inputs, labels) batches in order, as often as one likes.

    inputs: (examples, ...) float32. labels: (examples,) int64. ``len()`` is the number of batches, as for a DataLoader.

    >>> data = ArrayData(inputs=torch.zeros(5, 3), labels=torch.arange(5), batch_size=2)
    >>> [len(x) for x, _ in data], data.examples
    ([2, 2, 1], 5)
    """

    inputs: Tensor
    labels: Tensor
    batch_size: int = 256

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise DataError(f"{len(self.inputs)} inputs but {len(self.labels)} labels; every example needs one label.")
        if self.labels.ndim != 1 or self.labels.is_floating_point():
            kind = f"{str(self.labels.dtype).removeprefix('torch.')} of shape {tuple(self.labels.shape)}"
            raise DataError(f"labels are {kind}; they must be one class index (0, 1, ...) for each example.")

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.inputs.split(self.batch_size), self.labels.split(self.batch_size), strict=True)

    def __len__(self) -> int:
        return -(-self.examples // self.batch_size)

    @property
    def examples(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the bytes of inputs and labels, whatever the batch size."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.labels):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def take(self, rows: Tensor) -> ArrayData:
        """The examples at `rows`, in that order."""
        return replace(self, inputs=self.inputs[rows], labels=self.labels[rows])

    def flattened(self) -> ArrayData:
        """The same examples with one axis of features: (examples, features)."""
        return replace(self, inputs=self.inputs.flatten(1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """One data set in its roles. `certify` and `test` share no example with anything else.

    train: what a network may be trained on. calibrate: unlabelled use, trace and repair; may be part of train. search: judges
    candidates. certify: opened once. test: nobody's until the final report. note: what a user must know before trusting a
    certificate made with them.
    """

    name: str
    train: ArrayData
    calibrate: ArrayData
    search: ArrayData
    certify: ArrayData
    test: ArrayData
    class_names: tuple[str, ...] = ()
    note: str = ""
    classes: int = field(init=False)

    def __post_init__(self) -> None:
        for role in ROLES:
            if not getattr(self, role).examples:
                raise DataError(f"{self.name}: no example is left for {role}; the data set is too small to be split.")
        object.__setattr__(self, "classes", 1 + max(int(getattr(self, role).labels.max()) for role in ROLES))

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of every split, by role."""
        return {role: getattr(self, role).fingerprint for role in ROLES}

    def flattened(self) -> Splits:
        """The same splits with one axis of features, as a plain MLP takes them."""
        return self._with({role: getattr(self, role).flattened() for role in ROLES})

    def batched(self, batch_size: int) -> Splits:
        """The same splits in batches of another size."""
        return self._with({role: replace(getattr(self, role), batch_size=batch_size) for role in ROLES})

    def _with(self, roles: dict[str, ArrayData]) -> Splits:
        return Splits(name=self.name, class_names=self.class_names, note=self.note, **roles)


def shuffled(data: ArrayData, seed: int, sizes: tuple[int, ...]) -> list[ArrayData]:
    """`data` in a seeded order, cut into parts of `sizes` and the rest."""
    order = torch.randperm(data.examples, generator=torch.Generator().manual_seed(seed))
    return [data.take(rows) for rows in order.split([*sizes, data.examples - sum(sizes)])]
