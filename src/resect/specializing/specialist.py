"""What comes out: Specialist, a module that answers for its own classes, and Panel, which answers the full question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resect.batches import main_output
from resect.errors import ModelError
from resect.specializing.question import Other, Question

REJECTED = -1


class Specialist(nn.Module):
    """A cut network that answers for its own classes: an ordinary module, with its threshold as a buffer.

    rows: the classes of the network's logits, own ones and the rivals they are told from (default: all). One class: the output
    is one score per example, (examples,), logit_k - logsumexp(rivals' logits), the log-odds of "this class"; yes where it is at
    least the threshold. Several classes: their logits, (examples, own); with `other="reject"` one more column, the background
    score logsumexp(rivals' logits), and an example is accepted where its best own logit exceeds it by at least the threshold.

    >>> network = nn.Linear(4, 10)
    >>> three = Specialist(network, Question(own=(3,), classes=10)).eval()
    >>> three(torch.zeros(2, 4)).shape, three.predict(torch.zeros(2, 4)).dtype
    (torch.Size([2]), torch.bool)
    """

    threshold: Tensor
    own: Tensor
    rivals: Tensor

    def __init__(self, network: nn.Module, question: Question, *, rows: Sequence[int] | None = None, threshold: float = 0.0):
        super().__init__()
        self.network, self.question = network, question
        self.rows = tuple(range(question.classes) if rows is None else rows)
        own = [self.rows.index(c) for c in question.own]
        rivals = [place for place, c in enumerate(self.rows) if c not in question.own]
        # Places among the logits, as tensors: made anew in every call they would take longer than a small network.
        self.register_buffer("own", torch.tensor(own), persistent=False)
        self.register_buffer("rivals", torch.tensor(rivals, dtype=torch.long), persistent=False)
        self.register_buffer("threshold", torch.tensor(float(threshold)))
        self.train(network.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The score (examples,) or the logits (examples, own classes, and the background where there is one)."""
        logits = main_output(self.network(*args, **kwargs))
        own = logits.index_select(-1, self.own)
        if not self.question.rejects:
            return own
        background = torch.logsumexp(logits.index_select(-1, self.rivals), -1, keepdim=True)
        return (own - background)[..., 0] if self.question.one else torch.cat([own, background], -1)

    def accept(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """From what `forward` returned: how far each example is above rejection, (examples,), and the place of its best own
        class, (examples,)."""
        if self.question.one:
            return outputs, torch.zeros_like(outputs, dtype=torch.long)
        best, place = outputs[..., : len(self.question.own)].max(-1)
        return (best - outputs[..., -1] if self.question.rejects else best), place

    def decide(self, outputs: Tensor) -> Tensor:
        """Answers from what `forward` returned: bool for one class, else class indices with -1 where rejected; (examples,)."""
        margin, place = self.accept(outputs)
        if self.question.one:
            return margin >= self.threshold
        answer = torch.tensor(self.question.own, device=outputs.device)[place]
        return torch.where(margin >= self.threshold, answer, REJECTED) if self.question.rejects else answer

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> Tensor:
        """Yes or no for one class; for several the class, -1 where it is none of them. (examples,)."""
        return self.decide(self(*args, **kwargs))

    def record(self) -> dict[str, Any]:
        """What a file must know besides the network."""
        question = self.question
        return {
            "own": list(question.own),
            "classes": question.classes,
            "names": list(question.names),
            "other": question.other,
            "rows": list(self.rows),
            "threshold": float(self.threshold),
        }

    @classmethod
    def from_record(cls, network: nn.Module, record: Mapping[str, Any]) -> Specialist:
        """The specialist that `record` describes, around its network."""
        other: Other = record["other"]
        question = Question(own=tuple(record["own"]), classes=record["classes"], names=tuple(record["names"]), other=other)
        return cls(network, question, rows=record["rows"], threshold=record["threshold"])

    def extra_repr(self) -> str:
        return f"own={self.question.name}, threshold={float(self.threshold):.4g}"


class Panel(nn.Module):
    """Specialists of one class each that answer the full question together: the class with the highest own margin.

    The margin of a specialist is its score. Which classes sit on the panel is up to the caller, so that only those that are
    needed have to be loaded; `classes` lists them in the order of the columns.

    Raises ModelError for specialists of several classes, and for two of one class.
    """

    def __init__(self, specialists: Sequence[Specialist]):
        super().__init__()
        several = next((s for s in specialists if not s.question.one), None)
        if several is not None or not specialists:
            what = f"and {several.question.name} has several" if several is not None else "and none was given"
            raise ModelError(f"a panel is made of specialists of one class each, {what}; use each_class=True")
        self.specialists = nn.ModuleList(specialists)
        self.classes = tuple(s.question.own[0] for s in specialists)
        if len(set(self.classes)) < len(self.classes):
            raise ModelError(
                f"two specialists of this panel answer for the same class: {self.classes}; give one for each class"
            )
        self.train(any(s.training for s in specialists))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(examples, classes on the panel) own margins."""
        return torch.stack([specialist(*args, **kwargs) for specialist in self.specialists], dim=-1)

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> Tensor:
        """(examples,) class with the highest own margin."""
        margins = self(*args, **kwargs)
        return torch.tensor(self.classes, device=margins.device)[margins.argmax(-1)]
