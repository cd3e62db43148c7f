"""Tracing against plain computations with hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resect
from resect.tracing import survey


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4), nn.GELU(), nn.Linear(4, 3)).eval()


def data(count: int = 203, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 5, generator=draw), torch.randint(0, 3, (count,), generator=draw)
    return list(zip(x.split(37), y.split(37)))


def test_statistics_per_class_are_those_of_the_values_read() -> None:
    model, batches = mlp(), data()
    trace = resect.trace(model, batches, resect.dissect(model, batches[0][0][:2]))
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    with torch.no_grad():
        hidden = model[1](model[0](x)).double()
    sums = trace.sums["2.weight"]
    for label in range(3):
        part = hidden[y == label]
        assert sums.positions[label] == len(part) == trace.examples[label]
        np.testing.assert_array_equal(sums.fired[label], (part > 0).sum(0))
        np.testing.assert_allclose(sums.total[label], part.sum(0), rtol=1e-5)
        np.testing.assert_allclose(sums.square[label], part.square().sum(0), rtol=1e-5)
        np.testing.assert_allclose(sums.peak[label], part.max(0).values, rtol=1e-6)
    rows = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
    np.testing.assert_allclose((sums.gram + sums.held)[0], rows.T @ rows, rtol=1e-5)
    assert sums.rectified


def test_units_without_a_rectifier_fire_above_a_tenth_of_their_rms() -> None:
    model, batches = mlp(), data(4000)
    trace = resect.trace(model, batches, resect.dissect(model, batches[0][0][:2]))
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    with torch.no_grad():
        hidden = model[:4](x)
    assert not trace.sums["4.weight"].rectified
    expected = (hidden.abs() > 0.1 * hidden.square().mean(0).sqrt()).float()
    got = trace.sums["4.weight"].rate()
    for label in range(3):
        # The histogram of octaves resolves the threshold to a share of an octave.
        np.testing.assert_allclose(got[label], expected[y == label].mean(0), atol=0.05)


def test_convolution_readers_are_solved_on_their_patches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2, padding=1, dilation=1), nn.Flatten()
    ).eval()
    x = torch.randn(6, 2, 9, 9)
    anatomy = resect.dissect(model, x[:2])
    trace = resect.trace(model, [x], anatomy, gram_positions=1000)
    with torch.no_grad():
        hidden = model[:2](x)
        patches = F.unfold(hidden, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 36)
        made = patches @ model[2].weight.flatten(1).T + model[2].bias
        np.testing.assert_allclose(made, model[2](hidden).flatten(2).transpose(1, 2).reshape(-1, 3), rtol=1e-4, atol=1e-5)
    rows = torch.cat([patches, torch.ones(len(patches), 1)], 1).double()
    sums = trace.sums["2.weight"]
    np.testing.assert_allclose((sums.gram + sums.held)[0], rows.T @ rows, rtol=1e-4, atol=1e-3)
    assert sums.positions.sum() == 6 * 49


def test_taylor_is_activation_times_gradient() -> None:
    model, batches = mlp(), data()
    trace = resect.trace(model, batches, resect.dissect(model, batches[0][0][:2]), gradients=True)
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    hidden = model[:2](x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model[2:](hidden), y, reduction="sum"), hidden)
    effect = (hidden * slope).abs().detach()
    for label in range(3):
        np.testing.assert_allclose(trace.sums["2.weight"].slope[label], effect[y == label].sum(0), rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_a_frozen_network() -> None:
    model, batches = mlp(), data()
    expected = resect.trace(model, batches, resect.dissect(model, batches[0][0][:2]), gradients=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = resect.trace(model, batches, resect.dissect(model, batches[0][0][:2]), gradients=True)
    for name in expected.sums:
        np.testing.assert_allclose(frozen.sums[name].slope, expected.sums[name].slope, rtol=1e-5)


def test_padding_tokens_never_count() -> None:
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.down(F.relu(self.up(values)))
            return (hidden * attention_mask[:, :, None]).sum(1) / attention_mask.sum(1, keepdim=True)

    model = Tokens().eval()
    values, mask = torch.randn(10, 6, 4), torch.ones(10, 6)
    mask[:, 4:] = 0
    noisy = values.clone()
    noisy[:, 4:] = 100.0
    anatomy = resect.dissect(model, {"values": values[:2], "attention_mask": mask[:2]})
    clean = resect.trace(model, [{"values": values, "attention_mask": mask}], anatomy, token_stride=1)
    other = resect.trace(model, [{"values": noisy, "attention_mask": mask}], anatomy, token_stride=1)
    short = resect.trace(model, [{"values": values, "attention_mask": mask}], anatomy)
    for name, sums in clean.sums.items():
        assert sums.positions.sum() == 40
        # Every token of a short text counts in the second moments, too.
        np.testing.assert_array_equal(sums.gram, short.sums[name].gram)
        for field in ("fired", "total", "square", "gram", "held"):
            np.testing.assert_allclose(getattr(sums, field), getattr(other.sums[name], field), err_msg=field)


def test_weights_used_by_functions_are_observed_like_those_of_modules() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Parameter(torch.randn(5, 6))
            self.second = nn.Parameter(torch.randn(6, 4))
            self.third = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(F.relu(x @ self.first) @ self.second) @ self.third.t()

    model = Bare().eval()
    x = torch.randn(50, 5)
    anatomy = resect.dissect(model, x[:2])
    trace = resect.trace(model, [x], anatomy)
    assert set(trace.sums) == {"second", "third"}
    assert trace.readers["second"].axis == 0
    assert trace.readers["third"].axis == 1
    plan = resect.Plan.random(anatomy, ratio=0.5)
    fixed = resect.repair(trace, plan)
    small = resect.cut(model, plan, weights=fixed.weights)
    with torch.no_grad():
        repaired = (small(x) - model(x)).square().mean()
        plain = (resect.cut(model, plan)(x) - model(x)).square().mean()
    assert repaired < plain


def test_a_reader_without_bias_folds_its_constant_into_the_batch_norm_behind_it() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 2, 3, bias=False),
        nn.BatchNorm2d(2),
        nn.Flatten(),
    ).eval()
    reader = survey(model, resect.dissect(model, torch.randn(2, 1, 8, 8)))["3.weight"]
    assert (reader.offset, reader.sign) == ("4.running_mean", -1)


def test_traces_of_different_networks_do_not_add() -> None:
    one, other = mlp(), nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(20, 5)
    traces = [resect.trace(m, [x], resect.dissect(m, x[:2])) for m in (one, other)]
    with pytest.raises(resect.DataError, match="two different networks"):
        traces[0] + traces[1]


def test_groups_whose_readers_cannot_be_observed_are_left_alone() -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
            self.gain = nn.Parameter(torch.ones(3, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(F.relu(self.first(x)), self.second.weight * self.gain, self.second.bias)

    model, x = Merged().eval(), torch.randn(50, 4)
    anatomy = resect.dissect(model, x[:2])
    trace = resect.trace(model, [x], anatomy)
    assert [group.name for group in anatomy.groups] == ["first"]
    assert trace.anatomy.groups == ()
    assert any(pin.name == "first" and "cannot be observed" in pin.reason for pin in trace.anatomy.pins)


def test_a_writer_may_be_a_vector() -> None:
    """A network whose hidden units are written by an elementwise scale of its own (gates of a cell written by hand)."""
    from zoo import WHOLE

    for name in ("lstm_cell_by_hand", "gru_cell_by_hand"):
        model, example = WHOLE[name]()
        anatomy = resect.dissect(model, example)
        rows = example[0] if isinstance(example, tuple) else example
        trace = resect.trace(model, [rows], anatomy, classes=1)
        scores = resect.score(trace, "magnitude")
        assert set(scores.values) == {group.name for group in trace.anatomy.groups}
        assert scores.values
