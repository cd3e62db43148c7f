"""How much the network's answers suffer from each group: what turns reconstruction errors of layers into one currency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from resect.batches import forward, unpack
from resect.plan import Plan, valid_count
from resect.repair import Method, repair
from resect.scoring import Scores
from resect.searching.allocation import Curves
from resect.surgery import cut

PROBES = (0.7, 0.4)
EXAMPLES = 512


def divergence(expected: Sequence[Tensor], model: nn.Module, data: Sequence[Any]) -> float:
    """Mean Kullback-Leibler divergence in nats from the dense network's answers (logits per batch) to a network's."""
    total = count = 0.0
    with torch.inference_mode():
        for logits, item in zip(expected, data):
            batch = unpack(item)
            now = F.log_softmax(forward(model, batch).double(), dim=-1)
            before = F.log_softmax(logits.double(), dim=-1)
            total += float((before.exp() * (before - now)).sum())
            count += now[..., 0].numel()
    return total / max(count, 1.0)


def from_dense(model: nn.Module, data: Sequence[Any]) -> Callable[[nn.Module], float]:
    """What tells the divergence of a network's answers from the dense network's, on a few hundred examples of the data."""
    few = first_examples(data, EXAMPLES)
    with torch.inference_mode():
        expected = [forward(model, unpack(item)) for item in few]
    return lambda network: divergence(expected, network, few)


def weighed(
    curves: Curves,
    model: nn.Module,
    scores: Scores,
    harm: Callable[[nn.Module], float],
    method: Method,
    *,
    quiet: bool = True,
) -> tuple[Curves, float]:
    """Curves in nats of divergence from the dense network's answers, and the passes over the examples of `harm` that it took.

    harm: tells how far the answers of a network are from those of the dense one, in nats (see `from_dense`). Each group alone
    is cut to 70 and to 40 % of its units and repaired from the trace: the ratio of the harm to the predicted error,
    interpolated in between, weighs the group's whole curve. Labels are not used.
    """
    whole, passes = Plan.all(scores.anatomy), 1.0
    dense = whole.cost().macs
    errors = {}
    for group in track(scores.anatomy.groups, description="weighing groups", disable=quiet, transient=True):
        counts, ratios = [], []
        for share in PROBES:
            count = valid_count(group, share * group.units)
            plan = Plan.top(scores.anatomy, scores.values, {**whole.kept, group.name: count})
            small = cut(model, plan, weights=repair(scores.trace, plan, method).weights, verify=False)
            predicted = float(np.interp(count, curves.counts[group.name], curves.errors[group.name]))
            counts.append(count)
            ratios.append(max(harm(small), 1e-9) / max(predicted, 1e-9))
            passes += plan.cost().macs / max(dense, 1.0)
        order = np.argsort(counts)
        weights = np.exp(np.interp(curves.counts[group.name], np.array(counts)[order], np.log(ratios)[order]))
        errors[group.name] = np.minimum.accumulate(curves.errors[group.name] * weights)
    return replace(curves, errors=errors), passes


def first_examples(data: Sequence[Any], most: int) -> list[Any]:
    """Whole batches from the start of the data, until there are at least so many examples."""
    chosen, count = [], 0
    for item in data:
        if count >= most:
            break
        chosen.append(item)
        count += unpack(item).size
    return chosen
