"""The smallest network that answers one specialist's question: searched on a shared trace, frozen, then certified."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from resect.anatomy import Anatomy
from resect.errors import GoalError
from resect.evaluation import Evaluation
from resect.plan import Plan
from resect.repair import repair
from resect.scoring import Scores, score
from resect.searching import Floor, Trial
from resect.searching.allocation import Curves, Knapsack, measure
from resect.searching.finishing import finish
from resect.searching.ladder import chances, climb
from resect.searching.sensitivity import first_examples, weighed
from resect.specializing.aiming import Headed, aim, in_one_currency, linear_readers, slopes, specialised
from resect.specializing.judging import OTHERS, OWN, Answers, Chosen, Seen, choose_threshold
from resect.specializing.question import Question
from resect.specializing.readout import OutputLayer, Target, rows_of
from resect.specializing.specialist import Specialist
from resect.specializing.telling import hardest, harm, telling
from resect.surgery import cut, state_digest
from resect.tracing import Trace

LEAST_SHARE = 0.004
# Sizes around the leanest trial that was ahead, prepared for the certificate's list. Trials are repaired from the trace alone:
# what the final repair adds lets smaller ones keep the promise too.
AROUND = (0.45, 0.62, 0.8, 1.0, 1.5, 2.6)
# Two layers in turn, in the final repair: the first turns gain most, and every class pays for them at every size.
TURNS = 2
# Where no trial was ahead, sizes are tried with the final repair, from this share of the cost on.
LEAST_FINAL, FINAL_TRIALS = 0.1, 4
RUNGS = 12
# Other examples that a trial is shown, as a multiple of the own ones: those that the dense network is least sure to refuse.
HARDEST = 3
SLOPE_EXAMPLES, WEIGHING_EXAMPLES = 500, 512
LEVELS = 32
# Largest final repair of one network, in multiply-adds of passes of both networks; and the fewest examples for it.
LARGEST_REPAIR, LEAST_EXAMPLES = 4e10, 100
# Networks that keep more than this share of their units lose little, and their large readers take long to re-solve.
AIMED_BELOW = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """What all specialists of one network have in common, made once.

    x: (examples, columns + 1) what the dense output layer reads on the calibrate data. calib, search: the splits as the dense
    network sees them. counts: (classes,) examples of each class on the certify split.
    """

    model: nn.Module
    layer: OutputLayer
    trace: Trace
    x: np.ndarray
    calib: Seen
    search: Seen
    counts: np.ndarray
    minimise: str
    scorer: str
    evaluations: int
    sweeps: int
    seed: int

    @property
    def anatomy(self) -> Anatomy:
        return self.trace.anatomy


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A specialist prepared for the certificate: finally repaired, its threshold chosen, frozen by its digest."""

    plan: Plan
    model: Specialist
    answers: Answers
    chosen: Chosen
    cost: float
    digest: str

    def keeps(self, floors: Sequence[Floor], dense: Evaluation) -> bool:
        """Whether all promises are kept as measured on the search split, without a margin."""
        judged = self.answers.judged(float(self.model.threshold)).per_class
        return all(judged[f.label] >= f.threshold(dense.per_class[f.label]) for f in floors if f.label is not None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A specialist before the certify split is opened.

    frozen: the list that is walked on it. leanest: the cheapest of all prepared that keeps both promises as measured on the
    search split (the safest where none does).
    """

    question: Question
    floors: tuple[Floor, ...]
    frozen: tuple[Candidate, ...]
    leanest: Candidate
    trials: tuple[Trial, ...]
    seconds: float
    method: str
    notes: tuple[str, ...]


def floors_of(question: Question, goal: Floor, false_positives: float | Floor | None, search: Seen) -> tuple[Floor, ...]:
    """The promises as floors on own examples (label 1) and, where the question rejects, on others (label 0).

    false_positives: cap on the share of others accepted, or Floor(drop=...) for a cap beside the dense network's share; by
    default half a point above its share on the search split, and at least 1 %. Raises GoalError for a floor on a class, a cap
    outside (0, 1), and promises that the dense network itself does not keep on the search split.
    """
    if goal.label is not None:
        raise GoalError(f"a specialist's floor is on its own classes already, and was given label={goal.label}; leave it out")
    dense = search.dense(question)
    own = dense.per_class[OWN]
    if goal.accuracy is not None and goal.accuracy > own:
        raise GoalError(
            f"the floor is {goal.accuracy:.2%}, but the dense network itself has {own:.2%} on {question.name} in the search "
            f"split; write a floor of at most {own:.2%}, or Floor(drop=0.01)"
        )
    floors = [replace(goal, label=OWN)]
    if question.rejects and isinstance(false_positives, Floor):
        floors.append(replace(false_positives, label=OTHERS, delta=goal.delta))
    elif question.rejects:
        rate = 1 - dense.per_class[OTHERS]
        cap = false_positives if isinstance(false_positives, float) else max(rate + 0.005, 0.01)
        if not 0 < cap < 1:
            raise GoalError(f"false_positives={cap} is not a share in (0, 1); write false_positives=0.01 for 1 %")
        floors.append(Floor(accuracy=1 - cap, label=OTHERS, delta=goal.delta))
    return tuple(floors)


def prepare(
    shared: Shared, question: Question, floors: tuple[Floor, ...], *, on_trial: Callable[[Trial], None] | None = None
) -> Prepared:
    """Search for the smallest network that keeps the promises on the search split, and freeze the list to certify."""
    start = time.monotonic()
    one = _One(shared, question, floors, on_trial)
    scores = one.scores(one.headed.network)
    best = one.bisect(scores, LEAST_SHARE, 1.0, -(-shared.evaluations // 2))
    if best is not None:
        # Once it is known which units of later groups stay, earlier ones are weighed by what those read of them.
        again = one.scores(one.repaired(scores, best))
        centre = one.measure(best.kept) / one.dense
        again_best = one.bisect(again, centre / 2, min(centre * 1.3, 1.0), shared.evaluations - len(one.trials))
        if again_best is not None and one.measure(again_best.kept) <= one.measure(best.kept):
            scores, best = again, again_best
    notes = (
        ()
        if best is not None
        else ("No trial repaired from the trace alone kept the promises; sizes were tried finally repaired.",)
    )
    candidates = one.finished(scores, best)
    frozen, dense = freeze(candidates), shared.search.dense(question)
    return Prepared(
        question=question,
        floors=floors,
        frozen=frozen,
        leanest=min((c for c in candidates if c.keeps(floors, dense)), key=lambda c: c.cost, default=frozen[0]),
        trials=tuple(one.trials),
        seconds=time.monotonic() - start,
        method="repair",
        notes=notes,
    )


class _One:
    """The search for one specialist."""

    def __init__(self, shared: Shared, question: Question, floors: tuple[Floor, ...], on_trial: Callable[[Trial], None] | None):
        self.shared, self.question, self.floors, self.on_trial = shared, question, floors, on_trial
        self.target = Target.of(question, shared.calib.logits, shared.calib.own(question))
        rows = rows_of(question, shared.calib.logits, self.target)
        self.headed = Headed.of(shared.model, shared.anatomy, shared.layer, question, rows)
        self.readers = linear_readers(self.headed)
        # Linear throughout: `aim` re-solves every layer for the own answer.
        reading = {part.tensor for group in self.headed.anatomy.groups for part in group.readers}
        self.linear = reading <= set(self.readers)
        self.measure = measure(self.headed.anatomy, shared.minimise)
        self.dense = self.measure(Plan.all(self.headed.anatomy).kept)
        own = shared.search.own(question)
        self.certify = int(shared.counts[list(question.own)].sum()), int(shared.counts[list(question.others)].sum())
        self.hard = shared.search.take(hardest(shared.search, question, HARDEST * int(own.sum())))
        self.refused = int((~own).sum() - (~self.hard.own(question)).sum()) if question.rejects else 0
        self.few = self._affordable()
        self.trials: list[Trial] = []
        self.families: dict[int, Callable[[float], Plan]] = {}

    def _affordable(self) -> Seen:
        """As many calibrate examples as the final repair can go through, chosen for the question."""
        each = max(2 * Plan.all(self.headed.whole).cost().macs, 1.0)
        count = max(int(LARGEST_REPAIR / each), LEAST_EXAMPLES)
        return telling(self.shared.calib, self.question, count, seed=self.shared.seed)

    def scores(self, network: nn.Module) -> Scores:
        """Units scored for this specialist; `network` is the dense one with its head, or a repaired one with removed units
        that are read by zeros."""
        shared = self.shared
        batches = first_examples(shared.calib.batches, SLOPE_EXAMPLES)
        count = sum(shared.calib.sizes[: len(batches)])
        slope = slopes(self.headed.specialist(network), shared.trace.readers, batches, self.target.take(0, count))
        trace = specialised(shared.trace, self.headed, shared.x, self.target, slope)
        return score(trace, shared.scorer, classes=self.question.own, seed=shared.seed)

    def family(self, scores: Scores) -> Callable[[float], Plan]:
        """Plans of least predicted harm by their share of the dense cost."""
        if id(scores) in self.families:
            return self.families[id(scores)]
        knapsack = Knapsack(scores=scores, curves=self._curves(scores), measure=self.measure)
        self.families[id(scores)] = lambda share: knapsack.within(share * self.dense)
        return self.families[id(scores)]

    def _curves(self, scores: Scores) -> Curves:
        """Predicted harm to the answer. In deep networks it is measured group by group: slopes there say little."""
        if self.linear:
            return in_one_currency(Curves.of(scores, "least_squares", levels=LEVELS), scores.trace)
        network, few = self.headed.network, self.few.take(np.arange(self.few.examples) < WEIGHING_EXAMPLES)
        tells = harm(self.question, self.headed.rows, few)
        curves, _ = weighed(Curves.of(scores, "least_squares"), network, scores, tells, "least_squares")
        return curves.filled(scores.anatomy)

    def bisect(self, scores: Scores, low: float, high: float, evaluations: int) -> Plan | None:
        """Halve an interval of sizes on a logarithmic scale; the leanest plan that was ahead of its promises, if any was."""
        make, best, judged = self.family(scores), None, set[str]()
        for _ in range(evaluations):
            middle = float(np.sqrt(low * high))
            plan = make(middle)
            if plan.digest in judged:
                break
            judged.add(plan.digest)
            if self.trial(scores, plan):
                high, best = middle, plan
            else:
                low = middle
        return best

    def trial(self, scores: Scores, plan: Plan) -> bool:
        """Whether a plan, repaired from the trace alone, is ahead of its promises on the own and the hardest other examples."""
        start = time.monotonic()
        small = cut(self.headed.network, plan, weights=repair(scores.trace, plan).weights, verify=False)
        answers = Answers.of(self.headed.specialist(small), self.hard)
        chosen = choose_threshold(answers, self.hard.dense(self.question), self.floors, self.certify, refused=self.refused)
        judged = answers.judged(chosen.threshold)
        cost, dense = self.headed.plan(plan).cost(), max(Plan.all(self.headed.whole).cost().macs, 1.0)
        trial = Trial(
            number=len(self.trials),
            allocation="knapsack",
            kept=plan.kept,
            cost=cost,
            accuracy=judged.accuracy,
            above=chosen.ahead >= 0,
            examples=judged.examples,
            stopped=False,
            passes=cost.macs / dense * judged.examples / self.shared.search.examples,
            seconds=time.monotonic() - start,
            digest=plan.digest,
        )
        self.trials.append(trial)
        if self.on_trial is not None:
            self.on_trial(trial)
        return trial.above

    def repaired(self, scores: Scores, plan: Plan) -> nn.Module:
        """The headed network at full size, repaired as if units were gone: they are read by zeros."""
        everything = Plan.all(self.headed.anatomy)
        return cut(self.headed.network, everything, weights=repair(scores.trace, plan).weights, verify=False)

    def finished(self, scores: Scores, best: Plan | None) -> list[Candidate]:
        """Specialists of falling size around the best trial, each finally repaired and judged on the whole search split."""
        if best is None:
            return self._halved(scores)
        make, centre = self.family(scores), self.measure(best.kept) / self.dense
        plans = {plan.digest: plan for factor in AROUND if (plan := make(min(factor * centre, 1.0)))}
        plans |= {plan.digest: plan for plan in (Plan.all(self.headed.anatomy), best)}
        ordered = sorted(plans.values(), key=lambda plan: self.measure(plan.kept), reverse=True)
        return [self._finish(scores, plan) for plan in ordered]

    def _halved(self, scores: Scores) -> list[Candidate]:
        """Finally repaired specialists where an interval of sizes is halved by whether they are ahead of their promises."""
        make, low, high = self.family(scores), LEAST_FINAL, 1.0
        found: dict[str, Candidate] = {}

        def tried(plan: Plan) -> Candidate:
            if plan.digest not in found:
                found[plan.digest] = self._finish(scores, plan)
            return found[plan.digest]

        tried(Plan.all(self.headed.anatomy))
        for _ in range(FINAL_TRIALS):
            middle = float(np.sqrt(low * high))
            low, high = (low, middle) if tried(make(middle)).chosen.ahead >= 0 else (middle, high)
        tried(make(float(np.sqrt(high))))  # a safer one: the certify split may be less kind than the search split
        return sorted(found.values(), key=lambda candidate: candidate.cost, reverse=True)

    def _finish(self, scores: Scores, plan: Plan) -> Candidate:
        shared = self.shared
        # Layers in turn are fitted for what dense layers make. Where `aim` can, it does that for the own answer, at less cost.
        turns, few = 0 if self.linear else TURNS, list(self.few.batches)
        small, _ = finish(self.headed.network, scores, plan, few, "least_squares", alternations=turns)
        model = self.headed.specialist(small)
        if plan.share < AIMED_BELOW:
            model = aim(model, self.readers, shared.calib.batches, self.target, sweeps=shared.sweeps)
        answers = Answers.of(model, shared.search)
        chosen = choose_threshold(answers, shared.search.dense(self.question), self.floors, self.certify)
        model.threshold.fill_(chosen.threshold)
        return Candidate(
            plan=self.headed.plan(plan),
            model=model,
            answers=answers,
            chosen=chosen,
            cost=self.measure(plan.kept),
            digest=state_digest(model),
        )


def freeze(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that are expected to deliver the leanest network, in the order of the walk: costliest and safest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.cost, -c.chosen.ahead)):
        if not front or candidate.chosen.ahead > front[-1].chosen.ahead:
            front.append(candidate)
    front.reverse()
    costs, ahead = np.array([c.cost for c in front]), np.array([c.chosen.ahead for c in front])
    rungs = climb(costs / costs.max(), chances(ahead), RUNGS)
    return tuple(front[rung] for rung in rungs) or (front[0],)
