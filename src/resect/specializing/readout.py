"""The last layer of a specialist, and what it is fitted to: its own answer, not all logits of the dense network.

For one class the answer is the probability of "this class", for several their probabilities among each other (and the
background), softened by a temperature. Where that is what counts, examples near the decision count and those far from it do
not. (Softened targets: Hinton et al. 2015, arXiv 1503.02531.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax, logsumexp, softmax, xlogy
from torch import nn

from resect.anatomy import Anatomy, Group, Slices
from resect.anatomy.attributes import known
from resect.batches import example_batch, forward, unpack
from resect.errors import ModelError
from resect.specializing.question import Question
from resect.tracing import Reader, Reading, observing

TEMPERATURE = 2.0
# Least weight of an example, of .25 at the decision: keeps systems well posed where all examples are far from it.
LEAST_WEIGHT = 1e-3
# Rivals that carry less than this share of the slope of the score, all together, are not needed to tell a class from.
LEAST_RIVALS = 0.005


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputLayer:
    """The linear layer that makes the logits: its reader, and its rows as a group of units that only write."""

    reader: Reader
    group: Group

    @property
    def tensor(self) -> str:
        return self.reader.tensor


def output_layer(model: nn.Module, anatomy: Anatomy) -> OutputLayer:
    """Find the layer that makes the logits. Raises ModelError where the output is not that of one linear layer, used once."""
    seen: list[Reading] = []
    weights = [name for name in anatomy.parameters if len(anatomy.shapes[name]) == 2]
    with torch.no_grad(), observing(model, weights, seen.append):
        output = forward(model, example_batch(anatomy.example))
    last = seen[-1] if seen else None
    tied = last is not None and (
        anatomy.aliases.get(last.reader.tensor) or sum(r.reader.tensor == last.reader.tensor for r in seen) > 1
    )
    if last is None or tied or last.output.shape != output.shape or not torch.equal(last.output, output) or output.ndim != 2:
        raise ModelError(
            "the network's output is not that of a linear layer of its own (something happens behind it, or its weight is used "
            "elsewhere too), so its rows cannot be cut; return the logits of the last layer"
        )
    reader, rows = last.reader, np.arange(output.shape[1])[:, None]
    slices = [Slices(tensor=reader.tensor, axis=1 - reader.axis, index=rows, role="writer")]
    if reader.bias is not None:
        slices.append(Slices(tensor=reader.bias, axis=0, index=rows, role="carrier"))
    name = reader.tensor.rpartition(".")[0] or reader.tensor
    group = Group(name=name, kind="hidden", units=len(rows), slices=tuple(slices), parts=np.zeros(len(rows), dtype=np.int64))
    return OutputLayer(reader=reader, group=group)


def with_outputs(model: nn.Module, anatomy: Anatomy, layer: OutputLayer) -> Anatomy:
    """The anatomy in which the rows of the output layer can be cut too."""
    return replace(
        anatomy,
        groups=(*anatomy.groups, layer.group),
        edits=(*anatomy.edits, *known(model, [layer.group], dict(anatomy.aliases))),
    )


def features(model: nn.Module, layer: OutputLayer, batches: Sequence[Any]) -> np.ndarray:
    """(examples, columns + 1) what the output layer reads, a constant 1 last, in float64."""
    found: list[torch.Tensor] = []

    def see(reading: Reading) -> None:
        found.append(reading.inputs.detach().double().cpu())

    with torch.inference_mode(), observing(model, [layer.tensor], see):
        for item in batches:
            forward(model, unpack(item))
    rows = torch.cat(found).numpy()
    constant = np.ones((len(rows), 1)) if layer.reader.bias is not None else np.zeros((len(rows), 1))
    return np.concatenate([rows, constant], axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """The answers of the dense network that a specialist is fitted to, on the calibrate data.

    share: (examples, answers) softened probabilities: one column for one class, else own classes and, where the question
    rejects, the background. rows: (examples,) which examples count. one: whether "no" takes the rest.
    """

    share: np.ndarray
    rows: np.ndarray
    one: bool

    @classmethod
    def of(cls, question: Question, logits: np.ndarray, own: np.ndarray) -> Target:
        """logits: (examples, classes) of the dense network. own: (examples,) whether the example is of an own class."""
        columns = [logits[:, c] for c in question.own]
        if question.rejects:
            columns.append(logsumexp(logits[:, question.others], 1))
        soft = softmax(np.stack(columns, 1) / TEMPERATURE, 1)
        # Where nothing is rejected, only own examples will ever come.
        rows = np.ones(len(own), dtype=bool) if question.rejects else own
        return cls(share=soft[:, :1] if question.one else soft, rows=rows, one=question.one)

    def take(self, start: int, count: int) -> Target:
        """The target of some consecutive examples."""
        return replace(self, share=self.share[start : start + count], rows=self.rows[start : start + count])

    def told(self, outputs: np.ndarray) -> np.ndarray:
        """(examples, answers) softened probabilities that outputs of a specialist stand for."""
        return softmax(self._full(outputs), 1)[:, : self.share.shape[1]]

    def loss(self, outputs: np.ndarray) -> float:
        """Mean cross-entropy of a specialist's outputs against the target, in nats."""
        return float(-(self._whole * log_softmax(self._full(outputs), 1)).sum(1)[self.rows].mean())

    @property
    def entropy(self) -> float:
        """The least loss that any outputs can have, in nats."""
        return float(-xlogy(self._whole, self._whole).sum(1)[self.rows].mean())

    def weights(self, told: np.ndarray) -> np.ndarray:
        """(examples, answers) how much an error of each softened output counts: the second derivative of the loss."""
        return (told * (1 - told) + LEAST_WEIGHT) * self.rows[:, None]

    def missing(self, told: np.ndarray) -> np.ndarray:
        """(examples, answers) probability that is missing from each answer, 0 for examples that do not count."""
        return (self.share - told) * self.rows[:, None]

    @property
    def _whole(self) -> np.ndarray:
        """Softened probabilities that add up to 1."""
        return np.concatenate([self.share, 1 - self.share], 1) if self.one else self.share

    def _full(self, outputs: np.ndarray) -> np.ndarray:
        soft = outputs.reshape(len(outputs), -1) / TEMPERATURE
        return np.concatenate([soft, np.zeros((len(soft), 1))], 1) if self.one else soft


def rows_of(question: Question, logits: np.ndarray, target: Target) -> tuple[int, ...]:
    """The classes whose output rows a specialist needs, in ascending order: its own and, where it rejects, the rivals that it
    is told from.

    A rival's weight is the mean squared slope of the score in its logit; the weakest, up to half a per cent of all, go.
    """
    if not question.rejects:
        return tuple(sorted(question.own))
    others = np.array(question.others)
    weights = target.weights(target.share).max(1)
    slope = (softmax(logits[:, others], 1) ** 2 * weights[:, None]).sum(0)
    order = np.argsort(slope, kind="stable")
    needless = order[np.cumsum(slope[order]) <= LEAST_RIVALS * slope.sum()]
    return tuple(sorted({*question.own, *np.delete(others, needless).tolist()}))
