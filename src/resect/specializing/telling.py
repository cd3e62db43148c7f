"""Which examples tell most about a specialist's question, and how far a network's answers to it are from the dense one's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from resect.batches import forward, unpack
from resect.specializing.judging import Seen
from resect.specializing.question import Question
from resect.specializing.readout import Target
from resect.specializing.specialist import Specialist

# Of the examples that a deep network is repaired on: own ones, and others that the dense network is least sure to refuse. The
# rest are drawn from all others, so that what is far from the decision stays there.
OWN_SHARE, HARD_SHARE = 0.4, 0.4


def hardest(seen: Seen, question: Question, count: int) -> np.ndarray:
    """(examples,) bool: the own examples, and so many others that come closest to being taken for one (none where the question
    does not reject)."""
    own = seen.own(question)
    if not question.rejects:
        return own
    score = np.where(own, np.inf, seen.score(question))
    shown = np.zeros(len(own), dtype=bool)
    shown[np.argsort(-score, kind="stable")[: int(own.sum()) + count]] = True
    return shown


def telling(seen: Seen, question: Question, count: int, *, seed: int = 0) -> Seen:
    """About `count` examples of a split, two fifths own ones and two fifths the hardest others; all where it has no more.

    Where the question does not reject, only own examples will ever come, and only they are taken. Where own examples are few,
    others take their place.
    """
    if seen.examples <= count:
        return seen
    own, draw = seen.own(question), np.random.default_rng(seed)
    chosen = np.zeros(len(own), dtype=bool)
    if not question.rejects:
        chosen[_drawn(draw, np.flatnonzero(own), count)] = True
        return seen.take(chosen)
    chosen[_drawn(draw, np.flatnonzero(own), int(OWN_SHARE * count))] = True
    chosen |= hardest(seen, question, int(HARD_SHARE * count)) & ~own
    chosen[_drawn(draw, np.flatnonzero(~chosen & ~own), count - int(chosen.sum()))] = True
    return seen.take(chosen)


def _drawn(draw: np.random.Generator, rows: np.ndarray, count: int) -> np.ndarray:
    return draw.permutation(rows)[: max(count, 0)]


def harm(question: Question, rows: tuple[int, ...], seen: Seen) -> Callable[[nn.Module], float]:
    """What tells how far a network's answers to the question are from the dense network's on a split: mean Kullback-Leibler
    divergence of the softened answers, in nats.

    rows: classes of the network's output rows (see `Specialist`).
    """
    target = Target.of(question, seen.logits, seen.own(question))
    least = target.entropy

    def measured(network: nn.Module) -> float:
        specialist = Specialist(network, question, rows=rows).eval()
        with torch.inference_mode():
            outputs = [forward(specialist, unpack(item)).double().cpu() for item in seen.batches]
        return target.loss(torch.cat(outputs).numpy()) - least

    return measured
