"""What the user asks for: Floor, the promise on accuracy, and Budget, the cost that may remain."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from resect.errors import GoalError

Goal = TypeVar("Goal", "Floor", "Budget")


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The promise: accuracy at least so much, or at most so far below the dense network.

    accuracy: share in [0, 1]. drop: share in [0, 1); .01 is one point. Exactly one of the two. delta: the probability in (0, 1)
    with which a certificate may be wrong. label: with it, the promise counts the examples of this class only, so that a list
    of floors can promise every class its own recall.

    Raises GoalError for anything else, with what to write instead.

    >>> print(Floor(accuracy=0.95))
    accuracy at least 95 %
    >>> print(Floor(drop=0.01))
    at most 1 point below the dense network
    """

    accuracy: float | None = None
    drop: float | None = None
    delta: float = 0.05
    label: int | None = None

    def __post_init__(self) -> None:
        if (self.accuracy is None) == (self.drop is None):
            given = "neither" if self.accuracy is None else f"accuracy={self.accuracy} and drop={self.drop}"
            raise GoalError(
                f"a floor promises one thing and was given {given}; write Floor(accuracy=0.95) or Floor(drop=0.01), "
                "and a list of floors for several promises"
            )
        if self.accuracy is not None:
            _check_number("Floor", "accuracy", self.accuracy)
            if not 0 <= self.accuracy <= 1:
                raise GoalError(
                    f"Floor(accuracy={self.accuracy}) is not a share in [0, 1]; {_as_share('accuracy', self.accuracy)}"
                )
        if self.drop is not None:
            _check_number("Floor", "drop", self.drop)
            if not 0 <= self.drop < 1:
                raise GoalError(
                    f"Floor(drop={self.drop}) is not a share in [0, 1), where 0.01 is one point; {_as_share('drop', self.drop)}"
                )
        _check_number("Floor", "delta", self.delta)
        if not 0 < self.delta < 1:
            raise GoalError(f"Floor(delta={self.delta}) is not a probability in (0, 1); write delta=0.05 to be 95 % sure")
        if self.label is not None and (
            isinstance(self.label, bool) or not isinstance(self.label, numbers.Integral) or self.label < 0
        ):
            raise GoalError(f"Floor(label={self.label!r}) is not a class index; write label=3 for class 3")

    def __str__(self) -> str:
        where = "" if self.label is None else f" on class {self.label}"
        if self.accuracy is not None:
            return f"accuracy at least {_number(self.accuracy * 100)} %{where}"
        assert self.drop is not None
        if self.drop == 0:
            return f"not below the dense network{where}"
        points = _number(self.drop * 100)
        return f"at most {points} {_unit('drop', float(points))} below the dense network{where}"

    def threshold(self, dense_accuracy: float) -> float:
        """The accuracy in [0, 1] that a network must reach beside a dense network of `dense_accuracy`."""
        if self.accuracy is not None:
            return self.accuracy
        assert self.drop is not None
        return dense_accuracy - self.drop

    def to_dict(self) -> dict[str, Any]:
        """The floor as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Floor:
        """The floor that `to_dict` wrote. Raises GoalError for unknown names."""
        return _from_dict(cls, values)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The cost that may remain: shares of the dense network in (0, 1], and milliseconds for latency. All that are given hold.

    latency_ms: median of one forward pass on this device, one thread. batch: examples in that pass.

    Raises GoalError when nothing is given or a value is out of range, with what to write instead.

    >>> print(Budget(parameters=0.65, macs=0.73))
    at most 65 % of the parameters and 73 % of the MACs
    """

    parameters: float | None = None
    macs: float | None = None
    bytes: float | None = None
    latency_ms: float | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in ("parameters", "macs", "bytes", "latency_ms")):
            raise GoalError("a budget needs at least one limit; write Budget(parameters=0.5) to keep half of the parameters")
        for name in ("parameters", "macs", "bytes"):
            share = getattr(self, name)
            if share is None:
                continue
            _check_number("Budget", name, share)
            if not 0 < share <= 1:
                raise GoalError(
                    f"Budget({name}={share}) is not a share of the dense network in (0, 1]; it says what remains: "
                    f"write {name}=0.5 to keep half"
                )
        if self.latency_ms is not None:
            _check_number("Budget", "latency_ms", self.latency_ms)
            if self.latency_ms <= 0:
                raise GoalError(
                    f"Budget(latency_ms={self.latency_ms}) is not a time above 0; write latency_ms=4 for four milliseconds"
                )
        if isinstance(self.batch, bool) or not isinstance(self.batch, numbers.Integral) or self.batch < 1:
            raise GoalError(f"Budget(batch={self.batch!r}) is not a number of examples; write batch=64 to time 64 at once")
        if self.batch != 1 and self.latency_ms is None:
            raise GoalError(f"Budget(batch={self.batch}) only says what latency_ms is measured on; give latency_ms as well")

    def __str__(self) -> str:
        words = {"parameters": "parameters", "macs": "MACs", "bytes": "bytes"}
        limits = [f"{_number(getattr(self, n) * 100)} % of the {w}" for n, w in words.items() if getattr(self, n) is not None]
        if self.latency_ms is not None:
            limits.append(f"{_number(self.latency_ms)} ms" + (f" at batch {self.batch}" if self.batch > 1 else ""))
        return "at most " + (limits[0] if len(limits) == 1 else f"{', '.join(limits[:-1])} and {limits[-1]}")

    def to_dict(self) -> dict[str, Any]:
        """The budget as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Budget:
        """The budget that `to_dict` wrote. Raises GoalError for unknown names."""
        return _from_dict(cls, values)


def _from_dict(goal: type[Goal], values: Mapping[str, Any]) -> Goal:
    names = {field.name for field in fields(goal)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise GoalError(f"{goal.__name__} has no {', '.join(unknown)}; it has {', '.join(sorted(names))}")
    return goal(**values)


def _check_number(owner: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise GoalError(f"{owner}({name}={value!r}) is not a finite number; write {name}=0.5, for example")


def _as_share(name: str, value: float) -> str:
    """The likely meaning of a share that was written as a percentage."""
    if 1 <= value <= 100:
        return f"write {name}={_number(value / 100)} for {_number(value)} {_unit(name, value)}"
    return f"write {name}={0.95 if name == 'accuracy' else 0.01}, for example"


def _unit(name: str, value: float) -> str:
    if name == "accuracy":
        return "%"
    return "point" if value == 1 else "points"


def _number(value: float) -> str:
    return f"{value:.10g}"
