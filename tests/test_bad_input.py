"""Every bad input gets one clear message, and the network and the disk are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resect
from resect import DataError, Floor, GoalError, ModelError, PlanError
from resect.searching.judging import Judge


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide weights and no biases: the three answers are about equally frequent.
            parameter.copy_(torch.randn(parameter.shape) if parameter.ndim == 2 else torch.zeros(parameter.shape))
    return model


def answered(model: nn.Module, count: int = 300, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Seeded inputs with the network's own answers as labels, in batches of 50."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return [(part, model(part).argmax(1)) for part in x.split(50)]


MODEL = small_net()
DATA = answered(MODEL)
GOAL = Floor(drop=0.05)


def test_empty_loader() -> None:
    with pytest.raises(DataError, match="calibrate data are empty"):
        resect.prune(MODEL, [], DATA, floor=GOAL)
    with pytest.raises(DataError, match=r"gave no batch"):
        resect.prune(MODEL, DATA, [], floor=GOAL)
    with pytest.raises(DataError, match="certify data are empty"):
        resect.prune(MODEL, DATA, DATA, certify=[], floor=GOAL)


def test_no_labels_where_the_floor_needs_them() -> None:
    unlabelled = [x for x, _ in DATA]
    with pytest.raises(DataError, match="label"):
        resect.prune(MODEL, DATA, unlabelled, floor=GOAL)
    # Calibration does not need labels.
    assert resect.prune(MODEL, unlabelled, DATA, floor=GOAL).plan.share <= 1


def test_labels_out_of_range() -> None:
    wrong = [(x, torch.full_like(y, 5)) for x, y in DATA]
    with pytest.raises(DataError, match=r"labels run from 5 to 5, but the network has 3 outputs"):
        resect.prune(MODEL, wrong, DATA, floor=GOAL)
    with pytest.raises(DataError, match=r"label"):
        resect.prune(MODEL, DATA, wrong, floor=GOAL)


def test_labels_of_a_wrong_shape() -> None:
    with pytest.raises(DataError, match="one integer class per example"):
        resect.prune(MODEL, [(x, torch.rand(len(x))) for x, _ in DATA], DATA, floor=GOAL)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_reader(value: float) -> None:
    broken = [(x.clone(), y) for x, y in DATA]
    broken[1][0][3, 2] = value
    with pytest.raises(ModelError, match=r"2\.weight.*not finite"):
        resect.trace(MODEL, broken, resect.dissect(MODEL, DATA[0][0][:2]))


def test_training_mode() -> None:
    model = small_net().train()
    with pytest.raises(ModelError, match=r"call model\.eval\(\)"):
        resect.prune(model, DATA, DATA, floor=GOAL)
    assert model.training


class Wrapped(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.net, self.form = small_net(), form

    def forward(self, x: torch.Tensor):
        logits = self.net(x)
        return {"tuple": (logits, x), "dict": {"logits": logits, "features": x}, "text": "no tensor here"}[self.form]


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_tuple_and_dict_outputs_are_understood(form: str) -> None:
    found = resect.prune(Wrapped(form).eval(), DATA, DATA, floor=Floor(drop=0.2))
    assert found.cost.parameters < found.dense_cost.parameters


def test_an_output_without_a_tensor() -> None:
    with pytest.raises(ModelError, match="returned a str"):
        resect.prune(Wrapped("text").eval(), DATA, DATA, floor=GOAL)


def test_batch_shapes_that_do_not_fit() -> None:
    with pytest.raises(ModelError, match=r"inputs of shape \(\d+, 7\)"):
        resect.prune(MODEL, DATA, [(torch.randn(50, 7), torch.zeros(50, dtype=torch.long))], floor=GOAL)


def test_floor_above_the_dense_network() -> None:
    half_wrong = [(x, torch.where(torch.arange(len(y)) % 2 == 0, y, (y + 1) % 3)) for x, y in DATA]
    with pytest.raises(GoalError, match=r"the dense network itself has 5\d\.\d+%.*Floor\(drop=0\.01\)"):
        resect.prune(MODEL, DATA, half_wrong, floor=Floor(accuracy=0.9))


def test_a_floor_that_cannot_be_certified_is_an_outcome() -> None:
    found = resect.prune(MODEL, DATA, DATA, floor=Floor(accuracy=0.9999))
    assert not found.certified
    assert found.certificate is not None
    assert found.certificate.needed is None or found.certificate.needed > found.certificate.examples
    assert found.certificate.advice
    assert any("not certified" in note for note in found.notes)
    assert torch.isfinite(found.model(DATA[0][0])).all()


def test_fewer_than_100_certify_examples_are_warned_of() -> None:
    found = resect.prune(MODEL, DATA, DATA, certify=DATA[:1], floor=Floor(drop=0.3))
    assert found.certificate is not None
    assert any("100" in text for text in found.certificate.advice)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x + 0.1 * torch.randn_like(x))


def test_a_network_that_is_not_deterministic() -> None:
    with pytest.raises(ModelError, match="two different outputs"):
        resect.prune(Noisy().eval(), DATA, DATA, floor=GOAL)


def test_a_plan_for_another_architecture() -> None:
    plan = resect.Plan.random(resect.dissect(MODEL, DATA[0][0]), ratio=0.5)
    other = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with pytest.raises(PlanError, match=r"another network: 0\.weight has shape \(16, 6\) there and \(12, 6\) here"):
        resect.cut(other, plan)


def test_weights_shared_between_modules_are_cut_together() -> None:
    shared = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()
    shared[4].weight = shared[2].weight
    found = resect.prune(shared, DATA, answered(shared), floor=Floor(drop=0.3), repair="none")
    assert found.model[2].weight is found.model[4].weight
    assert found.model[2].weight.shape == (found.plan.kept["0"], found.plan.kept["0"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scorer": "firing_rat"}, "did you mean 'firing_rate'"),
        ({"allocation": "best"}, "no allocation 'best'"),
        ({"minimise": "flops"}, "minimise='flops'"),
        ({"repair": "magic"}, "no repair 'magic'"),
        ({"evaluations": 0}, "evaluations=0"),
    ],
)
def test_unknown_names(arguments: dict, message: str) -> None:
    with pytest.raises(resect.ResectError, match=message):
        resect.prune(MODEL, DATA, DATA, floor=GOAL, **arguments)


def test_ctrl_c_keeps_the_trials_that_ended(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = Judge.make

    def make(self: Judge, plan: resect.Plan) -> nn.Module:
        calls.append(plan)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, plan)

    file = tmp_path / "trials.jsonl"
    monkeypatch.setattr(Judge, "make", make)
    with pytest.raises(KeyboardInterrupt):
        resect.prune(MODEL, DATA, DATA, floor=GOAL, trials=file)
    lines = file.read_text().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("{") and line.endswith("}") for line in lines)


def test_weights_that_are_not_finite_are_named() -> None:
    model = small_net()
    with torch.no_grad():
        model[2].weight[1, 1] = float("nan")
    with pytest.raises(ModelError, match=r"2\.weight holds values that are not finite"):
        resect.prune(model, DATA, DATA, floor=GOAL)
