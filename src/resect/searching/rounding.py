"""Counts of units that make layers fast: which ones `round_to` lets an allocation choose."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from resect.anatomy import Anatomy, Group
from resect.errors import GoalError
from resect.plan import Plan, count_step, valid_count
from resect.scoring import Scores

RoundTo = Literal["auto"] | int
LINEAR, WIDE_LINEAR, WIDE = 8, 128, 1024
ROUNDED = ("hidden", "stream")


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounding:
    """The counts an allocation may choose, per group: multiples of a step, and all units. Without steps: every valid count.

    It binds the search, not the plan: a plan with any other valid count can be cut all the same.
    """

    steps: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, anatomy: Anatomy, round_to: RoundTo | None) -> Rounding:
        """Steps of every group for `round_to`: a multiple that widths should have, or "auto".

        "auto": channels of convolutions to 16 (8 where the CPU has no AVX-512), linear widths to 8, those of 1024 and more (the
        MLPs of language models) to 128; to half of that where a group holds the multiple only once, because what reads it
        still gains. Heads and experts are never rounded, and a group that is narrower than its multiple keeps whatever is
        valid. Raises GoalError for anything else.

        >>> from resect.anatomy import dissect
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 60), torch.nn.ReLU(), torch.nn.Linear(60, 2)).eval()
        >>> anatomy = dissect(model, torch.zeros(2, 4))
        >>> [Rounding.of(anatomy, "auto").up(anatomy.groups[0], wanted) for wanted in (1, 9, 57)]
        [8, 16, 60]
        """
        check_round_to(round_to)
        if round_to is None:
            return cls()
        convolved = {product.tensor for product in anatomy.contractions if "conv" in product.op}
        steps = {}
        for group in anatomy.groups:
            multiple = _fast_multiple(group, convolved) if round_to == "auto" else int(round_to)
            step = int(np.lcm(multiple // np.gcd(multiple, _positions(group)), count_step(group)))
            if group.kind in ROUNDED and step <= group.units:
                steps[group.name] = step
        return cls(steps=steps)

    def step(self, group: Group) -> int:
        """The counts that may be chosen are the multiples of this number, and all units."""
        return self.steps.get(group.name, count_step(group))

    def up(self, group: Group, wanted: float) -> int:
        """The smallest count that may be chosen and is at least `wanted`."""
        return valid_count(group, wanted, self.step(group))

    def counts(self, group: Group) -> list[int]:
        """Every count that may be chosen, rising."""
        return sorted({*range(self.step(group), group.units, self.step(group)), group.units})

    def top(self, scores: Scores, counts: Mapping[str, float]) -> Plan:
        """The plan that keeps the best units of every group, so many rounded up (all where a group is not named)."""
        rounded = {group.name: self.up(group, counts.get(group.name, group.units)) for group in scores.anatomy.groups}
        return Plan.top(scores.anatomy, scores.values, rounded)


FREE = Rounding()


def check_round_to(round_to: object) -> None:
    """Raise GoalError unless it is None, "auto" or a whole number above 0."""
    number = isinstance(round_to, numbers.Integral) and not isinstance(round_to, bool)
    if round_to is not None and round_to != "auto" and not (number and int(round_to) > 0):  # type: ignore[call-overload]
        raise GoalError(
            f'round_to={round_to!r} is neither "auto" nor a whole number above 0; write round_to="auto", or round_to=8 for '
            "widths in multiples of 8"
        )


def _fast_multiple(group: Group, convolved: set[str | None]) -> int:
    if any(part.tensor in convolved for part in (*group.writers, *group.readers)):
        multiple = conv_multiple()
    else:
        multiple = WIDE_LINEAR if group.units >= WIDE else LINEAR
    return multiple // 2 if multiple <= group.units < 2 * multiple else multiple


def conv_multiple() -> int:
    """Channels that the CPU's convolutions handle at once: 16 with AVX-512, else 8."""
    return 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8


def _positions(group: Group) -> int:
    """How many positions of a width one unit owns, where it owns fewest (a flattened channel owns many of its reader's)."""
    return min((part.index.shape[1] for part in (*group.writers, *group.readers) if part.blocks == 1), default=1)
