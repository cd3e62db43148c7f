"""Predicted milliseconds: the layers timed are those of the network at every width, and tables are read as written."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import resect
from resect import ModelError, Plan
from resect.plan import lengths_of
from resect.searching.timing import Times, _layers, _memory
from zoo import ZOO


@pytest.fixture(scope="module")
def anatomy():
    torch.manual_seed(0)
    return resect.dissect(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)).eval(), torch.ones(2, 4))


@pytest.fixture(scope="module")
def written(anatomy):
    """Tables by hand: a staircase for what writes the units, a line for what reads them."""
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    writer, reader = _layers(model, anatomy, 1)
    (_, out), (into, _) = writer.knots(), reader.knots()
    stairs, line = np.where(out <= 8, 1.0, np.where(out <= 16, 2.0, 4.0))[None], 0.1 * into[:, None]
    return Times(anatomy=anatomy, batch=1, layers=(writer, reader), tables=(stairs, line), fixed=3.0, slope=6.0)


def test_at_the_knots_times_are_the_tables_and_between_them_a_line(written) -> None:
    rest = {kept: 3 + 6 * (kept + 2) / 34 for kept in (8, 12, 16, 32)}
    assert written({"0": 8}) == pytest.approx(1 + 0.8 + rest[8])
    assert written({"0": 12}) == pytest.approx(1.5 + 1.2 + rest[12])
    assert written({"0": 16}) == pytest.approx(2 + 1.6 + rest[16])
    assert written({"0": 32}) == pytest.approx(4 + 3.2 + rest[32])
    many = written.many(np.array([[8.0], [12.0], [32.0]]))
    assert many.tolist() == [written({"0": kept}) for kept in (8, 12, 32)]


def test_corrected_times_are_what_was_measured(written) -> None:
    corrected = written.corrected({"0": 16}, 50.0)
    assert corrected({"0": 16}) == pytest.approx(50)
    assert corrected({"0": 8}) / corrected({"0": 32}) == pytest.approx(written({"0": 8}) / written({"0": 32}))


def test_the_rest_is_fitted_to_whole_networks(written, anatomy) -> None:
    plans = [Plan.random(anatomy, ratio) for ratio in (0.0, 0.5, 0.75)]
    measured = np.array([written(plan.kept) for plan in plans])
    fitted = replace(written, fixed=0.0, slope=0.0)._fitted(plans, measured)
    assert [fitted(plan.kept) for plan in plans] == pytest.approx(measured.tolist())
    assert (fitted.fixed, fitted.slope) == pytest.approx((3, 6))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_layer_timed_at_other_widths_is_that_of_the_cut_network(name: str) -> None:
    model, example = ZOO[name]()
    anatomy = resect.dissect(model, example)
    anatomy = anatomy.without([g.name for g in anatomy.groups if g.kind == "stream"], "left alone here")
    if not anatomy.groups:
        pytest.skip("nothing to cut")
    plan = Plan.random(anatomy, 0.5, seed=1)
    dense, small = list(_layers(model, anatomy, 2)), list(_layers(resect.cut(model, plan, verify=False), anatomy, 2))
    assert [layer.reader.tensor for layer in dense] == [layer.reader.tensor for layer in small]
    memory = _memory(model, dense)
    for layer, lean in zip(dense, small):
        axes = [(layer.reader.tensor, axis) for axis in layer.axes]
        widths = lengths_of(anatomy, np.array(list(plan.kept.values())), axes)[0].astype(int).tolist()
        assert widths == [lean.weight[axis] for axis in lean.axes]
        assert layer.call(*widths, memory)().numel() == lean.outputs
        knots = layer.knots()
        assert [int(part[-1]) for part in knots] == [layer.weight[axis] for axis in layer.axes]
        for corner in ([part[0] for part in knots], [part[-1] for part in knots]):
            layer.call(*map(int, corner), memory)()


@pytest.mark.parametrize("name", ["mlp_relu", "mobilenet", "lstm_tagger", "attention_grouped_queries"])
def test_measured_times_are_finite_for_every_plan(name: str) -> None:
    model, example = ZOO[name]()
    anatomy = resect.dissect(model, example)
    before = resect.surgery.state_digest(model)
    times = Times.of(model, anatomy, batch=2, rounds=1)
    assert resect.surgery.state_digest(model) == before
    kept = np.array([[group.units for group in anatomy.groups], [1] * len(anatomy.groups)], dtype=np.float64)
    assert np.isfinite(times.many(kept)).all()
    assert (times.many(kept) > 0).all()


def test_a_network_that_does_not_take_the_batch_says_so() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.second(self.first(x).relu().reshape(2, 6))

    model = Fixed().eval()
    with pytest.raises(ModelError, match=r"failed on inputs of shape \(3, 4\)"):
        Times.of(model, resect.dissect(model, torch.ones(2, 4)), batch=3)
