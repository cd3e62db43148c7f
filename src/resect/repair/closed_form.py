"""Repair from the trace alone: what is left of every reader is re-solved so that its outputs change as little as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from scipy.linalg import LinAlgError, cho_factor, cho_solve, lstsq
from torch import Tensor

from resect.anatomy import Group, Slices
from resect.errors import PlanError
from resect.plan import Plan
from resect.tracing import Reader, Trace
from resect.tracing.trace import as_matrix, squares_of

Method = Literal["none", "mean", "least_squares"]
METHODS: tuple[Method, ...] = get_args(Method)
RIDGES = (1e-5, 1e-3)
# Outputs whose variance is a smaller share of their squared size count as constant: relative errors are of this share then.
LEAST_VARIANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What repair did for one reader: the method chosen, the ridge, and the held-out error without and with it.

    Errors are shares of the variance of the reader's outputs on the held-out fifth of the calibrate data. condition: of the
    second moments that were inverted (0 where none were).
    """

    method: Method
    ridge: float
    error_before: float
    error_after: float
    condition: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Repair:
    """Full-size tensors by name that replace the network's own before a cut, and what was chosen for every reader."""

    weights: Mapping[str, Tensor]
    choices: Mapping[str, Choice]


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """One reader (or one block of a grouped convolution), whole: y = weight x.

    weight: (outputs, columns). fit, held: (columns + 1, columns + 1) second moments of x with a constant 1 last. constant:
    whether a constant may be added to the outputs. scale: (outputs,) how much each output's error counts.
    """

    weight: np.ndarray
    fit: np.ndarray
    held: np.ndarray
    constant: bool
    scale: np.ndarray

    @cached_property
    def products(self) -> np.ndarray:
        """(outputs, columns + 1) products of outputs and inputs on the held-out moments, scaled twice."""
        return np.square(self.scale)[:, None] * (self.weight @ self.held[:-1])

    @cached_property
    def size(self) -> float:
        """Squared size of the outputs on the held-out moments."""
        return float((self.products[:, :-1] * self.weight).sum())

    @cached_property
    def energy(self) -> float:
        """The same around their mean; outputs that are constant up to rounding have next to none, never 0."""
        mean = self.scale * (self.weight @ self.held[:-1, -1])
        return max(self.size - float(np.square(mean).sum()) / max(self.held[-1, -1], 1.0), LEAST_VARIANCE * self.size, 1e-300)


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A block of whose columns only `kept` remain."""

    block: Block
    kept: np.ndarray

    @cached_property
    def removed(self) -> np.ndarray:
        return np.setdiff1d(np.arange(self.block.weight.shape[1]), self.kept)

    @cached_property
    def basis(self) -> np.ndarray:
        return np.append(self.kept, self.block.weight.shape[1]) if self.block.constant else self.kept

    @cached_property
    def _held(self) -> np.ndarray:
        return self.block.held[np.ix_(self.basis, self.basis)]

    def error(self, change: np.ndarray) -> float:
        """Squared error of the outputs, held out, when the removed columns go and `change` (outputs, basis) is added."""
        block, new = self.block, change.copy()
        new[:, : len(self.kept)] += block.weight[:, self.kept]
        fitted = (np.square(block.scale)[:, None] * new) @ self._held
        return max(block.size + float(((fitted - 2 * block.products[:, self.basis]) * new).sum()), 0.0)

    def none(self) -> np.ndarray:
        return np.zeros((len(self.block.weight), len(self.basis)))

    def mean(self, moments: np.ndarray) -> np.ndarray:
        """The removed units' mean, folded into the constant."""
        change = self.none()
        if self.block.constant:
            change[:, -1] = self.block.weight[:, self.removed] @ moments[self.removed, -1] / max(moments[-1, -1], 1.0)
        return change

    def least_squares(self, moments: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
        """The ridge solution around the unrepaired reader (so that it is never worse than none), and the condition number."""
        square = moments[np.ix_(self.basis, self.basis)]
        cross = self.block.weight[:, self.removed] @ moments[np.ix_(self.removed, self.basis)]
        return solve(square, cross, ridge * float(np.mean(np.diag(moments)[:-1])))


def solve(square: np.ndarray, cross: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """cross (square + ridge I)^-1 by Cholesky, by minimum-norm least squares where that breaks down; and a condition bound."""
    regular = square + ridge * np.eye(len(square))
    try:
        factor = cho_factor(regular)
        diagonal = np.diag(factor[0])
        return cho_solve(factor, cross.T).T, float((diagonal.max() / diagonal.min()) ** 2)
    except LinAlgError:
        return lstsq(regular, cross.T)[0].T, float("inf")


def repair(trace: Trace, plan: Plan, method: Method = "least_squares") -> Repair:
    """Re-solve every reader that loses columns, from the trace's second moments; milliseconds, and no data.

    method: the highest rung that may be used: "none"; "mean" folds the removed units' mean into the bias; "least_squares"
    re-fits weight and bias, W' = W G[:, S] (G[S, S] + ridge I)^-1 with the constant 1 as one more input. For each reader the
    rung with the least error on the held-out fifth of the calibrate data is taken, then solved on all of it.

    A convolution is solved on its patches; a reader without bias puts the constant into the batch norm behind it, or does
    without. Raises PlanError for an unknown method.
    """
    if method not in METHODS:
        raise PlanError(f"there is no repair {method!r}; write one of {', '.join(METHODS)}")
    weights: dict[str, Tensor] = {}
    choices: dict[str, Choice] = {}
    for name, kept in kept_columns(trace, plan).items():
        sums, reader = trace.sums[name], trace.readers[name]
        if method == "none" or sums.gram is None or sums.held is None:
            choices[name] = Choice(method="none", ridge=0.0, error_before=float("nan"), error_after=float("nan"))
            continue
        problems = _problems(_blocks(trace, name), kept, trace.weights[name].shape[reader.axis])
        changes, choice = _best(problems, method)
        choices[name] = choice
        if choice.method != "none":
            fold(weights, trace.weights, reader, problems, changes)
    return Repair(weights=weights, choices=choices)


def kept_columns(trace: Trace, plan: Plan) -> dict[str, np.ndarray]:
    """Per reader that loses units: the positions of its contracted axis (running through blocks) that stay."""
    removed: dict[str, list[np.ndarray]] = {}
    for group in plan.anatomy.groups:
        gone = ~plan.keep[group.name]
        if gone.any():
            for part in group.readers:
                if part.tensor in trace.sums:
                    removed.setdefault(part.tensor, []).append(part.index[gone].ravel())
    kept = {}
    for name in trace.readers:
        if name in removed:
            reader = trace.readers[name]
            size = trace.weights[name].shape[reader.axis] * reader.blocks
            kept[name] = np.setdiff1d(np.arange(size), np.concatenate(removed[name]))
    return kept


def _blocks(trace: Trace, name: str) -> list[Block]:
    sums, reader = trace.sums[name], trace.readers[name]
    assert sums.gram is not None
    assert sums.held is not None
    matrix = as_matrix(trace.weights[name], reader.axis)
    scale = trace.scales.get(name, np.ones(len(matrix)))
    constant = reader.offset is not None
    parts = zip(np.split(matrix, reader.blocks), sums.gram, sums.held, np.split(scale, reader.blocks))
    return [Block(weight=weight, fit=fit, held=held, constant=constant, scale=part) for weight, fit, held, part in parts]


def _problems(blocks: list[Block], kept: np.ndarray, size: int) -> list[Problem]:
    """The blocks with the columns of `kept`, positions of a contracted axis of `size` that runs through the blocks."""
    kernel = np.arange(blocks[0].weight.shape[1] // size)
    inside = [kept[kept // size == number] % size for number in range(len(blocks))]
    return [Problem(block=block, kept=(own[:, None] * len(kernel) + kernel).ravel()) for block, own in zip(blocks, inside)]


def _best(problems: list[Problem], method: Method) -> tuple[list[np.ndarray], Choice]:
    """The rung with the least held-out error over all blocks, solved again on all moments."""
    before = sum(p.error(p.none()) for p in problems)
    energy = sum(p.block.energy for p in problems)
    rungs: list[tuple[float, Method, float]] = [(before, "none", 0.0)]
    rungs.append((sum(p.error(p.mean(p.block.fit)) for p in problems), "mean", 0.0))
    if method == "least_squares":
        rungs += [
            (sum(p.error(p.least_squares(p.block.fit, ridge)[0]) for p in problems), "least_squares", ridge) for ridge in RIDGES
        ]
    # Without a held-out example every rung has error 0; the ladder's last rung is then the honest default.
    error, chosen, ridge = min(rungs) if energy > 1e-300 else rungs[-1]
    total = [p.block.fit + p.block.held for p in problems]
    if chosen == "least_squares":
        solved = [p.least_squares(moments, ridge) for p, moments in zip(problems, total)]
        changes, condition = [change for change, _ in solved], max(condition for _, condition in solved)
    else:
        changes = [p.mean(moments) if chosen == "mean" else p.none() for p, moments in zip(problems, total)]
        condition = 0.0
    return changes, Choice(
        method=chosen, ridge=ridge, error_before=before / energy, error_after=error / energy, condition=condition
    )


def fold(
    weights: dict[str, Tensor], own: Mapping[str, Tensor], reader: Reader, problems: list[Problem], changes: list[np.ndarray]
) -> None:
    """Write the changed columns into a full-size copy of the reader's weight, and the constants into its offset."""
    original = weights.get(reader.tensor, own[reader.tensor])
    matrix = as_matrix(original, reader.axis).copy()
    rows = len(matrix) // len(problems)
    constants = np.zeros(len(matrix))
    for block, (problem, change) in enumerate(zip(problems, changes)):
        part = matrix[block * rows : (block + 1) * rows]
        part[:, problem.removed] = 0.0
        part[:, problem.kept] += change[:, : len(problem.kept)]
        if problem.block.constant:
            constants[block * rows : (block + 1) * rows] = change[:, -1]
    weights[reader.tensor] = from_matrix(matrix, original, reader.axis)
    if reader.offset is not None:
        offset = weights.get(reader.offset, own[reader.offset])
        weights[reader.offset] = (offset.double() + reader.sign * torch.from_numpy(constants).to(offset.device)).to(
            offset.dtype
        )


def from_matrix(matrix: np.ndarray, like: Tensor, axis: int) -> Tensor:
    """A weight of the shape and type of `like` from its (outputs, columns) form."""
    tensor = torch.from_numpy(np.ascontiguousarray(matrix if axis else matrix.T)).reshape(like.shape)
    return tensor.to(device=like.device, dtype=like.dtype)


def predicted_errors(trace: Trace, group: Group, masks: Sequence[np.ndarray], method: Method) -> np.ndarray:
    """What every mask of one group would cost, all other groups whole: (masks,) shares of the readers' output variance.

    Summed over the group's readers, on the held-out fifth of the calibrate data, after the best allowed repair.
    """
    errors = np.zeros(len(masks))
    for part in group.readers:
        sums = trace.sums.get(part.tensor)
        if sums is None:
            continue
        if sums.gram is None or sums.held is None:
            errors += [_energy_removed(trace, part, mask) for mask in masks]
            continue
        size, blocks = trace.weights[part.tensor].shape[part.axis], _blocks(trace, part.tensor)
        energy = sum(block.energy for block in blocks)
        for number, mask in enumerate(masks):
            if not mask.all():
                kept = np.setdiff1d(np.arange(size * len(blocks)), part.index[~mask].ravel())
                errors[number] += _least_error(_problems(blocks, kept, size), method) / energy
    return errors


def _energy_removed(trace: Trace, part: Slices, mask: np.ndarray) -> float:
    """Share of a reader's output energy that removed units carry, for readers without second moments: units as uncorrelated."""
    sums = trace.sums[part.tensor]
    square = sums.square.sum(0) / max(float(sums.positions.sum()), 1.0)
    energy = square * squares_of(trace.weights[part.tensor], part)
    return float(energy[part.index[~mask].ravel()].sum() / max(energy.sum(), 1e-300))


def _least_error(problems: list[Problem], method: Method) -> float:
    rungs = [sum(p.error(p.none()) for p in problems)]
    if method != "none":
        rungs.append(sum(p.error(p.mean(p.block.fit)) for p in problems))
    if method == "least_squares":
        rungs.append(sum(p.error(p.least_squares(p.block.fit, RIDGES[0])[0]) for p in problems))
    return min(rungs)
