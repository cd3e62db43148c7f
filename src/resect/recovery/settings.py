"""How a recovery is to be done: Recovery."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any, Literal, get_args

from torch import Tensor, nn

from resect.batches import Batch
from resect.errors import GoalError

Optimizer = Literal["adamw", "sgd"]
Loss = Callable[[Tensor, Tensor | None, Batch], Tensor]
TrainingStep = Callable[[nn.Module, nn.Module | None, Any], Tensor]
# Peak learning rate around which the sweep looks, and weight decay (of matrices and kernels only).
DEFAULTS: dict[str, tuple[float, float]] = {"adamw": (1e-3, 1e-2), "sgd": (3e-2, 5e-4)}
SWEEP = (1.0, 0.3, 3.0)


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """One fine-tune: how long, how fast, and towards what.

    epochs: passes over the data, a fraction too; steps: their number in place of it. batch: examples per step, where batches
    join. learning_rate: the peak; a tuple is swept; None sweeps 1x, .3x and 3x of 1e-3 (AdamW) or .03 (SGD with momentum .9),
    each for a tenth of the steps. temperature: of the distillation. distillation: its share of the loss in [0, 1], the rest is
    cross-entropy. weight_decay: None is .01 (AdamW) or 5e-4 (SGD). clip: largest norm of the gradient. warmup: share of the
    steps over which the rate rises, before a cosine to 0. mixed: bfloat16 on a GPU that has it. adapters: train only low-rank
    adapters of this rank (LoRA; 8 or 16, say) and merge them at the end, which spares gradients and optimizer states of large
    networks; needs the extra `adapters`.

    loss: `(logits, the dense network's logits or None, batch) -> scalar` in place of the loss above. training_step:
    `(small, dense or None, batch as it came) -> scalar`, which runs the networks itself.

    Raises GoalError for values out of range, for both `steps` and `epochs`, and for adapters where peft is not installed.

    >>> Recovery(steps=60, learning_rate=1e-3).rates
    (0.001,)
    """

    epochs: float | None = None
    steps: int | None = None
    batch: int = 64
    learning_rate: float | tuple[float, ...] | None = None
    temperature: float = 2.0
    distillation: float = 0.5
    optimizer: Optimizer = "adamw"
    weight_decay: float | None = None
    clip: float = 1.0
    warmup: float = 0.05
    mixed: bool = True
    adapters: int | None = None
    loss: Loss | None = None
    training_step: TrainingStep | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise GoalError(f"Recovery(epochs={self.epochs}, steps={self.steps}) names its length twice; leave one of them out")
        if self.loss is not None and self.training_step is not None:
            raise GoalError("Recovery takes a loss or a training_step of your own, not both; leave one of them out")
        if self.optimizer not in get_args(Optimizer):
            raise GoalError(f"there is no optimizer {self.optimizer!r}; write one of {', '.join(get_args(Optimizer))}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and low <= value <= high):
                raise GoalError(f"Recovery({name}={value!r}) must be a number from {low:g} to {high:g}")
        if self.adapters is not None and not (
            isinstance(self.adapters, int) and _is_number(self.adapters) and self.adapters > 0
        ):
            raise GoalError(f"Recovery(adapters={self.adapters!r}) must be a whole number of at least 1, or None; write 16")
        if self.adapters is not None and find_spec("peft") is None:
            raise GoalError(
                f'Recovery(adapters={self.adapters}) needs peft: pip install "resect[adapters]", or leave it out to train '
                "all weights"
            )
        for rate in self.rates:
            if not _is_number(rate) or not 0 < rate < math.inf:
                raise GoalError(f"Recovery(learning_rate={self.learning_rate!r}) must be above 0; write 1e-3, for example")

    @property
    def rates(self) -> tuple[float, ...]:
        """The peak learning rates to try, in that order; one where it is given."""
        if self.learning_rate is None:
            return tuple(factor * DEFAULTS[self.optimizer][0] for factor in SWEEP)
        return self.learning_rate if isinstance(self.learning_rate, tuple) else (self.learning_rate,)

    @property
    def decay(self) -> float:
        return DEFAULTS[self.optimizer][1] if self.weight_decay is None else self.weight_decay

    def length(self, per_epoch: int) -> int:
        """Steps in all, for data of so many batches per epoch."""
        if self.steps is not None:
            return self.steps
        return max(1, round((3.0 if self.epochs is None else self.epochs) * per_epoch))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-able values; functions by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: getattr(v, "__qualname__", type(v).__name__) if callable(v) else v for name, v in values.items()}


_RANGES = (
    ("epochs", 1e-9, math.inf),
    ("steps", 1, math.inf),
    ("batch", 1, math.inf),
    ("temperature", 1e-3, math.inf),
    ("distillation", 0, 1),
    ("weight_decay", 0, math.inf),
    ("clip", 1e-12, math.inf),
    ("warmup", 0, 1),
)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
