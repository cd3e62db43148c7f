"""score(): how much every unit matters; the registry of scorers and what all of them share."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np

from resect.anatomy import Anatomy
from resect.errors import ScoreError
from resect.tracing import Evidence, Trace

Scorer = Callable[[Evidence], np.ndarray]
S = TypeVar("S", bound=Scorer)
DEAD_VARIANCE = 1e-12
# Sums are taken in single precision: a variance this small beside the mean square is rounding, and the unit constant.
ROUNDING = 1e-6
SCORERS: dict[str, Scorer] = {}


@overload
def scorer(function: S, /) -> S: ...
@overload
def scorer(**needs: Any) -> Callable[[S], S]: ...
def scorer(function: Any = None, /, **needs: Any) -> Any:
    """Register a scorer under its name, so that `score(trace, "name")` and the command line find it.

    `@scorer`, or `@scorer(gradients=True)` with what a trace must be asked for, so that `prune` asks for it (see `needs`).
    """
    if function is None:
        return lambda function: scorer(_needing(function, needs))
    SCORERS[function.__name__] = function
    return function


def _needing(function: Any, what: dict[str, Any]) -> Any:
    function.needs = what
    return function


def needs(*scorers: str | Scorer) -> dict[str, Any]:
    """What a trace must be asked for so that all of these scorers can be used: keyword arguments of `trace`.

    Raises ScoreError for an unknown name.

    >>> needs("magnitude", "taylor")
    {'gradients': True}
    """
    wanted: dict[str, Any] = {}
    for each in scorers:
        for name, value in getattr(_resolve(each)[1], "needs", {}).items():
            wanted[name] = max(value, wanted.get(name, value))
    return wanted


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """How much every unit matters, higher = keep.

    values: (units,) per group, over all classes. by_class: (classes, units) per group where the scorer tells classes apart.
    trace: the evidence, from which a search repairs any candidate without touching data again.
    """

    scorer: str
    trace: Trace
    values: Mapping[str, np.ndarray]
    by_class: Mapping[str, np.ndarray]

    @property
    def anatomy(self) -> Anatomy:
        return self.trace.anatomy

    def normalised(self) -> dict[str, np.ndarray]:
        """Scores divided by their group's root mean square, so that one threshold can be used across groups."""
        return {name: v / (np.sqrt(np.mean(np.square(v))) or 1.0) for name, v in self.values.items()}

    def order(self, name: str) -> np.ndarray:
        """Units of a group, most important first; ties by index."""
        return np.argsort(-self.values[name], kind="stable")


def score(
    trace: Trace,
    scorer: str | Scorer = "firing_rate",
    *,
    classes: tuple[int, ...] | None = None,
    reduce: str = "max",
    seed: int = 0,
) -> Scores:
    """Score every unit of every group from a trace.

    scorer: a name from SCORERS or a function from Evidence to (units,) or (classes, units), finite, higher = keep.
    classes: the classes that matter (default all). reduce: "max" or "mean" over classes. Units that are dead or constant
    (variance below 1e-12 of the group's largest) score lowest under every scorer but `random`; where all are constant, as on
    a single example, those do that are always 0.

    Raises ScoreError for an unknown name (with the nearest), missing evidence, and a scorer that returns another shape or
    values that are not finite.
    """
    name, function = _resolve(scorer)
    if reduce not in ("max", "mean"):
        raise ScoreError(f'reduce={reduce!r} is not a way to join classes; write "max" or "mean"')
    values, by_class = {}, {}
    for group in trace.anatomy.groups:
        evidence = trace.evidence(group, seed=seed)
        result = _checked(np.asarray(function(evidence), dtype=np.float64), evidence, name)
        if result.ndim == 2:
            by_class[group.name] = result
            rows = result if classes is None else result[list(classes)]
            result = rows.max(0) if reduce == "max" else rows.mean(0)
        values[group.name] = result if name == "random" else _dead_last(result, evidence)
    return Scores(scorer=name, trace=trace, values=values, by_class=by_class)


def _resolve(scorer: str | Scorer) -> tuple[str, Scorer]:
    if callable(scorer):
        return getattr(scorer, "__name__", "scorer"), scorer
    if scorer not in SCORERS:
        near = difflib.get_close_matches(scorer, SCORERS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ScoreError(f"there is no scorer {scorer!r}{hint} Known: {', '.join(sorted(SCORERS))}")
    return scorer, SCORERS[scorer]


def _checked(result: np.ndarray, evidence: Evidence, name: str) -> np.ndarray:
    expected = (evidence.units,), (len(evidence.examples), evidence.units)
    if result.shape not in expected:
        raise ScoreError(
            f"scorer {name} gave shape {result.shape} for group {evidence.group}; return {' or '.join(map(str, expected))}"
        )
    if not np.isfinite(result).all():
        raise ScoreError(
            f"scorer {name} gave {(~np.isfinite(result)).sum()} values that are not finite for group {evidence.group}"
        )
    return result


def _dead_last(values: np.ndarray, evidence: Evidence) -> np.ndarray:
    if not evidence.readers:
        return values
    variance = evidence.over_readers("variance")
    square = np.max([np.average(r.mean_square, axis=0, weights=evidence.examples) for r in evidence.readers], axis=0)
    dead = variance <= np.maximum(DEAD_VARIANCE * variance.max(), ROUNDING * square)
    if dead.all():
        # On one example every unit is constant: only those that never fire are known to do nothing.
        dead = square == 0
    return np.where(dead, values.min() - 1.0, values)
