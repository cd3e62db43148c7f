"""The final repair: reader by reader in execution order, inputs from the cut network, targets from the dense one.

So what an earlier reader got wrong is corrected by the later ones. No gradients; every step is kept only where a held-out
part of the calibrate data says that it helps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from resect.anatomy import slicing
from resect.batches import forward, unpack
from resect.plan import Plan
from resect.repair.alternating import alternate
from resect.repair.fitting import fitted
from resect.repair.moments import Line, Rows, rows_of
from resect.repair.walking import Pair, walking
from resect.tracing import Reader, survey
from resect.tracing.trace import HELD_OUT_EVERY

MEMORY = 6e9


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the sequential repair: relative held-out error before and after, and whether the step was kept.

    together: the weight that feeds this one, where both were re-fitted for this reader's error.
    """

    tensor: str
    error_before: float
    error_after: float
    kept: bool
    together: str | None = None


def repair_sequentially(
    dense: nn.Module,
    small: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    *,
    sweeps: int = 1,
    alternations: int = 0,
    memory: float = MEMORY,
    quiet: bool = True,
) -> tuple[nn.Module, tuple[Step, ...]]:
    """Re-fit the readers of a cut network in execution order; returns a new module and what every step did.

    dense: the network that was cut. small: cut(dense, plan), repaired or not. data: the calibrate data, unlabelled will do.
    Every weight from the first that lost columns (or units) on is re-fitted, so that error is made good all the way; a step is
    kept only where it lowers the error on the held-out fifth of the data. Behind a rectifier a target below zero is met by
    anything below zero. sweeps: how often to go through the readers, while a sweep still changes something. alternations: where
    one weight feeds the next through an elementwise function, how often to move what the first is to make to where the second
    needs it and to solve both again: still least squares, but kept units then no longer compute what they did.
    memory: bytes that halted passes may hold; as many of the first examples are used as fit. One forward pass of both networks
    a sweep. A weight that is read more than once in a pass keeps what it has.

    Source: sequential re-fitting as in Zhang et al. 2015, arXiv 1505.06798, section 2 (also for the rectifier).
    """
    small, data = copy.deepcopy(small), list(data)
    readers = affected(dense, plan, feeders=alternations > 0)
    outputs = kept_outputs(plan, readers)
    steps: list[Step] = []
    with Progress(disable=quiet, transient=True) as progress:
        task = progress.add_task("repairing", total=sweeps * len(readers))
        for _ in range(sweeps):
            round_: list[Step] = []
            with torch.inference_mode(), walking(dense, small, readers, data, memory=memory, every=HELD_OUT_EVERY) as walk:
                for reader, pairs in walk:
                    step = _refit(dense, small, readers, reader, outputs, pairs, alternations)
                    walk.changed = step is not None and step.kept
                    round_ += [] if step is None else [step]
                    progress.advance(task)
            steps += round_
            if not any(step.kept for step in round_):
                break
    return small, tuple(steps)


def affected(dense: nn.Module, plan: Plan, *, feeders: bool = False) -> dict[str, Reader]:
    """The weights to re-fit, in execution order: all from the first that loses columns to the last.

    feeders: also the weight that feeds the first of them.
    """
    weights = [name for name in plan.anatomy.parameters if len(plan.anatomy.shapes[name]) >= 2]
    readers = survey(dense, plan.anatomy, weights)
    losing = {part.tensor for group in plan.anatomy.groups if not plan.keep[group.name].all() for part in group.readers}
    order = list(readers)
    first = next((number for number, name in enumerate(order) if name in losing), len(order))
    if feeders and first < len(order) and (feeder := readers[order[first]].fed_by) is not None:
        first = min(first, order.index(feeder))
    # A transposed convolution has no patches to solve on.
    return {name: readers[name] for name in order[first:] if readers[name].op != "transposed" and readers[name].calls == 1}


def kept_outputs(plan: Plan, readers: Mapping[str, Reader]) -> dict[str, Tensor | None]:
    """Per reader the positions of its outputs that the cut network still has; None where it has all."""
    positions = slicing.keep_positions(plan.anatomy, plan.keep)
    found: dict[str, Tensor | None] = {}
    for name, reader in readers.items():
        axis = 1 - reader.axis if len(plan.anatomy.shapes[name]) == 2 else 0
        kept = positions.get(name, {}).get(axis)
        found[name] = None if kept is None else torch.from_numpy(kept.positions)
    return found


def _refit(
    dense: nn.Module,
    small: nn.Module,
    readers: Mapping[str, Reader],
    reader: Reader,
    outputs: Mapping[str, Tensor | None],
    pairs: list[Pair],
    alternations: int,
) -> Step | None:
    """Solve one reader around what it is now, and with the one that feeds it; put what helps into `small`."""
    problem = prepare(dense, small, reader, outputs[reader.tensor], pairs)
    if problem is None:
        return None
    rows, line = problem
    result = fitted(small, reader, [fit for fit, _ in rows], [judges for _, judges in rows], line)
    result.write(small)
    feeder = readers.get(reader.fed_by or "")
    together = None
    if alternations and feeder is not None and pairs[0].now.tape[0].reading is not pairs[0].now.reading:
        result, changed = alternate(small, result, feeder, outputs[reader.tensor], pairs, alternations)
        together = feeder.tensor if changed else None
    return Step(
        tensor=reader.tensor,
        error_before=result.before,
        error_after=result.after,
        kept=result.kept,
        together=together,
    )


def prepare(
    dense: nn.Module, small: nn.Module, reader: Reader, outputs: Tensor | None, pairs: list[Pair]
) -> tuple[list[tuple[Rows, Rows]], Line] | None:
    """The rows of a reader's problem over all pairs, and what stands behind it; None where the networks do not line up."""
    width = slicing.named_tensors(small)[reader.tensor].shape[0 if reader.axis else 1]
    line = Line.of(dense, small, reader, outputs, width)
    rows = [rows_of(pair, reader, line, outputs) for pair in pairs]
    return None if any(part is None for part in rows) else ([part for part in rows if part is not None], line)


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
