"""The laws of resect as functions of a network: each asserts one law, so that tests can run every law over every network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import resect
from resect.anatomy import Anatomy, slicing
from resect.batches import forward, unpack
from resect.repair.closed_form import _blocks, _problems, kept_columns
from resect.surgery import state_digest

SCORER_NAMES = (
    "firing_rate", "peak", "contribution", "magnitude", "activation_weight", "fluctuation", "taylor", "spectral", "isolation",
    "input_only", "random",
)  # fmt: skip


def batches_like(example: Any, *, count: int = 3, size: int = 20, seed: int = 0) -> list[Any]:
    """Seeded unlabelled batches with the shapes and types of an example (tensor, tuple or dict)."""
    draw = torch.Generator().manual_seed(seed)

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            return value
        shape = (size, *value.shape[1:])
        if value.is_floating_point():
            return torch.randn(shape, generator=draw, dtype=torch.float32).to(value.dtype)
        return torch.randint(0, int(value.max()) + 1, shape, generator=draw).to(value.dtype)

    def batch() -> Any:
        if isinstance(example, torch.Tensor):
            return fresh(example)
        if isinstance(example, dict):
            return {name: fresh(value) for name, value in example.items()}
        return {"args": tuple(map(fresh, example))}["args"] if len(example) > 1 else fresh(example[0])

    return [batch() for _ in range(count)]


def run(model: nn.Module, anatomy: Anatomy) -> torch.Tensor:
    """Main output on the anatomy's example."""
    args, kwargs = anatomy.example
    with torch.no_grad():
        return resect.batches.main_output(model(*args, **kwargs))


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Bytes, mode and hooks of a network."""
    hooks = [
        len(getattr(module, name))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]
    gradients = [parameter.grad is None for parameter in model.parameters()]
    return (
        state_digest(model),
        [m.training for m in model.modules()],
        hooks,
        gradients,
        [p.requires_grad for p in model.parameters()],
    )


def law_1_keeping_all_changes_no_bit(model: nn.Module, anatomy: Anatomy) -> None:
    whole = resect.cut(model, resect.Plan.all(anatomy))
    assert torch.equal(run(whole, anatomy), run(model, anatomy))


def law_2_cut_equals_masked(model: nn.Module, anatomy: Anatomy) -> None:
    for seed in range(2):
        assert resect.testing.check_cut(model, None, anatomy=anatomy, seed=seed)


def law_3_the_model_is_left_alone(model: nn.Module, anatomy: Anatomy, data: Sequence[Any]) -> None:
    before = snapshot(model)
    plan = resect.Plan.random(anatomy, ratio=0.5)
    trace = resect.trace(model, data, anatomy)
    resect.cut(model, plan, weights=resect.repair(trace, plan).weights)
    with resect.masked(model, plan):
        pass
    assert snapshot(model) == before

    def broken():
        yield data[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resect.trace(model, broken(), anatomy)
    with pytest.raises(KeyboardInterrupt), resect.masked(model, plan):
        raise KeyboardInterrupt
    assert snapshot(model) == before


def law_4_traces_add(model: nn.Module, anatomy: Anatomy, data: Sequence[Any]) -> None:
    first, second = (resect.trace(model, part, anatomy, states=32) for part in (data[:1], data[1:]))
    whole = resect.trace(model, data, anatomy, states=32)
    for joined in (first + second, second + first):
        assert np.array_equal(joined.examples, whole.examples)
        assert set(joined.states) == set(whole.states)
        for name, states in whole.states.items():
            for field in ("keys", "pre", "post"):
                assert np.array_equal(getattr(states, field), getattr(joined.states[name], field)), (name, field)
        for name, sums in whole.sums.items():
            other = joined.sums[name]
            for field in ("fired", "peak", "low", "octaves", "positions"):
                assert np.array_equal(getattr(sums, field), getattr(other, field)), (name, field)
            for field in ("total", "square"):
                np.testing.assert_allclose(getattr(sums, field), getattr(other, field), rtol=1e-6, atol=1e-6)
            if sums.gram is not None:
                scale = np.abs(sums.gram).max()
                np.testing.assert_allclose(sums.gram + sums.held, other.gram + other.held, rtol=1e-6, atol=1e-9 * scale)


def permuted_model(model: nn.Module, anatomy: Anatomy, orders: dict[str, np.ndarray]) -> nn.Module:
    """The same function with the units of every group in another order."""
    other = copy.deepcopy(model)
    tensors = slicing.named_tensors(other)
    with torch.no_grad():
        for group in anatomy.groups:
            for part in group.slices:
                if part.blocks > 1:
                    continue
                old, new = part.index.ravel(), part.index[orders[group.name]].ravel()
                source = tensors[part.tensor].clone()
                tensors[part.tensor].index_copy_(
                    part.axis, torch.from_numpy(old), source.index_select(part.axis, torch.from_numpy(new))
                )
    return other


def law_5_permuted_units_have_permuted_scores(
    model: nn.Module, anatomy: Anatomy, data: Sequence[Any], names: Sequence[str]
) -> None:
    if any(part.blocks > 1 for group in anatomy.groups for part in group.slices):
        return
    draw = np.random.default_rng(1)
    orders = {group.name: draw.permutation(group.units) for group in anatomy.groups}
    other = permuted_model(model, anatomy, orders)
    np.testing.assert_allclose(run(other, anatomy).numpy(), run(model, anatomy).numpy(), rtol=1e-3, atol=1e-4)
    needs = resect.scoring.needs(*names)
    one, two = (resect.trace(network, data, anatomy, **needs) for network in (model, other))
    for name in names:
        if name == "random":
            continue
        a, b = resect.score(one, name), resect.score(two, name)
        for group in one.anatomy.groups:
            expected = a.values[group.name][orders[group.name]]
            scale = np.abs(expected).max() + 1e-12
            np.testing.assert_allclose(
                b.values[group.name], expected, rtol=5e-3, atol=5e-3 * scale, err_msg=f"{name} {group.name}"
            )


def law_8_predicted_cost_is_counted_cost(model: nn.Module, anatomy: Anatomy) -> None:
    for ratio in (0.0, 0.3, 0.6):
        plan = resect.Plan.random(anatomy, ratio=ratio, seed=3)
        small, cost = resect.cut(model, plan), plan.cost()
        assert cost.parameters == sum(p.numel() for p in small.parameters())
        tensors = slicing.named_tensors(small).values()
        assert cost.bytes == sum(t.numel() * t.element_size() for t in tensors)
        args, kwargs = anatomy.example
        # The plain kernel of attention is made of products that the counter knows; the fused ones are not all.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            small(*args, **kwargs)
        examples = next(v.shape[0] for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
        assert cost.macs == pytest.approx(counter.get_total_flops() / 2 / examples, rel=1e-9)


def law_10_or_keeps_what_either_keeps(anatomy: Anatomy) -> None:
    a, b = resect.Plan.random(anatomy, ratio=0.5, seed=1), resect.Plan.random(anatomy, ratio=0.5, seed=2)
    if any(group.parts.max() > 0 or group.multiple_of > 1 for group in anatomy.groups):
        return
    joined = a | b
    for name in joined.keep:
        assert np.array_equal(joined.keep[name], a.keep[name] | b.keep[name])


def law_11_least_squares_is_never_worse_than_none(model: nn.Module, anatomy: Anatomy, data: Sequence[Any]) -> None:
    trace = resect.trace(model, data, anatomy)
    plan = resect.Plan.random(anatomy, ratio=0.5, seed=4)
    for name, kept in kept_columns(trace, plan).items():
        if trace.sums[name].gram is None:
            continue
        blocks = [replace(block, held=block.fit + block.held) for block in _blocks(trace, name)]
        for problem in _problems(blocks, kept, trace.weights[name].shape[trace.readers[name].axis]):
            unrepaired = problem.error(problem.none())
            for ridge in (1e-6, 1e-3, 1.0):
                change, _ = problem.least_squares(problem.block.held, ridge)
                assert problem.error(change) <= unrepaired * (1 + 1e-6) + 1e-9 * (1 + problem.block.size)


def labelled(model: nn.Module, data: Sequence[Any]) -> list[Any]:
    """The batches with the network's own answers as labels (its accuracy on them is 1)."""
    result = []
    for item in data:
        batch = unpack(item) if not isinstance(item, tuple) else unpack((*item, torch.zeros(len(item[0]), dtype=torch.long)))
        with torch.no_grad():
            answers = forward(model, batch).argmax(-1)
        result.append({**item, "labels": answers} if isinstance(item, dict) else (*batch.args, answers))
    return result


Law = Callable[..., None]
