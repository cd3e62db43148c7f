"""Sums over what one reader reads: they add, so shards, machines and sessions merge by `+`.

Per class and channel of the reader's input: how often it fires, its sum, sum of squares and extremes; per reader the Gram
matrix of its inputs. A channel of a convolution counts every position; a token counts unless it is padding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from resect.tracing.observing import Reader, Reading

BINS = 32
LOWEST_OCTAVE = -24
HISTOGRAM_LIMIT = 1 << 22
HISTOGRAM_POSITIONS = 64
FIRING_SHARE_OF_RMS = 0.1
# Columns beyond which second moments would take more than 2 GB a reader: such readers are cut without repair.
WIDEST_GRAM = 12_000
MAXIMA = ("peak",)
MINIMA = ("low",)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """What one reader read, summed over data; all arrays float64.

    positions: (classes,) counted values per channel. fired, total, square, peak: (classes, channels): count of values > 0, sum,
    sum of squares, maximum. low: (channels,) minimum. octaves: (classes or 1, channels, 32) histogram of log2|value| from
    2^-24 up, kept while values are not behind a rectifier. slope: (classes, channels) sum of |value x gradient| or None.
    gram, held: (blocks, columns + 1, columns + 1) second moments of the reader's inputs with a constant 1 as the last, over
    four fifths of the examples and over the fifth that repair is judged on, or None.
    """

    positions: np.ndarray
    fired: np.ndarray
    total: np.ndarray
    square: np.ndarray
    peak: np.ndarray
    low: np.ndarray
    octaves: np.ndarray
    slope: np.ndarray | None = None
    gram: np.ndarray | None = None
    held: np.ndarray | None = None

    def __add__(self, other: Sums) -> Sums:
        merged: dict[str, Any] = {}
        for entry in fields(self):
            a, b = getattr(self, entry.name), getattr(other, entry.name)
            if a is None or b is None:
                merged[entry.name] = None
            elif entry.name in MAXIMA:
                merged[entry.name] = np.maximum(a, b)
            elif entry.name in MINIMA:
                merged[entry.name] = np.minimum(a, b)
            else:
                merged[entry.name] = a + b
        return replace(self, **merged)

    @property
    def rectified(self) -> bool:
        """True where the smallest value read is exactly 0: the units are behind a rectifier."""
        return bool(self.low.min() == 0)

    def rate(self) -> np.ndarray:
        """Share of values that fire, (classes, channels) in [0, 1]: > 0 behind a rectifier, else |value| > 0.1 rms."""
        positions = np.maximum(self.positions, 1)[:, None]
        if self.rectified or not self.octaves.any():
            return self.fired / positions
        everything = max(float(self.positions.sum()), 1.0)
        rms = np.sqrt(self.square.sum(0) / everything)
        counted = np.maximum(self.octaves.sum(-1), 1)
        return np.broadcast_to(_share_above(self.octaves, FIRING_SHARE_OF_RMS * rms) / counted, self.fired.shape)


def _share_above(octaves: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Counts above a threshold per channel, read off an octave histogram with linear interpolation inside an octave."""
    place = np.log2(np.maximum(threshold, 2.0**LOWEST_OCTAVE)) - LOWEST_OCTAVE
    whole = np.clip(np.floor(place).astype(int), 0, BINS - 1)
    above = octaves[..., ::-1].cumsum(-1)[..., ::-1]
    channel = np.arange(octaves.shape[1])
    inside = octaves[:, channel, whole] * np.clip(place - whole, 0, 1)[None]
    return above[:, channel, whole] - inside


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """What one batch adds to the sums of every reader that read one tensor; fields as in Sums, on the network's device."""

    sums: dict[str, torch.Tensor]
    low: torch.Tensor
    peak: torch.Tensor
    tokens: torch.Tensor | None
    inputs: torch.Tensor

    @classmethod
    def of(cls, reading: Reading, labels: torch.Tensor, mask: torch.Tensor | None, classes: int) -> Statistics:
        values, axis = by_example(reading, len(labels))
        values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
        tokens = _token_mask(values, axis, mask)
        values = values if tokens is None else values * tokens
        # Rows that cannot be told apart by example (tokens routed to an expert) count for every class by its share.
        membership = F.one_hot(labels, classes).double()
        membership = membership if len(values) == len(labels) else membership.mean(0, keepdim=True)
        low = values.amin(axis).amin(0)  # in two steps: along the contiguous axis first is four times faster
        # Measured on CPU: counting through sign() is five times faster than count_nonzero, and exact below 2^24 positions.
        positive = values if bool(low.min() >= 0) else values.clamp_min(0)
        counted = float(values.shape[axis]) if tokens is None else tokens.sum((1, 2)).double()
        sums = {
            "positions": (membership.T * counted).sum(1),
            "fired": membership.T @ positive.sign().sum(axis).double(),
            "total": membership.T @ values.sum(axis).double(),
            "square": membership.T @ torch.linalg.vector_norm(values, dim=axis).square().double(),
        }
        if low.min() != 0:
            sums["octaves"] = _octaves(values if axis == 1 else values.transpose(1, 2), membership)
        # The input is kept so that its identity is not used again within the batch.
        peak = _peaks(values.amax(axis).double(), membership)
        return cls(sums=sums, low=low.double(), peak=peak, tokens=tokens, inputs=reading.inputs)


def _octaves(values: torch.Tensor, membership: torch.Tensor) -> torch.Tensor:
    """(classes or 1, channels, 32) histogram of log2|values| at up to 64 positions."""
    channels, classes = values.shape[2], membership.shape[1]
    rows = classes if classes * channels * BINS <= HISTOGRAM_LIMIT and len(membership) == len(values) else 1
    sample = values[:, :: max(1, values.shape[1] // HISTOGRAM_POSITIONS)].float()
    octave = torch.frexp(sample)[1].masked_fill(sample == 0, LOWEST_OCTAVE) - 1 - LOWEST_OCTAVE
    row = membership.argmax(1)[:, None, None] if rows > 1 else 0
    place = (row * channels + torch.arange(channels, device=values.device)) * BINS + octave.clamp(0, BINS - 1)
    return torch.bincount(place.flatten(), minlength=rows * channels * BINS).view(rows, channels, BINS).double()


class Adder:
    """Adds readings of one reader into Sums, batch by batch; memory does not grow with the number of examples."""

    def __init__(self, reader: Reader, classes: int, *, grams: bool, token_stride: int | None, gram_positions: int):
        self.reader, self.classes, self.grams = reader, classes, grams
        self.token_stride, self.gram_positions = token_stride, gram_positions
        self.sums: dict[str, torch.Tensor] = {}

    def add(
        self,
        reading: Reading,
        labels: torch.Tensor,
        held: torch.Tensor,
        mask: torch.Tensor | None,
        known: dict[int, Statistics] | None = None,
    ) -> None:
        """labels: (examples,) class of each example; held: (examples,) True where the example judges repair.

        known: statistics of the inputs that other readers of this batch have read, by identity; one tensor read by two
        convolutions is looked at once.
        """
        known = {} if known is None else known
        seen = known.get(id(reading.inputs))
        if seen is None:
            seen = known[id(reading.inputs)] = Statistics.of(reading, labels, mask, self.classes)
        for name, value in seen.sums.items():
            self._accumulate(name, value)
        self._extreme("low", seen.low, torch.minimum)
        self._extreme("peak", seen.peak, torch.maximum)
        if self.grams:
            self._add_grams(reading, held, seen.tokens)

    def _add_grams(self, reading: Reading, held: torch.Tensor, tokens: torch.Tensor | None) -> None:
        if reading.weight.numel() // reading.weight.shape[0 if reading.reader.axis else 1] > WIDEST_GRAM:
            return
        rows = design(reading, len(held), self.gram_positions)
        if rows is None:
            return
        judges = held[:, None].expand(len(held), rows.shape[1]) if len(rows) == len(held) else held.new_zeros(rows.shape[:2])
        keep = torch.ones_like(judges) if tokens is None else tokens[:, :, 0].bool()
        if reading.reader.op != "conv" and rows.shape[1] > 1:
            stride = self.token_stride or max(1, rows.shape[1] // self.gram_positions)
            keep = keep & (torch.arange(rows.shape[1], device=keep.device) % stride == 0)
        for name, chosen in (("gram", keep & ~judges), ("held", keep & judges)):
            self._add_moments(name, rows[chosen])

    def _add_moments(self, name: str, rows: torch.Tensor) -> None:
        """Second moments added in place: for wide readers the matrix itself is the memory that counts."""
        columns = rows.transpose(0, 1).to("cpu", torch.float64)
        if name not in self.sums:
            self.sums[name] = torch.zeros(len(columns), columns.shape[2], columns.shape[2], dtype=torch.float64)
        self.sums[name].baddbmm_(columns.transpose(1, 2), columns)

    def add_slope(self, slope: torch.Tensor, labels: torch.Tensor) -> None:
        """slope: (examples, channels) |sum over positions of value x gradient|."""
        self._accumulate("slope", F.one_hot(labels, self.classes).T.double() @ slope.double())

    def _accumulate(self, name: str, value: torch.Tensor) -> None:
        value = value.double().cpu()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _extreme(self, name: str, value: torch.Tensor, choose) -> None:
        value = value.cpu()
        self.sums[name] = choose(self.sums[name], value) if name in self.sums else value

    def finish(self) -> Sums:
        """The sums so far, as arrays; without a histogram where no value was negative."""
        empty = {"octaves": np.zeros((1, len(self.sums["low"]), BINS))}
        return Sums(**{**empty, **{name: value.numpy() for name, value in self.sums.items()}})


def _peaks(values: torch.Tensor, membership: torch.Tensor) -> torch.Tensor:
    """(classes, channels) maximum over the examples of a class; -inf where a class has none."""
    peaks = values.new_full((membership.shape[1], values.shape[1]), -torch.inf)
    if len(membership) != len(values) or len(values) == 1:
        peaks[membership.sum(0) > 0] = values.amax(0)
        return peaks
    return peaks.scatter_reduce_(0, membership.argmax(1)[:, None].expand_as(values), values, "amax")


def by_example(reading: Reading, examples: int, values: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
    """The reader's input (or `values` of its shape) as three axes, examples first, and which of them runs over positions.

    (examples, positions, channels) for linear readers, position axis 1; (examples, channels, positions) for convolutions,
    position axis 2. Rows that were flattened into the first axis go back to their examples.
    """
    inputs = reading.inputs.detach() if values is None else values
    if reading.reader.op in ("conv", "transposed"):
        values = inputs.flatten(2)
        rows, channels, positions = values.shape
        if rows != examples and rows % examples == 0:
            values = values.view(examples, -1, channels, positions).transpose(1, 2).flatten(2)
        return values, 2
    if inputs.ndim >= 3 and inputs.shape[0] != examples and inputs.shape[1] == examples:
        inputs = inputs.transpose(0, 1)
    if inputs.ndim == 1:
        inputs = inputs[None]
    rows = inputs.shape[:-1].numel()
    return inputs.reshape(examples if rows % examples == 0 else 1, -1, inputs.shape[-1]), 1


def _token_mask(values: torch.Tensor, axis: int, mask: torch.Tensor | None) -> torch.Tensor | None:
    """(examples, tokens, 1) of 0 and 1 where the positions are the batch's tokens, else None."""
    if mask is None or axis != 1 or mask.shape != values.shape[:2]:
        return None
    return mask.to(values.device, values.dtype)[:, :, None]


def design(reading: Reading, examples: int, most: int) -> torch.Tensor | None:
    """The rows of the reader's least-squares problem, (examples, positions, blocks, columns + 1), a constant 1 last.

    For a convolution a row is one patch, unfolded exactly as the call did, at up to `most` positions of an evenly spaced grid;
    columns run like the stored weight's axes from 1 on. None for readers that have no such form (transposed, 3-d).
    """
    reader = reading.reader
    if reader.op in ("linear", "matmul"):
        rows = by_example(reading, examples)[0][:, :, None, :]
    elif reader.op == "conv" and reading.inputs.ndim <= 4:
        rows = _patches(reading, most)
        if rows.shape[0] != examples and rows.shape[0] % examples == 0:
            rows = rows.reshape(examples, -1, *rows.shape[2:])
    else:
        return None
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


def _patches(reading: Reading, most: int) -> torch.Tensor:
    reader, inputs = reading.reader, reading.inputs.detach()
    kernel, stride, dilation = tuple(reading.weight.shape[2:]), reader.stride, reader.dilation
    inputs = F.pad(inputs, pads_of(reader, kernel))
    if inputs.ndim == 3:
        inputs, kernel, stride, dilation = inputs[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    columns = F.unfold(inputs, kernel, dilation=dilation, stride=stride)
    count = columns.shape[-1]
    if count > most:
        columns = columns[..., torch.linspace(0, count - 1, most, device=columns.device).round().long()]
    rows = columns.transpose(1, 2)
    return rows.reshape(*rows.shape[:2], reader.blocks, -1)


def pads_of(reader: Reader, kernel: tuple[int, ...]) -> list[int]:
    """Zeros added on each side of each spatial axis, last axis first, as F.pad takes them."""
    pads: list[int] = []
    for axis in reversed(range(len(kernel))):
        if isinstance(reader.padding, str):
            total = reader.dilation[axis] * (kernel[axis] - 1) if reader.padding == "same" else 0
            pads += [total // 2, total - total // 2]
        else:
            pads += [reader.padding[axis]] * 2
    return pads


def second_moments(rows: torch.Tensor) -> torch.Tensor:
    """(blocks, columns, columns) sums of outer products of rows (n, blocks, columns), in float64."""
    columns = rows.double().transpose(0, 1)
    return columns.transpose(1, 2) @ columns
