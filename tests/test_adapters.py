"""Recovery through adapters: only they are trained, they are merged, and nothing of them is left."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

import resect
from laws import batches_like, snapshot
from resect.recovery.adapters import attach, merge
from resect.surgery import state_digest
from zoo import WHOLE


def examples(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Four classes around four centres, in 8 features."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=draw)
    inputs = torch.randn(count, 8, generator=draw) + 2 * torch.eye(4, 8)[labels]
    return list(zip(inputs.split(100), labels.split(100)))


class Mixed(nn.Module):
    """A convolution, one in groups, a batch norm, a tied pair of layers, a layer with a frozen weight, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped = nn.Conv1d(1, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.norm, self.one, self.two = nn.BatchNorm1d(8), nn.Linear(64, 64), nn.Linear(64, 64)
        self.two.weight = self.one.weight
        self.frozen, self.head = nn.Linear(64, 32), nn.Linear(32, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.grouped(self.conv(x[:, None])))).flatten(1)
        return self.head(torch.relu(self.frozen(torch.relu(self.two(torch.relu(self.one(x)))))))


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    settings = resect.Recovery(steps=60, learning_rate=1e-2)
    return resect.recover(None, Mixed().eval(), examples(600, 0), settings).model


@pytest.fixture(scope="module")
def small(dense: nn.Module) -> nn.Module:
    return resect.cut(dense, resect.Plan.random(resect.dissect(dense, examples(4, 0)[0][0]), ratio=0.6, seed=1))


def settings(**options) -> resect.Recovery:
    return resect.Recovery(**{"steps": 40, "learning_rate": 1e-2, "adapters": 4, **options})


def test_only_what_can_be_merged_is_trained(dense: nn.Module, small: nn.Module) -> None:
    before = snapshot(dense), snapshot(small)
    val = examples(400, 3)
    result = resect.recover(dense, small, examples(600, 0), settings(), val=val)
    assert (snapshot(dense), snapshot(small)) == before
    assert resect.evaluate(result.model, val).accuracy > resect.evaluate(small, val).accuracy
    old, new = small.state_dict(), result.model.state_dict()
    assert list(old) == list(new)
    assert {name for name in old if not torch.equal(old[name], new[name])} == {"conv.weight", "head.weight"}
    assert {n: p.requires_grad for n, p in result.model.named_parameters()} == {
        n: p.requires_grad for n, p in small.named_parameters()
    }
    assert type(result.model) is Mixed
    assert vars(result.model).keys() == vars(small).keys()
    # The best network was chosen before its adapters were merged: both answer the same.
    best = next(check for check in result.history if check.step == result.best)
    assert best.val_accuracy == resect.evaluate(result.model, val).accuracy


def test_a_layer_that_is_used_in_two_places_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
            self.again = self.one

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.again(torch.relu(self.one(x)))))

    torch.manual_seed(0)
    network = Twice().eval()
    result = resect.recover(None, network, examples(600, 0), settings(), val=(val := examples(400, 3)))
    assert torch.equal(result.model.one.weight, network.one.weight)
    assert not torch.equal(result.model.head.weight, network.head.weight)
    best = next(check for check in result.history if check.step == result.best)
    assert best.val_accuracy == resect.evaluate(result.model, val).accuracy


def test_adapters_are_no_wider_than_their_layer(small: nn.Module) -> None:
    network = copy.deepcopy(small)
    adapted = attach(network, 16)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if p.requires_grad}
    inputs = small.head.in_features
    assert shapes["conv.lora_A.default.weight"] == (1, 1, 3)
    assert shapes["head.lora_A.default.weight"] == (min(4, inputs), inputs)
    assert network.head.scaling["default"] == network.conv.scaling["default"] == 2
    # Nothing was trained: the product of the two is 0, and the weights come back as they were.
    assert state_digest(merge(adapted, small)) == state_digest(small)


def test_same_seed_same_bytes_also_after_a_kill(dense: nn.Module, small: nn.Module, tmp_path) -> None:
    data, val, steps = examples(600, 0), examples(200, 3), 0
    whole = resect.recover(dense, small, data, settings(), val=val, work=tmp_path / "whole")

    class Killed(Mixed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal steps
            steps += self.training
            if steps == 25:
                raise KeyboardInterrupt
            return super().forward(x)

    dying = copy.deepcopy(small)
    dying.__class__ = Killed
    with pytest.raises(KeyboardInterrupt):
        resect.recover(dense, dying, data, settings(), val=val, work=tmp_path / "killed")
    resumed = resect.recover(dense, small, data, settings(), val=val, work=tmp_path / "killed")
    assert state_digest(resumed.model) == state_digest(whole.model)
    assert repr(resumed.history) == repr(whole.history)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_language_models_keep_their_embeddings(name: str) -> None:
    if name not in WHOLE:
        pytest.skip("transformers is not installed")
    model, example = WHOLE[name]()
    small = resect.cut(model, resect.Plan.random(resect.dissect(model, example), ratio=0.3))
    result = resect.recover(model, small, batches_like(example, count=2, size=4), settings(steps=12, distillation=1.0))
    assert result.history[-1].loss < result.history[1].loss
    old, new = small.state_dict(), result.model.state_dict()
    assert list(old) == list(new)
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed
    assert not [key for key in changed if "norm" in key or "ln_" in key or "embed" in key or "wte" in key]


def test_a_network_in_half_precision_can_be_recovered_this_way(dense: nn.Module, small: nn.Module) -> None:
    half = copy.deepcopy(small).bfloat16()
    data = [(x.bfloat16(), y) for x, y in examples(600, 0)]
    with pytest.raises(resect.ModelError, match="small steps are lost"):
        resect.recover(None, half, data, settings(adapters=None))
    result = resect.recover(None, half, data, settings())
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert result.history[-1].loss < result.history[1].loss


def test_where_nothing_can_be_adapted(dense: nn.Module, small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = copy.deepcopy(small).requires_grad_(False)
    with pytest.raises(resect.ModelError, match="can take an adapter"):
        resect.recover(dense, frozen, examples(100, 0), settings())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(resect.GoalError, match=r"resect\[adapters\]"):
        resect.recover(dense, small, examples(100, 0), settings())


@pytest.mark.parametrize("adapters", [0, -1, 2.5, "many", True])
def test_ranks_that_are_none(adapters: object) -> None:
    with pytest.raises(resect.GoalError, match="adapters"):
        resect.Recovery(adapters=adapters)
