"""Rounding: only counts that a plan may have, never above a group's size, and no plan becomes illegal by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import resect
from resect import GoalError, Plan
from resect.plan import count_step, valid_count
from resect.searching.rounding import FREE, Rounding, conv_multiple
from zoo import ZOO


class Gated(nn.Module):
    """Gate and value in one weight: a unit owns two rows of it, and one column of what reads it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(6, 2 * width), nn.Linear(width, 3)

    def forward(self, x):
        gate, value = self.both(x).chunk(2, dim=1)
        return self.out(gate.sigmoid() * value)


def anatomy_of(model: nn.Module, *shape: int):
    return resect.dissect(model.eval(), torch.randn(2, *shape))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_count_that_may_be_chosen_can_be_cut(name: str) -> None:
    model, example = ZOO[name]()
    anatomy = resect.dissect(model, example, verify=False)
    for round_to in ("auto", 1, 4, 6):
        rounding = Rounding.of(anatomy, round_to)
        for group in anatomy.groups:
            counts = rounding.counts(group)
            assert counts[-1] == group.units
            assert all(rounding.up(group, count) == count == valid_count(group, count) for count in counts)
            for wanted in (0, 1, 0.3 * group.units, group.units / 2, group.units - 1, group.units, 10 * group.units):
                assert rounding.up(group, wanted) == min((c for c in counts if c >= wanted), default=group.units)
        keep = {g.name: rounding.counts(g)[0] for g in anatomy.groups}
        scores = {g.name: np.arange(g.units) for g in anatomy.groups}
        assert Plan.top(anatomy, scores, keep).kept == keep


def test_auto_rounds_by_what_the_width_is() -> None:
    wide = anatomy_of(nn.Sequential(nn.Linear(4, 2048), nn.ReLU(), nn.Linear(2048, 60), nn.ReLU(), nn.Linear(60, 2)), 4)
    assert [Rounding.of(wide, "auto").step(group) for group in wide.groups] == [128, 8]
    layers = (nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 6, 1), nn.Flatten(), nn.Linear(6 * 4, 5))
    convolved = anatomy_of(nn.Sequential(*layers), 3, 4, 4)
    rounding = Rounding.of(convolved, "auto")
    first, narrow = convolved.groups
    assert Rounding.of(anatomy_of(Gated(12), 6), "auto").counts(anatomy_of(Gated(12), 6).groups[0]) == [4, 8, 12]
    assert rounding.counts(first) == sorted({*range(conv_multiple(), 40, conv_multiple()), 40})
    assert rounding.counts(narrow) == [1, 2, 3, 4, 5, 6]
    gated = anatomy_of(Gated(20), 6)
    assert Rounding.of(gated, "auto").counts(gated.groups[0]) == [8, 16, 20]


def test_heads_are_never_rounded() -> None:
    layer = nn.TransformerEncoderLayer(32, 8, 48, batch_first=True)
    anatomy = anatomy_of(nn.Sequential(layer, nn.Linear(32, 3)), 5, 32)
    rounding = Rounding.of(anatomy, 4)
    kinds = {group.kind: rounding.step(group) for group in anatomy.groups if group.kind != "stream"}
    assert kinds == {"head": 1, "hidden": 4}


def test_parts_are_rounded_together() -> None:
    model = nn.Sequential(nn.Conv2d(3, 24, 1), nn.ReLU(), nn.Conv2d(24, 36, 3, groups=3), nn.ReLU(), nn.Conv2d(36, 2, 1))
    anatomy = anatomy_of(model, 3, 6, 6)
    rounding = Rounding.of(anatomy, 4)
    assert {count_step(group) for group in anatomy.groups} == {3}
    assert [rounding.counts(group) for group in anatomy.groups] == [[12, 24], [12, 24, 36]]


def test_without_round_to_every_valid_count_may_be_chosen() -> None:
    anatomy = anatomy_of(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)), 4)
    (group,) = anatomy.groups
    assert FREE.counts(group) == Rounding.of(anatomy, None).counts(group) == Rounding.of(anatomy, 1).counts(group)
    assert FREE.counts(group) == list(range(1, 10))


@pytest.mark.parametrize("round_to", [0, -8, 8.0, "fast", "8", True, [8]])
def test_what_is_not_a_multiple_is_refused_before_any_work(round_to) -> None:
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)).eval()
    data = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(GoalError, match=r'neither "auto" nor a whole number above 0; write round_to="auto"'):
        resect.prune(model, data, budget=resect.Budget(macs=0.5), round_to=round_to)
    scores = resect.score(resect.trace(model, data, resect.dissect(model, data[0][0])), "magnitude")
    with pytest.raises(GoalError, match="round_to"):
        resect.fit(model, scores, resect.Budget(macs=0.5), data, round_to=round_to)
    with pytest.raises(GoalError, match="round_to"):
        resect.search(model, scores, data, resect.Floor(drop=0.5), round_to=round_to)
