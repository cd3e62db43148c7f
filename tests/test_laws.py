"""Every law over every small network of the zoo; scorer laws over every scorer."""

from __future__ import annotations

import functools
import socket

import numpy as np
import pytest
import torch

import laws
import resect
from zoo import ZOO

NAMES = sorted(ZOO)


@functools.cache
def subject(name: str):
    """A network of the zoo with its anatomy, unlabelled data like its example, and the same data with its own answers."""
    model, example = ZOO[name]()
    anatomy = resect.dissect(model, example)
    data = laws.batches_like(example)
    return model, anatomy, data


def test_most_of_the_zoo_can_be_cut() -> None:
    """Laws say little about a network without groups; only a few hard cases may be left whole."""
    whole = [name for name in NAMES if not subject(name)[1].groups]
    assert len(whole) <= 0.1 * len(NAMES), whole


@pytest.mark.parametrize("name", NAMES)
def test_law_1_keeping_all_changes_no_bit(name: str) -> None:
    model, anatomy, _ = subject(name)
    laws.law_1_keeping_all_changes_no_bit(model, anatomy)


@pytest.mark.parametrize("name", NAMES)
def test_law_2_cut_equals_masked(name: str) -> None:
    model, anatomy, _ = subject(name)
    laws.law_2_cut_equals_masked(model, anatomy)


@pytest.mark.parametrize("name", NAMES)
def test_law_3_the_model_is_left_alone(name: str) -> None:
    model, anatomy, data = subject(name)
    laws.law_3_the_model_is_left_alone(model, anatomy, wrapped(data))


@pytest.mark.parametrize("name", NAMES)
def test_law_4_traces_add(name: str) -> None:
    model, anatomy, data = subject(name)
    laws.law_4_traces_add(model, anatomy, wrapped(data))


@pytest.mark.parametrize("name", NAMES)
def test_law_5_permuted_units_have_permuted_scores(name: str) -> None:
    model, anatomy, data = subject(name)
    names = [n for n in laws.SCORER_NAMES if n != "taylor"]
    laws.law_5_permuted_units_have_permuted_scores(model, anatomy, wrapped(data), names)


@pytest.mark.parametrize("scorer", laws.SCORER_NAMES)
def test_law_6_same_seed_same_plan_same_bytes(scorer: str) -> None:
    model, _, data = subject("mlp_relu")
    answered = laws.labelled(model, data)
    found = [resect.prune(model, answered, answered, floor=resect.Floor(drop=0.2), scorer=scorer, seed=3) for _ in range(2)]
    assert found[0].plan.digest == found[1].plan.digest
    assert resect.surgery.state_digest(found[0].model) == resect.surgery.state_digest(found[1].model)
    assert [t.digest for t in found[0].trials] == [t.digest for t in found[1].trials]


@pytest.mark.parametrize("name", NAMES)
def test_law_8_predicted_cost_is_counted_cost(name: str) -> None:
    model, anatomy, _ = subject(name)
    laws.law_8_predicted_cost_is_counted_cost(model, anatomy)


@pytest.mark.parametrize("name", NAMES)
def test_law_10_or_keeps_what_either_keeps(name: str) -> None:
    _, anatomy, _ = subject(name)
    laws.law_10_or_keeps_what_either_keeps(anatomy)


@pytest.mark.parametrize("name", NAMES)
def test_law_11_least_squares_is_never_worse_than_none(name: str) -> None:
    model, anatomy, data = subject(name)
    laws.law_11_least_squares_is_never_worse_than_none(model, anatomy, wrapped(data))


def test_law_13_no_network_access(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def refuse(*arguments, **options):
        raise AssertionError("a step on local data opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    model, _, data = subject("mlp_relu")
    answered = laws.labelled(model, data)
    found = resect.prune(model, answered, answered, floor=resect.Floor(drop=0.2))
    resect.save(found.model, found.plan, tmp_path / "small", found=found)
    reloaded = resect.load(tmp_path / "small", lambda: ZOO["mlp_relu"]()[0])
    with torch.no_grad():
        assert torch.equal(reloaded(answered[0][0]), found.model(answered[0][0]))


def wrapped(data: list) -> list:
    """Data for networks of several inputs: as keyword-free tuples they would read as (inputs, labels), so add labels."""
    return [(*item, torch.zeros(len(item[0]), dtype=torch.long)) if isinstance(item, tuple) else item for item in data]


def test_the_laws_can_fail() -> None:
    """A scorer that depends on a unit's place, and a plan cut wrongly, are caught."""
    with pytest.raises(resect.ScoreError, match="place"):
        resect.testing.check_scorer(lambda evidence: np.arange(evidence.units, dtype=float))
    with pytest.raises(resect.ScoreError, match="changed the evidence"):
        resect.testing.check_scorer(destructive)


def destructive(evidence: resect.Evidence) -> np.ndarray:
    evidence.writer_norm[0] += 1
    return np.zeros(evidence.units)


@pytest.mark.parametrize("name", sorted(set(resect.SCORERS) - {"random"}))
def test_every_scorer_keeps_the_laws(name: str) -> None:
    assert resect.testing.check_scorer(resect.SCORERS[name])
