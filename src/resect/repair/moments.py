"""What a reader of a cut network reads, and what it should make of it: the rows that the sequential repair is solved from.

The target of a reader is what the dense network's reader made. Where its output is added to a residual stream, the target is
the dense network's sum less the cut network's own stream: what earlier blocks got wrong, this one makes good. Where only a
rectifier looks at the output (or the sum), a target below zero is met by anything below zero.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from resect.anatomy import slicing
from resect.batches import Batch
from resect.repair.walking import GRAM_POSITIONS, Pair
from resect.tracing import Reader, Reading
from resect.tracing.observing import norm_line
from resect.tracing.sums import by_example, design

# Channels whose batch norm scale is this small beside the largest make next to nothing of their convolution: not re-targeted.
LEAST_SCALE = 1e-3
# Rows whose products are summed in single precision; more would lose digits.
CHUNK = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """What stands behind a reader: it makes y, a batch norm shift + scale y of it; without a norm, 0 and 1. All (outputs,).

    reference: running mean at which the reader's constant is 0 (where a norm's mean carries the constant), else 0.
    """

    shift: Tensor
    scale: Tensor
    reference: Tensor

    @classmethod
    def of(cls, dense: nn.Module, small: nn.Module, reader: Reader, rows: Tensor | None, outputs: int) -> Line:
        """rows: positions of the dense reader's outputs that the cut network still has (None: all)."""
        zero = torch.zeros(outputs, dtype=torch.float64)
        if reader.norm is None:
            return cls(shift=zero, scale=zero + 1, reference=zero)
        shift, scale = (part.cpu() for part in norm_line(small, reader.norm))
        if reader.offset is None or reader.sign > 0:
            return cls(shift=shift, scale=scale, reference=zero)
        mean = slicing.named_tensors(small)[reader.offset].detach().double().cpu()
        if reader.residual:
            return cls(shift=shift, scale=scale, reference=mean.clone())
        reference = slicing.named_tensors(dense)[reader.offset].detach().double().cpu()
        reference = reference if rows is None else reference[rows]
        return cls(shift=shift + scale * (mean - reference), scale=scale, reference=reference)

    @classmethod
    def constant(cls, small: nn.Module, reader: Reader) -> Line:
        """A line in which the reader's constant is 0 as the network is now; what is behind it is of no interest."""
        outputs = slicing.named_tensors(small)[reader.tensor].shape[0 if reader.axis else 1]
        zero = torch.zeros(outputs, dtype=torch.float64)
        if reader.offset is None or reader.sign > 0:
            return cls(shift=zero, scale=zero + 1, reference=zero)
        mean = slicing.named_tensors(small)[reader.offset].detach().double().cpu().clone()
        return cls(shift=zero, scale=zero + 1, reference=mean)

    @property
    def usable(self) -> Tensor:
        """(outputs,) where the scale is large enough to divide by."""
        return self.scale.abs() > LEAST_SCALE * self.scale.abs().max()


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Rows of a reader's problem: x (blocks, n, columns + 1), a 1 last; y (blocks, n, outputs), the targets.

    beside: (blocks, n, outputs) what is added behind the reader, or None.
    """

    x: Tensor
    y: Tensor
    beside: Tensor | None

    def made(self, weight: np.ndarray) -> Tensor:
        """(blocks, n, outputs) what a weight (blocks, outputs, columns + 1) makes."""
        return self.x @ torch.from_numpy(weight).to(self.x.dtype).mT

    def towards(self, made: Tensor, line: Line) -> Rows:
        """The rows with targets below zero, behind the rectifier, moved to what the reader makes now."""
        outputs = (len(self.y), 1, self.y.shape[2])
        shift, scale = (part.view(outputs).to(self.y.dtype) for part in (line.shift, line.scale))
        usable = line.usable.view(outputs)
        beside = 0.0 if self.beside is None else self.beside
        now, goal = shift + scale * made + beside, shift + scale * self.y + beside
        moved = (now.clamp_max(0) - goal) / torch.where(usable, scale, 1.0)
        return replace(self, y=torch.where((goal <= 0) & usable, self.y + moved, self.y))


def rows_of(pair: Pair, reader: Reader, line: Line, rows: Tensor | None) -> tuple[Rows, Rows] | None:
    """The rows that one batch adds, to fit and to judge; None where the two networks do not line up."""
    was, now, size = pair.was, pair.now, pair.batch.size
    x = design(now.reading, size, GRAM_POSITIONS)
    if x is None or len(x) != size:
        return None
    y, beside = by_position(was.reading, was.output, pair.batch, rows), None
    if was.total is not None and now.other is not None:
        beside = by_position(now.reading, now.other, pair.batch, None)
        wanted = by_position(was.reading, was.total, pair.batch, rows).double() - beside.double()
        y = torch.where(line.usable, (wanted - line.shift) / torch.where(line.usable, line.scale, 1.0), y.double())
    return None if y.shape[:2] != x.shape[:2] else split(pair, reader, x, y, beside)


def split(pair: Pair, reader: Reader, x: Tensor, y: Tensor, beside: Tensor | None = None) -> tuple[Rows, Rows]:
    """Rows to fit and to judge of x (examples, positions, blocks, columns + 1) and y (examples, positions, outputs)."""
    counted = pair.counted(x)
    judges = pair.judges[:, None].expand(counted.shape)

    def chosen(part: Tensor, keep: Tensor) -> Tensor:
        rows = part.cpu()[keep]
        rows = rows if rows.ndim == 3 else rows.unflatten(-1, (reader.blocks, -1))
        return rows.to(precise(x).dtype).transpose(0, 1).contiguous()

    fit, judge = (
        Rows(x=chosen(x, keep), y=chosen(y, keep), beside=None if beside is None else chosen(beside, keep))
        for keep in (counted & ~judges, counted & judges)
    )
    return fit, judge


def by_position(reading: Reading, values: Tensor, batch: Batch, rows: Tensor | None) -> Tensor:
    """(examples, positions, outputs) of a reader's output, or of a tensor of its shape, at the positions of the design."""
    if reading.reader.op == "conv":
        values = values.flatten(2).transpose(1, 2)
        if values.shape[1] > GRAM_POSITIONS:
            grid = torch.linspace(0, values.shape[1] - 1, GRAM_POSITIONS, device=values.device).round().long()
            values = values[:, grid]
        values = values.reshape(batch.size, -1, values.shape[-1]) if len(values) % batch.size == 0 else values
    else:
        values = by_example(reading, batch.size, values)[0]
    values = values if rows is None else values.index_select(-1, rows.to(values.device))
    return precise(values).cpu()


def precise(values: Tensor) -> Tensor:
    """Half precision made single: sums of squares overflow in it."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Second moments of the inputs x, their products with the targets y, and the targets' energy; float64.

    square: (blocks, columns + 1, columns + 1); cross: (blocks, outputs, columns + 1); energy: (blocks, outputs).
    """

    square: np.ndarray
    cross: np.ndarray
    energy: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Rows], square: np.ndarray | None = None) -> Moments:
        """square: the second moments of x where they are known."""
        square = _total(_products(part.x, part.x) for part in rows) if square is None else square
        cross = _total(_products(part.y, part.x) for part in rows)
        return cls(square=square, cross=cross, energy=_total(part.y.double().square().sum(1) for part in rows))

    def __add__(self, other: Moments) -> Moments:
        return Moments(square=self.square + other.square, cross=self.cross + other.cross, energy=self.energy + other.energy)

    def errors(self, weight: np.ndarray) -> np.ndarray:
        """(blocks, outputs) squared error of weight (blocks, outputs, columns + 1) against the targets."""
        fitted = np.einsum("bki,bij,bkj->bk", weight, self.square, weight, optimize=True)
        return self.energy - 2 * np.sum(weight * self.cross, axis=2) + fitted


def _total(parts: Iterable[Tensor]) -> np.ndarray:
    return functools.reduce(torch.add, parts).numpy()


def _products(left: Tensor, right: Tensor) -> Tensor:
    """(blocks, a, b) sums of outer products of rows, a few thousand at a time in the rows' own type, those added in float64."""
    parts = zip(left.split(CHUNK, 1), right.split(CHUNK, 1))
    return torch.stack([(a.mT @ b).double() for a, b in parts]).sum(0)
