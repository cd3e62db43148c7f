"""The original program's way to specialists: units whose peak on the class is above a threshold, raised until accuracy drops.

Kept to be compared with. As in the program, a unit is judged by its largest activation on the class, by an absolute threshold
that rises in steps of a fixed size, and the rise ends with the first step whose one-vs-rest accuracy is below the target; units
are cut and nothing is repaired. Unlike the program, accuracy is measured on the search split and not on the test set, and what
comes out is certified like any specialist, on recall and false positives.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from torch import nn

from resect.evaluation import Evaluation
from resect.plan import Plan, count_step
from resect.scoring import Scores, score
from resect.searching import Floor, Trial
from resect.specializing.judging import Answers, Chosen
from resect.specializing.question import Question
from resect.specializing.readout import with_outputs
from resect.specializing.search import Candidate, Prepared, Shared
from resect.specializing.specialist import Specialist
from resect.surgery import cut, state_digest

HIGHEST, STEP = 5.0, 0.1


def prepare_by_threshold(
    shared: Shared, question: Question, floors: tuple[Floor, ...], *, on_trial: Callable[[Trial], None] | None = None
) -> Prepared:
    """One specialist by the original method, frozen as a list of one."""
    start, trials = time.monotonic(), list[Trial]()
    scores = score(shared.trace, "peak", classes=question.own, seed=shared.seed)
    target = floors[0].threshold(_one_vs_rest(shared.search.dense(question)))
    best = Plan.all(shared.anatomy)
    network = cut(shared.model, best, verify=False)
    for number, at in enumerate(np.arange(0.0, HIGHEST + STEP / 2, STEP)):
        plan = _above(scores, float(at))
        small = cut(shared.model, plan, verify=False)
        judged = Answers.of(Specialist(small, question), shared.search).judged(0.0)
        passed = _one_vs_rest(judged) >= target
        trials.append(_trial(number, plan, judged, passed))
        if on_trial is not None:
            on_trial(trials[-1])
        if not passed:
            break
        best, network = plan, small
    frozen = (_frozen(shared, question, best, network),)
    return Prepared(
        question=question,
        floors=floors,
        frozen=frozen,
        leanest=frozen[0],
        trials=tuple(trials),
        seconds=time.monotonic() - start,
        method="threshold",
        notes=(),
    )


def _one_vs_rest(evaluation: Evaluation) -> float:
    """Share of all examples whose side is told rightly: the program's measure, which "always no" mostly passes."""
    return evaluation.accuracy


def _above(scores: Scores, at: float) -> Plan:
    counts = {
        group.name: max(count_step(group), int((scores.values[group.name] > at).sum())) for group in scores.anatomy.groups
    }
    return Plan.top(scores.anatomy, scores.values, counts)


def _trial(number: int, plan: Plan, judged: Evaluation, passed: bool) -> Trial:
    cost = plan.cost()
    return Trial(
        number=number,
        allocation="threshold",
        kept=plan.kept,
        cost=cost,
        accuracy=judged.accuracy,
        above=passed,
        examples=judged.examples,
        stopped=False,
        passes=cost.macs / max(Plan.all(plan.anatomy).cost().macs, 1.0),
        seconds=0.0,
        digest=plan.digest,
    )


def _frozen(shared: Shared, question: Question, plan: Plan, network: nn.Module) -> Candidate:
    whole = with_outputs(shared.model, shared.anatomy, shared.layer)
    everything = Plan.all(whole).keep
    model = Specialist(network, question).eval()
    return Candidate(
        plan=Plan(anatomy=whole, keep={**everything, **plan.keep}),
        model=model,
        answers=Answers.of(model, shared.search),
        chosen=Chosen(threshold=0.0, ahead=0.0),
        cost=float(sum(plan.kept.values())),
        digest=state_digest(model),
    )
