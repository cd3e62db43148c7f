"""recover(): one fine-tune of a cut network towards the dense one."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from resect.batches import device_of, unpack
from resect.recovery.adapters import merge
from resect.recovery.checkpoints import read, write
from resect.recovery.feeding import Feed, feed, fingerprint
from resect.recovery.losses import is_causal
from resect.recovery.settings import Recovery
from resect.recovery.training import Training, put, tensors
from resect.surgery import state_digest
from resect.tracing.trace import check_ready

CHECKS = 10
PROBE_SHARE, LEAST_PROBE, MOST_PROBE = 0.1, 10, 200
SECONDS_BETWEEN_CHECKPOINTS = 60.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """The network after so many steps. loss: mean over the steps since the check before (NaN at step 0). val_loss,
    val_accuracy: on the val data, NaN where there are none. learning_rate: the peak of this run."""

    step: int
    loss: float
    val_loss: float
    val_accuracy: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Recovered:
    """The outcome of a recovery.

    model: the best network by the val data (highest accuracy, then lowest loss), the one that came in included; without val
    data the last one. best: its step. tried: the loss that each peak learning rate of the sweep ended with. diverged: it was
    stopped early. notes: what a user should know, in sentences.
    """

    model: nn.Module
    history: tuple[Check, ...]
    learning_rate: float
    tried: dict[float, float]
    steps: int
    best: int
    diverged: bool
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the network, as JSON-able values."""
        return {
            "history": [{k: None if v != v else v for k, v in asdict(check).items()} for check in self.history],
            "learning_rate": self.learning_rate,
            "tried": {str(rate): loss if math.isfinite(loss) else None for rate, loss in self.tried.items()},
            "steps": self.steps,
            "best": self.best,
            "diverged": self.diverged,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def recover(
    dense: nn.Module | None,
    small: nn.Module,
    data: Iterable[Any],
    recovery: Recovery | None = None,
    *,
    val: Iterable[Any] | None = None,
    work: str | os.PathLike[str] | None = None,
    quiet: bool = True,
) -> Recovered:
    """Fine-tune a cut network once, and return a new network; `dense` and `small` stay as they are.

    dense: the network it was cut from, to learn from; None trains on the labels alone (a network of fresh weights, too). data:
    batches; without labels it is distillation alone; for causal language models the next token is the label. A DataLoader keeps
    its own order and augmentation; anything else is drawn anew each epoch. val: batches of the search split, to choose the best
    network by. work: a directory for checkpoints; called again after it was killed, the same call ends with the same bytes.

    On a GPU bfloat16 is used where there is such hardware, and same bytes are not promised. A recovery that diverges is an
    outcome: it stops, keeps the best network so far and says so. Raises DataError for data that cannot be used, ModelError for
    networks in training mode, in half precision or with nothing to train, and FileError for a checkpoint of another run.

    Sources: Hinton et al. 2015, arXiv 1503.02531; Loshchilov & Hutter, arXiv 1608.03983 and 1711.05101.
    """
    started = time.monotonic()
    recovery = recovery or Recovery()
    for network in (dense, small):
        if network is not None:
            check_ready(network)
    feeder = feed(data, recovery.batch, recovery.seed)
    run = _Run(
        dense=dense,
        small=small,
        recovery=recovery,
        feed=feeder,
        val=None if val is None else list(val),
        steps=recovery.length(feeder.per_epoch),
        causal=recovery.training_step is None and is_causal(small if dense is None else dense, unpack(next(feeder.start(0)))),
        path=None if work is None else Path(work) / "recovery.pt",
    )
    device = device_of(small)
    # The caller's random states come back as they were.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _progress(quiet) as progress:
        run.resume()
        run.sweep(progress)
        run.train(progress)
    return run.outcome(time.monotonic() - started)


@dataclass(kw_only=True, eq=False)
class _Run:
    """One recovery under way: what is known so far, and how it is kept."""

    dense: nn.Module | None
    small: nn.Module
    recovery: Recovery
    feed: Feed
    val: list[Any] | None
    steps: int
    causal: bool
    path: Path | None
    tried: dict[float, float] = field(default_factory=dict)
    history: list[Check] = field(default_factory=list)
    best: tuple[int, tuple[float, ...], dict[str, Tensor]] | None = None
    losses: list[float] = field(default_factory=list)
    stopped: str = ""
    saved: float = 0.0
    training: Training | None = None
    restored: dict[str, Any] | None = None

    def new(self, rate: float, steps: int) -> Training:
        torch.manual_seed(self.recovery.seed)
        return Training(self.dense, self.small, self.recovery, rate, steps, self.causal)

    def sweep(self, progress: Progress) -> None:
        """Try every rate that was not tried yet, each on a short run of its own with the same batches and random numbers."""
        rates = self.recovery.rates
        if len(rates) == 1 or self.restored is not None:
            return
        steps = min(self.steps, max(LEAST_PROBE, round(PROBE_SHARE * self.steps)), MOST_PROBE)
        task = progress.add_task("learning rates", total=steps * len(rates), loss="")
        for rate in rates:
            if rate not in self.tried:
                self.tried[rate] = self._probe(rate, steps, progress, task)
                self.save()
        progress.remove_task(task)

    def _probe(self, rate: float, steps: int, progress: Progress, task: TaskID) -> float:
        """The loss that a short run at one rate ends with: on val, else over its last quarter; infinite where it diverges."""
        training, losses = self.new(rate, steps), []
        for raw in self.feed.start(0):
            losses.append(training.step(raw))
            progress.update(task, advance=1, loss=f"{rate:.2g}: {losses[-1]:.4g}")
            if training.diverged:
                return math.inf
            if training.done == steps:
                break
        loss = mean(losses[-max(1, steps // 4) :]) if self.val is None else training.judge(self.val)[0]
        return loss if math.isfinite(loss) else math.inf

    def train(self, progress: Progress) -> None:
        rate = self.rate
        if not math.isfinite(self.tried.get(rate, 0.0)):
            self.stopped = (
                f"Recovery diverged at every learning rate tried ({', '.join(map(str, self.tried))}): name smaller ones."
            )
            return
        training = self.training = self.new(rate, self.steps)
        if self.restored is not None:
            training.restore(self.restored)
        else:
            self.check(math.nan)
        task = progress.add_task("recovering", total=self.steps, completed=training.done, loss="")
        batches = self.feed.start(training.done)
        while training.done < self.steps and not self.stopped:
            self.losses.append(training.step(next(batches)))
            progress.update(task, advance=1, loss=f"loss {self.losses[-1]:.4g}")
            if training.diverged:
                self.stopped = (
                    f"Recovery diverged at step {training.done} of {self.steps}: its loss was {training.running:.3g}, and "
                    f"{training.first:.3g} in the first. The best network until then was kept; name a smaller learning rate."
                )
            elif training.done % self.every == 0 or training.done == self.steps:
                self.check(mean(self.losses))
                self.losses = []
                self.save()
            elif time.monotonic() - self.saved > SECONDS_BETWEEN_CHECKPOINTS:
                self.save()
        if self.stopped:
            self.save()

    @property
    def rate(self) -> float:
        return min(self.recovery.rates, key=lambda rate: self.tried.get(rate, 0.0))

    @property
    def every(self) -> int:
        return max(1, self.steps // CHECKS)

    def check(self, loss: float) -> None:
        """Judge the network as it is now, and keep it where it is the best so far."""
        assert self.training is not None
        training = self.training
        val_loss, accuracy = (math.nan, math.nan) if self.val is None else training.judge(self.val)
        self.history.append(
            Check(step=training.done, loss=loss, val_loss=val_loss, val_accuracy=accuracy, learning_rate=training.rate)
        )
        judged = loss if self.val is None else val_loss
        value = (accuracy if accuracy == accuracy else 0.0, -judged if math.isfinite(judged) else -math.inf)
        if self.best is None or value >= self.best[1]:
            self.best = (training.done, value, tensors(training.model))

    def outcome(self, seconds: float) -> Recovered:
        step, values = 0, tensors(self.small)
        if self.training is not None and self.val is None and not self.stopped:
            step, values = self.training.done, tensors(self.training.model)
        elif self.best is not None:
            step, _, values = self.best
        model = copy.deepcopy(self.small) if self.training is None else self.training.model
        put(model, values)
        if self.training is not None and self.training.adapted is not None:
            model = merge(self.training.adapted, self.small)
        for parameter in model.parameters():
            parameter.grad = None
        notes = [self.stopped] if self.stopped else []
        if not self.stopped and self.val is not None and step == 0:
            notes.append("No step of the recovery was better on the val data than the network that came in, which is returned.")
        return Recovered(
            model=model.eval(),
            history=tuple(self.history),
            learning_rate=self.rate,
            tried=dict(self.tried),
            steps=0 if self.training is None else self.training.done,
            best=step,
            diverged=bool(self.stopped),
            seconds=seconds,
            notes=tuple(notes),
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes this run what it is."""
        return {
            "settings": repr(sorted(self.recovery.to_dict().items())),
            "small network": state_digest(self.small),
            "dense network": "" if self.dense is None else state_digest(self.dense),
            "data": fingerprint(self.feed),
            "val data": 0 if self.val is None else len(self.val),
        }

    def save(self) -> None:
        if self.path is None:
            return
        assert self.training is not None or self.tried
        state = {
            "run": self.identity,
            "tried": [list(pair) for pair in self.tried.items()],
            "history": [asdict(check) for check in self.history],
            "best": None if self.best is None else list(self.best),
            "losses": self.losses,
            "stopped": self.stopped,
            "training": None if self.training is None else self.training.state(),
        }
        write(self.path, state)
        self.saved = time.monotonic()

    def resume(self) -> None:
        state = None if self.path is None else read(self.path, self.identity)
        self.saved = time.monotonic()
        if state is None:
            return
        self.tried = dict(state["tried"])
        self.history = [Check(**check) for check in state["history"]]
        if state["best"] is not None:
            step, value, values = state["best"]
            self.best = (step, tuple(value), values)
        self.losses, self.stopped, self.restored = state["losses"], state["stopped"], state["training"]


def mean(losses: list[float]) -> float:
    """Mean of the losses of steps, without those that were passed over."""
    counted = [loss for loss in losses if loss == loss]
    return sum(counted) / len(counted) if counted else math.nan


def _progress(quiet: bool) -> Progress:
    """Steps, time left and loss, where somebody watches."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    silent = quiet or not console.is_terminal
    return Progress(*columns, TextColumn("{task.fields[loss]}"), console=console, transient=True, disable=silent)
