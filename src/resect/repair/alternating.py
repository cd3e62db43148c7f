"""Two weights in a row fitted for the second one's error: the first one's targets are moved to where the second needs them.

Where a weight (the feeder) is read through an elementwise function by exactly one other (the reader), both are solved in turn:
the reader on what it reads; then the smallest change of the feeder's output that would make good what the reader still misses,
linear around where the feeder is now, becomes the feeder's target. Two least-squares problems and no gradient of any loss; but
the kept units change what they compute.

Source: moved targets as in target propagation (Lee et al. 2015, arXiv 1412.7525), each solved in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from resect.repair.fitting import LEAST_GAIN, RIDGES, Fitted, current, fitted, step, write
from resect.repair.moments import Line, Moments, Rows, by_position, precise, rows_of, split
from resect.repair.walking import GRAM_POSITIONS, Halt, Pair, again
from resect.tracing import Reader
from resect.tracing.sums import design, pads_of

# How much a moved target costs beside what it makes good, in units of the reader's typical response.
DAMPING = 0.3
CONJUGATE_STEPS = 4
# A feeder can make only part of what is asked of it: asking for more than is missing gets there in fewer turns.
OVERSHOOT = 3.0
# Where that goes too far: what is missing and no more, and solved closer to what the feeder is.
ATTEMPTS = ((OVERSHOOT, RIDGES[0]), (1.0, RIDGES[1]))
# The step, in units of the feeder's typical output, over which the slope of the function behind it is taken.
SLOPE_STEP = 1e-2
CONVOLUTIONS = {3: (F.conv1d, conv1d_input), 4: (F.conv2d, conv2d_input), 5: (F.conv3d, conv3d_input)}


def alternate(
    small: nn.Module, start: Fitted, feeder: Reader, outputs: Tensor | None, pairs: Sequence[Pair], times: int
) -> tuple[Fitted, bool]:
    """Fit both weights in turn, at most `times` times; what is best on held-out rows stays in `small`.

    start: the reader's solution, already in `small`. outputs: positions of the dense reader's outputs that remain. pairs:
    halted at the reader. Returns the reader's last solution and whether the feeder changed.
    """
    reader, best = start.reader, start
    line = Line.constant(small, feeder)
    kept = current(small, feeder, line)
    square: np.ndarray | None = None
    attempts = list(ATTEMPTS)
    for _ in range(times):
        asked, ridge = attempts[0]
        targets = [_feeder_rows(pair, feeder, _moved(small, pair, start.line, outputs, asked)) for pair in pairs]
        moments = Moments.of(targets, square)
        square, before = moments.square, current(small, feeder, line)
        write(small, feeder, line, step(before, moments, ridge, constant=feeder.offset is not None))
        moved = [replace(pair, now=_reread(pair.now)) for pair in pairs]
        rows = [part for pair in moved if (part := rows_of(pair, reader, start.line, outputs)) is not None]
        result = fitted(small, reader, [fit for fit, _ in rows], [judges for _, judges in rows], start.line)
        if result.after < best.after * (1 - LEAST_GAIN):
            result.write(small)
            best = result
            continue
        write(small, feeder, line, before)
        attempts.pop(0)
        if not attempts:
            break
    changed = not np.array_equal(kept, current(small, feeder, line))
    return replace(best, before=start.before, kept=start.kept or changed), changed


def _place(halt: Halt) -> int:
    """Where on the tape the reader's own call stands."""
    return next(number for number, call in enumerate(halt.tape) if call.reading is halt.reading)


def _reread(halt: Halt) -> Halt:
    """The halt with what the reader reads now that its feeder has changed."""
    inputs = again(halt.tape[: _place(halt)])
    return replace(halt, reading=replace(halt.reading, inputs=inputs))


def _feeder_rows(pair: Pair, feeder: Reader, targets: Tensor) -> Rows:
    """The rows on which the feeder is solved; those that judge the reader are left out."""
    reading = pair.now.tape[0].reading
    assert reading is not None
    x = design(reading, pair.batch.size, GRAM_POSITIONS)
    assert x is not None
    return split(pair, feeder, x, by_position(reading, targets, pair.batch, None))[0]


def _moved(small: nn.Module, pair: Pair, line: Line, outputs: Tensor | None, asked: float) -> Tensor:
    """The feeder's output, moved to where the reader behind it would miss less, by `asked` times what it misses."""
    halt, place = pair.now, _place(pair.now)
    tape, reader = halt.tape, halt.reading.reader
    first, axis = id(tape[0].output), 1 if reader.op == "conv" else -1
    made = again(tape[:1])
    read = again(tape[:place], {first: made})
    small_step = SLOPE_STEP * made.std().clamp_min(1e-6)
    slope = again(tape[:place], {first: made + small_step}) - again(tape[:place], {first: made - small_step})
    slope = precise(slope / (2 * small_step))
    shift, scale = (_along(part, precise(read), axis) for part in (line.shift, line.scale))
    constant = _constant(small, reader, line)
    beside = 0.0 if halt.other is None else halt.other
    raw = again(tape[: place + 1], {first: made})
    now = shift + scale * (raw + _along(constant, precise(read), axis)) + beside
    dense = pair.was.output if pair.was.total is None else pair.was.total
    dense = dense if outputs is None else dense.index_select(axis, outputs.to(dense.device))
    goal = dense if pair.was.total is not None else shift + scale * dense
    goal = torch.where(goal <= 0, now.clamp_max(0), goal) if reader.rectified else goal
    return made + asked * _smallest(goal - now, slope, _Linear.of(halt, read, scale))


def _constant(small: nn.Module, reader: Reader, line: Line) -> Tensor:
    """(outputs,) the constant that a batch norm carries for the reader; 0 where it is in the reader's own bias."""
    if reader.offset is None or reader.sign > 0:
        return torch.zeros_like(line.shift)
    return torch.from_numpy(current(small, reader, line)[:, :, -1].reshape(-1))


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Per-channel values shaped to multiply a tensor with its channels on `axis`."""
    values = values.to(like.device, like.dtype)
    return values.view(-1, *[1] * (like.ndim - 2)) if axis == 1 else values


@dataclass(frozen=True, kw_only=True, eq=False)
class _Linear:
    """What a reader and its norm make of a change of what it reads: scale * (weight x change), and the way back.

    size: mean over what is read of the squared response.
    """

    forward: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    size: float

    @classmethod
    def of(cls, halt: Halt, read: Tensor, scale: Tensor) -> _Linear:
        reader, weight = halt.reading.reader, precise(halt.reading.weight.detach())
        if reader.op == "conv":
            function, transposed = CONVOLUTIONS[read.ndim]
            # Padded by hand: padding may be a word, and need not be the same on both sides.
            pads = pads_of(reader, tuple(weight.shape[2:]))
            back_pads, wide = [-pad for pad in pads], F.pad(read, pads).shape
            call: Any = (reader.stride, 0, reader.dilation, reader.blocks)
            forward, back = (
                lambda change: scale * function(F.pad(change, pads), weight, None, *call),
                lambda error: F.pad(transposed(wide, weight, scale * error, *call), back_pads),
            )
            columns = weight.square() * scale.view(-1, *[1] * (weight.ndim - 1)).square()
        else:
            matrix = weight if reader.axis == 1 else weight.T
            forward, back = (
                lambda change: scale * (change @ matrix.T),
                lambda error: (scale * error) @ matrix,
            )
            columns = matrix.square() * scale[:, None].square()
        return cls(forward=forward, back=back, size=float(columns.flatten(1).sum(1).sum()) / columns.shape[1])


def _smallest(missing: Tensor, slope: Tensor, map_: _Linear) -> Tensor:
    """The change e of the feeder's output that makes map(slope * e) meet what is missing, damped; a few conjugate gradients."""
    active = slope != 0
    damping = DAMPING * map_.size * float(slope.square().sum() / active.sum().clamp_min(1))

    def normal(change: Tensor) -> Tensor:
        return slope * map_.back(map_.forward(slope * change)) + damping * change

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))

    residual = slope * map_.back(missing)
    change, direction, length = torch.zeros_like(residual), residual, inner(residual, residual)
    for _ in range(CONJUGATE_STEPS):
        image = normal(direction)
        stride = length / inner(direction, image).clamp_min(1e-30)
        change, residual = change + stride * direction, residual - stride * image
        longer = inner(residual, residual)
        direction, length = residual + longer / length.clamp_min(1e-30) * direction, longer
    return change
