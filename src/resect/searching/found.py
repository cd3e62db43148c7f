"""What a search hands back: every trial, and the network that was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from resect.plan import Cost, Plan
from resect.searching.certificate import Certificate
from resect.searching.floor import Budget, Floor


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One candidate that the search judged.

    kept: units that stay per group. accuracy: share in [0, 1] of the `examples` it was shown on the search split. above:
    whether it meets the floor there. stopped: the race was decided before all examples were shown. passes: its cost in forward
    passes of the dense network over the whole search split.
    """

    number: int
    allocation: str
    kept: Mapping[str, int]
    cost: Cost
    accuracy: float
    above: bool
    examples: int
    stopped: bool
    passes: float
    seconds: float
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """The trial as JSON-able values."""
        return asdict(self) | {"kept": dict(self.kept)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """The outcome of a search.

    model: the delivered network, an ordinary smaller module (the safest one tried when the floor could not be certified).
    certificate: None without a certify split. frozen: digests of the networks that were fixed before the certify split was
    opened, in the order of the walk. search_accuracy: NaN where a budget was fitted without labelled data. passes: what the
    search cost, in forward passes of the dense network over the search split. repaired: method per reader. notes: what a user
    should know, in sentences.
    """

    model: nn.Module
    plan: Plan
    goal: Floor | Budget
    trials: tuple[Trial, ...]
    certificate: Certificate | None
    frozen: tuple[str, ...]
    passes: float
    cost: Cost
    dense_cost: Cost
    search_accuracy: float
    dense_search_accuracy: float
    repaired: Mapping[str, str]
    seconds: float
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def floor(self) -> Floor | None:
        """The promise on accuracy; None where the goal was a budget."""
        return self.goal if isinstance(self.goal, Floor) else None

    @property
    def certified(self) -> bool:
        """Whether the floor holds with the confidence asked for."""
        return self.certificate is not None and self.certificate.passed

    def to_dict(self) -> dict[str, Any]:
        """Everything but the network, as JSON-able values."""
        return {
            "goal": self.goal.to_dict(),
            "certified": self.certified,
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
            "kept": self.plan.kept,
            "units": {group.name: group.units for group in self.plan.anatomy.groups},
            "cost": asdict(self.cost),
            "dense_cost": asdict(self.dense_cost),
            "search_accuracy": self.search_accuracy,
            "dense_search_accuracy": self.dense_search_accuracy,
            "passes": self.passes,
            "seconds": self.seconds,
            "seed": self.seed,
            "frozen": list(self.frozen),
            "repaired": dict(self.repaired),
            "trials": [trial.to_dict() for trial in self.trials],
            "notes": list(self.notes),
        }
