"""The final repair: reader by reader in execution order, inputs from the cut network, targets from the dense one.

So what an earlier reader got wrong is corrected by the later ones. No gradients; every step is kept only where a held-out
part of the calibrate data says that it helps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from resect.anatomy import slicing
from resect.batches import Batch, forward, unpack
from resect.plan import Plan
from resect.repair.closed_form import RIDGES, from_matrix, solve
from resect.tracing import Reader, Reading, observing
from resect.tracing.sums import by_example, design, second_moments
from resect.tracing.trace import HELD_OUT_EVERY, as_matrix

GRAM_POSITIONS = 64


class _Reached(Exception):
    """Raised inside a forward pass once the reader of interest has been called: the rest of the pass is not needed."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the sequential repair: relative held-out error before and after, and whether the step was kept."""

    tensor: str
    error_before: float
    error_after: float
    kept: bool


@dataclass(kw_only=True, eq=False)
class _Moments:
    """Second moments of the cut network's inputs x (a constant 1 last), their products with targets y, and y's energy."""

    square: Tensor | None = None
    cross: Tensor | None = None
    energy: float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: (n, blocks, columns + 1); y: (n, blocks, outputs)."""
        square = second_moments(x)
        cross = y.double().movedim(1, 0).transpose(1, 2) @ x.double().movedim(1, 0)
        self.square = square if self.square is None else self.square + square
        self.cross = cross if self.cross is None else self.cross + cross
        self.energy += float(y.double().square().sum())

    def __add__(self, other: _Moments) -> _Moments:
        if self.square is None or self.cross is None:
            return other
        if other.square is None or other.cross is None:
            return self
        return _Moments(square=self.square + other.square, cross=self.cross + other.cross, energy=self.energy + other.energy)

    def error(self, weight: np.ndarray) -> float:
        """Squared error of weight (blocks, outputs, columns + 1) against the targets."""
        if self.square is None or self.cross is None:
            return 0.0
        square, cross = self.square.cpu().numpy(), self.cross.cpu().numpy()
        fitted = np.einsum("bki,bij,bkj->", weight, square, weight, optimize=True)
        return float(self.energy - 2 * np.sum(weight * cross) + fitted)


def repair_sequentially(
    dense: nn.Module,
    small: nn.Module,
    plan: Plan,
    readers: Mapping[str, Reader],
    data: Iterable[Any],
    *,
    quiet: bool = True,
) -> tuple[nn.Module, tuple[Step, ...]]:
    """Re-fit every reader of a cut network in execution order; returns a new module and what every step did.

    dense: the network that was cut. small: cut(dense, plan), repaired or not. readers: the trace's readers. data: the
    calibrate data, unlabelled will do, iterable again and again. Memory O(columns^2), independent of the number of examples;
    one partial forward pass of both networks over the data per reader.
    """
    small, data = copy.deepcopy(small), list(data)
    positions = slicing.keep_positions(plan.anatomy, plan.keep)
    steps = []
    for name in track(readers, description="repairing", disable=quiet, transient=True):
        reader = readers[name]
        if reader.op == "transposed":
            continue
        outputs = positions.get(name, {}).get(1 - reader.axis if len(plan.anatomy.shapes[name]) == 2 else 0)
        rows = None if outputs is None else torch.from_numpy(outputs.positions)
        fit, held = _moments(dense, small, reader, rows, data)
        if fit.square is not None:
            steps.append(_refit(dense, small, reader, rows, fit, held))
    return small, tuple(steps)


def _moments(
    dense: nn.Module, small: nn.Module, reader: Reader, rows: Tensor | None, data: list[Any]
) -> tuple[_Moments, _Moments]:
    fit, held, seen = _Moments(), _Moments(), 0
    for item in data:
        batch = unpack(item)
        targets = [_targets(reading, batch, rows) for reading in _readings(dense, reader, batch)]
        inputs = [design(reading, batch.size, GRAM_POSITIONS) for reading in _readings(small, reader, batch)]
        judges = (torch.arange(batch.size) + seen) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        seen += batch.size
        for x, y in zip(inputs, targets):
            if x is None or len(x) != batch.size or len(y) != batch.size:
                return _Moments(), _Moments()
            for moments, chosen in ((fit, ~judges), (held, judges)):
                keep = chosen[:, None].expand(x.shape[:2]).to(x.device)
                if batch.mask is not None and batch.mask.shape == x.shape[:2]:
                    keep = keep & batch.mask.to(x.device)
                moments.add(x[keep], y[keep])
    return fit, held


def _readings(model: nn.Module, reader: Reader, batch: Batch) -> list[Reading]:
    """All calls of one reader in one forward pass, which is stopped after the last of them."""
    readings: list[Reading] = []

    def see(reading: Reading) -> None:
        readings.append(reading)
        if len(readings) == reader.calls:
            raise _Reached

    with suppress(_Reached), torch.inference_mode(), observing(model, [reader.tensor], see):
        forward(model, batch)
    return readings


def _targets(reading: Reading, batch: Batch, rows: Tensor | None) -> Tensor:
    """(examples, positions, blocks, outputs) what the dense reader made, at the positions of the design, kept outputs only."""
    reader, output = reading.reader, reading.output
    if reader.op == "conv":
        values = output.flatten(2).transpose(1, 2)
        if values.shape[1] > GRAM_POSITIONS:
            grid = torch.linspace(0, values.shape[1] - 1, GRAM_POSITIONS, device=output.device).round().long()
            values = values[:, grid]
        values = values.reshape(batch.size, -1, values.shape[-1]) if len(values) % batch.size == 0 else values
    else:
        values = by_example(reading, batch.size, output)[0]
    if rows is not None:
        values = values.index_select(-1, rows.to(values.device))
    return values.reshape(*values.shape[:2], reader.blocks, -1)


def _refit(dense: nn.Module, small: nn.Module, reader: Reader, rows: Tensor | None, fit: _Moments, held: _Moments) -> Step:
    """Solve one reader around what it is now; put the solution into `small` where it lowers the held-out error."""
    tensors = slicing.named_tensors(small)
    weight = tensors[reader.tensor]
    matrix = as_matrix(weight, reader.axis)
    constant = _constant(dense, tensors, reader, rows, len(matrix))
    now = np.concatenate([matrix, constant[:, None]], axis=1).reshape(reader.blocks, -1, matrix.shape[1] + 1)
    before = held.error(now)
    trials = [(held.error(_solve(now, fit, ridge, reader.offset is not None)), ridge) for ridge in RIDGES]
    error, ridge = min(trials)
    energy = max(held.energy, 1e-300)
    kept = error < before or held.square is None
    if kept:
        total = _solve(now, fit + held, ridge, reader.offset is not None).reshape(len(matrix), -1)
        _write(dense, small, reader, rows, total)
    return Step(tensor=reader.tensor, error_before=before / energy, error_after=min(error, before) / energy, kept=kept)


def _solve(now: np.ndarray, moments: _Moments, ridge: float, constant: bool) -> np.ndarray:
    assert moments.square is not None
    assert moments.cross is not None
    solution = now.copy()
    basis = now.shape[2] if constant else now.shape[2] - 1
    for block in range(len(now)):
        square, cross = moments.square[block].cpu().numpy(), moments.cross[block].cpu().numpy()
        missing = (cross - now[block] @ square)[:, :basis]
        scale = ridge * float(np.mean(np.diag(square)[:-1])) or 1.0
        solution[block][:, :basis] += solve(square[:basis, :basis], missing, scale)[0]
    return solution


def _constant(dense: nn.Module, tensors: Mapping[str, Tensor], reader: Reader, rows: Tensor | None, outputs: int) -> np.ndarray:
    """(outputs,) the constant that the reader's output carries now, relative to the dense reader's."""
    if reader.offset is None:
        return np.zeros(outputs)
    now = tensors[reader.offset].detach().double().cpu()
    if reader.sign > 0:
        return now.numpy()
    return (_dense_offset(dense, reader, rows) - now).numpy()


def _dense_offset(dense: nn.Module, reader: Reader, rows: Tensor | None) -> Tensor:
    assert reader.offset is not None
    offset = slicing.named_tensors(dense)[reader.offset].detach().double().cpu()
    return offset if rows is None else offset[rows]


def _write(dense: nn.Module, small: nn.Module, reader: Reader, rows: Tensor | None, solution: np.ndarray) -> None:
    tensors = slicing.named_tensors(small)
    with torch.no_grad():
        tensors[reader.tensor].copy_(from_matrix(solution[:, :-1], tensors[reader.tensor], reader.axis))
        if reader.offset is not None:
            constant = torch.from_numpy(solution[:, -1].copy())
            offset = constant if reader.sign > 0 else _dense_offset(dense, reader, rows) - constant
            tensors[reader.offset].copy_(offset)


def fidelity(dense: nn.Module, small: nn.Module, data: Iterable[Any]) -> float:
    """Mean squared difference of the two networks' outputs, as a share of the variance of the dense network's."""
    difference = energy = total = count = 0.0
    with torch.inference_mode():
        for item in data:
            batch = unpack(item)
            expected, got = forward(dense, batch).double(), forward(small, batch).double()
            difference += float((expected - got).square().sum())
            energy += float(expected.square().sum())
            total += float(expected.sum())
            count += expected.numel()
    return difference / max(energy - total * total / max(count, 1.0), 1e-300)


def held_out(data: Iterable[Any], select: Callable[[Any, Tensor], Any]) -> list[Any]:
    """The examples of the calibrate data on which repair is judged: every fifth."""
    chosen, seen = [], 0
    for item in data:
        size = unpack(item).size
        rows = torch.arange(size)[(torch.arange(size) + seen) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
        seen += size
        if len(rows):
            chosen.append(select(item, rows))
    return chosen
