"""The final repair in execution order: halted passes, what is made again, targets below a rectifier, two weights in turn."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resect
from resect import Plan, repair_sequentially
from resect.repair import fidelity
from resect.tracing import survey
from resect.tracing.trace import HELD_OUT_EVERY


class Residual(nn.Module):
    """Two residual blocks with batch norm; `in_place` writes sums and rectifiers over their inputs."""

    def __init__(self, *, in_place: bool = False, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(8, 12, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(2))
        self.outer = nn.ModuleList(nn.Conv2d(12, 8, 3, padding=1, bias=False) for _ in range(2))
        self.closing = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.head = nn.Linear(8, 4)
        self.in_place = in_place
        self.train()
        with torch.no_grad():
            for _ in range(10):
                self(torch.randn(64, 2, 6, 6))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=self.in_place)
        for inner, norm, outer, closing in zip(self.inner, self.norms, self.outer, self.closing):
            y = closing(outer(F.relu(norm(inner(x)), inplace=self.in_place)))
            if self.in_place:
                y += x
                x = F.relu_(y)
            else:
                x = F.relu(y + x)
        return self.head(x.mean((2, 3)))


class StreamInPlace(Residual):
    """The stream itself is what the block's output is added to in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for inner, norm, outer, closing in zip(self.inner, self.norms, self.outer, self.closing):
            x.add_(closing(outer(F.relu(norm(inner(x))))))
        return self.head(x.mean((2, 3)))


def perceptron(activation: type[nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 32), activation(), nn.Linear(32, 20), activation(), nn.Linear(20, 3)).eval()


def images(count: int = 300, seed: int = 1) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def rows(count: int = 900, seed: int = 1) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def prepared(model: nn.Module, x: Tensor, ratio: float = 0.5) -> tuple[nn.Module, Plan, list[Tensor]]:
    data = list(x.split(100))
    trace = resect.trace(model, data, resect.dissect(model, x[:2]))
    plan = Plan.random(trace.anatomy, ratio=ratio, seed=0)
    return resect.cut(model, plan, weights=resect.repair(trace, plan).weights), plan, data


def facts(model: nn.Module, x: Tensor) -> dict[str, tuple[bool, bool, str | None]]:
    anatomy = resect.dissect(model, x)
    weights = [name for name in anatomy.parameters if len(anatomy.shapes[name]) >= 2]
    return {name: (r.residual, r.rectified, r.fed_by) for name, r in survey(model, anatomy, weights).items()}


@pytest.mark.parametrize("in_place", [False, True])
def test_what_stands_behind_readers_is_seen(in_place: bool) -> None:
    seen = facts(Residual(in_place=in_place), images(2))
    assert seen["stem.weight"] == (False, True, None)
    assert seen["inner.0.weight"] == (False, True, None)
    assert seen["outer.1.weight"] == (True, True, "inner.1.weight")
    assert seen["head.weight"] == (False, False, None)


def test_an_output_that_others_look_at_is_not_rectified() -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            hidden = F.relu(y)
            return self.third(F.relu(self.second(hidden)) + hidden) + y.sum(1, keepdim=True)

    seen = facts(Looked().eval(), rows(2))
    assert seen["first.weight"] == (False, False, None)
    # Two look at the first layer's hidden values, so it may not be moved for one of them.
    assert seen["second.weight"] == (False, True, None)


@pytest.mark.parametrize("alternations", [0, 3])
@pytest.mark.parametrize("make", [Residual, lambda: Residual(in_place=True), StreamInPlace])
def test_the_reported_error_is_the_error_of_the_network_made(make, alternations: int) -> None:
    """What later readers read after earlier ones changed is what a pass from the start gives: the last step's error tells."""
    model, x = make(), images()
    small, plan, data = prepared(model, x)
    fixed, steps = repair_sequentially(model, small, plan, data, alternations=alternations)
    assert steps[-1].tensor == "head.weight"
    # The head was solved again on all rows; its error before is that of the network with the head it had.
    before = copy.deepcopy(fixed)
    before.head.load_state_dict(small.head.state_dict())
    judges = torch.arange(len(x)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    with torch.no_grad():
        target, got = model(x[judges]).double(), before(x[judges]).double()
    error = (got - target).square().sum() / (target - target.mean(0)).square().sum()
    assert steps[-1].error_before == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("alternations", [0, 3])
def test_in_place_makes_no_difference(alternations: int) -> None:
    fixed = []
    for in_place in (False, True):
        model = Residual(in_place=in_place)
        small, plan, data = prepared(model, images())
        fixed.append(repair_sequentially(model, small, plan, data, alternations=alternations)[0])
    for a, b in zip(fixed[0].state_dict().values(), fixed[1].state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make", [lambda: (Residual(), images()), lambda: (perceptron(), rows()), lambda: (perceptron(nn.GELU), rows())]
)
def test_fitting_in_turn_gets_closer_than_in_order_alone(make) -> None:
    model, x = make()
    small, plan, data = prepared(model, x)
    fresh = [images(200, seed=5) if x.ndim == 4 else rows(400, seed=5)]
    errors = [fidelity(model, small, fresh)]
    for alternations in (0, 5):
        fixed, steps = repair_sequentially(model, small, plan, data, alternations=alternations)
        errors.append(fidelity(model, fixed, fresh))
        assert all(step.error_after <= step.error_before for step in steps)
        assert any(step.together for step in steps) == (alternations > 0)
    assert errors[2] < errors[1] <= errors[0] * 1.001


@pytest.mark.parametrize(("padding", "kernel"), [("same", 3), ("same", 4), ("valid", 3), (2, 3)])
def test_convolutions_are_fitted_in_turn_however_they_are_padded(padding: str | int, kernel: int) -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 12, kernel, padding=padding), nn.Conv2d(12, 8, kernel, padding=padding, stride=1)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)).eval()
    small, plan, data = prepared(model, images())
    _, steps = repair_sequentially(model, small, plan, data, alternations=3)
    step = next(step for step in steps if step.tensor == "2.weight")
    assert step.together == "0.weight"
    assert step.error_after < step.error_before


def test_without_turns_the_units_that_stay_compute_what_they_did() -> None:
    model, x = perceptron(), rows()
    small, plan, data = prepared(model, x)
    fixed, _ = repair_sequentially(model, small, plan, data)
    kept = plan.keep["0"]
    assert torch.equal(fixed[0].weight, model[0].weight[torch.from_numpy(kept)])


def test_a_target_below_a_rectifier_is_met_by_anything_below() -> None:
    """Fewer units suffice where only the positive part of what the next layer makes has to be right."""
    model, x = perceptron(), rows()
    data = list(x.split(100))
    trace = resect.trace(model, data, resect.dissect(model, x[:2]))
    whole = Plan.all(trace.anatomy)
    plan = Plan(anatomy=trace.anatomy, keep={**whole.keep, "0": Plan.random(trace.anatomy, ratio=0.6).keep["0"]})
    plain = resect.cut(model, plan, weights=resect.repair(trace, plan).weights)
    fixed, _ = repair_sequentially(model, plain, plan, data)
    fresh = rows(500, seed=7)
    with torch.no_grad():
        target = model[:4](fresh)
        errors = [float((network[:4](fresh) - target).square().mean()) for network in (plain, fixed)]
    assert errors[1] < 0.95 * errors[0]


def test_little_memory_means_fewer_examples() -> None:
    model, x = perceptron(), rows()
    small, plan, data = prepared(model, x)
    first, _ = repair_sequentially(model, small, plan, data, memory=1.0)
    again, _ = repair_sequentially(model, small, plan, [x[:50]], memory=1e9)
    everything, _ = repair_sequentially(model, small, plan, data)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert not all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), everything.state_dict().values()))


def test_same_data_same_bytes_and_nothing_left_behind() -> None:
    model, x = Residual(), images()
    small, plan, data = prepared(model, x)
    before = [copy.deepcopy(network.state_dict()) for network in (model, small)]
    threads = threading.active_count()
    results = [repair_sequentially(model, small, plan, data, alternations=2)[0] for _ in range(2)]
    assert threading.active_count() == threads
    assert all(torch.equal(a, b) for a, b in zip(*(r.state_dict().values() for r in results)))
    for network, state in zip((model, small), before):
        assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())


def test_an_error_on_the_way_ends_every_pass() -> None:
    class Fails(Residual):
        failing = False

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            if self.failing:
                raise RuntimeError("no more")
            return x

    model = Fails()
    small, plan, data = prepared(model, images())
    threads = threading.active_count()
    model.failing = True
    with pytest.raises(resect.ModelError, match="no more"):
        repair_sequentially(model, small, plan, data)
    assert threading.active_count() == threads


def test_a_weight_that_is_read_twice_keeps_its_repair_from_the_trace() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.shared, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            return self.last(F.relu(self.shared(F.relu(self.shared(x)))))

    model, x = Twice().eval(), rows()
    small, plan, data = prepared(model, x, ratio=0.25)
    fixed, steps = repair_sequentially(model, small, plan, data)
    assert "shared.weight" not in {step.tensor for step in steps}
    assert torch.equal(fixed.shared.weight, small.shared.weight)
