"""Hidden states: a fixed-size sample of what the units of every group hold before and after their activation.

One row is one example (perceptrons), one position of an example (convolutions, up to 8 an example) or one token that is not
padding. Which rows are kept is decided by a hash of the example's content and the position, so that samples merge: the rows of
two traces are those of one trace of all the data, in any order and on any number of machines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from resect.anatomy import Anatomy, Group
from resect.batches import Batch, example_batch, forward
from resect.tracing.observing import NORMS, Reader, Reading, norm_line, observing, survey
from resect.tracing.sums import by_example

POSITIONS = 8
# Groups with many writers or readers (a residual sum) are looked at in so many places, spread over the network.
PLACES = 4
ACTIVATIONS = {
    "celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "prelu", "relu", "relu6",
    "selu", "sigmoid", "silu", "softplus", "softsign", "tanh",
}  # fmt: skip
NO_ROW = np.uint64(2**64 - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class States:
    """What the units of one group held on the same rows, before and after their activation.

    keys: (rows,) uint64, ascending, one for each row. pre, post: (rows, units, width) float32; the width is that of one unit in
    the places where it is written or read (1 for a neuron or channel, the head's width for a head, the sum of them for a
    residual sum). most: so many rows are kept, those with the smallest keys.
    """

    keys: np.ndarray
    pre: np.ndarray
    post: np.ndarray
    most: int

    def __add__(self, other: States) -> States:
        return joined([self, other])


def joined(samples: Sequence[States]) -> States:
    """The sample of all the data that several samples are of; an example that is in two of them counts once."""
    most = min(sample.most for sample in samples)
    keys, first = np.unique(np.concatenate([sample.keys for sample in samples]), return_index=True)
    first = first[:most]
    return States(
        keys=keys[:most],
        pre=np.concatenate([sample.pre for sample in samples])[first],
        post=np.concatenate([sample.post for sample in samples])[first],
        most=most,
    )


def merged(one: Mapping[str, States], other: Mapping[str, States]) -> dict[str, States]:
    """The samples of two traces by group; none where either trace has none. Groups that one of them never reached count too."""
    if not one or not other:
        return {}
    both = {name: one[name] + other[name] for name in one if name in other}
    return {name: both.get(name) or one.get(name) or other[name] for name in dict.fromkeys((*one, *other))}


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where the units of a group are seen: in what a writer makes, or in what a reader reads.

    columns: (units, width) channels there. grid: extent of the positions on the example. norm: (shift, scale) of a batch norm
    behind the writer. flat: the columns of a unit are positions, because the reader reads a flattened convolution.
    """

    tensor: str
    written: bool
    columns: np.ndarray
    grid: tuple[int, ...]
    norm: tuple[np.ndarray, np.ndarray] | None = None
    flat: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """All places of one group. grid: that of the place with the fewest positions, or None where all have the same."""

    pre: tuple[Place, ...]
    post: tuple[Place, ...]
    grid: tuple[int, ...] | None
    positions: int | None


class Sampler:
    """Takes rows out of the readings of a pass over data, batch by batch; memory does not grow with the number of examples."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, readers: Mapping[str, Reader], most: int):
        self.most = most
        self.groups = find_places(model, anatomy, readers)
        self.at: dict[str, list[tuple[str, int]]] = {}
        for name, places in self.groups.items():
            for number, place in enumerate((*places.pre, *places.post)):
                self.at.setdefault(place.tensor, []).append((name, number))
        self.parts: dict[str, list[States]] = {name: [] for name in self.groups}
        self.limits = dict.fromkeys(self.groups, NO_ROW)

    def begin(self, batch: Batch) -> None:
        """Look at the examples of the next batch."""
        self.digests = digests(batch)
        self.mask = None if batch.mask is None else batch.mask.cpu().numpy()
        self.keys: dict[tuple[int, int], np.ndarray] = {}
        self.rows: dict[str, _Rows] = {}

    def see(self, reading: Reading) -> None:
        """Take the rows of this batch out of one reading; only the first call of a weight counts."""
        for name, number in self.at.get(reading.reader.tensor, ()):
            places = self.groups[name]
            place = (*places.pre, *places.post)[number]
            if name not in self.rows:
                self.rows[name] = self._choose(name, places, *seen(reading, place.written, len(self.digests)))
            rows = self.rows[name]
            if number not in rows.values:
                rows.take(number, place, reading, len(self.digests), self.mask)

    def end(self) -> None:
        """Add the batch's rows to the sample of every group whose places were all reached."""
        for name, rows in self.rows.items():
            places, parts = self.groups[name], self.parts[name]
            before, count = len(places.pre), len(places.pre) + len(places.post)
            if len(rows.values) < count or not len(rows.keys):
                continue
            values = [rows.values[number] for number in range(count)]
            post = np.concatenate(values[before:], axis=2)
            pre = np.concatenate(values[:before], axis=2) if before else post
            parts.append(States(keys=rows.keys, pre=pre, post=post, most=self.most))
            if sum(len(part.keys) for part in parts) >= 2 * self.most:
                self.parts[name] = [joined(parts)]
                self.limits[name] = self.parts[name][0].keys[-1]

    def finish(self) -> dict[str, States]:
        """The sample of every group of which any rows were seen."""
        return {name: joined(parts) for name, parts in self.parts.items() if parts}

    def _choose(self, name: str, places: Places, values: torch.Tensor, axis: int, grid: tuple[int, ...]) -> _Rows:
        """The rows of this batch that may be in the sample, at the first place that is reached."""
        base = grid if places.grid is None else places.grid
        keys = self._keys(len(values), int(np.prod(base)))
        if self.mask is not None and axis == 1 and self.mask.shape == keys.shape:
            keys = np.where(self.mask, keys, NO_ROW)
        if places.positions is not None and keys.shape[1] > places.positions:
            keys = np.where(keys <= np.partition(keys, places.positions - 1)[:, places.positions - 1, None], keys, NO_ROW)
        limit = self.limits[name]
        if keys.size > self.most:
            limit = min(limit, np.partition(keys, self.most, axis=None)[self.most])
        example, position = np.nonzero(keys < limit)
        return _Rows(keys[example, position], example, position, base, len(values))

    def _keys(self, examples: int, positions: int) -> np.ndarray:
        """(examples, positions) a hash of each example's content and the position."""
        if (examples, positions) not in self.keys:
            known = self.digests if examples == len(self.digests) else together(self.digests)
            steps = np.arange(positions, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            # An example that is in the batch twice is one example.
            again = np.ones(len(known), dtype=bool)
            again[np.unique(known, return_index=True)[1]] = False
            self.keys[examples, positions] = np.where(again[:, None], NO_ROW, mixed(known[:, None] + steps))
        return self.keys[examples, positions]


@dataclass
class _Rows:
    """The rows that one batch offers for one group, and their values at every place reached so far."""

    keys: np.ndarray
    example: np.ndarray
    position: np.ndarray
    grid: tuple[int, ...]
    examples: int
    values: dict[int, np.ndarray] = field(default_factory=dict)

    def take(self, number: int, place: Place, reading: Reading, examples: int, mask: np.ndarray | None) -> None:
        """Keep the (rows, units, width) values of the units at one place."""
        values, axis, grid = seen(reading, place.written, examples)
        if len(values) != self.examples:
            return  # Tokens routed to an expert are by example in one place by accident: no rows from this batch.
        if axis == 2:
            values = values.transpose(1, 2)
        columns = place.columns[None]
        if place.flat:
            position, columns = np.zeros_like(self.position), place.columns.T[self.positions(place.grid, None)][:, :, None]
        else:
            position = self.positions(grid, mask if axis == 1 else None)
        at = [torch.from_numpy(a).to(values.device) for a in (self.example, position, columns)]
        taken = values[at[0][:, None, None], at[1][:, None, None], at[2]].float().cpu().numpy()
        self.values[number] = taken if place.norm is None else (place.norm[0] + place.norm[1] * taken).astype(np.float32)

    def positions(self, grid: tuple[int, ...], mask: np.ndarray | None) -> np.ndarray:
        """(rows,) positions in another grid at the same relative places; where one cell covers many, one of them by the key."""
        if grid == self.grid:
            return self.position
        if len(grid) != len(self.grid):
            share = (self.position + self._chance(0)) / np.prod(self.grid)
            if mask is not None and mask.shape[1] == int(np.prod(grid)):
                # The tokens of an example that are not padding, in their order.
                tokens = np.argsort(~mask, axis=1, kind="stable")
                return tokens[self.example, (share * mask.sum(1)[self.example]).astype(np.int64)]
            return (share * np.prod(grid)).astype(np.int64)
        cells = np.unravel_index(self.position, self.grid)
        chances = [(cell + self._chance(axis)) / size for axis, (cell, size) in enumerate(zip(cells, self.grid))]
        return np.ravel_multi_index(tuple((c * size).astype(np.int64) for c, size in zip(chances, grid)), grid)

    def _chance(self, axis: int) -> np.ndarray:
        return (mixed(self.keys + np.uint64(axis + 1)) >> np.uint64(11)).astype(np.float64) / 2**53


def seen(reading: Reading, written: bool, examples: int) -> tuple[torch.Tensor, int, tuple[int, ...]]:
    """What a writer made or a reader read, examples first; the axis of positions; and the extent of the positions."""
    tensor = (reading.output if written else reading.inputs).detach()
    values, axis = by_example(reading, examples, tensor)
    grid = tuple(tensor.shape[2:]) if axis == 2 else tuple(tensor.shape[1:-1])
    if tensor.shape[0] != len(values) or int(np.prod(grid)) != values.shape[axis]:
        grid = (values.shape[axis],)
    return values, axis, grid or (1,)


def find_places(model: nn.Module, anatomy: Anatomy, readers: Mapping[str, Reader]) -> dict[str, Places]:
    """Where every group is written and read, from one pass over the anatomy's example.

    Pre-activation states are what writers make, behind a batch norm where there is one: a norm in evaluation mode is part of
    the same affine map, so that folding it into the convolution changes no score. Of several writers the gates count (those
    that an activation is applied to) and those whose output is added to a residual sum; of an attention head, the queries.
    Where nothing that is observed writes the units (an embedding), what is read stands for both.
    """
    writers = survey(model, anatomy, dict.fromkeys(part.tensor for group in anatomy.groups for part in group.writers))
    scout = _Scout()
    with torch.no_grad(), observing(model, {**writers, **readers}, scout.see, follow=scout.follow):
        batch = example_batch(anatomy.example)
        forward(model, batch)
    places = {group.name: _places(model, group, scout, writers, batch.size) for group in anatomy.groups}
    return {name: found for name, found in places.items() if found.post}


def _places(model: nn.Module, group: Group, scout: _Scout, writers: Mapping[str, Reader], examples: int) -> Places:
    post = _spread(_read(group, scout, examples))
    pre = _spread(_written(model, group, scout, writers, examples, post[0].columns.shape[1] if post else 1))
    post = tuple(_flattened(place, pre[0].grid) for place in post) if pre else post
    if len({len(seen(scout.readings[p.tensor], p.written, examples)[0]) for p in (*pre, *post)}) > 1:
        # Rows of one place are not those of another (nodes and edges of a graph): one place stands for all.
        pre, post = (), post[:1]
    grids = [place.grid for place in (*pre, *post)]
    convolved = any(scout.readings[place.tensor].reader.op in ("conv", "transposed") for place in (*pre, *post))
    return Places(
        pre=pre,
        post=post,
        grid=None if len(set(grids)) < 2 else min(grids, key=np.prod),
        positions=POSITIONS if convolved else None,
    )


def _read(group: Group, scout: _Scout, examples: int) -> list[Place]:
    """A place for every reader that was seen, the first of those that read the same tensor."""
    found: list[Place] = []
    inputs: set[int] = set()
    for part in group.readers:
        reading = scout.readings.get(part.tensor)
        if reading is not None and id(reading.inputs) not in inputs:
            inputs.add(id(reading.inputs))
            found.append(Place(tensor=part.tensor, written=False, columns=part.index, grid=seen(reading, False, examples)[2]))
    return found


def _written(
    model: nn.Module, group: Group, scout: _Scout, writers: Mapping[str, Reader], examples: int, width: int
) -> list[Place]:
    """A place for every writer that counts; width: columns of a unit where it is read."""
    parts = [part for part in group.writers if part.tensor in scout.readings]
    chosen: list[tuple[str, np.ndarray]] = []
    for part in parts if group.kind != "head" else ():
        gate = np.isin(part.index, list(scout.activated.get(part.tensor, ())))
        if gate.any() and len(set(gate.sum(1))) == 1:
            chosen.append((part.tensor, part.index[gate].reshape(group.units, -1)))
        elif writers[part.tensor].residual:
            chosen.append((part.tensor, part.index))
    if not chosen:
        # The queries of a head come first, and so does a gate that nothing known is applied to.
        chosen = [(part.tensor, part.index[:, :width]) for part in parts[:1]]
    return [
        Place(
            tensor=tensor,
            written=True,
            columns=columns,
            grid=seen(scout.readings[tensor], True, examples)[2],
            norm=_norm(model, writers[tensor].norm, columns),
        )
        for tensor, columns in chosen
    ]


def _norm(model: nn.Module, name: str | None, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    if name is None:
        return None
    shift, scale = (line.cpu().numpy() for line in norm_line(model, name))
    return shift[columns], scale[columns]


def _spread(places: list[Place]) -> tuple[Place, ...]:
    """At most four places, spread over the network, the first and the last among them."""
    numbers = np.unique(np.linspace(0, max(len(places) - 1, 0), PLACES).round().astype(int))
    return tuple(places[number] for number in numbers) if places else ()


def _flattened(place: Place, grid: tuple[int, ...]) -> Place:
    """The place as it is; a reader of one position with several columns a unit, behind a writer of many positions, reads a
    flattened grid of the writer's proportions."""
    width = place.columns.shape[1]
    if width == 1 or place.grid != (1,) or int(np.prod(grid)) == 1:
        return place
    flat: tuple[int, ...] = (width,)
    if len(grid) == 2:
        rows = max(round((width * grid[0] / grid[1]) ** 0.5), 1)
        flat = (rows, width // rows) if width % rows == 0 else flat
    return Place(tensor=place.tensor, written=False, columns=place.columns, grid=flat, flat=True)


class _Scout:
    """Sees one pass over the example: the first reading of every weight, and which outputs an activation is applied to."""

    def __init__(self) -> None:
        self.readings: dict[str, Reading] = {}
        self.activated: dict[str, set[int]] = {}
        # Tensors by the memory they live in, so that chunks of an output are known; kept, so that the memory stays theirs.
        self.made: dict[int, tuple[torch.Tensor, str, int]] = {}

    def see(self, reading: Reading) -> None:
        if reading.reader.tensor not in self.readings:
            self.readings[reading.reader.tensor] = reading
            axis = 1 if reading.reader.op in ("conv", "transposed") else reading.output.ndim - 1
            self.made[_memory(reading.output)] = (reading.output, reading.reader.tensor, axis)

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        inputs = args[0] if args and isinstance(args[0], torch.Tensor) else kwargs.get("input")
        if not isinstance(inputs, torch.Tensor) or _memory(inputs) not in self.made:
            return
        whole, name, axis = self.made[_memory(inputs)]
        function = getattr(func, "__name__", "").strip("_")
        if func in NORMS:
            self.made[_memory(output)] = (output, name, axis)
        elif function in ACTIVATIONS:
            width = whole.shape[axis]
            first, count = 0, width
            if func is F.glu:
                first, count = width // 2, width // 2
            elif inputs.numel() < whole.numel() and inputs.ndim == whole.ndim:
                first, count = (inputs.storage_offset() - whole.storage_offset()) // whole.stride(axis), inputs.shape[axis]
            self.activated.setdefault(name, set()).update(range(first, min(first + count, width)))


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def digests(batch: Batch) -> np.ndarray:
    """(examples,) uint64 hash of the content of every example's inputs."""
    tensors = [value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim]
    rows = [t.detach().cpu().contiguous() for t in tensors if len(t) == batch.size]
    contents = [row.reshape(batch.size, -1).view(torch.uint8).numpy() for row in rows if row.numel()]
    made = [hashlib.blake2b(digest_size=8) for _ in range(batch.size)]
    for content in contents:
        for number, digest in enumerate(made):
            digest.update(content[number])
    return np.array([int.from_bytes(digest.digest(), "little") for digest in made], dtype=np.uint64)


def together(hashes: np.ndarray) -> np.ndarray:
    """(1,) one hash of a whole batch, for rows that cannot be told apart by example (tokens routed to an expert)."""
    return np.array([int.from_bytes(hashlib.blake2b(hashes.tobytes(), digest_size=8).digest(), "little")], dtype=np.uint64)


def mixed(values: np.ndarray) -> np.ndarray:
    """A hash of every 64-bit number. Source: the finaliser of SplitMix64, Steele, Lea & Flood 2014."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
