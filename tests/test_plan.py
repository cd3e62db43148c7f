"""Plans: what they refuse, what they cost, how they are made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import resect
from resect import Plan, PlanError
from resect.plan import best, valid_count


@pytest.fixture(scope="module")
def anatomy():
    torch.manual_seed(0)
    return resect.dissect(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval(), torch.ones(2, 4)
    )


@pytest.fixture(scope="module")
def grouped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1)).eval()
    return model, resect.dissect(model, torch.ones(2, 3, 6, 6))


def test_unknown_groups_name_the_nearest(anatomy) -> None:
    keep = dict(Plan.all(anatomy).keep)
    keep["00"] = keep.pop("0")
    with pytest.raises(PlanError, match=r"'00', which this network lacks; nearest: '0'"):
        Plan(anatomy=anatomy, keep=keep)


def test_missing_groups_wrong_lengths_and_empty_groups(anatomy) -> None:
    whole = Plan.all(anatomy).keep
    with pytest.raises(PlanError, match="says nothing of group '0'"):
        Plan(anatomy=anatomy, keep={"2": whole["2"]})
    with pytest.raises(PlanError, match=r"shape \(7,\).*8 units"):
        Plan(anatomy=anatomy, keep={**whole, "0": np.ones(7, dtype=bool)})
    with pytest.raises(PlanError, match="removes every unit of group '2'"):
        Plan(anatomy=anatomy, keep={**whole, "2": np.zeros(6, dtype=bool)})


def test_parts_keep_equally_many(grouped) -> None:
    model, anatomy = grouped
    whole = Plan.all(anatomy)
    name = next(group.name for group in anatomy.groups if group.parts.max() > 0)
    uneven = whole.keep[name].copy()
    uneven[0] = False
    with pytest.raises(PlanError, match="equally many units"):
        Plan(anatomy=anatomy, keep={**whole.keep, name: uneven})
    for seed in range(5):
        plan = Plan.random(anatomy, ratio=0.5, seed=seed)
        small = resect.cut(model, plan)
        assert small[2].groups == 4
        assert small[2].weight.shape[0] == plan.kept[anatomy.groups[1].name]


def test_counts_go_up_to_the_next_valid_one(grouped) -> None:
    group = next(g for g in grouped[1].groups if g.units == 12)
    assert [valid_count(group, wanted) for wanted in (0, 1, 4, 4.5, 11, 12, 50)] == [4, 4, 4, 8, 12, 12, 12]


def test_ties_break_by_index(anatomy) -> None:
    assert best(anatomy.group("0"), np.zeros(8), 3).tolist() == [True] * 3 + [False] * 5


def test_equal_plans_have_equal_digests(anatomy) -> None:
    a, b, c = (Plan.random(anatomy, ratio=0.5, seed=seed) for seed in (0, 0, 1))
    assert a == b
    assert hash(a) == hash(b)
    assert a != c
    assert (a | c).share >= max(a.share, c.share)
    assert str(a).startswith("keeps 50.0% of the units")


def test_plans_of_two_networks_do_not_join(anatomy, grouped) -> None:
    with pytest.raises(PlanError, match="two different networks"):
        Plan.all(anatomy) | Plan.all(grouped[1])


def test_predicted_cost_is_what_remains(anatomy) -> None:
    plan = Plan.top(anatomy, {"0": np.arange(8.0), "2": np.arange(6.0)}, {"0": 3, "2": 2})
    cost = plan.cost()
    assert cost.parameters == 4 * 3 + 3 + 3 * 2 + 2 + 2 * 2 + 2
    assert cost.macs == 4 * 3 + 3 * 2 + 2 * 2
    assert cost.bytes == 4 * cost.parameters
    assert plan.keep["0"].tolist() == [False] * 5 + [True] * 3
