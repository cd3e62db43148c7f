"""How good a network is, example by example, and how fast it is beside the dense one: Evaluation and Latency."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import nn

from resect.batches import Batch, device_of, forward, unpack
from resect.errors import DataError, ModelError

BUSY = 1.5
SHORTEST_MEASUREMENT = 0.002


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What one network answered on every example, so that two networks can be compared example by example.

    correct: (examples,) bool. labels, predictions: (examples,) int64. labelled: False where `labels` are another network's
    predictions (`evaluate(..., against=)`); `accuracy` is then the share of examples on which both agree.
    """

    correct: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    labelled: bool = True

    def __post_init__(self) -> None:
        shapes = {self.correct.shape, self.labels.shape, self.predictions.shape}
        if len(shapes) != 1 or self.correct.ndim != 1 or not len(self.correct):
            raise DataError(
                f"an evaluation holds one entry per example and at least one example; got correct {self.correct.shape}, "
                f"labels {self.labels.shape}, predictions {self.predictions.shape}"
            )

    @property
    def examples(self) -> int:
        """How many examples were seen."""
        return len(self.correct)

    @property
    def right(self) -> int:
        """How many examples were answered correctly."""
        return int(self.correct.sum())

    @property
    def accuracy(self) -> float:
        """Share of examples answered correctly, in [0, 1]."""
        return self.right / self.examples

    @property
    def per_class(self) -> dict[int, float]:
        """Share of each class's examples answered correctly, by label, for the labels that occur."""
        return {int(c): float(self.correct[self.labels == c].mean()) for c in np.unique(self.labels)}

    @property
    def counts(self) -> dict[int, int]:
        """How many examples each class has, by label, for the labels that occur."""
        classes, counts = np.unique(self.labels, return_counts=True)
        return {int(c): int(n) for c, n in zip(classes, counts)}

    def drop_from(self, dense: Evaluation) -> float:
        """Accuracy lost against `dense` on the same examples, in [-1, 1]. Raises DataError when the examples differ."""
        self.check_paired(dense)
        return dense.accuracy - self.accuracy

    def check_paired(self, dense: Evaluation) -> None:
        """Raise DataError unless both evaluations saw the same examples in the same order, as far as the labels can tell."""
        if self.labelled != dense.labelled or not np.array_equal(self.labels, dense.labels):
            raise DataError(
                f"two networks were evaluated on different examples ({dense.examples} and {self.examples}, or another order); "
                "evaluate both on the same batches, from a list or a DataLoader with shuffle=False"
            )

    def select(self, rows: np.ndarray) -> Evaluation:
        """The evaluation on some examples: `rows` is a bool mask (examples,) or int64 indices. DataError when none is left."""
        return Evaluation(
            correct=self.correct[rows], labels=self.labels[rows], predictions=self.predictions[rows], labelled=self.labelled
        )

    def __str__(self) -> str:
        word = "right" if self.labelled else "in agreement"
        return f"{self.accuracy * 100:.2f} % {word} ({self.right:,} of {self.examples:,} examples)"


def evaluate(model: nn.Module, data: Iterable[Any], *, against: np.ndarray | None = None, quiet: bool = True) -> Evaluation:
    """Judge a classifier on every example of `data`, an iterable of labelled batches, in one streaming pass.

    against: (examples,) predictions of another network, taken in place of labels (unlabelled data will do then).
    The network's output is read as (examples, classes) logits; the prediction is the largest.

    Raises DataError for empty data, missing labels and labels out of range, and ModelError for a network in training mode,
    outputs that are NaN or infinite, and outputs that are not one row of logits per example.

    >>> model = nn.Softmax(dim=1).eval()
    >>> print(evaluate(model, [(torch.eye(3), torch.tensor([0, 1, 1]))]))
    66.67 % right (2 of 3 examples)
    """
    predictions, labels, seen = [], [], 0
    for number, batch, logits in outputs(model, data, quiet=quiet):
        if against is not None:
            _check_enough(against, seen + batch.size)
            truth = torch.as_tensor(against[seen : seen + batch.size]).long()
        else:
            truth = _labels(batch, number)
        _check_range(truth, logits.shape[1], number)
        predictions.append(logits.argmax(dim=1).cpu().numpy())
        labels.append(truth.cpu().numpy())
        seen += batch.size
    if against is not None and len(against) != seen:
        raise DataError(f"against= holds {len(against)} predictions and data {seen} examples; predict on the same data")
    predicted, true = np.concatenate(predictions), np.concatenate(labels)
    return Evaluation(correct=predicted == true, labels=true, predictions=predicted, labelled=against is None)


def predict(model: nn.Module, data: Iterable[Any], *, quiet: bool = True) -> np.ndarray:
    """The class with the largest logit for every example of `data`, (examples,) int64; labels are not needed.

    Raises what `evaluate` raises, except for labels.
    """
    return np.concatenate([logits.argmax(dim=1).cpu().numpy() for _, _, logits in outputs(model, data, quiet=quiet)])


def outputs(model: nn.Module, data: Iterable[Any], *, quiet: bool = True) -> Iterator[tuple[int, Batch, torch.Tensor]]:
    """Number, unpacked batch and (examples, classes) logits of every batch of `data`, checked; errors as in `evaluate`."""
    _check_mode(model)
    device = device_of(model)
    number = -1
    batches = data if quiet else track(data, description="evaluating", transient=True)
    for number, raw in enumerate(batches):
        batch = unpack(raw)
        with torch.inference_mode():
            logits = forward(model, batch, device=device)
        _check_logits(logits, batch.size, number, type(model).__name__)
        yield number, batch, logits
    if number < 0:
        raise DataError(
            "data gave no batches; give at least one, and a list or DataLoader where it is read more than once "
            "(a generator is empty the second time)"
        )


def _check_mode(model: nn.Module) -> None:
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f"its module {training!r}" if training else "it"
        raise ModelError(
            f"{type(model).__name__} cannot be evaluated: {where} is in training mode, so dropout and batch norm would change "
            "the answers; call model.eval() first"
        )


def _check_logits(logits: torch.Tensor, size: int, number: int, name: str) -> None:
    if logits.ndim != 2 or logits.shape[0] != size or logits.shape[1] < 2:
        raise ModelError(
            f"{name} returned shape {tuple(logits.shape)} for {size} examples; evaluation reads logits of shape "
            "(examples, classes) with at least 2 classes"
        )
    bad = ~torch.isfinite(logits).all(dim=1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ModelError(
            f"{name} returned NaN or infinite values for {int(bad.sum())} of {size} examples of batch {number} (first: example "
            f"{row}); check the inputs and the weights for NaN"
        )


def _labels(batch: Batch, number: int) -> torch.Tensor:
    if batch.labels is None:
        raise DataError(
            f"batch {number} of data has no labels, and accuracy needs them; give batches (inputs, labels), for one batch "
            "[(inputs, labels)]"
        )
    return batch.labels


def _check_range(labels: torch.Tensor, classes: int, number: int) -> None:
    wrong = labels[(labels < 0) | (labels >= classes)].unique()
    if len(wrong):
        some = ", ".join(str(int(value)) for value in wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        raise DataError(
            f"batch {number} of data has labels {some}, and the network has {classes} outputs; "
            f"labels go from 0 to {classes - 1}"
        )


def _check_enough(against: np.ndarray, seen: int) -> None:
    if len(against) < seen:
        raise DataError(
            f"against= holds {len(against)} predictions and data more examples ({seen} so far); predict on the same data"
        )


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one forward pass over the rounds of a measurement."""

    minimum: float
    median: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ms"


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long the dense and the small network take on one batch size, measured side by side.

    ratio: median over rounds of dense time / small time, each pair measured back to back; above 1 the small one is faster.
    wins: share of rounds in which it was. clock: "CPU time" or "wall time". warning: why not to trust the figures, or "".
    """

    batch: int
    dense_ms: Timing
    small_ms: Timing
    ratio: float
    wins: float
    rounds: int
    threads: int
    clock: str
    warning: str = ""

    @property
    def faster(self) -> bool:
        """Whether the small network won clearly: by the median, and in three of four rounds."""
        return self.ratio > 1 and self.wins >= 0.75

    def __str__(self) -> str:
        verdict = f"{self.ratio:.2f} times as fast" if self.faster else f"not faster on this device (ratio {self.ratio:.2f})"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        text = (
            f"batch {self.batch}: {self.dense_ms} -> {self.small_ms}, {verdict} ({self.clock}, {threads}, {self.rounds} rounds)"
        )
        return f"{text}; {self.warning}" if self.warning else text

    def to_dict(self) -> dict[str, Any]:
        """The measurement as JSON-able values."""
        return asdict(self)


def latency(
    dense: nn.Module,
    small: nn.Module,
    example: Any,
    *,
    batches: Sequence[int] = (1, 64),
    rounds: int = 20,
    threads: int = 1,
) -> tuple[Latency, ...]:
    """Measure both networks, interleaved, at every batch size; one Latency per entry of `batches`.

    example: a tensor, a tuple of positional inputs, a dict of keyword inputs, or (positional, keyword); its first axis is
    repeated or cut to the batch size. CPU time with one thread on a CPU; wall time with more threads or on an accelerator.
    The order of the two networks alternates from round to round, so that a drift of the machine falls on both alike.

    Raises ModelError for a network in training mode and DataError for an example without a batch axis or sizes below 1.
    """
    if not batches or min(batches) < 1 or rounds < 1 or threads < 1:
        raise DataError(f"batches={tuple(batches)}, rounds={rounds} and threads={threads} must all be at least 1")
    for model in (dense, small):
        _check_mode(model)
    with _threads(threads), torch.inference_mode():
        return tuple(_latency(dense, small, example, batch, rounds, threads) for batch in batches)


def milliseconds(
    calls: Sequence[Callable[[], Any]], device: torch.device, *, rounds: int = 5, quiet: bool = True
) -> np.ndarray:
    """(calls,) median milliseconds of each call over rounds, one thread; CPU time on a CPU, wall time on an accelerator.

    Every round makes all the calls, so that a slow spell of the machine falls on all of them alike.
    """
    clock = 0 if device.type == "cpu" else 1
    calls = [_synchronised(call, device) for call in calls]
    taken = np.empty((rounds, len(calls)))
    with _threads(1), torch.inference_mode():
        loops = [_loops(call) for call in track(calls, description="warming up", disable=quiet, transient=True)]
        for row in track(taken, description="timing layers", disable=quiet, transient=True):
            row[:] = [_measure(call, count)[clock] for call, count in zip(calls, loops)]
    return np.median(taken, axis=0) * 1000


def _latency(dense: nn.Module, small: nn.Module, example: Any, batch: int, rounds: int, threads: int) -> Latency:
    first, second = (_call(model, *inputs_of(example, batch, device_of(model))) for model in (dense, small))
    on_cpu = all(device_of(model).type == "cpu" for model in (dense, small))
    return paired(first, second, batch=batch, rounds=rounds, threads=threads, cpu_time=on_cpu and threads == 1)


def paired(
    dense: Callable[[], Any], small: Callable[[], Any], *, batch: int, rounds: int, threads: int = 1, cpu_time: bool = True
) -> Latency:
    """Two calls measured side by side, whatever runs them; the caller sees to their threads. Otherwise as `latency`."""
    calls = dense, small
    loops = max(_loops(call) for call in calls)
    cpu, wall = np.empty((rounds, 2)), np.empty((rounds, 2))
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            cpu[number, which], wall[number, which] = _measure(calls[which], loops)
    times = cpu if cpu_time else wall
    ratios = times[:, 0] / times[:, 1]
    busy = float(np.median(wall / cpu)) if cpu_time else 1.0
    ms = times * 1000
    return Latency(
        batch=batch,
        dense_ms=Timing(minimum=float(ms[:, 0].min()), median=float(np.median(ms[:, 0]))),
        small_ms=Timing(minimum=float(ms[:, 1].min()), median=float(np.median(ms[:, 1]))),
        ratio=float(np.median(ratios)),
        wins=float((ratios > 1).mean()),
        rounds=rounds,
        threads=threads,
        clock="CPU time" if cpu_time else "wall time",
        warning=f"wall time was {busy:.1f} times CPU time: this machine is busy, measure again when it is idle"
        if busy > BUSY
        else "",
    )


def _measure(call: Callable[[], Any], loops: int) -> tuple[float, float]:
    """CPU and wall seconds of one call, averaged over `loops`."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(loops):
        call()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return max(cpu, 1e-9) / loops, max(wall, 1e-9) / loops


def _loops(call: Callable[[], Any]) -> int:
    """Calls per measurement: enough that the clock's own grain does not matter. The first calls also warm the network up."""
    call()
    seconds = median(_measure(call, 1)[1] for _ in range(3))
    return max(1, math.ceil(SHORTEST_MEASUREMENT / seconds))


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any]:
    return _synchronised(lambda: model(*args, **kwargs), device_of(model))


def _synchronised(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    if device.type == "cpu":
        return call

    def synchronised() -> None:
        call()
        torch.accelerator.synchronize()

    return synchronised


def inputs_of(example: Any, batch: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs for so many examples: the rows of `example` (as in `latency`) cut or repeated."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if isinstance(example, torch.Tensor):
        args, kwargs = (example,), {}
    elif isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    elif len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], dict):
        args, kwargs = example
    else:
        args, kwargs = tuple(example), {}
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim and len(v)), None)
    if first is None:
        raise DataError("latency needs an example with a batch axis; give an input tensor of shape (1, ...) or a tuple of them")
    rows = torch.arange(batch) % len(first)

    def resized(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return (value[rows.to(value.device)] if value.ndim and len(value) == len(first) else value).to(device)

    return tuple(resized(v) for v in args), {k: resized(v) for k, v in kwargs.items()}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
