"""Evaluation: per-example correctness, its errors, and latency measured side by side (with clocks that the test controls)."""

import numpy as np
import pytest
import torch
from torch import nn

from resect import evaluation
from resect.errors import DataError, ModelError
from resect.evaluation import Evaluation, Latency, Timing, evaluate, latency, predict


class Echo(nn.Module):
    """Returns its input as logits, wrapped in whatever the test asks for."""

    def __init__(self, wrap=lambda logits: logits):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(x)


def echo(wrap=lambda logits: logits):
    return Echo(wrap).eval()


def one_hot(classes, of=3):
    return torch.nn.functional.one_hot(torch.tensor(classes), of).float()


def mlp(hidden=16):
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 3)).eval()


BATCHES = [(one_hot([0, 1, 2]), torch.tensor([0, 1, 1])), (one_hot([2, 2]), torch.tensor([2, 0]))]


def test_every_example_is_judged_in_order():
    found = evaluate(echo(), BATCHES)
    assert found.correct.tolist() == [True, True, False, True, False]
    assert found.labels.tolist() == [0, 1, 1, 2, 0]
    assert found.predictions.tolist() == [0, 1, 2, 2, 2]
    assert (found.accuracy, found.examples, found.right) == (0.6, 5, 3)
    assert found.per_class == {0: 0.5, 1: 0.5, 2: 1.0}
    assert found.counts == {0: 2, 1: 2, 2: 1}
    assert str(found) == "60.00 % right (3 of 5 examples)"


@pytest.mark.parametrize(
    "wrap", [lambda x: (x, None), lambda x: {"logits": x, "loss": torch.tensor(1.0)}], ids=["tuple", "mapping"]
)
def test_wrapped_outputs_are_understood(wrap):
    assert evaluate(echo(wrap), BATCHES).accuracy == 0.6


def test_batching_does_not_matter():
    inputs, labels = torch.randn(50, 6), torch.randint(0, 3, (50,))
    model = mlp()
    whole = evaluate(model, [(inputs, labels)])
    parts = evaluate(model, zip(inputs.split(7), labels.split(7)))
    assert np.array_equal(whole.correct, parts.correct)
    assert np.array_equal(whole.predictions, predict(model, inputs.split(9)))


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, [(torch.randn(20, 6), torch.zeros(20, dtype=torch.long))])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_pairs_are_checked():
    dense, small = evaluate(echo(), BATCHES), evaluate(echo(lambda x: -x), BATCHES)
    assert small.drop_from(dense) == pytest.approx(dense.accuracy - small.accuracy)
    reordered = evaluate(echo(), BATCHES[::-1])
    with pytest.raises(DataError, match=r"different examples.*shuffle=False"):
        reordered.drop_from(dense)


def test_unlabelled_data_are_judged_against_predictions():
    inputs = [batch for batch, _ in BATCHES]
    found = evaluate(echo(lambda x: x.roll(1, dims=1)), inputs, against=predict(echo(), inputs))
    assert found.accuracy == 0
    assert not found.labelled
    assert "in agreement" in str(found)
    with pytest.raises(DataError, match="different examples"):
        found.check_paired(evaluate(echo(), BATCHES))
    for wrong in (3, 8):
        with pytest.raises(DataError, match=f"against= holds {wrong} predictions"):
            evaluate(echo(), inputs, against=np.zeros(wrong, dtype=np.int64))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "gave no batches"),
        ([one_hot([0, 1])], r"batch 0 of data has no labels.*\[\(inputs, labels\)\]"),
        ([BATCHES[0], (one_hot([0, 1]), torch.tensor([3, 7]))], "batch 1 of data has labels 3, 7, .* 3 outputs; .* 0 to 2"),
        ([(one_hot([0, 1]), torch.tensor([-100, 1]))], "labels -100"),
        ([(one_hot([0] * 9), torch.arange(9) + 3)], r"labels 3, 4, 5, 6, 7, \.\.\., and"),
        ([(one_hot([0, 1]), torch.tensor([0.5, 1.0]))], "one integer class per example"),
        ([(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))], "no examples"),
    ],
    ids=["empty", "unlabelled", "out of range", "negative", "many", "fractional", "empty batch"],
)
def test_unusable_data(data, message):
    with pytest.raises(DataError, match=message):
        evaluate(echo(), data)


def test_a_generator_read_twice_is_empty():
    data = iter(BATCHES)
    evaluate(echo(), data)
    with pytest.raises(DataError, match="a generator is empty the second time"):
        evaluate(echo(), data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_not_numbers(bad):
    inputs = one_hot([0, 1, 2])
    inputs[1, 0] = bad
    with pytest.raises(ModelError, match=r"1 of 3 examples of batch 0 .first: example 1"):
        evaluate(echo(), [(inputs, torch.tensor([0, 1, 2]))])


@pytest.mark.parametrize(
    "wrap", [lambda x: x[:, :1], lambda x: x[0], lambda x: x[:, None], lambda x: x[:2]], ids=["1", "vector", "3d", "rows"]
)
def test_outputs_of_another_shape(wrap):
    with pytest.raises(ModelError, match=r"shape .* for 3 examples; evaluation reads logits"):
        evaluate(echo(wrap), BATCHES[:1])


def test_training_mode_is_refused_wherever_it_hides():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    with pytest.raises(ModelError, match=r"it is in training mode.*call model\.eval\(\)"):
        evaluate(model, BATCHES)
    model.eval()[1].train()
    with pytest.raises(ModelError, match="its module '1' is in training mode"):
        predict(model, BATCHES)


def test_evaluations_of_unequal_arrays_are_refused():
    with pytest.raises(DataError, match="one entry per example"):
        Evaluation(correct=np.ones(3, dtype=bool), labels=np.zeros(2, dtype=np.int64), predictions=np.zeros(3, dtype=np.int64))


@pytest.fixture
def clocks(monkeypatch):
    """Clocks that only forward passes move: by the network's `cost`, wall time by `busy` times as much."""

    class Clock:
        cpu = wall = 0.0
        busy = growth = pace = 1.0

        def tick(self, seconds):
            self.cpu += seconds * self.pace
            self.wall += seconds * self.pace * self.busy
            self.pace *= self.growth

    clock = Clock()
    monkeypatch.setattr(evaluation.time, "process_time", lambda: clock.cpu)
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: clock.wall)
    return clock


class Timed(nn.Module):
    """A network whose forward pass takes `seconds` per example by the test's clock."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds, self.shapes = clock, seconds, []
        self.eval()

    def forward(self, x, mask=None):
        self.shapes.append(tuple(x.shape))
        self.clock.tick(self.seconds * len(x))
        return x


def test_ratio_and_times_are_read_from_the_clock(clocks):
    dense, small = Timed(clocks, 0.004), Timed(clocks, 0.001)
    one, many = latency(dense, small, torch.zeros(2, 5), batches=(1, 8), rounds=6)
    assert (one.batch, many.batch) == (1, 8)
    assert one.ratio == pytest.approx(4)
    assert one.faster
    assert one.dense_ms.median == pytest.approx(4)
    assert many.small_ms.minimum == pytest.approx(8)
    assert one.warning == ""
    assert {(1, 5), (8, 5)} == set(dense.shapes)
    assert "4.00 times as fast (CPU time, 1 thread, 6 rounds)" in str(one)
    assert one.to_dict()["dense_ms"]["median"] == pytest.approx(4)


def test_slower_and_busy_are_said(clocks):
    clocks.busy = 3.0
    found = latency(Timed(clocks, 0.001), Timed(clocks, 0.002), torch.zeros(1, 5), batches=(1,), rounds=5)[0]
    assert not found.faster
    assert "not faster on this device (ratio 0.50)" in str(found)
    assert "wall time was 3.0 times CPU time" in str(found)


def test_a_machine_that_slows_down_favours_neither(clocks):
    clocks.growth = 1.1
    found = latency(Timed(clocks, 0.01), Timed(clocks, 0.01), torch.zeros(1, 5), batches=(1,), rounds=10)[0]
    assert found.ratio == pytest.approx(1, abs=0.01)
    assert found.wins == 0.5
    assert not found.faster


def test_an_even_match_is_not_called_faster():
    timing = Timing(minimum=1.0, median=1.0)
    drawn = Latency(batch=1, dense_ms=timing, small_ms=timing, ratio=1.01, wins=0.55, rounds=20, threads=1, clock="CPU time")
    assert not drawn.faster


@pytest.mark.parametrize(
    "example",
    [torch.zeros(1, 5), (torch.zeros(1, 5),), {"x": torch.zeros(1, 5)}, ((torch.zeros(1, 5),), {"mask": None})],
    ids=["tensor", "tuple", "mapping", "both"],
)
def test_examples_of_every_convention(clocks, example):
    model = Timed(clocks, 0.01)
    latency(model, model, example, batches=(3,), rounds=1)
    assert set(model.shapes) == {(3, 5)}


def test_threads_are_restored_also_after_an_error(clocks):
    before = torch.get_num_threads()
    found = latency(Timed(clocks, 0.01), Timed(clocks, 0.01), torch.zeros(1, 5), batches=(1,), rounds=1, threads=before + 1)[0]
    assert (found.threads, found.clock) == (before + 1, "wall time")
    with pytest.raises(RuntimeError):
        latency(mlp(), mlp(), torch.zeros(1, 5), threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wrong", [{"batches": ()}, {"batches": (0,)}, {"rounds": 0}, {"threads": 0}])
def test_sizes_below_one_are_refused(wrong):
    with pytest.raises(DataError, match="at least 1"):
        latency(mlp(), mlp(), torch.zeros(1, 6), **wrong)


def test_unusable_networks_and_examples():
    with pytest.raises(ModelError, match="training mode"):
        latency(mlp(), mlp().train(), torch.zeros(1, 6))
    with pytest.raises(DataError, match="example with a batch axis"):
        latency(mlp(), mlp(), (torch.tensor(1.0),))


def test_real_networks_are_measured():
    found = latency(mlp(64), mlp(4), torch.zeros(1, 6), batches=(1, 32), rounds=3)
    assert [f.batch for f in found] == [1, 32]
    assert all(f.dense_ms.minimum > 0 and 0 < f.small_ms.minimum <= f.small_ms.median for f in found)
