"""What the classes use: units that serve one class and units that serve all, how selective units are, and what a class loses
without its most selective ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from resect.errors import DataError
from resect.evaluation import evaluate
from resect.plan import Plan
from resect.surgery import masked
from resect.tracing import Trace


@dataclass(frozen=True, kw_only=True, eq=False)
class Overlap:
    """Units kept by several specialists of one network.

    names: of the specialists. kept: (specialists, units) bool, over all groups in order. shared: (specialists, specialists)
    share of the row's units that the column keeps too.
    """

    names: tuple[str, ...]
    kept: np.ndarray

    @classmethod
    def of(cls, plans: Mapping[str, Plan], output: str) -> Overlap:
        """output: name of the group of output rows, which are no hidden units."""
        masks = [np.concatenate([mask for name, mask in plan.keep.items() if name != output]) for plan in plans.values()]
        return cls(names=tuple(plans), kept=np.stack(masks))

    @property
    def shared(self) -> np.ndarray:
        both = self.kept.astype(float) @ self.kept.T
        return both / np.maximum(self.kept.sum(1), 1)[:, None]

    @property
    def expected(self) -> np.ndarray:
        """(specialists, specialists) what `shared` would be if every specialist drew its units at random."""
        return np.broadcast_to(self.kept.mean(1), (len(self.names), len(self.names)))

    @property
    def by_users(self) -> np.ndarray:
        """(specialists + 1,) number of units kept by so many specialists, from none to all."""
        return np.bincount(self.kept.sum(0), minlength=len(self.names) + 1)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "names": list(self.names),
            "shared": self.shared.round(4).tolist(),
            "units_by_users": self.by_users.tolist(),
        }

    def __str__(self) -> str:
        counts = self.by_users
        one, every, used = counts[1], counts[-1], counts[1:].sum()
        return (
            f"{used} of {counts.sum()} units serve at least one of {len(self.names)} classes; {one} serve one class alone, "
            f"{every} serve all"
        )


def selectivity(trace: Trace) -> dict[str, np.ndarray]:
    """(classes, units) per group: how much stronger a unit responds to one class than to the others, in [-1, 1].

    (m_c - m_rest) / (m_c + m_rest) of root mean squares, 1 where a unit responds to class c alone and 0 where it does not tell
    it apart. Source: the class selectivity index of Morcos et al. 2018, arXiv 1803.06959, taken for every class.

    Raises DataError for a trace of unlabelled data.
    """
    if not trace.labelled or trace.classes < 2:
        raise DataError("selectivity compares classes, and the trace was made on data without labels; trace (inputs, labels)")
    found = {}
    for group in trace.anatomy.groups:
        strength = np.sqrt(trace.evidence(group).over_readers("mean_square"))
        rest = (strength.sum(0) - strength) / (trace.classes - 1)
        total = strength + rest
        found[group.name] = np.divide(strength - rest, total, out=np.zeros_like(total), where=total > 0)
    return found


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """Accuracy on one class and on all others, whole and without the units most selective for the class; in [0, 1]."""

    label: int
    own_before: float
    own_after: float
    others_before: float
    others_after: float


def collapse(model: nn.Module, trace: Trace, data: Sequence[Any], *, share: float = 0.1) -> tuple[Collapse, ...]:
    """The sanity check of selectivity: every class without the `share` of units of each group most selective for it.

    Units are masked, nothing is repaired. data: labelled batches. Raises DataError where the trace or the data have no labels.
    """
    selective, whole = selectivity(trace), evaluate(model, data)
    found = []
    for label in sorted(whole.per_class):
        scores = {name: -values[label] for name, values in selective.items()}
        counts = {group.name: (1 - share) * group.units for group in trace.anatomy.groups}
        with masked(model, Plan.top(trace.anatomy, scores, counts)) as without:
            after = evaluate(without, data)
        own = whole.labels == label
        found.append(
            Collapse(
                label=label,
                own_before=whole.select(own).accuracy,
                own_after=after.select(own).accuracy,
                others_before=float(whole.correct[~own].mean()),
                others_after=float(after.correct[~own].mean()),
            )
        )
    return tuple(found)
