"""Scorers against their formulas, and the greedy elimination against brute force."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import resect
from resect.scoring import reconstruction
from resect.scoring.reconstruction import System, eliminate
from resect.testing import example_evidence


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x, y = torch.randn(300, 5), torch.randint(0, 3, (300,))
    trace = resect.trace(model, [(x, y)], resect.dissect(model, x[:2]), gradients=True)
    with torch.no_grad():
        return model, model[:2](x).numpy(), y.numpy(), trace


def per_class(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.stack([values[labels == label].mean(0) for label in range(3)])


def test_formulas(subject) -> None:
    model, hidden, labels, trace = subject
    weight = model[2].weight.detach().numpy()
    column = np.linalg.norm(weight, axis=0)
    expected = {
        "firing_rate": per_class(hidden > 0, labels),
        "peak": np.stack([hidden[labels == label].max(0) for label in range(3)]),
        "contribution": per_class(hidden, labels) * np.abs(weight - weight.mean(0)),
        "activation_weight": np.sqrt(per_class(hidden**2, labels)) * column,
    }
    for name, values in expected.items():
        scores = resect.score(trace, name)
        np.testing.assert_allclose(scores.by_class["0"], values, rtol=1e-4, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(resect.score(trace, name, classes=(1,)).values["0"], values[1], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(resect.score(trace, name, reduce="mean").values["0"], values.mean(0), rtol=1e-4, atol=1e-6)
    writers = np.linalg.norm(model[0].weight.detach().numpy(), axis=1)
    np.testing.assert_allclose(resect.score(trace, "magnitude").values["0"], writers * column, rtol=1e-5)
    np.testing.assert_allclose(resect.score(trace, "fluctuation").values["0"], hidden.var(0) * column**2, rtol=1e-3)


def test_random_is_seeded(subject) -> None:
    trace = subject[3]
    a, b, c = (resect.score(trace, "random", seed=seed).values["0"] for seed in (0, 0, 1))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_dead_and_constant_units_score_lowest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].weight[[2, 5]] = 0
        model[0].bias[2], model[0].bias[5] = 7.0, -7.0
        model[2].weight[:, [2, 5]] = 100
    x, y = torch.randn(200, 5), torch.randint(0, 3, (200,))
    trace = resect.trace(model, [(x, y)], resect.dissect(model, x[:2]), **resect.scoring.needs(*resect.SCORERS))
    for name in set(resect.SCORERS) - {"random"}:
        assert set(np.argsort(resect.score(trace, name).values["0"], kind="stable")[:2]) == {2, 5}, name


def residual(weight: np.ndarray, moments: np.ndarray, kept: list[int]) -> float:
    """Least-squares error of the reader when only `kept` columns and the constant remain."""
    basis = [*kept, weight.shape[1]]
    full = np.concatenate([weight, np.zeros((len(weight), 1))], axis=1)
    cross = full @ moments[:, basis]
    fitted = cross @ np.linalg.pinv(moments[np.ix_(basis, basis)]) @ cross.T
    return float(np.trace(full @ moments @ full.T) - np.trace(fitted))


def test_each_elimination_is_the_cheapest_when_the_others_adapt() -> None:
    weight, moments, columns = example_evidence(3, units=7).systems[0]
    found = eliminate([System(weight, moments, columns)])
    kept = list(range(7))
    energy = residual(weight, moments, [])
    for step, unit in enumerate(found.order):
        options = {u: residual(weight, moments, [k for k in kept if k != u]) for u in kept}
        assert options[unit] <= min(options.values()) * (1 + 1e-3) + 1e-6
        kept.remove(unit)
        assert found.lost[unit] == pytest.approx(options[unit] / energy, rel=1e-2, abs=1e-4), step


def test_elimination_is_near_the_best_subset() -> None:
    weight, moments, columns = example_evidence(5, units=10).systems[0]
    order = eliminate([System(weight, moments, columns)]).order
    greedy = residual(weight, moments, sorted(order[5:].tolist()))
    everything = [residual(weight, moments, list(subset)) for subset in itertools.combinations(range(10), 5)]
    assert min(everything) - 1e-6 <= greedy <= np.percentile(everything, 5)


def test_blocks_of_columns_are_eliminated_together() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=(400, 12))
    rows = np.concatenate([values, np.ones((400, 1))], axis=1)
    weight, moments = draw.normal(size=(5, 12)), rows.T @ rows
    columns = np.arange(12).reshape(4, 3)
    order = eliminate([System(weight, moments, columns)]).order
    kept = [0, 1, 2, 3]
    for unit in order[:3]:
        options = {u: residual(weight, moments, [c for k in kept if k != u for c in columns[k]]) for u in kept}
        assert options[unit] <= min(options.values()) * (1 + 1e-3)
        kept.remove(unit)


def wide_system(units: int, width: int, *, rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A reader of units that are nearly functions of few hidden ones: second moments that are almost singular."""
    draw = np.random.default_rng(seed)
    columns = units * width
    values = draw.normal(size=(900, rank)) @ draw.normal(size=(rank, columns)) + 1e-3 * draw.normal(size=(900, columns)) + 2
    rows = np.concatenate([values, np.ones((900, 1))], axis=1)
    return draw.normal(size=(9, columns)), rows.T @ rows, np.arange(columns).reshape(units, width)


@pytest.mark.parametrize(("units", "width"), [(150, 1), (30, 9), (6, 40)])
def test_what_is_left_is_solved_anew_at_every_stage(units: int, width: int) -> None:
    system = System(*wide_system(units, width, rank=20))
    draw = np.random.default_rng(1)
    while len(system.units) > 2:
        system.remove(np.sort(draw.choice(len(system.units), size=min(2, len(system.units) - 1), replace=False)))
        running = system.losses()
        fresh = copy.deepcopy(system)
        fresh.factorise()
        np.testing.assert_allclose(running, fresh.losses(), rtol=1e-3)
    assert system.drift() <= reconstruction.DRIFT


def test_an_inverse_that_drifts_is_made_anew() -> None:
    system = System(*wide_system(150, 1, rank=20))
    assert system.drift() <= reconstruction.DRIFT
    system.inverse[:] *= 1 + 1e-3 * np.random.default_rng(0).normal(size=system.inverse.shape)
    assert system.drift() > reconstruction.DRIFT
    for _ in range(reconstruction.PENDING):
        system.remove(np.array([0]))
    assert system.drift() <= reconstruction.DRIFT
    fresh = copy.deepcopy(system)
    fresh.factorise()
    np.testing.assert_allclose(system.losses(), fresh.losses(), rtol=1e-6)


def test_the_curve_runs_from_everything_lost_to_nothing(subject) -> None:
    trace = subject[3]
    found = reconstruction.eliminated(trace.evidence(trace.anatomy.groups[0]))
    assert found.curve.shape == (9,)
    assert found.curve[0] == pytest.approx(1, abs=1e-3)
    assert found.curve[-1] == 0
    assert (np.diff(found.curve) <= 0).all()


@pytest.mark.parametrize("together", [1, 3, 4])
def test_what_is_lost_is_what_least_squares_cannot_restore(together: int) -> None:
    weight, moments, columns = example_evidence(3, units=9).systems[0]
    found = eliminate([System(weight, moments, columns)], together=together)
    energy = residual(weight, moments, [])
    for step, unit in enumerate(found.order):
        expected = residual(weight, moments, found.order[step + 1 :].tolist())
        assert found.lost[unit] == pytest.approx(expected / energy, rel=1e-2, abs=1e-4), step


def test_several_at_a_time_lose_little_more_than_one_at_a_time() -> None:
    system = wide_system(400, 1, rank=60)
    exact, blocked = (eliminate([System(*system)], together=together).curve for together in (1, 2))
    for kept in (40, 120, 200, 280):
        assert blocked[kept] <= 1.1 * exact[kept] + 1e-9


def test_missing_evidence_is_named(subject) -> None:
    model, *_ = subject
    x = torch.randn(50, 5)
    plain = resect.trace(model, [x], resect.dissect(model, x[:2]), grams=False)
    with pytest.raises(resect.ScoreError, match="grams=True"):
        resect.score(plain, "reconstruction")
    with pytest.raises(resect.ScoreError, match="gradients=True"):
        resect.score(plain, "taylor")


def test_what_a_scorer_may_return(subject) -> None:
    trace = subject[3]
    with pytest.raises(resect.ScoreError, match=r"shape \(3,\)"):
        resect.score(trace, lambda evidence: np.zeros(3))
    with pytest.raises(resect.ScoreError, match="not finite"):
        resect.score(trace, lambda evidence: np.full(8, np.nan))
    mine = resect.score(trace, lambda evidence: np.arange(8.0) + 1)
    assert mine.order("0").tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_an_unknown_reduction(subject) -> None:
    with pytest.raises(resect.ScoreError, match="reduce='median'"):
        resect.score(subject[3], reduce="median")
