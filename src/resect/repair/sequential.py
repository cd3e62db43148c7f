"""The final repair: reader by reader in execution order, inputs from the cut network, targets from the dense one.

So what an earlier reader got wrong is corrected by the later ones. No gradients; every step is kept only where a held-out
part of the calibrate data says that it helps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from resect.anatomy import slicing
from resect.batches import forward, unpack
from resect.plan import Plan
from resect.repair.closed_form import RIDGES, from_matrix, solve
from resect.repair.moments import Moments, collect
from resect.tracing import Reader, survey
from resect.tracing.observing import norm_line
from resect.tracing.trace import HELD_OUT_EVERY, as_matrix

# A step must lower the held-out error by this share of it: rounding alone is not a gain.
LEAST_GAIN = 1e-4


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the sequential repair: relative held-out error before and after, and whether the step was kept."""

    tensor: str
    error_before: float
    error_after: float
    kept: bool


def repair_sequentially(
    dense: nn.Module,
    small: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    *,
    sweeps: int = 1,
    quiet: bool = True,
) -> tuple[nn.Module, tuple[Step, ...]]:
    """Re-fit the readers of a cut network in execution order; returns a new module and what every step did.

    dense: the network that was cut. small: cut(dense, plan), repaired or not. data: the calibrate data, unlabelled will do,
    iterable again and again. sweeps: how often to go through the readers, while a sweep still changes something. Every weight
    from the first that lost columns on is re-fitted, so that error is made good all the way; a step is kept only where it
    lowers the error on the held-out fifth of the data. Memory O(columns^2), independent of the number of examples; one partial
    forward pass of both networks over the data per reader and sweep.
    """
    small, data = copy.deepcopy(small), list(data)
    positions = slicing.keep_positions(plan.anatomy, plan.keep)
    readers = affected(dense, plan)
    steps: list[Step] = []
    for _ in range(sweeps):
        round_: list[Step] = []
        for name in track(readers, description="repairing", disable=quiet, transient=True):
            outputs = positions.get(name, {}).get(1 - readers[name].axis if len(plan.anatomy.shapes[name]) == 2 else 0)
            rows = None if outputs is None else torch.from_numpy(outputs.positions)
            moments = collect(dense, small, readers[name], rows, data)
            if moments is not None:
                round_.append(_refit(dense, small, readers[name], rows, *moments))
        steps += round_
        if not any(step.kept for step in round_):
            break
    return small, tuple(steps)


def affected(dense: nn.Module, plan: Plan) -> dict[str, Reader]:
    """The weights to re-fit, in execution order: all from the first that loses columns to the last."""
    weights = [name for name in plan.anatomy.parameters if len(plan.anatomy.shapes[name]) >= 2]
    readers = survey(dense, plan.anatomy, weights)
    losing = {part.tensor for group in plan.anatomy.groups if not plan.keep[group.name].all() for part in group.readers}
    order = list(readers)
    first = next((number for number, name in enumerate(order) if name in losing), len(order))
    # A transposed convolution has no patches to solve on.
    return {name: readers[name] for name in order[first:] if readers[name].op != "transposed"}


def _refit(dense: nn.Module, small: nn.Module, reader: Reader, rows: Tensor | None, fit: Moments, held: Moments) -> Step:
    """Solve one reader around what it is now; put the solution into `small` where it lowers the held-out error."""
    matrix = as_matrix(slicing.named_tensors(small)[reader.tensor], reader.axis)
    reference = _reference(dense, small, reader, rows)
    constant = _constant(small, reader, reference, len(matrix))
    now = np.concatenate([matrix, constant[:, None]], axis=1).reshape(reader.blocks, -1, matrix.shape[1] + 1)
    # Behind a batch norm an output counts by how much the norm makes of it.
    scale = norm_line(small, reader.norm)[1].square().cpu().numpy() if reader.norm else np.ones(len(matrix))
    scale = scale.reshape(reader.blocks, -1)

    def judged(weight: np.ndarray) -> float:
        return float((scale * held.errors(weight)).sum())

    solvable = reader.offset is not None
    before = judged(now)
    error, ridge = min((judged(_solve(now, fit, ridge, solvable)), ridge) for ridge in RIDGES)
    energy = max(float((scale * held.energy).sum()), 1e-300)
    kept = error < before * (1 - LEAST_GAIN)
    if kept:
        _write(small, reader, reference, _solve(now, fit + held, ridge, solvable).reshape(len(matrix), -1))
    return Step(tensor=reader.tensor, error_before=before / energy, error_after=(error if kept else before) / energy, kept=kept)


def _solve(now: np.ndarray, moments: Moments, ridge: float, constant: bool) -> np.ndarray:
    solution = now.copy()
    basis = now.shape[2] if constant else now.shape[2] - 1
    for block in range(len(now)):
        square = moments.square[block]
        missing = (moments.cross[block] - now[block] @ square)[:, :basis]
        scale = ridge * float(np.mean(np.diag(square)[:-1])) or 1.0
        solution[block][:, :basis] += solve(square[:basis, :basis], missing, scale)[0]
    return solution


def _reference(dense: nn.Module, small: nn.Module, reader: Reader, rows: Tensor | None) -> np.ndarray:
    """(outputs,) running mean that stands for a constant of 0: the dense network's, or its own where the target is a sum."""
    if reader.offset is None or reader.sign > 0:
        return np.zeros(0)
    if reader.residual:
        return slicing.named_tensors(small)[reader.offset].detach().double().cpu().numpy().copy()
    offset = slicing.named_tensors(dense)[reader.offset].detach().double().cpu()
    return (offset if rows is None else offset[rows]).numpy()


def _constant(small: nn.Module, reader: Reader, reference: np.ndarray, outputs: int) -> np.ndarray:
    """(outputs,) the constant that the reader's output carries now."""
    if reader.offset is None:
        return np.zeros(outputs)
    now = slicing.named_tensors(small)[reader.offset].detach().double().cpu().numpy()
    return now.copy() if reader.sign > 0 else reference - now


def _write(small: nn.Module, reader: Reader, reference: np.ndarray, solution: np.ndarray) -> None:
    tensors = slicing.named_tensors(small)
    with torch.no_grad():
        tensors[reader.tensor].copy_(from_matrix(solution[:, :-1], tensors[reader.tensor], reader.axis))
        if reader.offset is not None:
            offset = solution[:, -1] if reader.sign > 0 else reference - solution[:, -1]
            tensors[reader.offset].copy_(torch.from_numpy(offset.copy()))


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
