"""Everything is weighed, and re-solved, by what it does to a specialist's own answer.

The trace and its second moments are those of the dense network, shared by all specialists. What differs from one to the next
is how much an error counts: an output of a reader by the slope of the answer behind it, an example by its distance from the
decision. With these weights, elimination and repair work for the specialist's own answer without knowing of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.linalg import LinAlgError, cho_factor, cho_solve, lstsq
from torch import Tensor, nn

from resect.anatomy import Anatomy
from resect.anatomy.slicing import named_tensors
from resect.batches import example_batch, forward, unpack
from resect.plan import Plan
from resect.repair.closed_form import from_matrix
from resect.searching.allocation import Curves
from resect.specializing.question import Question
from resect.specializing.readout import LEAST_WEIGHT, TEMPERATURE, OutputLayer, Target, with_outputs
from resect.specializing.specialist import Specialist
from resect.surgery import cut
from resect.tracing import Reader, Reading, Trace, observing
from resect.tracing.trace import HELD_OUT_EVERY, as_matrix

# Largest joint re-fit of one reader, in multiply-adds over all examples: beyond it a reader keeps its least-squares repair.
LARGEST_FIT = 1e10
DAMPING = 1e-3
SHORTEST = 0.1
SPARSE = 8
ENOUGH = 1e-4


@dataclass(frozen=True, kw_only=True, eq=False)
class Headed:
    """The dense network with only the output rows that one specialist needs: what its units are scored, cut and repaired in.

    anatomy: of the network. whole: of the dense network, where output rows can be cut too. rows: classes of the output rows.
    """

    question: Question
    network: nn.Module
    anatomy: Anatomy
    whole: Anatomy
    layer: OutputLayer
    rows: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy, layer: OutputLayer, question: Question, rows: tuple[int, ...]) -> Headed:
        whole = with_outputs(model, anatomy, layer)
        keep = {**Plan.all(whole).keep, layer.group.name: np.isin(np.arange(question.classes), rows)}
        network = cut(model, Plan(anatomy=whole, keep=keep), verify=False)
        tensors, share = named_tensors(network), len(rows) / question.classes
        changed = replace(
            anatomy,
            shapes={name: tuple(tensors[name].shape) for name in anatomy.shapes},
            contractions=tuple(
                replace(c, macs=c.macs * share) if c.tensor == layer.tensor else c for c in anatomy.contractions
            ),
        )
        return cls(question=question, network=network, anatomy=changed, whole=whole, layer=layer, rows=rows)

    def plan(self, plan: Plan) -> Plan:
        """A plan of this network as one of the dense network, in which the output rows are cut too."""
        rows = np.isin(np.arange(self.question.classes), self.rows)
        return Plan(anatomy=self.whole, keep={**plan.keep, self.layer.group.name: rows})

    def specialist(self, network: nn.Module) -> Specialist:
        """A network cut from this one as a specialist, with a threshold of 0."""
        return Specialist(network, self.question, rows=self.rows).eval()


def specialised(trace: Trace, headed: Headed, x: np.ndarray, target: Target, slope: Mapping[str, np.ndarray]) -> Trace:
    """The shared trace as one specialist sees it.

    x: (examples, columns + 1) what the output layer reads; its second moments are summed anew with the weights of examples.
    slope: (outputs,) per reader (see `slopes`).
    """
    by_example = target.weights(target.share).mean(1)
    by_example = by_example / max(float(by_example.mean()), 1e-300)
    held = np.arange(len(x)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    moments = [((x[rows] * by_example[rows, None]).T @ x[rows])[None] for rows in (~held, held)]
    sums, name = dict(trace.sums), headed.layer.tensor
    if name in sums:
        sums[name] = replace(sums[name], gram=moments[0], held=moments[1])
    return replace(
        trace, anatomy=headed.anatomy, sums=sums, weights=named_tensors(headed.network), scales={**trace.scales, **slope}
    )


def slopes(specialist: Specialist, readers: Iterable[str], batches: Sequence[Any], target: Target) -> dict[str, np.ndarray]:
    """(outputs,) per reader: root of the mean squared slope of the softened answers, weighed as the loss weighs their errors.

    Slopes at all positions of an example add up in squares. Several answers are joined by random signs, whose mixed terms
    vanish in the mean (Hutchinson 1989). The network is only read; no weight is changed.
    """
    draw = torch.Generator().manual_seed(0)
    sums: dict[str, Tensor] = {}
    count = 0
    for item in batches:
        batch = unpack(item)
        seen: list[Reading] = []
        with torch.enable_grad(), observing(specialist.network, readers, seen.append, prepare=_sloped):
            outputs = forward(specialist, batch).reshape(batch.size, -1) / TEMPERATURE
        part = target.take(count, batch.size)
        weights = torch.from_numpy(part.weights(part.share)).to(outputs)
        signs = torch.randint(0, 2, outputs.shape, generator=draw).to(outputs) * 2 - 1
        total = (outputs * signs * weights.sqrt()).sum()
        for reading, slope in zip(seen, torch.autograd.grad(total, [r.output for r in seen], allow_unused=True)):
            if slope is not None:
                squares = _by_output(reading.reader, slope).square().sum(0).double().cpu()
                sums[reading.reader.tensor] = sums.get(reading.reader.tensor, torch.zeros(())) + squares
        count += batch.size
    return {name: (total / max(count, 1)).sqrt().numpy() for name, total in sums.items()}


def _sloped(inputs: Tensor) -> Tensor:
    return inputs if inputs.requires_grad else inputs.detach().clone().requires_grad_()


def _by_output(reader: Reader, values: Tensor) -> Tensor:
    """(everything else, outputs)."""
    axis = 1 if reader.op in ("conv", "transposed") else -1
    return values.movedim(axis, -1).flatten(0, -2)


def in_one_currency(curves: Curves, trace: Trace) -> Curves:
    """Curves of relative errors as mean squared errors of the softened answers, to first order: groups can be compared."""
    errors = {}
    for group in trace.anatomy.groups:
        energies = [_energy(trace, part.tensor) for part in group.readers if part.tensor in trace.sums]
        errors[group.name] = curves.errors[group.name] * (float(np.mean(energies)) if energies else 1.0)
    return replace(curves, errors=errors)


def _energy(trace: Trace, name: str) -> float:
    """Weighed variance of what a reader makes, per position; 1 where there are no second moments."""
    sums = trace.sums[name]
    if sums.gram is None or sums.held is None or sums.gram.shape[0] != 1:
        return 1.0
    moments = sums.gram[0] + sums.held[0]
    weight = as_matrix(trace.weights[name], trace.readers[name].axis)
    weight = weight * trace.scales.get(name, np.ones(len(weight)))[:, None]
    count = max(moments[-1, -1], 1.0)
    mean = moments[-1, :-1] / count
    centred = moments[:-1, :-1] / count - np.outer(mean, mean)
    return float(np.einsum("oi,ij,oj->", weight, centred, weight, optimize=True))


def aim(
    specialist: Specialist, readers: Sequence[str], batches: Sequence[Any], target: Target, *, sweeps: int = 1
) -> Specialist:
    """Re-solve linear readers of a specialist towards its own answer, output row by output row; returns a new one.

    For every reader the answer is taken as linear in what its rows make (Gauss-Newton), and each row in turn is the solution of
    a weighted ridge regression on what the reader reads, of what the rows before it left over. A step that does not lower the
    loss on the held-out fifth of the data is halved, and dropped where that does not help. Readers that are too large for
    it keep what they have.
    """
    specialist = copy.deepcopy(specialist)
    held = np.arange(len(target.rows)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    held = held if (target.rows & held).any() else np.ones_like(held)
    judges, fitted = replace(target, rows=target.rows & held), replace(target, rows=target.rows & ~held)
    loss = judges.loss(_answers(specialist, batches))
    for _ in range(sweeps):
        before = loss
        for name in reversed(readers):
            change = _change(specialist, name, batches, fitted if fitted.rows.any() else target)
            length = 1.0 if change is not None else 0.0
            while change is not None and length >= SHORTEST:
                trial = copy.deepcopy(specialist)
                _move(trial.network, change, length)
                now = judges.loss(_answers(trial, batches))
                if now < loss:
                    specialist, loss = trial, now
                    break
                length /= 2
        if before - loss < ENOUGH * before:
            break
    return specialist


def linear_readers(headed: Headed) -> list[str]:
    """Linear readers of groups, in execution order, that see one row an example; the output layer is the last."""
    anatomy, seen = headed.anatomy, list[Reading]()
    names = {part.tensor for group in anatomy.groups for part in group.readers if len(anatomy.shapes[part.tensor]) == 2}
    with torch.inference_mode(), observing(headed.network, names | {headed.layer.tensor}, seen.append):
        examples = len(forward(headed.network, example_batch(anatomy.example)))
    read = [reading.reader.tensor for reading in seen]
    return [
        r.reader.tensor for r in seen if r.inputs.ndim == 2 and len(r.inputs) == examples and read.count(r.reader.tensor) == 1
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Change:
    """What is added to one reader: (outputs, columns + 1), the constant last."""

    reader: Reader
    matrix: np.ndarray


def _change(specialist: Specialist, name: str, batches: Sequence[Any], target: Target) -> _Change | None:
    """The Gauss-Newton step of one reader; None where it is too large to be solved this way."""
    x, slope, told, reader = _linearised(specialist, name, batches, target)
    rows = slope.shape[2]
    weights, missing = target.weights(told), target.missing(told)
    times = _times(weights)
    x, slope, weights, missing = (a[times > 0] for a in (x, slope, weights, missing))
    weights, missing = (a * times[times > 0, None] for a in (weights, missing))
    if len(x) * x.shape[1] ** 2 * rows > LARGEST_FIT:
        return None
    matrix = np.zeros((rows, x.shape[1]))
    for row in range(rows):
        by_answer = slope[:, :, row]
        square = (x * (by_answer**2 * weights).sum(1)[:, None]).T @ x
        matrix[row] = solved(square, x.T @ (by_answer * missing).sum(1))
        missing = missing - weights * by_answer * (x @ matrix[row])[:, None]
    return _Change(reader=reader, matrix=matrix)


def _times(weights: np.ndarray) -> np.ndarray:
    """(examples,) how often each example stands in the re-fit: those far from every decision, one in SPARSE for all of them."""
    times = np.ones(len(weights))
    dull = np.flatnonzero(weights.max(1) < 2 * LEAST_WEIGHT)
    times[dull] = np.where(np.arange(len(dull)) % SPARSE == 0, SPARSE, 0)
    return times


def solved(square: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """(square + ridge I)^-1 cross, the ridge relative to the mean diagonal; zeros where nothing depends on it."""
    level = float(np.mean(np.diag(square)[:-1]))
    if level < 1e-12:
        return np.zeros(len(square))
    regular = square + DAMPING * level * np.eye(len(square))
    try:
        return cho_solve(cho_factor(regular), cross)
    except LinAlgError:
        return lstsq(regular, cross)[0]


def _move(network: nn.Module, change: _Change, length: float) -> None:
    tensors, reader = named_tensors(network), change.reader
    weight = tensors[reader.tensor]
    with torch.no_grad():
        weight.copy_(from_matrix(as_matrix(weight, reader.axis) + length * change.matrix[:, :-1], weight, reader.axis))
        if reader.bias is not None:
            tensors[reader.bias].add_(torch.from_numpy(length * change.matrix[:, -1]).to(tensors[reader.bias]))


def _linearised(
    specialist: Specialist, name: str, batches: Sequence[Any], target: Target
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Reader]:
    """What a reader reads (examples, columns + 1), the slope of every softened answer in what it makes (examples, answers,
    outputs), the softened probabilities (examples, answers), and the reader."""
    inputs, slope, answers = [], [], []
    seen: list[Reading] = []
    for item in batches:
        seen.clear()
        with torch.enable_grad(), observing(specialist.network, [name], seen.append, prepare=_sloped):
            outputs = forward(specialist, unpack(item)).reshape(unpack(item).size, -1)
        by_answer = [
            torch.autograd.grad(o.sum() / TEMPERATURE, seen[0].output, retain_graph=True)[0] for o in outputs.unbind(1)
        ]
        slope.append(torch.stack(by_answer, 1).double().cpu())
        inputs.append(seen[0].inputs.detach().double().cpu())
        answers.append(outputs.detach().double().cpu())
    reader, x = seen[0].reader, torch.cat(inputs).numpy()
    # Without a bias there is no constant to solve for.
    constant = np.full((len(x), 1), float(reader.bias is not None))
    told = target.told(torch.cat(answers).numpy())
    return np.concatenate([x, constant], 1), torch.cat(slope).numpy(), told, reader


def _answers(specialist: Specialist, batches: Sequence[Any]) -> np.ndarray:
    """(examples,) or (examples, answers) outputs."""
    with torch.inference_mode():
        return torch.cat([forward(specialist, unpack(item)).double().cpu() for item in batches]).numpy()
