"""How good a specialist is: own examples answered, other examples refused, and the threshold that serves both promises best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from scipy.stats import rankdata
from torch import nn

from resect.batches import forward, select, unpack
from resect.errors import DataError, ModelError
from resect.evaluation import Evaluation
from resect.searching import Floor
from resect.searching.ladder import margins
from resect.specializing.question import Question
from resect.specializing.specialist import Specialist

OWN, OTHERS = 1, 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """One split as the dense network sees it, once for all specialists.

    batches: as given. labels: (examples,) int64. logits: (examples, classes) float64 of the dense network.
    """

    batches: tuple[Any, ...]
    labels: np.ndarray
    logits: np.ndarray

    @classmethod
    def of(cls, model: nn.Module, data: Sequence[Any], where: str) -> Seen:
        """Raises DataError for empty or unlabelled data and labels out of range, ModelError for a network without classes."""
        labels, logits = [], []
        for item in data:
            batch = unpack(item, where=f"the {where} data")
            if batch.labels is None:
                raise DataError(
                    f"the {where} data have no labels, and a specialist is told apart by them; give (inputs, labels)"
                )
            with torch.inference_mode():
                output = forward(model, batch)
            if output.ndim != 2 or output.shape[1] < 2:
                raise ModelError(
                    f"the network returns shape {tuple(output.shape)} for {batch.size} examples: a regression or a single "
                    "score has no classes to specialise on; give a classifier with one logit for each of at least 2 classes"
                )
            labels.append(batch.labels.cpu().numpy())
            logits.append(output.double().cpu().numpy())
        if not labels:
            raise DataError(f"the {where} data are empty: the loader gave no batch; give at least one")
        seen = cls(batches=tuple(data), labels=np.concatenate(labels), logits=np.concatenate(logits))
        low, high, classes = seen.labels.min(), seen.labels.max(), seen.logits.shape[1]
        if low < 0 or high >= classes:
            raise DataError(f"labels of the {where} data run from {low} to {high}, but the network has {classes} outputs")
        return seen

    @property
    def examples(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> list[int]:
        """Examples of each batch."""
        return [unpack(item).size for item in self.batches]

    def take(self, rows: np.ndarray) -> Seen:
        """Only the examples where `rows`, (examples,) bool, is True."""
        start, parts = 0, []
        for item in self.batches:
            size = unpack(item).size
            chosen = np.flatnonzero(rows[start : start + size])
            if len(chosen):
                parts.append(select(item, torch.from_numpy(chosen)))
            start += size
        return Seen(batches=tuple(parts), labels=self.labels[rows], logits=self.logits[rows])

    def own(self, question: Question) -> np.ndarray:
        """(examples,) whether an example is of an own class."""
        return np.isin(self.labels, question.own)

    def score(self, question: Question) -> np.ndarray:
        """(examples,) the dense network's log-odds of "one of the own classes" against all others."""
        return logsumexp(self.logits[:, question.own], 1) - logsumexp(self.logits[:, question.others], 1)

    def dense(self, question: Question) -> Evaluation:
        """The dense network on the specialist's question: labels 1 for own examples, 0 for others."""
        own, told = self.own(question), self.logits.argmax(1)
        if not question.rejects:
            told = np.asarray(question.own)[self.logits[:, question.own].argmax(1)]
            return _evaluation((told == self.labels)[own], own[own])
        return _evaluation(np.where(own, told == self.labels, ~np.isin(told, question.own)), own)


def _evaluation(right: np.ndarray, own: np.ndarray) -> Evaluation:
    labels = own.astype(np.int64)
    return Evaluation(correct=right, labels=labels, predictions=np.where(right, labels, 1 - labels))


def check_classifier(model: nn.Module, batch: Any) -> None:
    """Raise what `Seen.of` raises, from the first batch of the calibrate data alone."""
    Seen.of(model, [batch], "calibrate")


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """What a specialist says on a split before a threshold is applied.

    own: (examples,) whether the example is of an own class. margin: (examples,) how far it is above rejection. told:
    (examples,) whether the best own class is the label (always True for one class). Where nothing is rejected only own examples
    are here.
    """

    own: np.ndarray
    margin: np.ndarray
    told: np.ndarray
    rejects: bool

    @classmethod
    def of(cls, specialist: Specialist, seen: Seen) -> Answers:
        question, margin, place = specialist.question, [], []
        for item in seen.batches:
            with torch.inference_mode():
                above, best = specialist.accept(forward(specialist, unpack(item)))
            margin.append(above.double().cpu().numpy())
            place.append(best.cpu().numpy())
        own, label = seen.own(question), np.asarray(question.own)[np.concatenate(place)]
        told = (label == seen.labels) if not question.one else np.ones(seen.examples, dtype=bool)
        rows = np.ones(len(own), dtype=bool) if question.rejects else own
        return cls(own=own[rows], margin=np.concatenate(margin)[rows], told=told[rows], rejects=question.rejects)

    def judged(self, threshold: float) -> Evaluation:
        """Right and wrong at a threshold: labels 1 for own examples, 0 for others."""
        if not self.rejects:
            return _evaluation(self.told, self.own)
        accepted = self.margin >= threshold
        return _evaluation(np.where(self.own, accepted & self.told, ~accepted), self.own)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How good a specialist is on some examples; all in [0, 1].

    recall: share of own examples answered rightly (several classes: the accuracy among them). false_positive_rate: share of
    other examples accepted, None where nothing is rejected. auroc: of the margin, own against others. precision: of a "yes" at
    the prevalence of own examples in these data.
    """

    examples: int
    recall: float
    false_positive_rate: float | None = None
    balanced_accuracy: float | None = None
    auroc: float | None = None
    precision: float | None = None
    prevalence: float | None = None

    @classmethod
    def of(cls, evaluation: Evaluation, margin: np.ndarray | None = None) -> Rates:
        share = evaluation.per_class
        recall = share.get(OWN, float("nan"))
        if OTHERS not in share or OWN not in share:
            return cls(examples=evaluation.examples, recall=recall)
        wrong, prevalence = 1 - share[OTHERS], evaluation.counts[OWN] / evaluation.examples
        yes = recall * prevalence + wrong * (1 - prevalence)
        return cls(
            examples=evaluation.examples,
            recall=recall,
            false_positive_rate=wrong,
            balanced_accuracy=(recall + 1 - wrong) / 2,
            auroc=None if margin is None else auroc(margin, evaluation.labels == OWN),
            precision=recall * prevalence / yes if yes else float("nan"),
            prevalence=prevalence,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rates_of(specialist: Specialist, seen: Seen) -> tuple[Rates, Rates]:
    """Rates of the dense network and of a specialist on the specialist's question."""
    question, answers = specialist.question, Answers.of(specialist, seen)
    dense = Rates.of(seen.dense(question), seen.score(question) if question.rejects else None)
    return dense, Rates.of(answers.judged(float(specialist.threshold)), answers.margin)


def auroc(margin: np.ndarray, own: np.ndarray) -> float:
    """The chance that an own example has a larger margin than another one, ties counting half.

    >>> auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    0.75
    """
    positives = int(own.sum())
    total = rankdata(margin)[own].sum() - positives * (positives + 1) / 2
    return float(total / (positives * (len(own) - positives)))


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A threshold, and how far both promises are kept there: the smaller distance, in standard deviations of what the certify
    split will show."""

    threshold: float
    ahead: float


def choose_threshold(
    answers: Answers, dense: Evaluation, floors: Sequence[Floor], certify: tuple[int, int], *, refused: int = 0
) -> Chosen:
    """The threshold at which the weaker of the promises is kept by most, each measured by its chance to be certified.

    dense: on the same examples. floors: on label 1 (own examples), and on label 0 (others) where the question rejects. certify:
    own and other examples of the certify split (of a split like it). refused: other examples that were left out of `answers`
    because both networks surely refuse them. The threshold lies halfway between two scores.
    """
    if not answers.rejects:
        both, gained = answers.told & dense.correct, answers.told & ~dense.correct
        ahead = _ahead(floors[0], both.sum(keepdims=True), gained.sum(keepdims=True), dense.correct, certify[0])
        return Chosen(threshold=0.0, ahead=float(ahead[0]))
    order = np.argsort(answers.margin, kind="stable")
    steps, own, told, before = (a[order] for a in (answers.margin, answers.own, answers.told, dense.correct))
    cuts = np.concatenate([[steps[0] - 1], (steps[:-1] + steps[1:]) / 2, [steps[-1] + 1]]).astype(np.float32)
    above = [_below(own & told & right)[-1] - _below(own & told & right) for right in (before, ~before)]
    below = [_below(~own & right) for right in (before, ~before)]
    ahead = np.minimum(
        _ahead(floors[0], above[0], above[1], before[own], certify[0]),
        _ahead(floors[1], below[0] + refused, below[1], np.append(before[~own], np.ones(refused, dtype=bool)), certify[1]),
    )
    best = np.flatnonzero(ahead >= ahead.max() - 1e-9)
    middle = int(best[len(best) // 2])
    return Chosen(threshold=float(cuts[middle]), ahead=float(ahead[middle]))


def _below(rows: np.ndarray) -> np.ndarray:
    """How many of the chosen rows lie below each of the thresholds between sorted scores; (rows + 1,)."""
    return np.concatenate([[0], np.cumsum(rows)])


def _ahead(floor: Floor, both: np.ndarray, gained: np.ndarray, dense: np.ndarray, certify: int) -> np.ndarray:
    """Standard deviations by which a promise is predicted to pass, for many thresholds at once.

    both, gained: (thresholds,) examples that both networks, and that the specialist alone, answer rightly. dense: (examples,)
    bool.
    """
    count = max(len(dense), 1)
    seen = np.full(len(both), float(count))
    if floor.drop is None:
        return margins((both + gained) / count, floor, seen, max(certify, 1))
    lost, won = (dense.sum() - both) / count, gained / count
    # Few or no differences were seen on few examples: they are counted as if two more had been.
    deviation = np.sqrt(np.maximum(lost + won + 2 / count - (lost - won) ** 2, 0))
    return margins(lost - won, floor, seen, max(certify, 1), deviation)
