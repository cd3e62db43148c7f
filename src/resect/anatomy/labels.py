"""Channel labels: which unit every element of a tensor belongs to, and the book of labels that must leave together.

A *plane* is an int64 tensor that broadcasts against its tensor (size 1 where constant, so it stays small) and holds for every
element the label of one position of one parameter axis; -1 is no label. A parameter has one plane for each of its axes, an
activation usually one. The meaning: an element leaves when the unit of any of its labels leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Plane = Tensor
Source = Literal["parameter", "constant", "activation"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Marks:
    """What is known about one tensor of the watched forward pass.

    `source`: computed from parameters alone, from constants alone, or from the network's input. `name`: the parameter this
    tensor is a view of. `flat`: axes along which its values are known to be constant, so that they follow any width.
    `stats`: labels whose width this tensor summarises (a mean or norm over units), until it meets those units again.
    """

    shape: tuple[int, ...]
    planes: tuple[Plane, ...] = ()
    source: Source = "constant"
    name: str | None = None
    flat: frozenset[int] = frozenset()
    stats: tuple[Plane, ...] = ()

    def with_planes(self, planes: Iterable[Plane]) -> Marks:
        """The same tensor with other planes."""
        return replace(self, planes=tuple(planes))

    def lifted(self, ndim: int) -> Marks:
        """Seen with leading axes of size 1, as broadcasting sees it."""
        more = ndim - len(self.shape)
        if more <= 0:
            return self
        return replace(
            self,
            shape=(1,) * more + self.shape,
            planes=tuple(p.reshape((1,) * more + tuple(p.shape)) for p in self.planes),
            flat=frozenset(a + more for a in self.flat),
        )

    def fixed(self, axis: int) -> bool:
        """Whether the tensor has a width of its own on `axis`: neither broadcast nor constant along it."""
        return self.shape[axis] > 1 and axis not in self.flat


def axes(plane: Plane) -> tuple[int, ...]:
    """The axes along which the labels vary."""
    return tuple(i for i, size in enumerate(plane.shape) if size != 1)


def compress(plane: Plane) -> Plane | None:
    """The plane with every constant axis at size 1; None when it holds no label at all."""
    for axis, (size, stride) in enumerate(zip(plane.shape, plane.stride())):
        if size > 1:
            first = plane.narrow(axis, 0, 1)
            if stride == 0 or bool((plane == first).all()):
                plane = first
    return None if plane.numel() == 0 or (plane.numel() == 1 and int(plane.reshape(())) < 0) else plane


def drop(plane: Plane, dropped: Iterable[int]) -> Plane:
    """The plane without the labels' variation along `dropped` (index 0 stands for all; sizes become 1)."""
    for axis in dropped:
        plane = plane.narrow(axis, 0, 1)
    return plane


def vector(plane: Plane, axis: int) -> Plane:
    """The labels along one axis, at index 0 of the others."""
    return drop(plane, (a for a in range(plane.ndim) if a != axis)).reshape(-1)


def on_axis(labels: Tensor, axis: int, ndim: int) -> Plane:
    """A plane of `ndim` axes that holds `labels` along `axis`."""
    return labels.reshape([-1 if a == axis else 1 for a in range(ndim)])


def reshaped(plane: Plane, old: Sequence[int], new: Sequence[int]) -> Plane:
    """`plane`, broadcastable to `old`, as the plane of the tensor reshaped to `new`; works segment by segment to stay small."""
    shape: list[int] = []
    source: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = i, j
        have = need = 1
        if i < len(old):
            have, i = old[i], i + 1
        if j < len(new):
            need, j = new[j], j + 1
        while have != need:
            if (have < need and i < len(old)) or j >= len(new):
                have, i = have * old[i], i + 1
            else:
                need, j = need * new[j], j + 1
        constant = all(size == 1 for size in plane.shape[a:i])
        source += [1] * (i - a) if constant else list(old[a:i])
        shape += [1] * (j - b) if constant else list(new[b:j])
    return plane.expand(source).reshape(shape)


@dataclass(frozen=True, kw_only=True)
class Where:
    """A place in the watched forward pass: module, op, and the user's source line where it could be found."""

    module: str = ""
    op: str = ""
    line: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.module or "(network)", self.op, self.line) if part)


@dataclass(frozen=True, kw_only=True, eq=False)
class Axis:
    """The labels [start, start + size * blocks) of one axis of one parameter or buffer, in position order."""

    tensor: str
    axis: int
    start: int
    size: int
    blocks: int = 1


class Book:
    """Every label given out in one pass, and what was learned about them; only appends, resolved once at the end."""

    def __init__(self, here: Callable[[], Where]) -> None:
        self.here = here
        self.axes: list[Axis] = []
        self.count = 0
        self.lenient = True
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []
        self.pins: list[tuple[np.ndarray, str, Where]] = []
        self.roles: list[tuple[np.ndarray, str, int]] = []
        self.shared_roles: list[tuple[np.ndarray, np.ndarray]] = []
        self.streams: list[np.ndarray] = []
        self.heads: list[np.ndarray] = []
        self.multiples: list[tuple[np.ndarray, int]] = []
        self.experts: list[np.ndarray] = []
        self.partitions: list[tuple[np.ndarray, np.ndarray, Where, bool]] = []
        self.folds: dict[bytes, tuple[np.ndarray, Where]] = {}
        self._blocked: dict[tuple[str, int], Axis] = {}
        self._clock = 0

    def allocate(self, tensor: str, axis: int, size: int, blocks: int = 1) -> Tensor:
        """Fresh labels (size * blocks,) for one axis; the blocked labels of an axis are given out once and then repeated."""
        found = self._blocked.get((tensor, axis)) if blocks > 1 else None
        if found is None:
            found = Axis(tensor=tensor, axis=axis, start=self.count, size=size, blocks=blocks)
            self.axes.append(found)
            self.count += size * blocks
            if blocks > 1:
                self._blocked[tensor, axis] = found
        return torch.arange(found.start, found.start + size * blocks)

    def tie(self, one: Tensor, other: Tensor, reason: str = "meets a tensor that cannot follow") -> None:
        """The units of `one` and `other` (broadcast against each other) leave together; a label without partner is pinned."""
        a, b = (t.numpy() for t in torch.broadcast_tensors(one, other))
        if a is b or np.array_equal(a, b):
            return
        both = (a >= 0) & (b >= 0)
        if both.all():
            self.edges.append((a.ravel(), b.ravel()))
            return
        self.edges.append((a[both], b[both]))
        lonely = np.maximum(a, b)[~both]
        if (lonely >= 0).any():
            self.pin(lonely, reason)

    def tie_along(self, plane: Plane, along: Iterable[int]) -> None:
        """All labels that differ only by their position on `along` leave together."""
        first = drop(plane, along)
        if first.numel() != plane.numel():
            self.tie(first, plane, "shares its width with a part that cannot follow")

    def pin(self, labels: Tensor | np.ndarray, reason: str) -> None:
        """The units of `labels` stay, because of `reason` at the present op."""
        array = labels.numpy() if isinstance(labels, Tensor) else labels
        array = np.unique(array[array >= 0])
        if array.size:
            self.pins.append((array, reason, self.here()))

    def role(self, labels: Tensor, role: str) -> None:
        """The positions of `labels` are read or written by a weight at the present op."""
        self._clock += 1
        self.roles.append((labels.numpy().ravel(), role, self._clock))

    def share_role(self, one: Tensor, other: Tensor) -> None:
        """Two weights are added or multiplied: whoever reads or writes the result, reads or writes both."""
        a, b = torch.broadcast_tensors(one, other)
        self.shared_roles.append((a.numpy().ravel(), b.numpy().ravel()))

    def stream(self, labels: Tensor) -> None:
        """The units of `labels` pass through a norm that mixes them: masking them is not the same as cutting them."""
        self.streams.append(labels.numpy().ravel())

    def head(self, labels: Tensor) -> None:
        """The units of `labels` are attention heads: whole batch indices of a product of activations."""
        self.heads.append(labels.numpy().ravel())

    def multiple(self, labels: Tensor, of: int) -> None:
        """Only multiples of `of` units may stay: a kernel asks for it."""
        self.multiples.append((labels.numpy().ravel(), of))

    def expert(self, labels: Tensor) -> None:
        """The units of `labels` are neurons inside experts."""
        self.experts.append(labels.numpy().ravel())

    def partition(self, labels: Tensor, parts: Tensor, *, strict: bool = True) -> None:
        """Equally many positions must stay in every part (both arrays broadcast against each other).

        Not strict: only where that works out; the bounds of a slice may as well be attributes that follow their widths.
        """
        a, b = torch.broadcast_tensors(labels, parts)
        self.partitions.append((a.numpy().ravel(), b.numpy().ravel(), self.here(), strict))

    def fold(self, plane: Plane) -> None:
        """Remember a plane that varies on several axes: its units must leave whole slabs of one of them."""
        array = plane.numpy()
        array = array.reshape([s for s in array.shape if s > 1])
        key = repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()
        if key not in self.folds:
            self.folds[key] = (array, self.here())
