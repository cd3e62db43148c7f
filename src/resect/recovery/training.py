"""One network in training: its steps, how it is judged, and the state from which it goes on."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resect.batches import Batch, device_of, forward, unpack
from resect.errors import DataError, ModelError
from resect.recovery.adapters import attach
from resect.recovery.losses import recovery_loss
from resect.recovery.settings import Recovery

# Diverged: the running loss is so many times that of the first step, or of the least loss that counts.
FAR, LEAST = 10.0, 0.01
SMOOTHING = 0.9


class Training:
    """A copy of the small network that is trained step by step; `dense` and the network it was made from stay as they are."""

    def __init__(self, dense: nn.Module | None, small: nn.Module, recovery: Recovery, rate: float, steps: int, causal: bool):
        self.dense, self.recovery, self.rate, self.steps, self.causal = dense, recovery, rate, steps, causal
        self.model = copy.deepcopy(small)
        self.device = device_of(self.model)
        self.adapted = None if recovery.adapters is None else attach(self.model, recovery.adapters)
        self.optimizer = _optimizer(self.model, recovery)
        self.least = 2 if any(isinstance(module, _BatchNorm) for module in self.model.modules()) else 1
        self.done, self.running = 0, 0.0
        self.first: float | None = None

    def step(self, raw: Any) -> float:
        """One gradient step on a batch; its loss (NaN where the batch is too small for a batch norm and was passed over)."""
        if self.least > 1 and unpack(raw).size < self.least:
            self.done += 1
            return math.nan
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rise_and_fall(self.done, self.steps, self.recovery.warmup)
        _train(self.model)
        loss = self.loss(raw)
        value = float(loss.detach())
        if math.isfinite(value):
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recovery.clip)
            self.optimizer.step()
        self._watch(value)
        self.done += 1
        return value

    @property
    def diverged(self) -> bool:
        """Whether the loss is not finite, or far above that of the first step."""
        return not math.isfinite(self.running) or self.running > FAR * max(self.first or 0.0, LEAST)

    def _watch(self, value: float) -> None:
        if self.first is None:
            self.first = self.running = value
        self.running = SMOOTHING * self.running + (1 - SMOOTHING) * value

    def loss(self, raw: Any) -> Tensor:
        """The loss on a batch as it came."""
        return self._judged(raw)[0]

    def _judged(self, raw: Any) -> tuple[Tensor, Tensor | None, Batch]:
        """The loss, the logits (None where a training step of the user's own made the loss) and the batch taken apart."""
        recovery = self.recovery
        batch = unpack(raw, where="the recovery data")
        with self._precision():
            if recovery.training_step is not None:
                return recovery.training_step(self.model, self.dense, raw), None, batch
            logits = forward(self.model, batch, device=self.device)
            taught = None
            if self.dense is not None and (recovery.loss is not None or recovery.distillation > 0):
                with torch.no_grad():
                    taught = forward(self.dense, batch).to(self.device)
        if recovery.loss is not None:
            return recovery.loss(logits, taught, batch), logits, batch
        loss = recovery_loss(
            logits,
            taught,
            batch,
            temperature=recovery.temperature,
            distillation=recovery.distillation,
            causal=self.causal,
        )
        return loss, logits, batch

    def judge(self, data: Iterable[Any]) -> tuple[float, float]:
        """Mean loss over the examples of some data, and accuracy (NaN without labels of examples), in evaluation mode."""
        self.model.eval()
        total, examples, right, labelled = 0.0, 0, 0, 0
        for raw in data:
            with torch.no_grad():
                loss, logits, batch = self._judged(raw)
            total, examples = total + float(loss) * batch.size, examples + batch.size
            if logits is not None and logits.ndim == 2 and batch.labels is not None:
                right += int((logits.argmax(1).cpu() == batch.labels.cpu()).sum())
                labelled += batch.size
        if not examples:
            raise DataError("val gave no batches; give at least one, as a list or DataLoader that can be read again and again")
        return total / examples, right / labelled if labelled else math.nan

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """bfloat16 products on a GPU that has them; on every GPU, kernels that give the same sums each time."""
        if self.device.type != "cuda":
            yield
            return
        usable = self.recovery.mixed and torch.cuda.is_bf16_supported(including_emulation=False)
        with (
            torch.autocast("cuda", dtype=torch.bfloat16, enabled=usable),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
        ):
            yield

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, beside the data."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": tensors(self.model),
            "optimizer": self.optimizer.state_dict(),
            "random": states,
            "numbers": {"done": self.done, "first": self.first, "running": self.running, "rate": self.rate},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        put(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        for name, value in state["numbers"].items():
            setattr(self, name, value)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that training changes, by name: parameters that require gradients, and buffers that no state dict holds
    too."""
    return {name: tensor.detach().clone() for name, tensor in _changing(model)}


def put(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Set parameters and buffers to those that `tensors` copied."""
    with torch.no_grad():
        for name, tensor in _changing(model):
            tensor.copy_(values[name])


def _changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    yield from model.named_buffers()


def rise_and_fall(step: int, steps: int, warmup: float) -> float:
    """The learning rate at a step as a share of the peak: a linear rise over `warmup` of the steps, then a cosine to 0.

    >>> [round(rise_and_fall(step, 100, 0.05), 3) for step in (0, 4, 5, 52, 99)]
    [0.2, 1.0, 1.0, 0.508, 0.0]
    """
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def _train(model: nn.Module) -> None:
    """Training mode, except for batch norms whose own weights are frozen: their statistics are frozen with them."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None and not module.weight.requires_grad:
            module.eval()


def _optimizer(model: nn.Module, recovery: Recovery) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum; weight decay for matrices and kernels, none for biases and norms."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ModelError(
            f"no parameter of {type(model).__name__} requires a gradient, so there is nothing to recover; call "
            "small.requires_grad_(True), or leave out of it what is to stay"
        )
    half = next((p.dtype for p in trainable if p.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise ModelError(f"weights are {half}, in which small steps are lost; call small.float() first, and convert afterwards")
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": recovery.decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recovery.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=1.0)
