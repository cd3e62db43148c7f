"""Recovery: it helps, it is deterministic and resumable, it stops when it diverges, and it leaves its inputs alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import resect
from laws import batches_like, snapshot
from resect.batches import unpack
from resect.recovery.feeding import feed
from resect.recovery.losses import distillation_loss, is_causal, recovery_loss
from resect.recovery.training import rise_and_fall
from resect.surgery import state_digest
from zoo import WHOLE


def blobs(count: int = 600, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes around four centres, in 8 features."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=draw)
    return torch.randn(count, 8, generator=draw) + 2 * torch.eye(4, 8)[labels], labels


def batches(count: int = 600, seed: int = 0, size: int = 100) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs, labels = blobs(count, seed)
    return list(zip(inputs.split(size), labels.split(size)))


class Normed(nn.Module):
    """A perceptron with batch norm and dropout, whose buffers and random draws a recovery must keep in order."""

    def __init__(self, width: int = 32, dropout: float = 0.2):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 4)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(F.dropout(F.relu(self.norm(self.inner(x))), self.dropout, self.training))


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return resect.recover(None, Normed().eval(), batches(), resect.Recovery(epochs=5, learning_rate=1e-2)).model


@pytest.fixture(scope="module")
def small(dense: nn.Module) -> nn.Module:
    anatomy = resect.dissect(dense, blobs(4)[0])
    return resect.cut(dense, resect.Plan.random(anatomy, ratio=0.8, seed=2))


def test_training_from_fresh_weights_needs_no_dense_network(dense: nn.Module) -> None:
    assert resect.evaluate(dense, batches(seed=1)).accuracy > 0.8


def test_it_recovers_what_a_cut_lost_and_changes_neither_network(dense: nn.Module, small: nn.Module) -> None:
    before = snapshot(dense), snapshot(small)
    state = torch.get_rng_state()
    val = batches(400, seed=3)
    result = resect.recover(dense, small, batches(), resect.Recovery(epochs=8), val=val)
    assert (snapshot(dense), snapshot(small)) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not result.diverged
    assert set(result.tried) == {1e-3, 3e-4, 3e-3}
    assert resect.evaluate(result.model, val).accuracy > resect.evaluate(small, val).accuracy
    best = max(result.history, key=lambda check: (check.val_accuracy, -check.val_loss))
    assert result.best == best.step
    assert best.val_accuracy == resect.evaluate(result.model, val).accuracy
    assert not any(module.training for module in result.model.modules())
    assert all(p.grad is None for p in result.model.parameters())


def test_without_labels_it_is_distillation_alone(dense: nn.Module, small: nn.Module) -> None:
    data = [inputs for inputs, _ in batches()]
    result = resect.recover(dense, small, data, resect.Recovery(epochs=8, learning_rate=3e-3), val=data)
    assert math.isnan(result.history[-1].val_accuracy)
    assert min(check.val_loss for check in result.history) < 0.7 * result.history[0].val_loss
    unlabelled = resect.recover(dense, small, data, resect.Recovery(steps=20, learning_rate=3e-3))
    alone = resect.recover(dense, small, batches(), resect.Recovery(steps=20, learning_rate=3e-3, distillation=1.0))
    assert state_digest(unlabelled.model) == state_digest(alone.model)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_same_seed_same_bytes(dense: nn.Module, small: nn.Module, optimizer: str) -> None:
    settings = resect.Recovery(steps=20, optimizer=optimizer)
    one, two = (resect.recover(dense, small, batches(), settings, val=batches(200, 3)) for _ in range(2))
    assert state_digest(one.model) == state_digest(two.model)
    other = resect.recover(dense, small, batches(), resect.Recovery(steps=20, optimizer=optimizer, seed=1))
    assert state_digest(other.model) != state_digest(one.model)


def loader(augmented: bool = True) -> DataLoader:
    """Shuffled, and with noise drawn anew for every example."""

    class Noisy(TensorDataset):
        def __getitem__(self, row: int):
            inputs, labels = super().__getitem__(row)
            return inputs + 0.1 * torch.randn_like(inputs), labels

    return DataLoader(Noisy(*blobs(300)), batch_size=32, shuffle=True)


@pytest.mark.parametrize("killed_at", [7, 33, 61, 75])
@pytest.mark.parametrize("make", [lambda: batches(), loader])
def test_a_killed_run_ends_with_the_same_bytes(dense, small, tmp_path, killed_at: int, make) -> None:
    calls, deadly = 0, killed_at

    def loss(logits, taught, batch):
        nonlocal calls
        calls += 1
        if calls == deadly:
            raise KeyboardInterrupt
        return recovery_loss(logits, taught, batch, temperature=2.0, distillation=0.5, causal=False)

    def run(work):
        settings = resect.Recovery(steps=50, loss=loss)
        return resect.recover(dense, small, make(), settings, val=batches(200, 3, size=200), work=work)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    deadly, calls = 0, 0
    resumed, spent = run(tmp_path / "killed"), calls
    calls = 0
    whole = run(tmp_path / "whole")
    assert state_digest(resumed.model) == state_digest(whole.model)
    # NaN, the loss before the first step, is not equal to itself.
    assert repr(resumed.history) == repr(whole.history)
    # What was done before is not done again, except for the first learning rate tried, which takes 10 steps.
    assert spent < calls or killed_at <= 10
    again = run(tmp_path / "killed")
    assert state_digest(again.model) == state_digest(whole.model)


def test_a_checkpoint_of_another_run_is_refused(dense: nn.Module, small: nn.Module, tmp_path) -> None:
    resect.recover(dense, small, batches(), resect.Recovery(steps=5, learning_rate=1e-3), work=tmp_path)
    with pytest.raises(resect.FileError, match="settings"):
        resect.recover(dense, small, batches(), resect.Recovery(steps=6, learning_rate=1e-3), work=tmp_path)
    with pytest.raises(resect.FileError, match="data"):
        resect.recover(dense, small, batches(seed=5), resect.Recovery(steps=5, learning_rate=1e-3), work=tmp_path)
    (tmp_path / "recovery.pt").write_bytes(b"half a file")
    with pytest.raises(resect.FileError, match="truncated"):
        resect.recover(dense, small, batches(), resect.Recovery(steps=5, learning_rate=1e-3), work=tmp_path)


@pytest.mark.parametrize("val", [None, batches(200, 3)])
def test_a_recovery_that_diverges_stops_keeps_the_best_and_says_so(dense, small, val) -> None:
    result = resect.recover(dense, small, batches(), resect.Recovery(steps=40, learning_rate=1e4), val=val)
    assert result.diverged
    assert result.steps < 40
    assert "diverged at step" in result.notes[0]
    assert state_digest(result.model) == state_digest(small)
    swept = resect.recover(dense, small, batches(), resect.Recovery(steps=40, learning_rate=(1e4, 1e5)), val=val)
    assert "every learning rate" in swept.notes[0]
    assert state_digest(swept.model) == state_digest(small)


def test_a_loss_that_turns_nan_keeps_the_best_network_until_then(dense: nn.Module, small: nn.Module) -> None:
    calls = 0

    def loss(logits, taught, batch):
        nonlocal calls
        calls += logits.requires_grad
        return F.cross_entropy(logits, batch.labels) * (float("nan") if calls > 30 else 1.0)

    settings = resect.Recovery(steps=40, learning_rate=1e-3, loss=loss)
    result = resect.recover(dense, small, batches(), settings, val=None)
    assert result.diverged
    assert 0 < result.best <= 30
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_a_sweep_takes_the_rate_that_ends_lowest(dense: nn.Module, small: nn.Module) -> None:
    settings = resect.Recovery(steps=40, learning_rate=(1e-6, 3e-3, 1e4))
    result = resect.recover(dense, small, batches(), settings, val=batches(200, 3))
    assert result.learning_rate == 3e-3
    assert result.tried[1e4] > result.tried[1e-6] > result.tried[3e-3]


def test_a_training_step_of_the_users_own(dense: nn.Module, small: nn.Module) -> None:
    seen = []

    def step(network, teacher, batch):
        seen.append(teacher is dense)
        return F.mse_loss(network(batch[0]), teacher(batch[0]).detach())

    result = resect.recover(dense, small, batches(), resect.Recovery(steps=30, learning_rate=3e-3, training_step=step))
    assert all(seen)
    assert result.history[-1].loss < result.history[1].loss


def test_batch_norm_statistics_follow_and_frozen_ones_do_not(dense: nn.Module, small: nn.Module) -> None:
    result = resect.recover(dense, small, batches(), resect.Recovery(steps=10, learning_rate=1e-3))
    assert not torch.equal(result.model.norm.running_mean, small.norm.running_mean)
    frozen = copy.deepcopy(small)
    frozen.norm.requires_grad_(False)
    result = resect.recover(dense, frozen, batches(), resect.Recovery(steps=10, learning_rate=1e-3))
    assert torch.equal(result.model.norm.running_mean, small.norm.running_mean)
    assert torch.equal(result.model.norm.weight, small.norm.weight)
    assert not torch.equal(result.model.inner.weight, small.inner.weight)


def test_a_last_batch_of_one_example_is_passed_over_by_a_batch_norm(dense: nn.Module, small: nn.Module) -> None:
    result = resect.recover(dense, small, batches(65), resect.Recovery(epochs=3, learning_rate=1e-3))
    assert result.steps == 6
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"data": []}, resect.DataError),
        ({"data": batches(), "val": []}, resect.DataError),
        ({"data": [(torch.zeros(4, 8), torch.tensor([0, 1, 2, 9]))]}, resect.DataError),
        ({"data": [torch.zeros(4, 8)], "dense": None}, resect.DataError),
        ({"data": batches(), "small": Normed().half().eval()}, resect.ModelError),
        ({"data": batches(), "small": Normed().eval().requires_grad_(False)}, resect.ModelError),
        ({"data": batches(), "small": Normed()}, resect.ModelError),
    ],
)
def test_bad_input_is_one_clear_error(dense: nn.Module, small: nn.Module, arguments: dict, error: type) -> None:
    given = {"dense": dense, "small": small, "val": None, **arguments}
    with pytest.raises(error):
        resect.recover(**given, recovery=resect.Recovery(steps=3, learning_rate=1e-3))


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"epochs": -1},
        {"epochs": 2, "steps": 5},
        {"learning_rate": 0.0},
        {"learning_rate": (1e-3, -1.0)},
        {"optimizer": "adam"},
        {"distillation": 1.5},
        {"batch": "many"},
    ],
)
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(resect.GoalError):
        resect.Recovery(**settings)


def test_the_rate_rises_and_falls_to_nothing() -> None:
    rates = [rise_and_fall(step, 200, 0.05) for step in range(200)]
    assert max(rates) == 1.0
    assert rates.index(1.0) == 9
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


def test_batches_go_on_from_any_step() -> None:
    for data in (batches(130, size=50), loader()):
        first = feed(data, 32, 5)
        stream = first.start(0)
        every = [unpack(next(stream)) for _ in range(3 * first.per_epoch)]
        for step in (1, first.per_epoch, first.per_epoch + 2):
            later = unpack(next(feed(data, 32, 5).start(step)))
            assert torch.equal(later.args[0], every[step].args[0])
        epoch = torch.cat([batch.labels for batch in every[: first.per_epoch]])
        assert len(epoch) == sum(unpack(batch).size for batch in data)
        assert not torch.equal(every[0].args[0], every[first.per_epoch].args[0])


class Causal(nn.Module):
    """A language model of one causal mixing, called like those of Hugging Face."""

    def __init__(self, *, causal: bool = True, vocabulary: int = 11, width: int = 16):
        super().__init__()
        self.embedding, self.causal = nn.Embedding(vocabulary, width), causal
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = self.embedding(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        past = x.cumsum(1) if self.causal else x.sum(1, keepdim=True) + x
        return {"logits": self.head(x + self.down(F.relu(self.up(past))))}


def sentences(count: int = 64, padded: int = 3) -> list[dict[str, torch.Tensor]]:
    """Tokens that count upwards from a random start, with padding at the end."""
    start = torch.randint(0, 11, (count, 1), generator=torch.Generator().manual_seed(0))
    ids = (start + torch.arange(9)) % 11
    mask = torch.ones_like(ids)
    mask[::2, 9 - padded :] = 0
    return [{"input_ids": a, "attention_mask": b} for a, b in zip(ids.split(16), mask.split(16))]


def test_causal_language_models_are_told_from_others() -> None:
    batch = unpack(sentences()[0])
    assert is_causal(Causal().eval(), batch)
    assert not is_causal(Causal(causal=False).eval(), batch)
    assert not is_causal(Normed().eval(), unpack(batches()[0]))


def test_a_language_model_learns_the_next_token_and_padding_does_not_count() -> None:
    torch.manual_seed(0)
    result = resect.recover(None, Causal().eval(), sentences(), resect.Recovery(steps=150, learning_rate=1e-2, batch=16))
    logits = result.model(**sentences()[0])["logits"]
    ids, mask = sentences()[0]["input_ids"], sentences()[0]["attention_mask"]
    known = mask[:, 1:].bool()
    assert float((logits.argmax(-1)[:, :-1] == ids[:, 1:])[known].double().mean()) > 0.95
    loss = {"temperature": 2.0, "distillation": 0.5, "causal": True}
    batch, taught = sentences()[0], torch.randn_like(logits)
    changed = {**batch, "input_ids": ids.masked_fill(mask == 0, 7)}
    scrambled = torch.where(mask[..., None] == 0, 99.0, logits)
    assert torch.equal(
        recovery_loss(logits, taught, unpack(batch), **loss), recovery_loss(scrambled, taught, unpack(changed), **loss)
    )


def test_labels_of_tokens_are_shifted_for_causal_models_only() -> None:
    batch = sentences(16, padded=0)[0]
    ids = batch["input_ids"]
    labelled = unpack({**batch, "labels": ids})
    assert labelled.labels is None
    assert torch.equal(labelled.tokens, ids)
    logits = 20.0 * F.one_hot(ids, 11).float()
    options = {"temperature": 2.0, "distillation": 0.5}
    assert float(recovery_loss(logits, None, labelled, causal=False, **options)) < 1e-3
    assert float(recovery_loss(logits, None, labelled, causal=True, **options)) > 10
    right = 20.0 * F.one_hot((ids + 1) % 11, 11).float()
    assert float(recovery_loss(right, None, labelled, causal=True, **options)) < 1e-3
    assert torch.equal(
        recovery_loss(right, None, labelled, causal=True, **options),
        recovery_loss(right, None, unpack(batch), causal=True, **options),
    )


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_models_and_batches_of_transformers_work_as_they_are(name: str) -> None:
    if name not in WHOLE:
        pytest.skip("transformers is not installed")
    model, example = WHOLE[name]()
    data = batches_like(example, count=2, size=4)
    plan = resect.Plan.random(resect.dissect(model, example), ratio=0.3)
    small = resect.cut(model, plan)
    before = snapshot(model), snapshot(small)
    result = resect.recover(model, small, data, resect.Recovery(steps=12, learning_rate=3e-3, distillation=1.0))
    assert (snapshot(model), snapshot(small)) == before
    assert result.history[-1].loss < result.history[1].loss


def test_distillation_is_the_divergence_at_a_temperature() -> None:
    small, dense = torch.randn(6, 5), torch.randn(6, 5)
    p, q = (dense / 3).softmax(-1), (small / 3).softmax(-1)
    expected = 9 * (p * (p.log() - q.log())).sum(-1).mean()
    assert float(distillation_loss(small, dense, 3.0)) == pytest.approx(float(expected), rel=1e-5)
    assert float(distillation_loss(dense, dense, 3.0)) == pytest.approx(0.0, abs=1e-6)
    both = recovery_loss(small, dense, unpack((small, torch.arange(6) % 5)), temperature=3.0, distillation=0.5, causal=False)
    assert float(both) == pytest.approx(
        0.5 * float(expected) + 0.5 * float(F.cross_entropy(small, torch.arange(6) % 5)), rel=1e-5
    )
