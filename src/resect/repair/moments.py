"""What a reader of a cut network reads, and what it should make of it: the moments that the sequential repair is solved from.

The target of a reader is what the dense network's reader made. Where its output is added to a residual stream, the target is
the dense network's sum less the cut network's own stream: what earlier blocks got wrong, this one makes good.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resect.batches import Batch, forward, unpack
from resect.tracing import Reader, Reading, observing
from resect.tracing.observing import ADDITIONS, NORMS, norm_line
from resect.tracing.sums import by_example, design, second_moments
from resect.tracing.trace import HELD_OUT_EVERY

GRAM_POSITIONS = 64
# Channels whose batch norm scale is this small beside the largest make next to nothing of their convolution: not re-targeted.
LEAST_SCALE = 1e-3


class _Reached(Exception):
    """Raised inside a forward pass once all that is needed of it has been seen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Second moments of the inputs x (a constant 1 last), their products with the targets y, and the targets' energy.

    square: (blocks, columns + 1, columns + 1); cross: (blocks, outputs, columns + 1); energy: (blocks, outputs).
    """

    square: np.ndarray
    cross: np.ndarray
    energy: np.ndarray

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """x: (n, blocks, columns + 1); y: (n, blocks, outputs)."""
        y = y.double()
        cross = y.movedim(1, 0).transpose(1, 2) @ x.double().movedim(1, 0)
        energy = y.square().sum(0)
        return cls(square=second_moments(x).cpu().numpy(), cross=cross.cpu().numpy(), energy=energy.cpu().numpy())

    def __add__(self, other: Moments) -> Moments:
        return Moments(square=self.square + other.square, cross=self.cross + other.cross, energy=self.energy + other.energy)

    def errors(self, weight: np.ndarray) -> np.ndarray:
        """(blocks, outputs) squared error of weight (blocks, outputs, columns + 1) against the targets."""
        fitted = np.einsum("bki,bij,bkj->bk", weight, self.square, weight, optimize=True)
        return self.energy - 2 * np.sum(weight * self.cross, axis=2) + fitted


@dataclass(frozen=True, kw_only=True, eq=False)
class _Seen:
    """One call of a reader in one network: the reading, what it was added to, and the sum (None where there is no addition)."""

    reading: Reading
    output: Tensor
    other: Tensor | None = None
    total: Tensor | None = None


def collect(
    dense: nn.Module, small: nn.Module, reader: Reader, rows: Tensor | None, data: list[Any]
) -> tuple[Moments, Moments] | None:
    """Moments over four fifths of the examples and over the fifth that judges; None where the two networks do not line up.

    rows: positions of the dense reader's outputs that the cut network still has (None: all).
    """
    sums: list[Moments | None] = [None, None]
    seen = 0
    for item in data:
        batch = unpack(item)
        judges = (torch.arange(batch.size) + seen) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        seen += batch.size
        for was, now in zip(_watch(dense, reader, batch), _watch(small, reader, batch)):
            x = design(now.reading, batch.size, GRAM_POSITIONS)
            y = _targets(was, now, small, reader, batch, rows)
            if x is None or len(x) != batch.size or len(y) != batch.size or len(y[0]) != len(x[0]):
                return None
            for number, chosen in enumerate((~judges, judges)):
                keep = chosen[:, None].expand(x.shape[:2]).to(x.device)
                if batch.mask is not None and batch.mask.shape == x.shape[:2]:
                    keep = keep & batch.mask.to(x.device)
                moments = Moments.of(x[keep], y[keep])
                before = sums[number]
                sums[number] = moments if before is None else before + moments
    fit, held = sums
    return None if fit is None or held is None else (fit, held)


def _watch(model: nn.Module, reader: Reader, batch: Batch) -> list[_Seen]:
    """All calls of one reader in one forward pass, which is stopped as soon as nothing more of it is needed."""
    seen: list[_Seen] = []
    made: dict[int, Tensor] = {}

    def see(reading: Reading) -> None:
        # A later addition may be in place, so the output is kept as it is now.
        seen.append(_Seen(reading=reading, output=reading.output.clone() if reader.residual else reading.output))
        made[id(reading.output)] = reading.output
        if len(seen) == reader.calls and not reader.residual:
            raise _Reached

    def follow(func, args, kwargs, output: Tensor) -> None:
        if (func in NORMS or func is torch.nn.functional.dropout) and id(args[0]) in made:
            made[id(output)] = output
        elif func in ADDITIONS and len(args) == 2 and seen and any(id(a) in made for a in args):
            other = args[1] if id(args[0]) in made else args[0]
            seen[-1] = _Seen(reading=seen[-1].reading, output=seen[-1].output, other=other.clone(), total=output.clone())
            raise _Reached

    with (
        suppress(_Reached),
        torch.inference_mode(),
        observing(model, [reader.tensor], see, follow=follow if reader.residual else None),
    ):
        forward(model, batch)
    return seen


def _targets(was: _Seen, now: _Seen, small: nn.Module, reader: Reader, batch: Batch, rows: Tensor | None) -> Tensor:
    """(examples, positions, blocks, outputs) what the cut network's reader should make."""
    if was.total is None or now.other is None:
        target = _by_position(was.reading, was.output, batch, rows)
    else:
        target = _by_position(was.reading, was.total, batch, rows) - _by_position(now.reading, now.other, batch, None)
        if reader.norm is not None:
            shift, scale = norm_line(small, reader.norm)
            plain = _by_position(was.reading, was.output, batch, rows)
            target = torch.where(scale.abs() > LEAST_SCALE * scale.abs().max(), (target - shift) / scale, plain)
    return target.reshape(*target.shape[:2], reader.blocks, -1)


def _by_position(reading: Reading, values: Tensor, batch: Batch, rows: Tensor | None) -> Tensor:
    """(examples, positions, outputs) in float64, at the positions of the design."""
    if reading.reader.op == "conv":
        values = values.flatten(2).transpose(1, 2)
        if values.shape[1] > GRAM_POSITIONS:
            grid = torch.linspace(0, values.shape[1] - 1, GRAM_POSITIONS, device=values.device).round().long()
            values = values[:, grid]
        values = values.reshape(batch.size, -1, values.shape[-1]) if len(values) % batch.size == 0 else values
    else:
        values = by_example(reading, batch.size, values)[0]
    return (values if rows is None else values.index_select(-1, rows.to(values.device))).double()
