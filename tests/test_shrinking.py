"""Shrink: rounds that land on the target, files that go on after a kill, and every bad input one clear answer."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import resect
from laws import batches_like, snapshot
from resect.cli import app
from resect.searching.allocation import against
from resect.searching.landing import by_rank, by_share, filled
from resect.shrinking import keeping
from resect.shrinking.shrinking import same_units
from resect.surgery import state_digest
from test_cli import here, run  # noqa: F401 (a fixture)
from test_searching import blobs, trained
from zoo import WHOLE, ZOO

WIDE = (8, 96, 64, 4)


@pytest.fixture(scope="module")
def wide() -> nn.Sequential:
    return trained(*WIDE)


def calib() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return blobs(400)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repair": "none"},
        {"repair": "mean", "allocation": "uniform", "scorer": "magnitude"},
        {"allocation": "threshold", "scorer": "taylor"},
    ],
)
def test_the_last_round_lands_on_the_target_and_the_model_is_left_alone(wide, rounds: int, options: dict) -> None:
    before = snapshot(wide)
    for to in (resect.Budget(parameters=0.4), resect.Budget(macs=0.3), resect.Budget(parameters=0.5, macs=0.45)):
        found = resect.shrink(wide, calib(), to=to, rounds=rounds, **options)
        assert snapshot(wide) == before
        shares = found.cost.share_of(found.dense_cost)
        closest = max(shares[name] / getattr(to, name) for name in ("parameters", "macs") if getattr(to, name))
        assert closest <= 1 + 1e-9
        assert closest >= 0.999 or "Whole units" in found.notes[0]
        goal = against(found.plan.anatomy, to)
        more = [
            {**found.plan.kept, g.name: n + 1} for g in found.plan.anatomy.groups if (n := found.plan.kept[g.name]) < g.units
        ]
        assert all(goal(counts) > 1 for counts in more), "a unit more fits"
        assert found.cost.parameters == sum(p.numel() for p in found.model.parameters())
        assert found.cost == found.plan.cost()
        assert len(found.rounds) == rounds
        assert found.rounds[-1].kept == found.plan.kept


def test_waypoints_fall_by_the_same_factor(wide) -> None:
    found = resect.shrink(wide, calib(), to=resect.Budget(macs=0.1), rounds=4, repair="none")
    shares = [entry.cost.macs / found.dense_cost.macs for entry in found.rounds]
    np.testing.assert_allclose(shares, 0.1 ** (np.arange(1, 5) / 4), rtol=0.05)
    kept = [found.rounds[number].kept for number in range(4)]
    assert all(later[name] <= earlier[name] for earlier, later in itertools.pairwise(kept) for name in later)


def test_rounds_are_scored_on_what_the_one_before_left(wide) -> None:
    """One plan of the dense network describes all the rounds: cut at once, the same units are gone."""
    found = resect.shrink(wide, calib(), to=resect.Budget(parameters=0.4), rounds=3, repair="none")
    at_once = resect.cut(wide, found.plan)
    assert state_digest(at_once) == state_digest(found.model)
    once = resect.shrink(wide, calib(), to=resect.Budget(parameters=0.4), rounds=1, repair="none")
    assert once.plan != found.plan


def test_save_and_load_after_several_rounds(wide, tmp_path) -> None:
    found = resect.shrink(wide, calib(), to=resect.Budget(parameters=0.3), rounds=3, recovery=resect.Recovery(steps=20))
    resect.save(found.model, found.plan, tmp_path / "small", found=found)
    again = resect.load(tmp_path / "small", wide)
    inputs = blobs(50, seed=9)[0][0]
    assert torch.equal(again(inputs), found.model(inputs))
    plan = resect.load_plan(tmp_path / "small", resect.dissect(wide, inputs[:2]))
    assert plan == found.plan
    json.dumps(found.to_dict(), allow_nan=True)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_plans_of_rounds_compose_over_the_zoo(name: str) -> None:
    model, example = ZOO[name]()
    first = resect.dissect(model, example)
    if not first.groups:
        pytest.skip("nothing can be removed from it")
    one = resect.Plan.random(first, ratio=0.4, seed=1)
    middle = resect.cut(model, one)
    second = same_units(resect.dissect(middle, first.example), one)
    two = resect.Plan.random(second, ratio=0.4, seed=2)
    both = one.then(two)
    small = resect.cut(middle, two)
    assert both.cost() == two.cost()
    assert state_digest(resect.cut(model, both)) == state_digest(small)


@pytest.mark.parametrize("name", ["bert", "llama", "resnet_padded", "grouped", "attention_fused_timm"])
def test_convolutions_and_transformers_shrink_in_rounds(name: str) -> None:
    if name not in WHOLE:
        pytest.skip("transformers is not installed")
    model, example = WHOLE[name]()
    to = resect.Budget(parameters=0.85)
    options = {"to": to, "rounds": 2, "token_stride": 1, "recovery": resect.Recovery(steps=4, learning_rate=1e-3)}
    found = resect.shrink(model, batches_like(example), **options)
    assert 0.8 < found.cost.parameters / found.dense_cost.parameters <= 0.85
    assert found.cost.parameters == sum(p.numel() for p in found.model.parameters())
    assert found.cost == found.plan.cost()


@pytest.mark.parametrize("killed_in", ["round 2", "final repair", "recovery"])
def test_a_killed_run_ends_with_the_same_bytes(wide, tmp_path, monkeypatch, killed_in: str) -> None:
    def whole(work):
        return resect.shrink(
            wide,
            calib(),
            to=resect.Budget(parameters=0.3),
            rounds=3,
            val=blobs(200, seed=4),
            recovery=resect.Recovery(steps=30, learning_rate=(1e-3, 3e-3)),
            work=work,
        )

    expected = whole(tmp_path / "whole")
    target, name = {
        "round 2": (keeping.Keeper, "keep"),
        "final repair": (resect.shrinking.shrinking, "repair_sequentially"),
        "recovery": (resect.recovery.training.Training, "judge"),
    }[killed_in]
    original, calls = getattr(target, name), 0

    def kill(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == {"round 2": 2, "final repair": 1, "recovery": 6}[killed_in]:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, kill)
        with pytest.raises(KeyboardInterrupt):
            whole(tmp_path / "killed")
    done = len(list((tmp_path / "killed").glob("round-*")))
    assert done == (1 if killed_in == "round 2" else 3)
    resumed = whole(tmp_path / "killed")
    assert state_digest(resumed.model) == state_digest(expected.model)
    assert resumed.plan == expected.plan
    for number in (1, 2, 3):
        paths = [tmp_path / folder / f"round-{number}" / "model.safetensors" for folder in ("killed", "whole")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert [entry.kept for entry in resumed.rounds] == [entry.kept for entry in expected.rounds]


def test_a_directory_of_another_run_is_refused(wide, tmp_path) -> None:
    to = resect.Budget(parameters=0.5)
    resect.shrink(wide, calib(), to=to, rounds=1, work=tmp_path / "work")
    with pytest.raises(resect.FileError, match="rounds"):
        resect.shrink(wide, calib(), to=to, rounds=2, work=tmp_path / "work")
    with pytest.raises(resect.FileError, match="data"):
        resect.shrink(wide, blobs(100), to=to, rounds=1, work=tmp_path / "work")
    with pytest.raises(resect.FileError, match="network"):
        resect.shrink(trained(*WIDE, seed=3), calib(), to=to, rounds=1, work=tmp_path / "work")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(resect.FileError, match="empty or new"):
        resect.shrink(wide, calib(), to=to, work=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_target_that_cannot_be_reached_says_what_can(wide) -> None:
    with pytest.raises(resect.GoalError, match=r"there still are parameters \d+\.\d%"):
        resect.shrink(wide, calib(), to=resect.Budget(parameters=0.001))
    with pytest.raises(resect.GoalError, match=r"still takes .* ms"):
        resect.shrink(wide, calib(), to=resect.Budget(latency_ms=1e-4))


@pytest.mark.parametrize("to", [resect.Budget(parameters=1.0), resect.Budget(latency_ms=1e4)])
def test_a_target_that_is_met_cuts_nothing_and_says_so(wide, to: resect.Budget) -> None:
    found = resect.shrink(wide, calib(), to=to, recovery=resect.Recovery(steps=5))
    assert found.plan.share == 1
    assert found.rounds == ()
    assert found.recovered is None
    assert "nothing was cut" in found.notes[0]
    assert state_digest(found.model) == state_digest(wide)


def test_a_latency_target_is_met_by_the_network_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that cannot be disturbed: a microsecond for every parameter.
    def taken(network: nn.Module) -> float:
        return sum(p.numel() for p in network.parameters()) / 1000

    def timed(dense: nn.Module, small: nn.Module, *_: object, **__: object) -> tuple[SimpleNamespace]:
        return (SimpleNamespace(dense_ms=SimpleNamespace(median=taken(dense)), small_ms=SimpleNamespace(median=taken(small))),)

    monkeypatch.setattr("resect.shrinking.target.latency", timed)
    model = trained(8, 400, 400, 4)
    half = taken(model) / 2
    found = resect.shrink(model, blobs(100), to=resect.Budget(latency_ms=half), rounds=2, scorer="magnitude", repair="none")
    assert 0.9 * half < taken(found.model) <= half
    assert found.rounds[-1].latency_ms == taken(found.model)
    assert found.rounds[1].cost.macs < found.rounds[0].cost.macs < found.dense_cost.macs


def test_no_labels_anywhere(wide) -> None:
    data = [inputs for inputs, _ in calib()]
    found = resect.shrink(wide, data, to=resect.Budget(parameters=0.2), rounds=2, recovery=resect.Recovery(steps=60), val=data)
    assert math.isnan(found.search_accuracy)
    assert found.recovered.history[found.recovered.best // 6].val_loss <= found.recovered.history[0].val_loss
    json.dumps(found.to_dict())


def test_a_recovery_that_diverges_is_told(wide) -> None:
    recovery = resect.Recovery(steps=20, learning_rate=1e6)
    found = resect.shrink(wide, calib(), to=resect.Budget(parameters=0.3), rounds=1, recovery=recovery)
    without = resect.shrink(wide, calib(), to=resect.Budget(parameters=0.3), rounds=1)
    assert any("diverged" in note for note in found.notes)
    assert state_digest(found.model) == state_digest(without.model)


def test_a_floor_is_certified_for_the_network_that_ships(wide) -> None:
    val, held = blobs(300, seed=5), blobs(600, seed=6)
    floor = resect.Floor(drop=0.05)
    options = {"to": resect.Budget(parameters=0.4), "rounds": 1, "recovery": resect.Recovery(steps=30), "val": val}
    found = resect.shrink(wide, calib(), floor=floor, certify=held, **options)
    certificate = found.certificate
    assert certificate.correct == resect.evaluate(found.model, held).right
    assert (certificate.level, certificate.reserve) == (floor.delta / 2, floor.delta / 2)
    assert found.frozen == (state_digest(found.model),)
    assert found.floor == floor
    split = resect.shrink(wide, calib(), floor=floor, **options)
    assert split.certificate.examples == 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"allocation": "best"}, "no allocation"),
        ({"floor": resect.Floor(drop=0.1)}, "certified on labelled data"),
    ],
)
def test_arguments_that_make_no_sense(wide, arguments: dict, message: str) -> None:
    with pytest.raises(resect.GoalError, match=message):
        resect.shrink(wide, calib(), to=resect.Budget(parameters=0.5), **arguments)


def test_plans_that_do_not_follow_each_other(wide) -> None:
    anatomy = resect.dissect(wide, blobs(2)[0][0])
    half = resect.Plan.random(anatomy, ratio=0.5)
    with pytest.raises(resect.PlanError, match="dissect the network that was cut"):
        half.then(resect.Plan.random(anatomy, ratio=0.3))
    assert half.then(resect.Plan.all(resect.dissect(resect.cut(wide, half), blobs(2)[0][0]))) == half


def test_the_lowest_normalised_scores_of_all_groups_leave_first(wide) -> None:
    trace = resect.trace(wide, calib(), resect.dissect(wide, blobs(2)[0][0]))
    scores = resect.score(trace, "activation_weight")
    measure = against(scores.anatomy, resect.Budget(parameters=0.5))
    plan, normal = by_rank(scores, measure, 1.0), scores.normalised()
    kept = np.concatenate([normal[name][mask] for name, mask in plan.keep.items()])
    gone = np.concatenate([normal[name][~mask] for name, mask in plan.keep.items()])
    # All but the few that were exchanged to land on the target.
    assert (gone > np.sort(kept)[4]).sum() <= 4
    even = by_share(scores, measure, 1.0)
    shares = [even.kept[group.name] / group.units for group in scores.anatomy.groups]
    assert max(shares) - min(shares) < 0.1
    assert filled(scores, plan.kept, measure, 1.0, lambda *_: 0.0) == plan


NETWORK = ("my_cli_module:trained", "--data", "my_cli_module:examples")


def test_shrink_on_the_command_line(here) -> None:  # noqa: F811
    result = run("shrink", *NETWORK, "--parameters", 0.5, "--rounds", 2, "--steps", 30, "--drop", 0.2, "--out", "small")
    assert result.exit_code == 0, result.output
    assert "Certified" in result.stdout
    record = json.loads((here / "small" / "result.json").read_text())
    assert len(record["rounds"]) == 2
    assert record["recovered"]["steps"] == 30
    assert record["cost"]["parameters"] <= 0.5 * record["dense_cost"]["parameters"]
    assert not (here / "small.rounds").exists()
    resect.load("small", "my_cli_module:trained")


def test_ctrl_c_on_the_command_line_keeps_the_rounds(here, monkeypatch) -> None:  # noqa: F811
    command = ("shrink", *NETWORK, "--parameters", 0.4, "--rounds", 2, "--steps", 20, "--out", "small")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resect.shrinking.shrinking, "recover", interrupted)
        result = run(*command)
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.stderr
    assert len(list((here / "small.rounds").glob("round-*"))) == 2
    assert not (here / "small").exists()
    assert run(*command).exit_code == 0
    assert run(*command[:-1], "other").exit_code == 0
    files = [here / name / "model.safetensors" for name in ("small", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "say how small"),
        (("--parameters", 0.01), "there still are"),
        (("--parameters", 1.5), "not a share"),
        (("--parameters", 0.5, "--learning-rate", -1), "must be above 0"),
    ],
)
def test_bad_input_on_the_command_line(here, arguments, expected) -> None:  # noqa: F811
    result = CliRunner().invoke(app, ["shrink", *NETWORK, *map(str, arguments)])
    assert result.exit_code == 2
    assert expected in result.stderr
