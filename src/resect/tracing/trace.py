"""trace(): watch every unit, class by class, in one streaming pass; Trace and the evidence scorers see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn

from resect.anatomy import Anatomy, Group, Slices
from resect.batches import Batch, device_of, forward, unpack
from resect.errors import DataError, ModelError
from resect.tracing.observing import Reader, Reading, norm_line, observing, survey
from resect.tracing.states import Sampler, States, merged
from resect.tracing.sums import Adder, Statistics, Sums, by_example

HELD_OUT_EVERY = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class ReaderEvidence:
    """What one reader read of the units of one group; arrays over (classes, units) or (units,).

    rate: share of values that fire. mean, mean_square, peak: of the values. variance: over all classes. column_norm: Euclidean
    size of what the reader makes of a unit. slope: mean |value x gradient| or None. readout: (outputs, units) weights of an
    output layer, else None.
    """

    tensor: str
    rate: np.ndarray
    mean: np.ndarray
    mean_square: np.ndarray
    peak: np.ndarray
    variance: np.ndarray
    column_norm: np.ndarray
    slope: np.ndarray | None
    readout: np.ndarray | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """All a scorer may look at for one group: arrays, never modules.

    examples: (classes,) number of examples. writer_norm: (units,) Euclidean size of what writes a unit. readers: one entry per
    reader of the group. systems: per reader (weight (outputs, columns), second moments (columns + 1, columns + 1), columns of
    each unit (units, width)) where Gram matrices were traced. states: a sample of hidden states, where it was asked for. seed:
    for scorers that draw.
    """

    group: str
    kind: str
    units: int
    examples: np.ndarray
    writer_norm: np.ndarray
    readers: tuple[ReaderEvidence, ...]
    systems: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...] = ()
    states: States | None = None
    seed: int = 0

    def over_readers(self, name: str) -> np.ndarray:
        """The largest value over the group's readers of one of their arrays; zeros where nothing reads the group."""
        arrays = [getattr(reader, name) for reader in self.readers]
        return np.max(arrays, axis=0) if arrays else np.zeros((len(self.examples), self.units))


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """What every unit did on data: sums per reader, that merge by `+`.

    examples: (classes,) how many of each class were seen. weights: the network's tensors by name, not copies; the trace of one
    network is of no use for another. scales: (outputs,) per reader with a batch norm behind it, what the norm makes of one unit
    of each output: errors count by it. labelled: False where all data count as one class. states: per group a sample of hidden
    states, empty unless it was asked for.
    """

    anatomy: Anatomy
    readers: Mapping[str, Reader]
    sums: Mapping[str, Sums]
    examples: np.ndarray
    labelled: bool
    weights: Mapping[str, torch.Tensor]
    scales: Mapping[str, np.ndarray]
    states: Mapping[str, States] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        return len(self.examples)

    def __add__(self, other: Trace) -> Trace:
        """The trace of both data sets. Raises DataError when the networks or the classes differ."""
        if self.anatomy.fingerprint != other.anatomy.fingerprint or set(self.sums) != set(other.sums):
            raise DataError("traces of two different networks do not add; trace the same network")
        if self.classes != other.classes:
            raise DataError(f"traces over {self.classes} and {other.classes} classes do not add; pass classes= to trace()")
        return Trace(
            anatomy=self.anatomy,
            readers=self.readers,
            sums={name: self.sums[name] + other.sums[name] for name in self.sums},
            examples=self.examples + other.examples,
            labelled=self.labelled and other.labelled,
            weights=self.weights,
            scales=self.scales,
            states=merged(self.states, other.states),
        )

    def evidence(self, group: Group, *, seed: int = 0) -> Evidence:
        """What scorers see of one group."""
        parts = [part for part in group.readers if part.tensor in self.sums]
        squares = [squares_of(self.weights[part.tensor], part)[part.index].sum(1) for part in group.writers]
        return Evidence(
            group=group.name,
            kind=group.kind,
            units=group.units,
            examples=self.examples,
            writer_norm=np.sqrt(np.sum(squares, axis=0)) if squares else np.zeros(group.units),
            readers=tuple(self._reader_evidence(part) for part in parts),
            systems=tuple(system for part in parts if (system := self.system(part)) is not None),
            states=self.states.get(group.name),
            seed=seed,
        )

    def _reader_evidence(self, part: Slices) -> ReaderEvidence:
        sums, weight = self.sums[part.tensor], self.weights[part.tensor]
        positions = np.maximum(sums.positions, 1)[:, None]
        mean, mean_square = sums.total / positions, sums.square / positions
        everything = max(float(sums.positions.sum()), 1.0)
        variance = np.maximum(sums.square.sum(0) / everything - (sums.total.sum(0) / everything) ** 2, 0)
        is_output = not any(w.tensor == part.tensor for g in self.anatomy.groups for w in g.writers)
        readout = None
        if is_output and weight.ndim == 2 and weight.shape[1 - part.axis] == self.classes and part.index.shape[1] == 1:
            readout = _array(weight if part.axis == 1 else weight.T)[:, part.index[:, 0]]
        return ReaderEvidence(
            tensor=part.tensor,
            rate=sums.rate()[:, part.index].mean(-1),
            mean=mean[:, part.index].mean(-1),
            mean_square=mean_square[:, part.index].mean(-1),
            peak=np.where(np.isfinite(sums.peak), sums.peak, 0)[:, part.index].max(-1),
            variance=variance[part.index].mean(-1),
            column_norm=np.sqrt(squares_of(weight, part)[part.index].sum(1)),
            slope=None if sums.slope is None else sums.slope[:, part.index].sum(-1) / np.maximum(self.examples, 1)[:, None],
            readout=readout,
        )

    def system(self, part: Slices) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """The least-squares problem of one reader: weight, second moments and the columns of each unit; None without Gram."""
        sums = self.sums[part.tensor]
        if sums.gram is None or sums.held is None or sums.gram.shape[0] != 1:
            return None
        weight = as_matrix(self.weights[part.tensor], part.axis)
        weight = weight * self.scales.get(part.tensor, np.ones(len(weight)))[:, None]
        kernel = weight.shape[1] // self.weights[part.tensor].shape[part.axis]
        columns = (part.index[:, :, None] * kernel + np.arange(kernel)).reshape(len(part.index), -1)
        return weight, sums.gram[0] + sums.held[0], columns


def as_matrix(weight: torch.Tensor, axis: int) -> np.ndarray:
    """A reader's weight as (outputs, columns) in float64: columns run over the contracted axis, then the kernel."""
    return _array(weight.movedim(axis, 1) if weight.ndim == 2 else weight).reshape(weight.shape[0 if axis else 1], -1)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def squares_of(weight: torch.Tensor, part: Slices) -> np.ndarray:
    """Sum of squares of the weight at every position of one axis (positions run through the blocks)."""
    tensor = weight.detach().double().cpu()
    if part.blocks > 1:
        tensor = tensor.view(part.blocks, tensor.shape[0] // part.blocks, *tensor.shape[1:])
        return tensor.square().transpose(1, 2).flatten(2).sum(2).flatten().numpy()
    return tensor.square().movedim(part.axis, 0).reshape(tensor.shape[part.axis], -1).sum(1).numpy()


def trace(
    model: nn.Module,
    data: Iterable[Any],
    anatomy: Anatomy,
    *,
    grams: bool = True,
    gradients: bool = False,
    classes: int | None = None,
    token_stride: int | None = None,
    gram_positions: int = 64,
    states: int = 0,
    quiet: bool = True,
) -> Trace:
    """Watch every unit of a network on data, class by class, in one streaming pass.

    data: iterable of batches; unlabelled data count as one class. classes: number of classes (default: the width of the
    network's output for labelled data). grams: also sum the second moments of every reader's inputs, for repair and
    `reconstruction`; every `token_stride`-th token (default: about `gram_positions` of a sequence) and up to `gram_positions`
    positions of a convolution. gradients: also sum |value x gradient| of the cross-entropy, for `taylor`; needs labels.
    states: also keep so many rows of hidden states per group (examples, positions or tokens), for `spectral`: rows x units x 8
    bytes.

    Groups that are read by a weight which no call can be recognised by (it is computed on the way) are left alone: they are
    pins of the trace's anatomy.

    Raises DataError for empty data, labels out of range or missing where needed; ModelError for a network in training mode or
    values that are not finite (naming the weight that read them).

    >>> from resect.anatomy import dissect
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    >>> seen = trace(model, [torch.randn(16, 4)], dissect(model, torch.randn(2, 4)))
    >>> seen.sums["2.weight"].fired.shape
    (1, 3)
    """
    check_ready(model)
    readers = survey(model, anatomy)
    unseen = [g.name for g in anatomy.groups if any(part.tensor not in readers for part in g.readers)]
    anatomy = anatomy.without(
        unseen, "what reads it cannot be observed: its weight is computed on the way, or used by an op of its own"
    )
    sampler = Sampler(model, anatomy, readers, states) if states else None
    pass_ = _Pass(model, readers, grams, gradients, classes, token_stride, gram_positions, sampler)
    for batch in track(data, description="tracing", disable=quiet, transient=True):
        pass_.see(unpack(batch, where="the calibrate data"))
    if pass_.examples is None:
        raise DataError("the calibrate data are empty: the loader gave no batch; give at least one")
    return Trace(
        anatomy=anatomy,
        readers=readers,
        sums={name: adder.finish() for name, adder in pass_.adders.items() if adder.sums},
        examples=pass_.examples,
        labelled=pass_.labelled,
        weights={**dict(model.named_buffers()), **dict(model.named_parameters())},
        scales={n: norm_line(model, r.norm)[1].abs().cpu().numpy() for n, r in readers.items() if r.norm is not None},
        states=sampler.finish() if sampler is not None else {},
    )


def check_ready(model: nn.Module) -> None:
    """Raise ModelError unless the network and all its modules are in evaluation mode and its tensors are finite."""
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ModelError(f"the network is in training mode ({training[0]}, {len(training)} modules); call model.eval() first")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
            raise ModelError(f"{name} holds values that are not finite (NaN or inf); load a sound checkpoint")


class _Pass:
    """One pass over data: who is in which class, and an adder per reader."""

    def __init__(self, model, readers, grams, gradients, classes, token_stride, gram_positions, sampler=None):
        self.model, self.readers, self.gradients, self.classes = model, readers, gradients, classes
        self.grams, self.token_stride, self.gram_positions = grams, token_stride, gram_positions
        self.sampler: Sampler | None = sampler
        self.watched = [*readers, *(set(sampler.at) - set(readers) if sampler else ())]
        self.adders: dict[str, Adder] = {}
        self.examples: np.ndarray | None = None
        self.seen, self.labelled = 0, True

    def see(self, batch: Batch) -> None:
        device = device_of(self.model)
        if self.examples is None:
            self._begin(batch, device)
        assert self.examples is not None
        labels = self._labels(batch).to(device)
        held = (torch.arange(batch.size, device=device) + self.seen) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        readings: list[Reading] = []
        known: dict[int, Statistics] = {}
        if self.sampler is not None:
            self.sampler.begin(batch)

        def add(reading: Reading) -> None:
            if self.sampler is not None:
                self.sampler.see(reading)
            if reading.reader.tensor not in self.adders:
                return
            adder = self.adders[reading.reader.tensor]
            with torch.no_grad():
                adder.add(reading, labels, held, batch.mask, known)
            if not torch.isfinite(adder.sums["total"]).all():
                raise ModelError(
                    f"values read by {reading.reader.tensor} are not finite (NaN or inf); check the data and weights"
                )
            if self.gradients:
                readings.append(reading)

        with (
            torch.enable_grad() if self.gradients else torch.inference_mode(),
            observing(self.model, self.watched, add, prepare=_with_gradient if self.gradients else None),
        ):
            logits = forward(self.model, batch, device=device)
        if self.gradients:
            self._add_slopes(readings, logits, labels)
        if self.sampler is not None:
            self.sampler.end()
        self.seen += batch.size
        self.examples += np.bincount(labels.cpu().numpy(), minlength=len(self.examples))

    def _begin(self, batch: Batch, device: torch.device) -> None:
        self.labelled = batch.labels is not None
        if self.gradients and not self.labelled:
            raise DataError("gradients need labels, and the calibrate data have none; give (inputs, labels) or another scorer")
        if self.classes is None:
            with torch.inference_mode():
                self.classes = forward(self.model, batch, device=device).shape[-1] if self.labelled else 1
        self.examples = np.zeros(self.classes, dtype=np.int64)
        options = {"grams": self.grams, "token_stride": self.token_stride, "gram_positions": self.gram_positions}
        self.adders = {name: Adder(reader, self.classes, **options) for name, reader in self.readers.items()}

    def _labels(self, batch: Batch) -> torch.Tensor:
        if not self.labelled:
            return torch.zeros(batch.size, dtype=torch.long)
        if batch.labels is None:
            raise DataError("some batches of the calibrate data have labels and some have none; give labels with all or none")
        low, high = int(batch.labels.min()), int(batch.labels.max())
        if low < 0 or high >= (self.classes or 0):
            raise DataError(
                f"labels run from {low} to {high}, but the network has {self.classes} outputs: 0 to {self.classes - 1}"
            )
        return batch.labels

    def _add_slopes(self, readings: list[Reading], logits: torch.Tensor, labels: torch.Tensor) -> None:
        loss = F.cross_entropy(logits, labels, reduction="sum")
        slopes = torch.autograd.grad(loss, [reading.inputs for reading in readings], allow_unused=True)
        for reading, slope in zip(readings, slopes):
            change = reading.inputs.detach() * (torch.zeros_like(reading.inputs) if slope is None else slope)
            effect, axis = by_example(reading, len(labels), change)
            if len(effect) == len(labels):
                self.adders[reading.reader.tensor].add_slope(effect.sum(axis).abs(), labels)


def _with_gradient(inputs: torch.Tensor) -> torch.Tensor:
    """The input of a reader, asked for its gradient; a frozen network's first readers start the graph."""
    return inputs if inputs.requires_grad else inputs.detach().clone().requires_grad_()
