"""What specialising hands back: Specialised, one specialist with its promise, and Specialists, one for each class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from resect.errors import GoalError
from resect.plan import Cost, Plan
from resect.searching import Certificate, Floor, Trial
from resect.specializing.judging import Rates
from resect.specializing.overlap import Overlap
from resect.specializing.question import Question
from resect.specializing.specialist import Panel, Specialist


def removed_by(plan: Plan, output: str) -> float:
    """Share of the units that a plan removes, in [0, 1], without the group of output rows."""
    masks = [mask for name, mask in plan.keep.items() if name != output]
    return 1 - sum(int(mask.sum()) for mask in masks) / max(sum(len(mask) for mask in masks), 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Specialised:
    """One specialist, and what was promised and measured of it.

    model: the specialist, an ordinary module (the safest one tried where the promise could not be certified). plan: of the
    dense network, output rows included. searched: the leanest network prepared that keeps the promises as measured on the
    search split, and its plan; it has no certificate. goal: the floor on its recall (several classes: the accuracy among them).
    false_positives: the cap on the share of other examples accepted, None where nothing is rejected. search, certify: its rates
    on these splits, beside the dense network's on the same question. frozen: digests of the networks that were fixed before the
    certify split was opened. seconds: of its own search, without what all specialists share.
    """

    question: Question
    model: Specialist
    plan: Plan
    searched: tuple[Specialist, Plan]
    goal: Floor
    false_positives: Floor | None
    certificate: Certificate
    search: Rates
    dense_search: Rates
    certify: Rates
    dense_certify: Rates
    trials: tuple[Trial, ...]
    frozen: tuple[str, ...]
    cost: Cost
    dense_cost: Cost
    output: str
    method: str
    seconds: float
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def certified(self) -> bool:
        """Whether all promises hold with the confidence asked for."""
        return self.certificate.passed

    @cached_property
    def kept(self) -> dict[str, int]:
        """Hidden units that stay, per group (output rows are not units)."""
        return {name: count for name, count in self.plan.kept.items() if name != self.output}

    @property
    def removed(self) -> float:
        """Share of all hidden units that are gone, in [0, 1]."""
        return removed_by(self.plan, self.output)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the network, as JSON-able values."""
        return {
            "classes": [self.question.class_name(c) for c in self.question.own],
            "other": self.question.other,
            "threshold": float(self.model.threshold),
            "goal": self.goal.to_dict(),
            "false_positives": None if self.false_positives is None else self.false_positives.to_dict(),
            "certified": self.certified,
            "certificate": self.certificate.to_dict(),
            "removed": self.removed,
            "kept": self.kept,
            "cost": vars(self.cost),
            "dense_cost": vars(self.dense_cost),
            "cost_share": self.cost.share_of(self.dense_cost),
            "rates": {name: getattr(self, name).to_dict() for name in ("search", "dense_search", "certify", "dense_certify")},
            "method": self.method,
            "frozen": list(self.frozen),
            "trials": [trial.to_dict() for trial in self.trials],
            "seconds": self.seconds,
            "seed": self.seed,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        share = self.cost.share_of(self.dense_cost)
        return (
            f"{self.question.name}: {self.removed:.1%} of the hidden units removed, {share['macs']:.1%} of MACs kept\n"
            f"{self.certificate}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Specialists:
    """One specialist for each class of a network; index by class number or name.

    shared_seconds: what was done once for all of them.
    """

    all: tuple[Specialised, ...]
    shared_seconds: float

    def __iter__(self) -> Iterator[Specialised]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, wanted: int | str) -> Specialised:
        for one in self.all:
            label = one.question.own[0]
            if wanted in (label, one.question.class_name(label)):
                return one
        known = ", ".join(one.question.name for one in self.all)
        raise GoalError(f"there is no specialist for class {wanted!r}; there are {known}")

    @property
    def certified(self) -> bool:
        """Whether every specialist's promise is certified."""
        return all(one.certified for one in self.all)

    def panel(self) -> Panel:
        """All of them together, answering the full question."""
        return Panel([one.model for one in self.all])

    def overlap(self) -> Overlap:
        """Which units serve one class, and which serve all."""
        return Overlap.of({one.question.name: one.plan for one in self.all}, self.all[0].output)

    def to_dict(self) -> dict[str, Any]:
        return {
            "specialists": [one.to_dict() for one in self.all],
            "overlap": self.overlap().to_dict(),
            "shared_seconds": self.shared_seconds,
        }


def as_mapping(result: Specialised | Specialists) -> Mapping[str, Specialised]:
    """Specialists by name, whether there are several or one."""
    return {one.question.name: one for one in (result if isinstance(result, Specialists) else (result,))}
