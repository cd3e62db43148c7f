"""What recovery minimises: distillation from the dense network, and cross-entropy where something is known to be right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resect.batches import Batch, device_of, forward
from resect.errors import DataError, ModelError

IGNORED = -100


def distillation_loss(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Mean over rows of T^2 KL(dense || small) at temperature T; both (rows, classes). Hinton et al. 2015, arXiv 1503.02531.

    >>> float(distillation_loss(torch.eye(3), torch.eye(3), 2.0))
    0.0
    """
    small, dense = (F.log_softmax(z.float() / temperature, dim=-1) for z in (logits, taught))
    return F.kl_div(small, dense, log_target=True, reduction="batchmean") * temperature**2


def recovery_loss(
    logits: Tensor, taught: Tensor | None, batch: Batch, *, temperature: float, distillation: float, causal: bool
) -> Tensor:
    """`distillation` of the divergence from the dense network and 1 - `distillation` of the cross-entropy.

    logits, taught: (size, classes) or (size, tokens, classes). What cannot be had is left out: without labels it is
    distillation alone, without a dense network cross-entropy alone. Tokens count one by one, padding does not. For a causal
    language model the right answer of a token is the next one of its input, unless the batch brings `labels` per token.

    Raises ModelError for other outputs, DataError where neither part can be had and for labels out of range.
    """
    if logits.ndim not in (2, 3) or logits.shape[-1] < 2:
        raise ModelError(
            f"the network returned shape {tuple(logits.shape)}; recovery reads logits (examples, classes) or (examples, "
            "tokens, classes) with at least 2 classes. For other outputs write Recovery(loss=...)"
        )
    targets = _targets(logits, batch, causal)
    if logits.ndim == 3:
        mask = batch.mask
        if mask is None or mask.shape != logits.shape[:2]:
            mask = torch.ones(logits.shape[:2], dtype=torch.bool)
        counted = mask.to(logits.device)
        logits, taught = logits[counted], None if taught is None else taught.to(logits.device)[counted]
        targets = None if targets is None else targets[counted]
    parts = []
    if taught is not None and distillation > 0:
        parts.append((distillation, distillation_loss(logits, taught.to(logits.device), temperature)))
    if targets is not None and (distillation < 1 or taught is None):
        parts.append((1 - distillation, _cross_entropy(logits, targets)))
    if not parts:
        raise DataError(
            "there is nothing to recover towards: the data have no labels, and there is no dense network to learn from; give "
            "batches (inputs, labels), or the dense network"
        )
    whole = sum(weight for weight, _ in parts) or 1.0
    return torch.stack([weight / whole * part for weight, part in parts]).sum() if len(parts) > 1 else parts[0][1]


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    known = targets[targets != IGNORED]
    if len(known) and (int(known.min()) < 0 or int(known.max()) >= logits.shape[-1]):
        raise DataError(
            f"labels run from {int(known.min())} to {int(known.max())}, but the network has {logits.shape[-1]} outputs: "
            f"0 to {logits.shape[-1] - 1}"
        )
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum") / max(len(known), 1)


def _targets(logits: Tensor, batch: Batch, causal: bool) -> Tensor | None:
    """(size,) or (size, tokens) right answers, -100 where there is none; None where nothing is known."""
    if logits.ndim == 2:
        return None if batch.labels is None else batch.labels.to(logits.device)
    if batch.tokens is None and not causal:
        return None
    answers = token_ids(batch) if batch.tokens is None else batch.tokens
    if answers is None or answers.shape != logits.shape[:2]:
        return None
    if causal:
        if batch.mask is not None and batch.tokens is None:
            answers = answers.masked_fill(~batch.mask, IGNORED)
        answers = F.pad(answers[:, 1:], (0, 1), value=IGNORED)
    return answers.to(logits.device)


def token_ids(batch: Batch) -> Tensor | None:
    """The (size, tokens) integer input of a language model, or None."""
    named = batch.kwargs.get("input_ids")
    for value in (named, *batch.args):
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point() and value.dtype != torch.bool:
            return value
    return None


def is_causal(model: nn.Module, batch: Batch) -> bool:
    """Whether a network predicts tokens from the tokens before them: another last token leaves all earlier outputs as they are.

    False where inputs are not tokens or the outputs not one row per token over a vocabulary that holds them.
    """
    ids = token_ids(batch)
    if ids is None or ids.shape[1] < 2:
        return False
    with torch.no_grad():
        logits = forward(model, batch, device=device_of(model))
        if logits.ndim != 3 or logits.shape[:2] != ids.shape or int(ids.max()) >= logits.shape[-1]:
            return False
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % logits.shape[-1]
        args = tuple(changed if value is ids else value for value in batch.args)
        kwargs = {name: changed if value is ids else value for name, value in batch.kwargs.items()}
        other = forward(model, Batch(args=args, kwargs=kwargs, labels=None, mask=batch.mask, size=batch.size))
    before, last = (logits - other)[:, :-1].abs().max(), (logits - other)[:, -1].abs().max()
    return bool(before <= 1e-4 * logits.abs().max()) and bool(last > before)
