"""Repair: against a plain least-squares solution, in every rung, with singular and tiny data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import resect
from resect import Plan
from resect.repair import fidelity, reestimate, repair_sequentially


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def cnn(seed: int = 0, *, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1, bias=bias),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding=1, bias=bias),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(64, 2, 6, 6))
    return model.eval()


def prepared(model: nn.Module, x: torch.Tensor, *, ratio: float = 0.4, seed: int = 0):
    data = list(x.split(50))
    anatomy = resect.dissect(model, x[:2])
    return resect.trace(model, data, anatomy), Plan.random(anatomy, ratio=ratio, seed=seed), data


def test_one_reader_equals_plain_least_squares() -> None:
    model, x = mlp(), torch.randn(800, 6)
    trace, plan, _ = prepared(model, x)
    whole = Plan.all(trace.anatomy)
    plan = Plan(anatomy=trace.anatomy, keep={**whole.keep, "0": plan.keep["0"]})
    small = resect.cut(model, plan, weights=resect.repair(trace, plan).weights)
    with torch.no_grad():
        hidden = model[:2](x).double()
        target = model[2](model[:2](x)).double().numpy()
    rows = np.concatenate([hidden.numpy()[:, plan.keep["0"]], np.ones((len(x), 1))], axis=1)
    solution, *_ = np.linalg.lstsq(rows, target, rcond=None)
    best = np.square(rows @ solution - target).mean()
    with torch.no_grad():
        got = np.square(small[:3](x).double().numpy() - target).mean()
    assert got <= best * 1.02


@pytest.mark.parametrize("make", [mlp, cnn, lambda: cnn(bias=True)])
def test_every_rung_is_at_least_as_faithful_as_the_one_below(make) -> None:
    model = make()
    x = torch.randn(600, 6) if isinstance(model[0], nn.Linear) else torch.randn(600, 2, 6, 6)
    trace, plan, data = prepared(model, x)
    errors = {
        method: fidelity(model, resect.cut(model, plan, weights=resect.repair(trace, plan, method).weights), data)
        for method in ("none", "least_squares")
    }
    small = resect.cut(model, plan, weights=resect.repair(trace, plan).weights)
    sequential, steps = repair_sequentially(model, small, plan, data)
    assert errors["least_squares"] < 0.8 * errors["none"]
    assert fidelity(model, sequential, data) <= errors["least_squares"] * 1.01
    assert {step.tensor for step in steps} >= set(trace.readers)
    assert all(step.error_after <= step.error_before + 1e-12 for step in steps)


def test_the_mean_of_a_constant_unit_is_folded_exactly() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 2.5
    x = torch.randn(100, 3)
    anatomy = resect.dissect(model, x[:2])
    trace = resect.trace(model, [x], anatomy)
    plan = Plan(anatomy=anatomy, keep={"0": np.array([True, False, True, True])})
    for method in ("mean", "least_squares"):
        small = resect.cut(model, plan, weights=resect.repair(trace, plan, method).weights)
        with torch.no_grad():
            torch.testing.assert_close(small(x), model(x), atol=1e-4, rtol=1e-4)


def test_none_leaves_the_weights_alone() -> None:
    trace, plan, _ = prepared(mlp(), torch.randn(300, 6))
    fixed = resect.repair(trace, plan, "none")
    assert fixed.weights == {}
    assert {choice.method for choice in fixed.choices.values()} == {"none"}


@pytest.mark.parametrize("examples", [1, 3, 10])
def test_fewer_examples_than_units(examples: int) -> None:
    model, x = mlp(), torch.randn(examples, 6)
    trace, plan, _ = prepared(model, x)
    small = resect.cut(model, plan, weights=resect.repair(trace, plan).weights)
    assert torch.isfinite(small(torch.randn(20, 6))).all()


def test_dead_and_duplicated_units() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[:5] = 0
        model[0].bias[:5] = -1
        model[0].weight[6], model[0].bias[6] = model[0].weight[5], model[0].bias[5]
    x = torch.randn(400, 6)
    anatomy = resect.dissect(model, x[:2])
    trace = resect.trace(model, [x], anatomy)
    keep = np.ones(24, dtype=bool)
    keep[[0, 1, 2, 3, 4, 6]] = False
    plan = Plan(anatomy=anatomy, keep={**Plan.all(anatomy).keep, "0": keep})
    small = resect.cut(model, plan, weights=resect.repair(trace, plan).weights)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), atol=2e-3, rtol=2e-3)
    scores = resect.score(trace, "reconstruction")
    # Dead units and one of the twins are the first to go.
    assert set(np.argsort(scores.values["0"])[:6]) <= {0, 1, 2, 3, 4, 5, 6}


def test_half_precision_weights() -> None:
    model = mlp().to(torch.bfloat16)
    x = torch.randn(200, 6).to(torch.bfloat16)
    trace, plan, _ = prepared(model, x)
    small = resect.cut(model, plan, weights=resect.repair(trace, plan).weights)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert torch.isfinite(small(x)).all()


def test_repair_in_float64_does_not_touch_the_model() -> None:
    model = mlp().double()
    x = torch.randn(200, 6, dtype=torch.float64)
    before = resect.surgery.state_digest(model)
    trace, plan, data = prepared(model, x)
    small = resect.cut(model, plan, weights=resect.repair(trace, plan).weights)
    repair_sequentially(model, small, plan, data)
    assert resect.surgery.state_digest(model) == before


def test_a_reader_of_two_groups_is_repaired_for_both() -> None:
    class Concat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.out = nn.Linear(6, 10), nn.Linear(6, 12), nn.Linear(22, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.cat([self.a(x).relu(), self.b(x).relu()], 1))

    model, x = Concat().eval(), torch.randn(500, 6)
    trace, plan, data = prepared(model, x)
    repaired = resect.cut(model, plan, weights=resect.repair(trace, plan).weights)
    assert fidelity(model, repaired, data) < 0.8 * fidelity(model, resect.cut(model, plan), data)


def test_batch_norm_statistics_are_renewed_only_where_that_helps() -> None:
    model, x = cnn(), torch.randn(400, 2, 6, 6)
    _, plan, data = prepared(model, x, ratio=0.6)
    small = resect.cut(model, plan)
    renewed, new = reestimate(model, small, data)
    assert new == (fidelity(model, renewed, data) < fidelity(model, small, data))
    assert [m.training for m in renewed.modules()] == [m.training for m in small.modules()]
    same, changed = reestimate(model, model, data)
    assert not changed or fidelity(model, same, data) > 0
    assert reestimate(mlp(), mlp(), [torch.randn(10, 6)])[1] is False


def test_an_unknown_repair_is_named() -> None:
    trace, plan, _ = prepared(mlp(), torch.randn(100, 6))
    with pytest.raises(resect.PlanError, match="no repair 'best'"):
        resect.repair(trace, plan, "best")  # type: ignore[arg-type]
