"""A prepared specialist put to the certify split, and its certificate in words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from resect.plan import Plan
from resect.searching import Certificate, Floor, certify
from resect.searching.certificate import FEW_PER_CLASS
from resect.searching.evidence import needed_for_drop
from resect.specializing.judging import Answers, Rates, Seen
from resect.specializing.question import Question
from resect.specializing.results import Specialised
from resect.specializing.search import Prepared, Shared


def certified(shared: Shared, prepared: Prepared, goal: Floor, opened: Seen) -> Specialised:
    """Walk the frozen list of one specialist on the certify split."""
    question = prepared.question
    answers = [Answers.of(candidate.model, opened) for candidate in prepared.frozen]
    judged = [a.judged(float(c.model.threshold)) for a, c in zip(answers, prepared.frozen)]
    dense = opened.dense(question)
    found = certify(prepared.floors, dense, judged, seed=shared.seed)
    place = found.delivered or 0
    chosen = prepared.frozen[place]
    dense_search = shared.search.dense(question)
    notes = (*prepared.notes, *(() if found.passed else ("The promise is not certified; this is the safest network tried.",)))
    return Specialised(
        question=question,
        model=chosen.model,
        plan=chosen.plan,
        searched=(prepared.leanest.model, prepared.leanest.plan),
        goal=goal,
        false_positives=prepared.floors[1] if question.rejects else None,
        certificate=in_words(found, question, prepared.floors, few_examples(question, shared.counts, goal)),
        search=Rates.of(chosen.answers.judged(float(chosen.model.threshold)), chosen.answers.margin),
        dense_search=Rates.of(dense_search, _dense_margin(shared.search, question)),
        certify=Rates.of(judged[place], answers[place].margin),
        dense_certify=Rates.of(dense, _dense_margin(opened, question)),
        trials=prepared.trials,
        frozen=tuple(candidate.digest for candidate in prepared.frozen),
        cost=chosen.plan.cost(),
        dense_cost=Plan.all(chosen.plan.anatomy).cost(),
        output=shared.layer.group.name,
        method=prepared.method,
        seconds=prepared.seconds,
        seed=shared.seed,
        notes=notes,
    )


def _dense_margin(seen: Seen, question: Question) -> np.ndarray | None:
    return seen.score(question) if question.rejects else None


def in_words(certificate: Certificate, question: Question, floors: tuple[Floor, ...], few: tuple[str, ...]) -> Certificate:
    """The certificate with its promise in the words of a specialist; `few`: what is to be said of small classes."""
    what = "recall" if question.one else "accuracy among them"
    words = f"{question.name}: {what} {str(replace(floors[0], label=None)).removeprefix('accuracy ')}"
    if question.rejects:
        words += f" and {'false-positive' if question.one else 'false-accept'} rate {_cap_in_words(floors[1])}"
    sure = f"({100 * (1 - certificate.delta):.4g} % sure)"
    general = tuple(text for text in certificate.advice if not text.startswith("class "))
    certificate = replace(certificate, advice=(*few, *general))
    if certificate.passed:
        return replace(certificate, promise=f"Certified: {words} {sure}.")
    return replace(certificate, promise=f"Not certified: no network on the list could be shown to keep '{words}' {sure}.")


def _cap_in_words(floor: Floor) -> str:
    if floor.accuracy is not None:
        return f"at most {100 * (1 - floor.accuracy):.4g} %"
    return str(replace(floor, label=None)).replace("below", "above")


def few_examples(question: Question, counts: np.ndarray, floor: Floor) -> tuple[str, ...]:
    """What can still be promised where an own class has few certify examples."""
    few = {c: int(counts[c]) for c in question.own if counts[c] < FEW_PER_CLASS}
    if not few:
        return ()
    total = int(counts[list(question.own)].sum())
    which = ", ".join(f"{n} of {question.class_name(c)!r}" for c, n in few.items())
    if floor.accuracy is not None:
        reach = f"a recall of {100 * floor.delta ** (1 / total):.2f} % even if every one is answered rightly"
    else:
        reach = f"a drop of {100 * least_drop(total, floor.delta):.2f} points even if not one more is lost"
    return (f"The certify data hold only {which} (fewer than {FEW_PER_CLASS}): at best they can show {reach}.",)


def least_drop(examples: int, delta: float) -> float:
    """The smallest drop that so many examples can certify where both networks are right on all of them."""
    low, high = 0.0, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        needed = needed_for_drop(0.0, 0.0, middle, delta)
        low, high = (low, middle) if needed is not None and needed <= examples else (middle, high)
    return high
