"""The statement that a floor holds on unseen data, with its confidence: fixed-sequence testing on the certify split.

The search freezes a list of networks of strictly decreasing cost, safest first, before the certify split is opened. `walk`
tests them in that order, each at the full level, stops at the first failure, and delivers the last that passed. Because the
order was fixed beforehand, the first broken network on the list has to slip through for any broken network to be delivered,
and that happens with probability at most delta: no correction for the number of networks, and no assumption that accuracy
falls with size. (Learn then Test, Angelopoulos et al., arXiv 2110.01052, section 4; fixed-sequence testing.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from resect.errors import DataError, GoalError
from resect.evaluation import Evaluation
from resect.searching.evidence import (
    lower_bound,
    needed_for_accuracy,
    needed_for_drop,
    p_accuracy,
    p_agreement,
    p_drop,
)
from resect.searching.floor import Floor

FEW_EXAMPLES = 100
FEW_PER_CLASS = 300
LIMITS = (
    "The probability is over the draw of the certify examples. The promise is for data exchangeable with them: a deployment "
    "that sees other data is not covered."
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One network of the frozen list, tested: number (its place, from 0), counts on the certify split, p-value, verdict."""

    number: int
    examples: int
    correct: int
    p_value: float
    passed: bool

    @property
    def accuracy(self) -> float:
        """Share of the certify examples answered correctly, in [0, 1]."""
        return self.correct / self.examples


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was promised, whether it is kept, how sure, and on how many examples.

    floors: the promises, all of which hold at once. delivered: place of the delivered network on the frozen list, None when
    none passed. examples, correct, p_value, lower_bound: of the delivered network, or of the safest one when none passed.
    dense_correct: of the dense network on the same examples, None when it was not judged. delta: the probability that any
    statement of this certificate is wrong. level: what each test of the walk was held to; reserve: the part of delta not yet
    spent (see `certify`). lower_bound: Clopper-Pearson, of this one network taken alone. frozen: length of the frozen list.
    needed: certify examples that would be needed at the observed rate when nothing passed; None when no number would do.
    """

    floors: tuple[Floor, ...]
    passed: bool
    promise: str
    examples: int
    correct: int
    dense_correct: int | None
    p_value: float
    delta: float
    level: float
    reserve: float
    lower_bound: float
    walked: tuple[Step, ...]
    delivered: int | None
    frozen: int
    needed: int | None = None
    advice: tuple[str, ...] = ()
    labelled: bool = True
    seed: int = 0

    @property
    def floor(self) -> Floor:
        """The promise, or the first of several."""
        return self.floors[0]

    @property
    def accuracy(self) -> float:
        """Share of the certify examples that the delivered (else the safest) network answered correctly."""
        return self.correct / self.examples

    def __str__(self) -> str:
        which = "The delivered network" if self.passed else "The safest network"
        counts = f"{self.correct:,} of {self.examples:,} certify examples"
        told = f"answered {counts} correctly" if self.labelled else f"agrees with the dense network on {counts}"
        share = "accuracy" if self.labelled else "agreement"
        dense = "" if self.dense_correct is None else f", the dense network {_percent(self.dense_correct / self.examples)}"
        lines = [
            self.promise,
            f"{which} {told} ({_percent(self.accuracy)}{dense}); p = {self.p_value:.2g}, and at most {self.level:.3g} passes.",
            f"Taken alone, its {share} is at least {_percent(self.lower_bound)} (Clopper-Pearson, {_sure(self.delta)} sure).",
            _walk_in_words(self),
            LIMITS,
        ]
        return "\n".join([*lines, *(f"Note: {text}" for text in self.advice)])

    def to_dict(self) -> dict[str, Any]:
        """The certificate as JSON-able values."""
        return asdict(self) | {"floors": [f.to_dict() for f in self.floors], "walked": [asdict(s) for s in self.walked]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Certificate:
        """The certificate that `to_dict` wrote, also after a trip through JSON."""
        return cls(
            **{
                **values,
                "floors": tuple(Floor.from_dict(f) for f in values["floors"]),
                "walked": tuple(Step(**s) for s in values["walked"]),
                "advice": tuple(values["advice"]),
            }
        )


def walk(
    floor: Floor | Sequence[Floor],
    dense: Evaluation | None,
    candidates: Iterable[Evaluation],
    *,
    level: float | None = None,
    seed: int = 0,
) -> tuple[int | None, tuple[Step, ...]]:
    """Test networks in their frozen order until one fails; the place of the last that passed (None: none), and every step.

    candidates: evaluations on the certify split, of strictly decreasing cost, safest first; a generator is read only as far
    as the walk goes, so that no network is run in vain. dense: needed for drop floors with labels. level: the p-value a
    network may have (default: the floor's delta). Several floors: every one must hold, so the p-value is their largest.

    Raises GoalError for floors with different deltas, DataError for a missing or unpaired dense evaluation, for a floor on a
    class that has no examples, and for an accuracy floor without labels.

    >>> def judged(right, n=1000):
    ...     correct, labels = np.arange(n) < right, np.zeros(n, dtype=np.int64)
    ...     return Evaluation(correct=correct, labels=labels, predictions=np.where(correct, 0, 1))
    >>> delivered, steps = walk(Floor(accuracy=0.95), None, [judged(980), judged(970), judged(955), judged(990)])
    >>> delivered, [step.passed for step in steps]
    (1, [True, True, False])
    """
    floors = _floors(floor)
    level = floors[0].delta if level is None else level
    steps: list[Step] = []
    for number, candidate in enumerate(candidates):
        p = max(_p_value(f, dense, candidate, level, seed) for f in floors)
        steps.append(Step(number=number, examples=candidate.examples, correct=candidate.right, p_value=p, passed=p <= level))
        if not steps[-1].passed:
            break
    passed = [step.number for step in steps if step.passed]
    return (passed[-1] if passed else None), tuple(steps)


def certify(
    floor: Floor | Sequence[Floor],
    dense: Evaluation | None,
    candidates: Iterable[Evaluation],
    *,
    reserve: float = 0.0,
    seed: int = 0,
    frozen: int | None = None,
) -> Certificate:
    """Walk the frozen list on the certify split and say what it proves. Arguments as in `walk`.

    reserve: share of delta in [0, 1) held back for `certify_artefact`: a network that is recovered or exported after the walk
    is a new network. With the default 0 the whole delta goes to the walk. frozen: length of the list, when `candidates` is a
    generator. Raises what `walk` raises, and DataError for an empty list.
    """
    floors = _floors(floor)
    if not 0 <= reserve < 1:
        raise GoalError(f"reserve={reserve} is not a share of delta in [0, 1); write reserve=0.5 to hold half of it back")
    delta = floors[0].delta
    level = delta * (1 - reserve)
    seen: list[Evaluation] = []
    length = len(candidates) if frozen is None and isinstance(candidates, Sized) else frozen
    delivered, steps = walk(floors, dense, _keeping(candidates, seen), level=level, seed=seed)
    if not steps:
        raise DataError(
            "the list of networks to certify is empty; freeze at least one network before the certify split is opened"
        )
    shown = delivered if delivered is not None else 0
    return _certificate(
        floors,
        dense,
        seen[shown],
        steps,
        delivered,
        level=level,
        reserve=delta * reserve,
        frozen=length or len(steps),
        seed=seed,
    )


def certify_artefact(
    certificate: Certificate, dense: Evaluation | None, artefact: Evaluation, *, variants: int | None = None
) -> Certificate:
    """Certify a network made from the delivered one afterwards (recovered, exported), on the same certify split.

    Which network was recovered depends on the certify split, so the test must hold for every network it could have been: it is
    held to reserve / variants, and with the walk's own share all statements together are wrong with probability at most delta
    (union bound). variants: how many artefacts could have been tested here: by default the length of the frozen list, for one
    artefact made from whichever network is delivered; twice that for two artefacts; 1 when the artefact's source was fixed
    before the certify split was opened. Making the artefact must not have used the certify examples. A fresh fold is the
    alternative: `certify(floor, dense, [artefact])` on it has the whole delta.

    The walk's certificate stays valid for its own network whatever comes out here. Raises GoalError when nothing was reserved.
    """
    if certificate.reserve <= 0:
        raise GoalError(
            "this certificate has spent its whole delta on the walk, so nothing made afterwards can be tested on the same "
            "examples; write certify(..., reserve=0.5), or certify the new network on a fresh fold"
        )
    if variants is not None and variants < 1:
        raise GoalError(f"variants={variants} must be at least 1: the number of artefacts that could have been tested here")
    level = certificate.reserve / (variants or certificate.frozen)
    delivered, steps = walk(certificate.floors, dense, [artefact], level=level, seed=certificate.seed)
    return _certificate(
        certificate.floors, dense, artefact, steps, delivered, level=level, reserve=0.0, frozen=1, seed=certificate.seed
    )


def _certificate(
    floors: tuple[Floor, ...],
    dense: Evaluation | None,
    shown: Evaluation,
    steps: tuple[Step, ...],
    delivered: int | None,
    *,
    level: float,
    reserve: float,
    frozen: int,
    seed: int,
) -> Certificate:
    passed = delivered is not None
    needed = None if passed else _needed(floors, dense, shown, level)
    delta = floors[0].delta
    return Certificate(
        floors=floors,
        passed=passed,
        promise=_promise(floors, passed, delta),
        examples=shown.examples,
        correct=shown.right,
        dense_correct=None if dense is None else dense.right,
        p_value=steps[delivered if delivered is not None else 0].p_value,
        delta=delta,
        level=level,
        reserve=reserve,
        lower_bound=lower_bound(shown.right, shown.examples, delta),
        walked=steps,
        delivered=delivered,
        frozen=frozen,
        needed=needed,
        advice=(*_warnings(shown), *(() if passed else _help(floors, dense, shown, needed))),
        labelled=shown.labelled,
        seed=seed,
    )


def _floors(floor: Floor | Sequence[Floor]) -> tuple[Floor, ...]:
    floors = (floor,) if isinstance(floor, Floor) else tuple(floor)
    if not floors:
        raise GoalError("no floor was given; write Floor(accuracy=0.95) or Floor(drop=0.01)")
    deltas = sorted({f.delta for f in floors})
    if len(deltas) > 1:
        raise GoalError(f"floors that hold together share one delta, and these have {deltas}; give each the same")
    return floors


def _keeping(candidates: Iterable[Evaluation], seen: list[Evaluation]) -> Iterable[Evaluation]:
    for candidate in candidates:
        seen.append(candidate)
        yield candidate


def _on_class(floor: Floor, evaluation: Evaluation) -> Evaluation:
    if floor.label is None:
        return evaluation
    rows = evaluation.labels == floor.label
    if not rows.any():
        raise DataError(f"the floor '{floor}' cannot be tested: no example has label {floor.label} among {evaluation.examples}")
    return evaluation.select(rows)


def _p_value(floor: Floor, dense: Evaluation | None, candidate: Evaluation, level: float, seed: int) -> float:
    judged = _on_class(floor, candidate)
    if floor.accuracy is not None:
        if not judged.labelled:
            raise DataError(
                f"the floor '{floor}' needs labels; without them only a drop can be promised: write Floor(drop=0.01)"
            )
        return p_accuracy(judged.right, judged.examples, floor.accuracy)
    assert floor.drop is not None
    if not judged.labelled:
        return p_agreement(judged.right, judged.examples, floor.drop)
    if dense is None:
        raise DataError(f"the floor '{floor}' needs the dense network's evaluation on the same certify examples")
    candidate.check_paired(dense)
    return p_drop(_on_class(floor, dense).correct, judged.correct, floor.drop, level, seed)


def _needed(floors: tuple[Floor, ...], dense: Evaluation | None, shown: Evaluation, level: float) -> int | None:
    """The certify examples that every floor would need at the rates observed: the largest of them, None when one has none."""
    numbers = [_needed_for(floor, dense, shown, level) for floor in floors]
    return None if any(n is None for n in numbers) else max(n for n in numbers if n is not None)


def _needed_for(floor: Floor, dense: Evaluation | None, shown: Evaluation, level: float) -> int | None:
    judged = _on_class(floor, shown)
    if floor.accuracy is not None:
        needed = needed_for_accuracy(judged.accuracy, floor.accuracy, level)
    elif not judged.labelled:
        needed = needed_for_accuracy(judged.accuracy, 1 - (floor.drop or 0.0), level)
    else:
        assert floor.drop is not None
        assert dense is not None
        was_right = _on_class(floor, dense).correct
        loss = float(np.mean(was_right & ~judged.correct))
        needed = needed_for_drop(loss, float(np.mean(~was_right & judged.correct)), floor.drop, level)
    # A floor on one class sees only that class's share of the examples.
    return None if needed is None else round(needed * shown.examples / judged.examples)


def _promise(floors: tuple[Floor, ...], passed: bool, delta: float) -> str:
    words = " and ".join(str(floor) for floor in floors)
    if passed:
        return f"Certified: {words}, {_sure(delta)} sure."
    return f"Not certified: no network on the list could be shown to keep '{words}' ({_sure(delta)} sure)."


def _warnings(shown: Evaluation) -> tuple[str, ...]:
    notes = []
    if shown.examples < FEW_EXAMPLES:
        notes.append(f"{shown.examples} certify examples are few: below {FEW_EXAMPLES} only a wide margin can be certified.")
    label, count = min(shown.counts.items(), key=lambda item: item[1])
    if count < FEW_PER_CLASS:
        notes.append(
            f"class {label} has {count} certify examples: below about {FEW_PER_CLASS}, little can be said of a class alone."
        )
    return tuple(notes)


def _help(floors: tuple[Floor, ...], dense: Evaluation | None, shown: Evaluation, needed: int | None) -> tuple[str, ...]:
    """What else would help when nothing passed."""
    certain = next((floor for floor in floors if floor.accuracy == 1), None)
    if certain is not None:
        return (f"no number of examples can show '{certain}'; promise a little less, as in Floor(accuracy=0.999).",)
    if needed is not None:
        return (
            f"at the rate observed, about {needed:,} certify examples would be needed (there were {shown.examples:,}); "
            "or start the list with a larger network, or lower the floor.",
        )
    broken = next((f for f in floors if f.accuracy is not None and dense and _on_class(f, dense).accuracy < f.accuracy), None)
    if broken is not None and dense is not None:
        accuracy = _on_class(broken, dense).accuracy
        return (
            f"the dense network itself reaches {_percent(accuracy)} here, below '{broken}'; "
            "lower the floor, or write Floor(drop=0.01).",
        )
    return (
        "the safest network on the list is itself below the floor on these examples, so more examples would not help: search "
        "again with a larger network first, with repair='least_squares', or with recovery; or lower the floor.",
    )


def _sure(delta: float) -> str:
    return f"{(1 - delta) * 100:.4g} %"


def _percent(share: float) -> str:
    return f"{share * 100:.2f} %"


def _walk_in_words(certificate: Certificate) -> str:
    tested, frozen, last = len(certificate.walked), certificate.frozen, certificate.walked[-1]
    if frozen == 1:
        return f"It was the only network tested, and it {'passed' if last.passed else 'failed'}."
    text = (
        f"{tested} of {frozen} networks, frozen before the certify split was opened, {'was' if tested == 1 else 'were'} tested"
    )
    if certificate.delivered is None:
        return f"{text}: the first failed."
    if last.passed:
        return f"{text}: all passed, and number {certificate.delivered + 1}, the leanest, is delivered."
    return f"{text}: number {last.number + 1} failed (p = {last.p_value:.2g}), number {certificate.delivered + 1} is delivered."
