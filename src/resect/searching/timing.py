"""Times: how many milliseconds a network takes for any plan, predicted from measured times of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import Tensor, nn

from resect.anatomy import Anatomy
from resect.batches import Batch, device_of, forward
from resect.evaluation import Latency, inputs_of, latency, milliseconds
from resect.plan import Plan, costs_of, lengths_of
from resect.searching.rounding import conv_multiple
from resect.surgery import cut
from resect.tracing.observing import CONVOLUTIONS, Reader, Reading, observing

SHARES = (0.25, 0.5, 0.75, 1.0)
# Whole networks that are timed to fit what the layers leave over: shares of the units that stay.
WHOLE = (1.0, 0.6, 0.3)
CONVOLVE: dict[int, Callable[..., Tensor]] = {dims: function for function, dims in CONVOLUTIONS.items()}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One product with a weight as it is called in a forward pass: what must be known to time it at other widths.

    inputs, weight: shapes in the call. outputs: elements of the result. cut: whether plans change its (input, output) width.
    """

    reader: Reader
    inputs: tuple[int, ...]
    weight: tuple[int, ...]
    outputs: int
    cut: tuple[bool, bool]

    @property
    def axes(self) -> tuple[int, int]:
        """The axes of the weight that are its input and output width."""
        return self.reader.axis, 1 - self.reader.axis

    @property
    def kind(self) -> Layer:
        """The layer without its name: layers of one kind take the same time."""
        facts = replace(self.reader, tensor="", offset=None, sign=1, calls=1, norm=None, residual=False)
        return replace(self, reader=replace(facts, bias=self.reader.bias and ""))

    def knots(self) -> tuple[np.ndarray, np.ndarray]:
        """(knots,) input and output widths at which the layer is timed."""
        grain = conv_multiple() if self.reader.op == "conv" else 1
        own = [self.weight[axis] for axis in self.axes]
        steps = (1, self._output_step())
        a, b = (_knots(size, step, grain) if cut else np.array([size]) for size, step, cut in zip(own, steps, self.cut))
        return a, b

    def _output_step(self) -> int:
        """Output widths of a grouped convolution are multiples of this number."""
        blocks = self.reader.blocks
        return self.weight[0] // blocks if self._depthwise else blocks

    @property
    def _depthwise(self) -> bool:
        return self.reader.blocks > 1 and self.weight[1] == 1

    def call(self, width: int, outputs: int, memory: Tensor) -> Callable[[], Tensor]:
        """The product alone at other widths. memory: a flat tensor that inputs and weights are laid out in."""
        weight = list(self.weight)
        weight[self.axes[0]], weight[self.axes[1]] = width, outputs
        blocks = outputs // self._output_step() if self._depthwise else self.reader.blocks
        inputs = list(self.inputs)
        inputs[self._channels] = width * blocks
        x, w = _laid_out(memory, inputs), _laid_out(memory, weight)
        bias = None if self.reader.bias is None else memory[:outputs]
        if self.reader.op == "matmul":
            return (lambda: x @ w) if bias is None else (lambda: torch.addmm(bias, x.flatten(0, -2), w))
        if self.reader.op == "linear":
            return lambda: F.linear(x, w, bias)
        r, convolve = self.reader, CONVOLVE[len(self.reader.stride)]
        return lambda: convolve(x, w, bias, r.stride, r.padding, r.dilation, blocks)

    @property
    def _channels(self) -> int:
        """The axis of the input that is contracted."""
        return len(self.inputs) - 1 - (len(self.reader.stride) if self.reader.op == "conv" else 0)


def _knots(size: int, step: int, grain: int) -> np.ndarray:
    """Widths up to `size`, multiples of `step`: shares of it, rounded up to the grain, each with the width just above, so
    that interpolation shows a staircase where there is one."""
    tops = [int(np.ceil(share * size / grain)) * grain for share in SHARES]
    above = [top + 1 for top in tops] if grain > 1 else []
    wanted = np.array([1, *tops, *above, size])
    return np.unique(np.ceil(wanted[wanted <= size] / step).astype(int) * step)


def _laid_out(memory: Tensor, shape: Sequence[int]) -> Tensor:
    return memory[: prod(shape)].view(*shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Times:
    """Predicted milliseconds of one network at one batch size, for any plan: measured layers and a fitted rest.

    layers: every product with a weight, in the order of the calls. tables: per layer (input knots, output knots) milliseconds.
    The rest (norms, activations, attention, overhead) is `fixed` plus `slope` times the share that remains of the work that no
    layer accounts for: multiply-accumulates of other products, and values that layers hand on. scale: correction learned from
    whole networks.
    """

    anatomy: Anatomy
    batch: int
    layers: tuple[Layer, ...]
    tables: tuple[np.ndarray, ...]
    fixed: float = 0.0
    slope: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy, *, batch: int = 1, rounds: int = 5, quiet: bool = True) -> Times:
        """Time every layer at some widths, and a few cut networks to fit the rest.

        One thread; the median of rounds, each of which times everything once, so that a slow spell falls on all alike; CPU
        time (wall time on an accelerator). Layers of one kind and shape are timed once.
        """
        layers = tuple(_layers(model, anatomy, batch))
        kinds = list(dict.fromkeys(layer.kind for layer in layers))
        grids = [[(int(a), int(b)) for a in kind.knots()[0] for b in kind.knots()[1]] for kind in kinds]
        memory = _memory(model, kinds)
        calls = [kind.call(*widths, memory) for kind, grid in zip(kinds, grids) for widths in grid]
        plans = [Plan.random(anatomy, 1 - share) for share in WHOLE]
        calls += [_whole(model, plan, batch) for plan in plans]
        measured = milliseconds(calls, device_of(model), rounds=rounds, quiet=quiet)
        parts = np.split(measured, np.cumsum([len(grid) for grid in grids]))
        tables = {kind: part.reshape([len(k) for k in kind.knots()]) for kind, part in zip(kinds, parts)}
        times = cls(anatomy=anatomy, batch=batch, layers=layers, tables=tuple(tables[layer.kind] for layer in layers))
        return times._fitted(plans, parts[-1])

    def _fitted(self, plans: Sequence[Plan], measured: np.ndarray) -> Times:
        """The same times with a rest that explains whole networks."""
        kept = np.array([list(plan.kept.values()) for plan in plans], dtype=np.float64)
        rest = np.maximum(measured - self._in_layers(kept), 0)
        (fixed, slope), _ = nnls(np.stack([np.ones(len(plans)), self._work(kept)], axis=1), rest)
        return replace(self, fixed=float(fixed), slope=float(slope))

    def __call__(self, kept: Mapping[str, int]) -> float:
        """Milliseconds of any plan that keeps so many units per group."""
        return float(self.many(np.array([[kept[group.name] for group in self.anatomy.groups]]))[0])

    def many(self, kept: np.ndarray) -> np.ndarray:
        """kept: (plans, groups) units that stay, in the anatomy's order; (plans,) milliseconds."""
        kept = np.asarray(kept, dtype=np.float64)
        return self.scale * (self._in_layers(kept) + self.fixed + self.slope * self._work(kept))

    def corrected(self, kept: Mapping[str, int], measured: float) -> Times:
        """Times scaled so that one network takes what was measured."""
        return replace(self, scale=self.scale * measured / max(self(kept), 1e-12))

    def beside(self, model: nn.Module, small: nn.Module) -> Latency:
        """What a cut network really takes, measured beside the dense one on the anatomy's example."""
        return latency(model, small, self.anatomy.example, batches=(self.batch,), rounds=10)[0]

    def _in_layers(self, kept: np.ndarray) -> np.ndarray:
        """(plans,) milliseconds of the layers alone: their tables, interpolated in both widths."""
        if not self.layers:
            return np.zeros(len(kept))
        start, position, tables = self._lookup
        widths = lengths_of(self.anatomy, kept, self._axes).astype(int)
        low, share = np.divmod(position[start + widths], 1)
        index = low.astype(int).reshape(len(kept), -1, 2)
        a, b = np.moveaxis(index, 2, 0)
        x, y = np.moveaxis(share.reshape(index.shape), 2, 0)
        row = np.arange(len(self.layers))
        corners = [tables[row, a + i, b + j] * (x if i else 1 - x) * (y if j else 1 - y) for i in (0, 1) for j in (0, 1)]
        return np.sum(corners, axis=(0, 2))

    def _work(self, kept: np.ndarray) -> np.ndarray:
        """(plans,) work outside of the layers, as a share of the dense network's."""
        whole = np.array([[group.units for group in self.anatomy.groups]], dtype=np.float64)
        rows = np.concatenate([kept, whole])
        work = costs_of(self._untimed, rows)[:, 1] * self.batch
        if self.layers:
            outputs = np.array([layer.outputs / layer.weight[layer.axes[1]] for layer in self.layers])
            work = work + lengths_of(self.anatomy, rows, self._axes[1::2]) @ outputs
        return work[:-1] / max(work[-1], 1.0)

    @cached_property
    def _axes(self) -> list[tuple[str, int]]:
        """Input and output axis of every layer, in turn."""
        return [(layer.reader.tensor, axis) for layer in self.layers for axis in layer.axes]

    @cached_property
    def _untimed(self) -> Anatomy:
        """The anatomy with the products that are not in the tables."""
        timed = {layer.reader.tensor for layer in self.layers}
        return replace(self.anatomy, contractions=tuple(c for c in self.anatomy.contractions if c.tensor not in timed))

    @cached_property
    def _lookup(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(axes,) where each axis starts in (widths,) positions between knots, and (layers, knots + 1, knots + 1) tables."""
        knots = [part for layer in self.layers for part in layer.knots()]
        positions = [np.interp(np.arange(part[-1] + 1), part, np.arange(len(part))) for part in knots]
        start = np.cumsum([0, *map(len, positions)])[:-1]
        size = max(map(len, knots)) + 1
        tables = np.stack([np.pad(t, [(0, size - n) for n in t.shape], mode="edge") for t in self.tables])
        return start, np.concatenate(positions), tables


def told(measured: Latency) -> str:
    """A sentence for a user on what a network took; it says so where it is not faster than the dense one."""
    return f"Measured beside the dense network: {measured}."


def _layers(model: nn.Module, anatomy: Anatomy, batch: int) -> Iterator[Layer]:
    """Every call of a product with a weight, from one pass over the anatomy's example; not those of unknown form."""
    seen: list[Reading] = []
    weights = [name for name, shape in anatomy.shapes.items() if len(shape) > 1 and name in anatomy.parameters]
    args, kwargs = inputs_of(anatomy.example, batch, device_of(model))
    with torch.no_grad(), observing(model, weights, seen.append):
        forward(model, Batch(args=args, kwargs=kwargs, labels=None, mask=None, size=batch))
    changed = {(part.tensor, part.axis) for group in anatomy.groups for part in group.slices}
    for reading in seen:
        reader = reading.reader
        if reader.op != "transposed":
            yield Layer(
                reader=reader,
                inputs=tuple(reading.inputs.shape),
                weight=tuple(reading.weight.shape),
                outputs=reading.output.numel(),
                cut=((reader.tensor, reader.axis) in changed, (reader.tensor, 1 - reader.axis) in changed),
            )


def _memory(model: nn.Module, kinds: Sequence[Layer]) -> Tensor:
    """A flat tensor as large as the largest input or weight."""
    like = next(iter(model.parameters()), torch.empty(0))
    size = max((prod(shape) for kind in kinds for shape in (kind.inputs, kind.weight)), default=0)
    return torch.ones(size, dtype=like.dtype, device=like.device)


def _whole(model: nn.Module, plan: Plan, batch: int) -> Callable[[], Any]:
    small = model if plan.share == 1 else cut(model, plan, verify=False)
    args, kwargs = inputs_of(plan.anatomy.example, batch, device_of(model))
    return lambda: small(*args, **kwargs)
