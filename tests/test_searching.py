"""The search: equal to brute force on tiny networks, within its budget, and honest about what it froze."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import resect
from resect import Floor, Plan
from resect.searching.allocation import Curves, Knapsack, measure, threshold, trades, uniform
from resect.searching.judging import Judge
from resect.searching.rounding import Rounding
from resect.searching.search import search
from resect.searching.timing import Times, _layers


def blobs(count: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Four noisy clusters in eight dimensions, in batches of 64."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 8, generator=torch.Generator().manual_seed(99)) * 1.2
    labels = torch.randint(0, 4, (count,), generator=draw)
    inputs = centres[labels] + torch.randn(count, 8, generator=draw)
    return list(zip(inputs.split(64), labels.split(64)))


def trained(*widths: int, seed: int = 0) -> nn.Sequential:
    """A ReLU network trained on the blobs for a moment."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(8):
        for x, y in blobs(1000, seed=1):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def tiny():
    model = trained(8, 5, 4, 4)
    calib = blobs(500, seed=2)
    scores = resect.score(resect.trace(model, calib, resect.dissect(model, calib[0][0][:2])), "reconstruction")
    return model, scores


@pytest.fixture(scope="module")
def wide():
    model = trained(8, 64, 32, 4)
    calib = blobs(2000, seed=2)
    scores = resect.score(resect.trace(model, calib, resect.dissect(model, calib[0][0][:2])), "reconstruction")
    return model, scores


@pytest.mark.parametrize("floor", [Floor(drop=0.02), Floor(drop=0.1), Floor(accuracy=0.6)])
@pytest.mark.parametrize("minimise", ["macs", "units", "parameters"])
def test_law_7_on_a_tiny_network_search_equals_brute_force(tiny, floor: Floor, minimise: str) -> None:
    model, scores = tiny
    val, certify = blobs(2000, seed=3), blobs(2000, seed=4)
    found = search(model, scores, val, floor, certify_on=certify, minimise=minimise, evaluations=20, seed=5)
    cost = measure(scores.anatomy, minimise)
    dense = resect.evaluate(model, val)
    passing = []
    for counts in itertools.product(range(1, 6), range(1, 5)):
        plan = Plan.top(scores.anatomy, scores.values, dict(zip(scores.values, counts)))
        small = resect.cut(model, plan, weights=resect.repair(scores.trace, plan).weights)
        if resect.evaluate(small, val).accuracy >= floor.threshold(dense.accuracy) - 1e-12:
            passing.append(cost(plan.kept))
    best = min(cost(trial.kept) for trial in found.trials if trial.above)
    assert best == min(passing)


def test_the_search_stays_in_its_budget_and_records_every_trial(wide) -> None:
    model, scores = wide
    seen = []
    found = search(model, scores, blobs(2000, seed=3), Floor(drop=0.02), evaluations=7, on_trial=seen.append)
    assert len(found.trials) == 7
    assert list(found.trials) == seen
    assert [trial.number for trial in found.trials] == list(range(7))
    assert found.passes < 20


def test_the_frozen_list_falls_in_cost_and_starts_safe(wide) -> None:
    model, scores = wide
    found = search(model, scores, blobs(3000, seed=3), Floor(drop=0.03), calib=blobs(500, seed=2))
    assert found.certificate is not None
    assert 1 <= len(found.frozen) <= 12
    assert len(set(found.frozen)) == len(found.frozen)
    assert found.certificate.frozen == len(found.frozen)
    assert found.certified
    assert resect.surgery.state_digest(found.model) == found.frozen[found.certificate.delivered]
    assert found.cost.macs < found.dense_cost.macs
    assert sum(p.numel() for p in found.model.parameters()) == found.cost.parameters


@pytest.mark.parametrize("allocation", ["uniform", "threshold", "knapsack", "auto"])
def test_every_allocation_finds_a_smaller_network(wide, allocation: str) -> None:
    model, scores = wide
    found = search(model, scores, blobs(3000, seed=3), Floor(drop=0.05), allocation=allocation)
    assert found.certified
    assert found.plan.share < 0.9
    expected = {"auto": {"uniform", "knapsack", "trade"}}.get(allocation, {allocation})
    assert {trial.allocation for trial in found.trials} <= expected


def test_repair_makes_the_search_find_leaner_networks(wide) -> None:
    model, scores = wide
    val, certify = blobs(3000, seed=3), blobs(3000, seed=4)
    shares = {
        method: search(model, scores, val, Floor(drop=0.03), certify_on=certify, method=method).cost.macs
        for method in ("none", "least_squares")
    }
    assert shares["least_squares"] < shares["none"]


def test_the_knapsack_falls_in_cost_as_the_price_rises(wide) -> None:
    _, scores = wide
    cost = measure(scores.anatomy, "macs")
    knapsack = Knapsack(scores=scores, curves=Curves.of(scores, "least_squares"), measure=cost)
    costs = [cost(knapsack.plan(price).kept) for price in (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == cost(Plan.all(scores.anatomy).kept)
    assert costs[-1] < 0.2 * costs[0]


def test_curves_fall_with_units_and_end_at_nothing(wide) -> None:
    _, scores = wide
    curves = Curves.of(scores, "least_squares")
    for name, errors in curves.errors.items():
        assert (np.diff(errors) <= 1e-12).all()
        assert errors[-1] == 0
        assert curves.counts[name][-1] == scores.anatomy.group(name).units


def test_filled_curves_keep_what_was_measured_and_fall_in_between(wide) -> None:
    _, scores = wide
    curves = Curves.of(scores, "least_squares", levels=6)
    filled = curves.filled(scores.anatomy)
    for group in scores.anatomy.groups:
        counts, errors = filled.counts[group.name], filled.errors[group.name]
        assert len(counts) > len(curves.counts[group.name])
        assert (np.diff(counts) > 0).all()
        assert (np.diff(errors) <= 1e-15).all()
        measured = np.isin(counts, curves.counts[group.name])
        np.testing.assert_allclose(errors[measured], curves.errors[group.name], rtol=1e-9)


def test_trades_are_leaner(wide) -> None:
    _, scores = wide
    cost = measure(scores.anatomy, "macs")
    plan = uniform(scores, 0.5)
    offers = trades(scores, plan, Curves.of(scores, "least_squares"), cost)
    assert offers
    assert all(cost(offer.kept) < cost(plan.kept) for offer in offers)


def test_one_threshold_for_all_groups(wide) -> None:
    _, scores = wide
    normal = scores.normalised()
    plan = threshold(scores, 0.8)
    for name, mask in plan.keep.items():
        assert mask.sum() == max(1, (normal[name] >= 0.8).sum())


def test_the_race_never_judges_more_than_it_needs(wide) -> None:
    model, scores = wide
    judge = Judge(
        model=model,
        trace=scores.trace,
        data=blobs(4000, seed=3),
        floor=Floor(accuracy=0.3),
        method="least_squares",
        evaluations=5,
    )
    trial = judge.judge(uniform(scores, 0.5), "uniform")
    assert trial.stopped
    assert trial.above
    assert trial.examples < 1000
    assert judge.judge(uniform(scores, 0.5), "uniform") is trial


def test_a_budget_is_kept_and_fitted_as_well_as_it_can(wide) -> None:
    model, scores = wide
    data = blobs(1000, seed=2)
    for budget in (resect.Budget(macs=0.4), resect.Budget(parameters=0.3), resect.Budget(parameters=0.5, macs=0.3)):
        found = resect.fit(model, scores, budget, data, val=blobs(2000, seed=3))
        shares = found.cost.share_of(found.dense_cost)
        limits = {"macs": budget.macs, "parameters": budget.parameters}
        assert all(shares[name] <= limit for name, limit in limits.items() if limit is not None)
        assert max(shares[name] / limit for name, limit in limits.items() if limit is not None) > 0.9
        assert sum(p.numel() for p in found.model.parameters()) == found.cost.parameters
        assert found.search_accuracy > found.dense_search_accuracy - 0.1
        assert not found.certified


def test_a_budget_that_cannot_be_met_says_what_can(wide) -> None:
    model, scores = wide
    with pytest.raises(resect.GoalError, match="not even the leanest network"):
        resect.fit(model, scores, resect.Budget(parameters=0.001), blobs(200))
    with pytest.raises(resect.GoalError, match="the fastest took"):
        resect.fit(model, scores, resect.Budget(latency_ms=1e-7), blobs(200))


def test_a_latency_budget_is_met_by_the_network_itself(wide) -> None:
    model, scores = wide
    found = resect.fit(model, scores, resect.Budget(latency_ms=1e4), blobs(200))
    assert found.plan.share == 1
    assert "not faster on this device" in found.notes[0]


@pytest.mark.parametrize("allocation", ["uniform", "threshold", "knapsack", "auto"])
def test_every_allocation_keeps_to_rounded_counts(wide, allocation: str) -> None:
    model, scores = wide
    found = search(model, scores, blobs(3000, seed=3), Floor(drop=0.05), allocation=allocation, round_to=8)
    for kept in (found.plan.kept, *(trial.kept for trial in found.trials)):
        assert all(count % 8 == 0 for count in kept.values())
    assert found.certified
    assert found.plan.share < 1


def test_on_a_tiny_network_a_rounded_search_equals_brute_force(tiny) -> None:
    model, scores = tiny
    val, certify = blobs(2000, seed=3), blobs(2000, seed=4)
    found = search(model, scores, val, Floor(drop=0.02), certify_on=certify, evaluations=20, round_to=2)
    tried = {tuple(trial.kept.values()) for trial in found.trials}
    assert tried <= set(itertools.product((2, 4, 5), (2, 4)))
    cost, dense = measure(scores.anatomy, "macs"), resect.evaluate(model, val).accuracy
    passing = []
    for counts in itertools.product((2, 4, 5), (2, 4)):
        plan = Plan.top(scores.anatomy, scores.values, dict(zip(scores.values, counts)))
        small = resect.cut(model, plan, weights=resect.repair(scores.trace, plan).weights)
        if resect.evaluate(small, val).accuracy >= dense - 0.02 - 1e-12:
            passing.append(cost(plan.kept))
    assert min(cost(trial.kept) for trial in found.trials if trial.above) == min(passing)


@pytest.mark.parametrize("round_to", ["auto", 8, 16])
def test_a_rounded_plan_still_keeps_the_budget(wide, round_to) -> None:
    model, scores = wide
    step = 8 if round_to == "auto" else round_to
    for budget in (resect.Budget(macs=0.6), resect.Budget(parameters=0.35, macs=0.5)):
        found = resect.fit(model, scores, budget, blobs(1000, seed=2), round_to=round_to)
        shares = found.cost.share_of(found.dense_cost)
        assert shares["macs"] <= budget.macs
        assert budget.parameters is None or shares["parameters"] <= budget.parameters
        assert all(count % step == 0 for count in found.plan.kept.values())
    with pytest.raises(resect.GoalError, match="or leave out round_to"):
        resect.fit(model, scores, resect.Budget(macs=0.05), blobs(200), round_to=32)


def test_the_knapsack_stays_at_the_end_of_a_step_of_time(wide) -> None:
    _, scores = wide
    curves = Curves.of(scores, "least_squares", rounding=Rounding.of(scores.anatomy, 8))
    writer, reader, last = _layers(trained(8, 64, 32, 4), scores.anatomy, 1)
    # Only the middle layer takes time, and as much for 17 as for 32 of what it reads.
    stairs = np.repeat(np.ceil(reader.knots()[0] / 16)[:, None], len(reader.knots()[1]), axis=1)
    tables = (np.zeros([len(k) for k in writer.knots()]), stairs, np.zeros([len(k) for k in last.knots()]))
    times = Times(anatomy=scores.anatomy, batch=1, layers=(writer, reader, last), tables=tables)
    assert times({"0": 64, "2": 32}) == 4
    plan = Knapsack(scores=scores, curves=curves, measure=measure(scores.anatomy, "latency", times)).within(2.0)
    assert plan.kept == {"0": 32, "2": 32}


def test_a_latency_budget_holds_with_the_shares_beside_it(wide) -> None:
    model, scores = wide
    found = resect.fit(model, scores, resect.Budget(latency_ms=1e4, macs=0.5, batch=4), blobs(200))
    assert found.cost.macs <= 0.5 * found.dense_cost.macs
    (note,) = found.notes
    assert note.startswith("Measured beside the dense network: batch 4")
    with pytest.raises(resect.GoalError, match="not even the leanest network"):
        resect.fit(model, scores, resect.Budget(latency_ms=1e4, parameters=0.001), blobs(200))
    with pytest.raises(resect.GoalError, match="give latency_ms as well"):
        resect.Budget(macs=0.5, batch=4)
    with pytest.raises(resect.GoalError, match="not a number of examples"):
        resect.Budget(latency_ms=1.0, batch=0)


def test_the_search_can_minimise_predicted_latency(wide) -> None:
    model, scores = wide
    found = search(model, scores, blobs(3000, seed=3), Floor(drop=0.05), minimise="latency", evaluations=12)
    assert found.certified
    assert found.plan.share < 1
    assert any(note.startswith("Measured beside the dense network: batch 1") for note in found.notes)
