"""Solving one reader of a cut network at a halt: least squares around what it is now, judged on the held-out fifth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from resect.anatomy import slicing
from resect.repair.closed_form import from_matrix, solve
from resect.repair.moments import Line, Moments, Rows
from resect.tracing import Reader
from resect.tracing.trace import as_matrix

# A step must lower the held-out error by this share of it: rounding alone is not a gain.
LEAST_GAIN = 1e-4
# Shrinkage towards what the reader is now, in units of its inputs' mean square: a step with few rows must be a short one.
RIDGES = (1e-5, 1e-3, 1e-1)
# Rounds in which targets below zero, behind a rectifier, are moved to what the reader makes of them.
RELAXATIONS = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """One reader's solution: weight (blocks, outputs, columns + 1), its constant last, and the relative held-out errors
    without and with it."""

    reader: Reader
    line: Line
    weight: np.ndarray
    before: float
    after: float
    kept: bool

    def write(self, small: nn.Module) -> None:
        """Put the solution into the network."""
        if self.kept:
            write(small, self.reader, self.line, self.weight)


def current(small: nn.Module, reader: Reader, line: Line) -> np.ndarray:
    """(blocks, outputs, columns + 1) what the reader is now, its constant last."""
    tensors = slicing.named_tensors(small)
    matrix = as_matrix(tensors[reader.tensor], reader.axis)
    constant = np.zeros(len(matrix))
    if reader.offset is not None:
        offset = tensors[reader.offset].detach().double().cpu().numpy()
        constant = offset.copy() if reader.sign > 0 else line.reference.numpy() - offset
    return np.concatenate([matrix, constant[:, None]], axis=1).reshape(reader.blocks, -1, matrix.shape[1] + 1)


def write(small: nn.Module, reader: Reader, line: Line, weight: np.ndarray) -> None:
    """Put a weight (blocks, outputs, columns + 1) and its constant where the network keeps them."""
    tensors, flat = slicing.named_tensors(small), weight.reshape(-1, weight.shape[2])
    with torch.no_grad():
        tensors[reader.tensor].copy_(from_matrix(flat[:, :-1], tensors[reader.tensor], reader.axis))
        if reader.offset is not None:
            offset = flat[:, -1] if reader.sign > 0 else line.reference.numpy() - flat[:, -1]
            tensors[reader.offset].copy_(torch.from_numpy(offset.copy()))


def fitted(small: nn.Module, reader: Reader, fit: Sequence[Rows], judges: Sequence[Rows], line: Line) -> Fitted:
    """The solution with the least held-out error: of three ridges, and behind a rectifier of targets moved a few times.

    fit, judges: rows to solve on and to judge by; in the end what was chosen is solved on both.
    """
    now = current(small, reader, line)
    # Behind a batch norm an output counts by how much the norm makes of it.
    scale = line.scale.square().view(now.shape[0], 1, now.shape[1])
    solvable = reader.offset is not None

    def towards(rows: Sequence[Rows], weight: np.ndarray) -> Sequence[Rows]:
        return [part.towards(part.made(weight), line) for part in rows] if reader.rectified else rows

    def error(weight: np.ndarray) -> float:
        return sum(float((scale * (part.made(weight) - part.y).double().square()).sum()) for part in towards(judges, weight))

    plain, held = Moments.of(fit), Moments.of(judges)
    weights = [(ridge, step(now, plain, ridge, constant=solvable)) for ridge in RIDGES]
    ridge, weight = min(weights, key=lambda entry: float((scale[:, 0].numpy() * held.errors(entry[1])).sum()))
    before, after, last = error(now), error(weight), plain + held
    for _ in range(RELAXATIONS if reader.rectified else 0):
        moved = Moments.of(towards(fit, weight), plain.square)
        further = step(weight, moved, ridge, constant=solvable)
        if (error_further := error(further)) >= after * (1 - LEAST_GAIN):
            break
        last = moved + Moments.of(towards(judges, weight), held.square)
        after, weight = error_further, further
    kept = after < before * (1 - LEAST_GAIN)
    energy = _energy(judges, scale)
    return Fitted(
        reader=reader,
        line=line,
        weight=step(weight, last, ridge, constant=solvable) if kept else now,
        before=before / energy,
        after=(after if kept else before) / energy,
        kept=kept,
    )


def _energy(rows: Sequence[Rows], scale: Tensor) -> float:
    """Squared size of the targets around their mean."""
    count = max(sum(part.y.shape[1] for part in rows), 1)
    mean = sum(part.y.double().sum(1, keepdim=True) for part in rows) / count
    return max(sum(float((scale * (part.y - mean).square()).sum()) for part in rows), 1e-300)


def step(now: np.ndarray, moments: Moments, ridge: float, *, constant: bool) -> np.ndarray:
    """The ridge solution around `now`, (blocks, outputs, columns + 1); without `constant` the constants stay."""
    solution = now.copy()
    basis = now.shape[2] if constant else now.shape[2] - 1
    for block in range(len(now)):
        square = moments.square[block]
        missing = (moments.cross[block] - now[block] @ square)[:, :basis]
        scale = ridge * float(np.mean(np.diag(square)[:-1])) or 1.0
        solution[block][:, :basis] += solve(square[:basis, :basis], missing, scale)[0]
    return solution
