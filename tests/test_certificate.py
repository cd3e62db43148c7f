"""The statistics behind a promise: exact where they are exact, and broken no more often than they say, by simulation.

Every simulation is seeded, and its limit is the stated probability plus binomial error at one in ten thousand.
"""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from resect.errors import DataError, GoalError
from resect.evaluation import Evaluation
from resect.searching.certificate import Certificate, certify, certify_artefact, walk
from resect.searching.evidence import (
    log_wealth,
    lower_bound,
    needed_for_accuracy,
    needed_for_drop,
    p_accuracy,
    p_agreement,
    p_drop,
)
from resect.searching.floor import Budget, Floor
from resect.searching.ladder import INDEPENDENT, NOTHING, chances, climb, ladder, margins
from resect.searching.racing import Accumulator, race


def at_most(share, draws):
    """Most events in `draws` that a true probability of `share` gives, but for one time in ten thousand."""
    return int(binom.ppf(0.9999, draws, share))


def judged(correct, labels=None, labelled=True):
    """An evaluation with this correctness; predictions follow from it."""
    correct = np.asarray(correct, dtype=bool)
    labels = np.zeros(len(correct), dtype=np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
    return Evaluation(correct=correct, labels=labels, predictions=np.where(correct, labels, labels + 1), labelled=labelled)


def share_right(share, n):
    return judged(np.arange(n) < round(share * n))


def drawn(accuracies, n, rng, common=0.9):
    """Correctness of networks of these accuracies, (networks, n): a share `common` of the errors falls on the same examples."""
    shared, own = rng.random(n), rng.random((len(accuracies), n))
    use = rng.random((len(accuracies), n)) < common
    return np.where(use, shared, own) < np.asarray(accuracies)[:, None]


# p-values


@given(n=st.integers(1, 400), share=st.floats(0, 1), tau=st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_accuracy_is_the_exact_binomial_test(n, share, tau):
    correct = round(share * n)
    assert p_accuracy(correct, n, tau) == pytest.approx(binomtest(correct, n, tau, alternative="greater").pvalue, abs=1e-12)


@given(n=st.integers(1, 400), share=st.floats(0, 1), delta=st.floats(0.001, 0.5))
@settings(max_examples=60, deadline=None)
def test_lower_bound_is_clopper_pearson_and_agrees_with_the_p_value(n, share, delta):
    correct = round(share * n)
    bound = lower_bound(correct, n, delta)
    exact = binomtest(correct, n, 0.5, alternative="greater").proportion_ci(1 - delta, method="exact").low
    assert bound == pytest.approx(exact, abs=1e-9)
    if bound > 1e-6:
        assert p_accuracy(correct, n, bound - 1e-7) <= delta + 1e-9
        assert p_accuracy(correct, n, min(1.0, bound + 1e-4)) >= delta - 1e-9


def test_trivial_cases_of_the_p_values():
    assert p_accuracy(0, 10, 0.0) == 0
    assert p_accuracy(0, 0, 0.5) == 1
    assert p_accuracy(10, 10, 1.0) == 1
    assert p_agreement(97, 100, 0.1) == pytest.approx(binom.cdf(3, 100, 0.1))
    assert p_drop(np.ones(0), np.ones(0), 0.01) == 1
    with pytest.raises(DataError, match=r"\(3,\).*\(4,\).*same batches"):
        p_drop(np.ones(3), np.ones(4), 0.01)


@pytest.mark.parametrize(
    ("loss", "gain", "eps"), [(0.01, 0.0, 0.01), (0.05, 0.04, 0.01), (0.06, 0.01, 0.05), (0.2, 0.0, 0.2), (0.03, 0.03, 0.0)]
)
@pytest.mark.parametrize("n", [300, 1000])
def test_a_broken_drop_floor_passes_at_most_delta_of_the_time(loss, gain, eps, n):
    """At the boundary (true drop = eps) the worst case is reached; draws of (dense, candidate) outcomes are independent."""
    rng, draws = np.random.default_rng(7), 1500
    passed = {0.05: 0, 0.2: 0}
    for number in range(draws):
        u = rng.random(n)
        dense, candidate = (u < loss) | (u >= loss + gain), u >= loss
        for delta in passed:
            passed[delta] += p_drop(dense, candidate, eps, delta, seed=number) <= delta
    for delta, count in passed.items():
        assert count <= at_most(delta, draws)


@pytest.mark.parametrize("delta", [0.05, 0.5])
@pytest.mark.parametrize(("low", "high"), [(0.1, 0.05), (0.5, 0.3)])
def test_wealth_is_a_martingale_at_the_boundary(low, high, delta):
    """Over all outcomes of six examples, the expected wealth is the stake: bets that peek at what they bet on would win."""
    chance = {0.0: low, 0.5: 1 - low - high, 1.0: high}
    mean = sum(value * share for value, share in chance.items())
    expected = np.zeros(6)
    for outcome in itertools.product(chance, repeat=6):
        wealth = np.exp(log_wealth(np.array(outcome), mean=mean, delta=delta))
        expected += wealth * np.prod([chance[value] for value in outcome])
    assert expected == pytest.approx(np.ones(6))


def test_a_kept_drop_floor_is_recognised():
    rng, passed = np.random.default_rng(1), 0
    for number in range(200):
        u = rng.random(2000)
        passed += p_drop((u < 0.004) | (u >= 0.007), u >= 0.004, 0.01, 0.05, seed=number) <= 0.05
    assert passed >= 160
    right = rng.random(1000) < 0.97
    assert p_drop(right, right, 0.01) <= 0.05
    assert p_drop(right, ~right, 0.01) == 1


def test_row_order_is_seeded_and_sorted_rows_do_no_harm():
    rng = np.random.default_rng(2)
    u = np.sort(rng.random(2000))
    dense, candidate = (u < 0.004) | (u >= 0.007), u >= 0.004
    assert p_drop(dense, candidate, 0.02, seed=3) == p_drop(dense, candidate, 0.02, seed=3)
    assert p_drop(dense, candidate, 0.02, seed=3) != p_drop(dense, candidate, 0.02, seed=4)
    assert max(p_drop(dense, candidate, 0.02, seed=s) for s in range(20)) <= 0.05


@given(rate=st.floats(0.5, 1), tau=st.floats(0.3, 0.99), delta=st.sampled_from([0.01, 0.05, 0.1]))
@settings(max_examples=40, deadline=None)
def test_needed_examples_suffice_and_fewer_do_not(rate, tau, delta):
    needed = needed_for_accuracy(rate, tau, delta)
    if rate <= tau:
        assert needed is None
    elif needed is not None:
        assert p_accuracy(int(np.floor(rate * needed + 1e-9)), needed, tau) <= delta
        before = needed - 1
        assert p_accuracy(int(np.floor(rate * before + 1e-9)), before, tau) > delta


@pytest.mark.parametrize(("loss", "gain"), [(0.006, 0.004), (0.011, 0.005), (0.003, 0.003), (0.0, 0.0)])
def test_needed_examples_for_a_drop_pass_about_half_of_the_time(loss, gain):
    needed = needed_for_drop(loss, gain, 0.01)
    rng, passed = np.random.default_rng(5), {needed // 2: 0, needed: 0, 2 * needed: 0}
    for n in passed:
        for number in range(100):
            u = rng.random(n)
            passed[n] += p_drop((u < loss) | (u >= loss + gain), u >= loss, 0.01, seed=number) <= 0.05
    half, enough, twice = passed.values()
    assert half < min(60, enough)
    assert enough >= 30
    assert twice >= 70
    assert needed_for_drop(0.02, 0.01, 0.01) is None


# the walk


def test_the_walk_delivers_the_last_that_passed_before_the_first_failure():
    floor = Floor(accuracy=0.9)
    index, steps = walk(floor, None, [share_right(a, 1000) for a in (0.97, 0.95, 0.90, 0.99)])
    assert index == 1
    assert [(s.number, s.passed) for s in steps] == [(0, True), (1, True), (2, False)]
    assert steps[2].p_value == pytest.approx(p_accuracy(900, 1000, 0.9))
    assert steps[0].accuracy == 0.97
    assert walk(floor, None, [share_right(0.5, 1000), share_right(0.99, 1000)])[0] is None
    assert walk(floor, None, []) == (None, ())


def test_no_network_is_run_after_the_first_failure():
    run = []

    def candidates():
        for accuracy in (0.97, 0.80, 0.99):
            run.append(accuracy)
            yield share_right(accuracy, 1000)

    certificate = certify(Floor(accuracy=0.9), None, candidates(), frozen=3)
    assert run == [0.97, 0.80]
    assert (certificate.delivered, certificate.frozen, len(certificate.walked)) == (0, 3, 2)


def test_several_floors_all_hold():
    dense, good, worse = (judged(np.arange(2000) >= k) for k in (20, 30, 90))
    both = [Floor(accuracy=0.9), Floor(drop=0.02)]
    index, steps = walk(both, dense, [good, worse])
    assert index == 0
    assert steps[1].p_value == p_drop(dense.correct, worse.correct, 0.02)
    assert walk(both[0], dense, [good, worse])[0] == 1
    with pytest.raises(GoalError, match="share one delta"):
        walk([both[0], Floor(drop=0.02, delta=0.1)], dense, [good])
    with pytest.raises(GoalError, match="no floor"):
        walk([], dense, [good])


def test_a_floor_on_one_class_counts_its_examples_only():
    labels = np.repeat([0, 1], 500)
    lopsided = judged(np.arange(1000) < 900, labels)
    assert walk([Floor(accuracy=0.85)], None, [lopsided])[0] == 0
    per_class = [Floor(accuracy=0.85, label=0), Floor(accuracy=0.85, label=1)]
    index, steps = walk(per_class, None, [lopsided])
    assert index is None
    assert steps[0].p_value == pytest.approx(p_accuracy(400, 500, 0.85))
    with pytest.raises(DataError, match="no example has label 7"):
        walk(Floor(accuracy=0.85, label=7), None, [lopsided])


def test_missing_evidence_is_named():
    with pytest.raises(DataError, match="needs the dense network's evaluation"):
        walk(Floor(drop=0.01), None, [share_right(0.9, 100)])
    with pytest.raises(DataError, match="different examples"):
        walk(Floor(drop=0.01), share_right(0.9, 101), [share_right(0.9, 100)])
    with pytest.raises(DataError, match="needs labels"):
        walk(Floor(accuracy=0.9), None, [judged(np.ones(100), labelled=False)])
    with pytest.raises(DataError, match="empty"):
        certify(Floor(accuracy=0.9), None, [])


def test_unlabelled_data_certify_a_drop_by_agreement():
    small = judged(np.arange(1000) >= 4, labelled=False)
    certificate = certify(Floor(drop=0.01), None, [small])
    assert certificate.passed
    assert certificate.p_value == pytest.approx(binom.cdf(4, 1000, 0.01))
    assert "agrees with the dense network on 996 of 1,000 certify examples" in str(certificate)


@pytest.mark.parametrize("floor", [Floor(accuracy=0.9), Floor(drop=0.05)], ids=str)
@pytest.mark.parametrize(
    "accuracies",
    [
        [0.899] * 12,
        [0.95, 0.94, 0.899, 0.96, 0.898, 0.9, 0.6],
        [0.93, 0.92, 0.91, 0.905, 0.899, 0.89, 0.88],
        [0.899, 0.97, 0.97, 0.97, 0.5],
    ],
    ids=["all broken", "not monotone", "falling", "first broken"],
)
@pytest.mark.parametrize("common", [0.0, 0.95], ids=["own errors", "shared errors"])
def test_certified_floors_are_broken_at_most_delta_of_the_time(floor, accuracies, common):
    """Law 12, over shapes of the list that invite mistakes: testing on after a failure, or a level per network, breaks it."""
    rng, draws, broken, delivered = np.random.default_rng(11), 400, 0, 0
    for number in range(draws):
        correct = drawn([0.95, *accuracies], 500, rng, common)
        index, _ = walk(floor, judged(correct[0]), [judged(c) for c in correct[1:]], seed=number)
        delivered += index is not None
        broken += index is not None and accuracies[index] < 0.9
    assert broken <= at_most(floor.delta, draws)
    if accuracies[0] >= 0.95 and floor.accuracy is not None:
        assert delivered >= draws * 0.9


def test_law_12_with_searched_ladders():
    """100 seeded draws of search and certify split from 200 networks: search, ladder, walk; then the truth."""
    truth = 0.97 - 0.5 * np.linspace(0, 1, 200) ** 4 - 0.01 * np.random.default_rng(0).random(200)
    costs, floor = np.linspace(1, 0.02, 200), Floor(accuracy=0.93)
    broken = naive_broken = delivered = 0
    kept = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        search, held_out = drawn(truth, 800, rng).mean(axis=1), drawn(truth, 800, rng)
        rungs = ladder(costs, search, floor, n_search=800, n_certify=800)
        index, _ = walk(floor, None, [judged(held_out[rung]) for rung in rungs])
        naive_broken += truth[np.flatnonzero(search >= 0.93).max()] < 0.93
        if index is not None:
            delivered += 1
            broken += truth[rungs[index]] < 0.93
            kept.append(costs[rungs[index]])
    assert broken <= at_most(0.05, 100)
    assert naive_broken > 40
    assert delivered >= 95
    assert np.mean(kept) < costs[truth >= 0.93].min() + 0.15


# the certificate


def test_a_passed_certificate_in_words():
    dense, candidates = share_right(0.98, 2000), [share_right(0.97, 2000), share_right(0.96, 2000), share_right(0.94, 2000)]
    certificate = certify(Floor(accuracy=0.95), dense, candidates)
    assert certificate.passed
    assert (certificate.delivered, certificate.correct, certificate.dense_correct) == (1, 1920, 1960)
    assert certificate.lower_bound == pytest.approx(lower_bound(1920, 2000))
    assert certificate.lower_bound >= 0.95
    text = str(certificate)
    for words in (
        "Certified: accuracy at least 95 %, 95 % sure.",
        "The delivered network answered 1,920 of 2,000 certify examples correctly (96.00 %, the dense network 98.00 %)",
        "Clopper-Pearson",
        "3 of 3 networks",
        "number 3 failed",
        "number 2 is delivered",
        "exchangeable",
        "over the draw of the certify examples",
    ):
        assert words in text
    assert certificate.advice == ()


def test_nothing_passes_is_an_outcome_with_advice():
    close = certify(Floor(accuracy=0.95), share_right(0.98, 400), [share_right(0.96, 400)])
    assert not close.passed
    assert close.delivered is None
    assert close.needed == needed_for_accuracy(0.96, 0.95)
    assert f"about {close.needed:,} certify examples would be needed" in str(close)
    below = certify(Floor(accuracy=0.95), share_right(0.98, 400), [share_right(0.9, 400)])
    assert below.needed is None
    assert "more examples would not help" in str(below)
    above_dense = certify(Floor(accuracy=0.95), share_right(0.94, 400), [share_right(0.9, 400)])
    assert "dense network itself reaches 94.00 % here" in str(above_dense)
    certain = certify(Floor(accuracy=1.0), share_right(1, 400), [share_right(1, 400)])
    assert "no number of examples can show 'accuracy at least 100 %'" in str(certain)
    assert "It was the only network tested, and it failed." in str(certain)
    drop = certify(Floor(drop=0.01), share_right(0.98, 400), [share_right(0.975, 400)])
    assert drop.needed == needed_for_drop(0.005, 0, 0.01)
    rare = judged(np.arange(1000) >= 20, np.arange(1000) % 10 == 3)
    one_class = certify(Floor(accuracy=0.95, label=1), None, [rare])
    recall = rare.per_class[1]
    assert one_class.needed == pytest.approx(10 * needed_for_accuracy(recall, 0.95), abs=5)


def test_few_examples_are_warned_of():
    assert any(
        "99 certify examples are few" in note for note in certify(Floor(accuracy=0.5), None, [share_right(1, 99)]).advice
    )
    labels = np.arange(1000) >= 299
    notes = certify(Floor(accuracy=0.5), None, [judged(np.ones(1000), labels)]).advice
    assert notes == ("class 0 has 299 certify examples: below about 300, little can be said of a class alone.",)
    assert certify(Floor(accuracy=0.5), None, [judged(np.ones(1000), np.arange(1000) >= 300)]).advice == ()


@pytest.mark.parametrize("accuracy", [0.99, 0.96, 0.9])
def test_certificates_survive_json(accuracy):
    floors = [Floor(accuracy=0.95), Floor(drop=0.02)]
    certificate = certify(floors, share_right(0.99, 1000), [share_right(accuracy, 1000)], reserve=0.5, seed=3)
    assert Certificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate


def test_a_later_network_is_tested_with_the_reserve_over_all_it_could_have_been():
    floor, dense = Floor(accuracy=0.9), share_right(0.99, 1000)
    first = certify(floor, dense, [share_right(0.98, 1000)] * 10, reserve=0.5)
    assert (first.level, first.reserve) == (pytest.approx(0.025), pytest.approx(0.025))
    later = certify_artefact(first, dense, share_right(0.95, 1000))
    assert later.passed
    assert later.level == pytest.approx(0.0025)
    assert later.delta == floor.delta
    assert later.reserve == 0
    borderline = share_right(0.92, 1000)
    assert 0.0025 < p_accuracy(920, 1000, 0.9) < 0.025
    assert not certify_artefact(first, dense, borderline).passed
    assert certify_artefact(first, dense, borderline, variants=1).passed
    with pytest.raises(GoalError, match=r"reserve=0\.5"):
        certify_artefact(later, dense, borderline)
    with pytest.raises(GoalError, match="variants=0"):
        certify_artefact(first, dense, borderline, variants=0)
    with pytest.raises(GoalError, match=r"reserve=1\.5"):
        certify(floor, dense, [borderline], reserve=1.5)


def test_walk_and_later_network_together_are_wrong_at_most_delta_of_the_time():
    """Every later network is broken, and which one is made depends on the walk: the worst case for the reserve."""
    rng, draws, wrong = np.random.default_rng(4), 400, 0
    floor, truth = Floor(accuracy=0.9, delta=0.2), np.linspace(0.95, 0.885, 8)
    for _ in range(draws):
        correct, later = drawn(truth, 300, rng), drawn([0.899] * 8, 300, rng, common=0.0)
        certificate = certify(floor, None, [judged(c) for c in correct], reserve=0.5)
        if certificate.delivered is None:
            continue
        artefact = certify_artefact(certificate, None, judged(later[certificate.delivered]))
        wrong += truth[certificate.delivered] < 0.9 or artefact.passed
    assert wrong <= at_most(0.2, draws)


# racing


def population(floor, above, total, rng):
    """A search split that lies on the floor, or just below it: the hardest cases for a race."""
    correct, dense = np.ones(total, dtype=bool), np.ones(total, dtype=bool)
    if floor.accuracy is not None:
        most = int(np.floor(total * (1 - floor.accuracy) + 1e-9))
        correct[: most if above else most + 1] = False
    else:
        most = int(np.floor(total * floor.drop + 1e-9)) + 20
        dense[:20] = False
        correct[20 : (20 + most) if above else (21 + most)] = False
    order = rng.permutation(total)
    return correct[order], dense[order]


@pytest.mark.parametrize("floor", [Floor(accuracy=0.9), Floor(drop=0.02)], ids=str)
@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("level", [0.001, 0.3])
def test_a_race_contradicts_the_whole_split_at_most_as_often_as_stated(floor, above, level):
    rng, races, contradicted = np.random.default_rng(3), 300, 0
    for _ in range(races):
        correct, dense = population(floor, above, 600, rng)
        contradicted += race(floor, zip(np.split(correct, 20), np.split(dense, 20)), 600, level=level).above != above
    assert contradicted <= at_most(level, races)


@pytest.mark.parametrize("batches", [1, 3])
def test_racing_wealth_is_a_martingale_on_a_split_that_lies_on_the_floor(batches):
    """Over all orders of a split with four right of eight, the expected wealth of both gamblers is the stake."""
    wealth = []
    for places in itertools.combinations(range(8), 4):
        order = np.isin(np.arange(8), places)
        accumulator = Accumulator(Floor(accuracy=0.5), 8)
        for part in np.split(order[:3], batches):
            assert accumulator.see(part) is None
        wealth.append(np.exp(accumulator.log_wealth))
    assert np.mean(wealth, axis=0) == pytest.approx(np.ones(2))
    assert np.std(wealth, axis=0).min() > 0.001


@pytest.mark.parametrize("floor", [Floor(accuracy=0.9), Floor(drop=0.05)], ids=str)
@pytest.mark.parametrize("share", [0.6, 0.99])
def test_a_race_stops_early_far_from_the_floor(floor, share):
    rng, seen, pulled = np.random.default_rng(1), [], []
    for _ in range(20):
        correct = rng.permutation(np.arange(4000) < share * 4000)

        def outcomes(correct=correct):
            for part in np.split(correct, 40):
                pulled.append(len(part))
                yield part, np.ones(len(part), dtype=bool)

        found = race(floor, outcomes(), 4000)
        assert found.above == (share > 0.9)
        assert found.stopped
        seen.append(found.examples)
    assert np.mean(seen) < 0.35 * 4000
    assert sum(pulled) == sum(seen)


def test_a_race_to_the_end_is_exact_and_counts_everything():
    floor = Floor(drop=0.25)
    correct, dense = np.array([1, 0, 1, 0, 1, 1, 1, 1], bool), np.array([1, 1, 0, 1, 1, 1, 1, 1], bool)
    found = race(floor, zip(np.split(correct, 4), np.split(dense, 4)), 8)
    assert (found.above, found.stopped, found.examples, found.correct, found.dense_correct) == (True, False, 8, 6, 7)
    assert found.drop == pytest.approx(1 / 8)
    assert found.differ == 3
    assert found.deviation == pytest.approx(np.std(dense.astype(float) - correct))
    alone = race(Floor(accuracy=0.5), [correct], 8)
    assert (alone.above, alone.drop, alone.deviation, alone.accuracy) == (True, None, None, 0.75)


@pytest.mark.parametrize("floor", [Floor(accuracy=0.0), Floor(accuracy=1.0), Floor(drop=0.0), Floor(drop=0.99)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_races_at_the_extremes_agree_with_the_whole_split(floor, share):
    correct = np.random.default_rng(0).permutation(np.arange(100) < share * 100)
    found = race(floor, [(part, np.ones(10, bool)) for part in np.split(correct, 10)], 100)
    assert found.above == (share >= floor.threshold(1.0) - 1e-12)


def test_races_refuse_what_does_not_fit():
    with pytest.raises(DataError, match="was shown only 5"):
        race(Floor(accuracy=0.9), [np.ones(5, bool)], 100)
    with pytest.raises(DataError, match="over 4 examples was shown 5"):
        race(Floor(accuracy=0.9), [np.ones(5, bool)], 4)
    with pytest.raises(DataError, match="needs the dense network's correctness"):
        race(Floor(drop=0.1), [np.ones(5, bool)], 100)
    with pytest.raises(DataError, match="total=0"):
        Accumulator(Floor(accuracy=0.9), 0)


# the ladder


@given(
    seed=st.integers(0, 10_000), count=st.integers(1, 60), rungs=st.integers(1, 12), kind=st.sampled_from(["accuracy", "drop"])
)
@settings(max_examples=60, deadline=None)
def test_ladders_fall_in_cost_and_waste_no_rung(seed, count, rungs, kind):
    rng = np.random.default_rng(seed)
    costs = rng.choice(np.linspace(0.05, 1, 20), count)
    good = rng.random(count) * 0.2
    floor = Floor(accuracy=0.9) if kind == "accuracy" else Floor(drop=0.1)
    estimates = 1 - good if kind == "accuracy" else good
    chosen = ladder(costs, estimates, floor, n_search=500, n_certify=500, rungs=rungs, deviation=0.3)
    assert 1 <= len(chosen) <= rungs
    assert (np.diff(costs[list(chosen)]) < 0).all()
    for place in chosen:
        assert not ((costs <= costs[place]) & (good < good[place])).any()


def expected_saving(path, cost, chance):
    """What a list saves on average under the ladder's model, spelled out step by step."""
    costs, alone, total, reached = [NOTHING, *cost[list(path)]], [1.0, *chance[list(path)]], 0.0, 1.0
    for step in range(1, len(costs)):
        alike = min(1, alone[step] / alone[step - 1])
        reached *= (1 - INDEPENDENT) * alike + INDEPENDENT * alone[step]
        total += reached * (costs[step - 1] - costs[step])
    return total


def test_the_climb_equals_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(30):
        cost = np.concatenate([[1.0], np.sort(rng.random(6))[::-1]])
        chance = chances(np.sort(rng.normal(size=7) * 2))[::-1]
        lists = [path for size in (1, 2, 3) for path in itertools.combinations(range(7), size)]
        best = max(expected_saving(path, cost, chance) for path in lists)
        assert expected_saving(climb(cost, chance, 3), cost, chance) == pytest.approx(best)


def delivered_costs(truth, costs, floor, n, make):
    """Cost delivered in 20 seeded draws: `make` freezes a list from search accuracies, and the walk does the rest."""
    kept = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        search, held_out = drawn(truth, n, rng).mean(axis=1), drawn(truth, n, rng)
        rungs = make(search)
        index, _ = walk(floor, None, (judged(held_out[rung]) for rung in rungs))
        kept.append(1.0 if index is None else costs[rungs[index]])
    return np.mean(kept)


def test_ladders_deliver_more_than_one_best_guess_and_survive_a_search_that_flatters():
    truth = 0.97 - 0.4 * np.linspace(0, 1, 100) ** 3
    costs, floor, n = np.linspace(1, 0.05, 100), Floor(accuracy=0.93), 3000

    def frozen(search):
        return ladder(costs, search, floor, n_search=n, n_certify=n)

    leanest = costs[truth >= 0.93].min()
    honest = delivered_costs(truth, costs, floor, n, frozen)
    assert leanest <= honest < leanest + 0.1
    assert delivered_costs(truth, costs, floor, n, lambda search: frozen(1 - (1 - search) / 3)) < leanest + 0.2
    guess = delivered_costs(truth, costs, floor, n, lambda search: [int(np.flatnonzero(search >= 0.93).max())])
    assert honest < guess - 0.1


def test_more_certify_examples_allow_a_leaner_first_rung():
    costs, estimates = np.linspace(1, 0.1, 30), 0.99 - 0.1 * np.linspace(0, 1, 30) ** 2
    few, many = (chances(margins(estimates, Floor(accuracy=0.95), np.full(30, 5000), n_certify=n)) for n in (200, 20_000))
    assert (many[estimates > 0.96] > few[estimates > 0.96]).all()
    short, long = (ladder(costs, estimates, Floor(accuracy=0.95), n_search=5000, n_certify=n) for n in (200, 20_000))
    assert costs[long[0]] <= costs[short[0]]


@pytest.mark.parametrize("labelled", [True, False])
def test_drop_margins_say_what_the_test_will_say(labelled):
    """Where the predicted margin is 0, the test passes about half of the time."""
    n, rng, passed = 2000, np.random.default_rng(9), 0
    losses = np.linspace(0, 0.02, 400)
    deviation = np.sqrt(losses + 0.004 - (losses - 0.004 * labelled) ** 2) if labelled else None
    estimates = losses - 0.004 if labelled else losses
    margin = margins(estimates, Floor(drop=0.01), np.full(400, 1e9), n, deviation, labelled=labelled)
    loss = losses[np.argmin(np.abs(margin))]
    for seed in range(200):
        u = rng.random(n)
        if labelled:
            passed += p_drop((u < loss) | (u >= loss + 0.004), u >= loss, 0.01, seed=seed) <= 0.05
        else:
            passed += p_agreement(int((u >= loss).sum()), n, 0.01) <= 0.05
    assert 60 <= passed <= 140


def test_ladders_refuse_what_does_not_fit():
    floor = Floor(accuracy=0.9)
    for costs, estimates in (([], []), ([0.5], [0.9, 0.8])):
        with pytest.raises(DataError, match="one cost and one estimate per candidate"):
            ladder(costs, estimates, floor, n_search=10, n_certify=10)
    for costs, estimates, seen in (([0.5], [float("nan")], 10), ([float("inf")], [0.9], 10), ([0.5], [0.9], 0)):
        with pytest.raises(DataError, match="finite costs and estimates"):
            ladder(costs, estimates, floor, n_search=seen, n_certify=10)
    with pytest.raises(DataError, match="n_certify=0"):
        ladder([0.5], [0.9], floor, n_search=10, n_certify=0)


# floors and budgets


@pytest.mark.parametrize(
    ("floor", "words"),
    [
        (Floor(accuracy=0.95), "accuracy at least 95 %"),
        (Floor(accuracy=0.995), "accuracy at least 99.5 %"),
        (Floor(accuracy=0.29), "accuracy at least 29 %"),
        (Floor(accuracy=0.9, label=3), "accuracy at least 90 % on class 3"),
        (Floor(drop=0.01), "at most 1 point below the dense network"),
        (Floor(drop=0.002), "at most 0.2 points below the dense network"),
        (Floor(drop=0), "not below the dense network"),
        (Budget(parameters=0.5), "at most 50 % of the parameters"),
        (Budget(parameters=0.65, macs=0.73), "at most 65 % of the parameters and 73 % of the MACs"),
        (
            Budget(parameters=0.5, macs=0.5, bytes=0.25, latency_ms=4),
            "at most 50 % of the parameters, 50 % of the MACs, 25 % of the bytes and 4 ms",
        ),
    ],
    ids=str,
)
def test_goals_print_as_words_and_survive_json(floor, words):
    assert str(floor) == words
    assert type(floor).from_dict(json.loads(json.dumps(floor.to_dict()))) == floor


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Floor(), "was given neither"),
        (lambda: Floor(accuracy=0.9, drop=0.1), r"accuracy=0.9 and drop=0.1.*list of floors"),
        (lambda: Floor(accuracy=95), r"write accuracy=0\.95 for 95 %"),
        (lambda: Floor(accuracy=-0.1), r"not a share in \[0, 1\]"),
        (lambda: Floor(drop=1), r"write drop=0\.01 for 1 point"),
        (lambda: Floor(drop=-0.5), r"write drop=0\.01, for example"),
        (lambda: Floor(accuracy=float("nan")), "not a finite number"),
        (lambda: Floor(accuracy="0.95"), "not a finite number"),
        (lambda: Floor(accuracy=True), "not a finite number"),
        (lambda: Floor(accuracy=0.9, delta=0), "not a probability in"),
        (lambda: Floor(accuracy=0.9, delta=5), r"write delta=0\.05"),
        (lambda: Floor(accuracy=0.9, label=-1), "not a class index"),
        (lambda: Floor(accuracy=0.9, label=1.5), "not a class index"),
        (lambda: Budget(), "at least one limit"),
        (lambda: Budget(parameters=0), r"what remains: write parameters=0\.5"),
        (lambda: Budget(macs=50), r"write macs=0\.5"),
        (lambda: Budget(bytes=float("inf")), "not a finite number"),
        (lambda: Budget(latency_ms=0), "not a time above 0"),
        (lambda: Floor.from_dict({"accuracy": 0.9, "metric": "f1"}), "Floor has no metric"),
    ],
)
def test_goals_that_make_no_sense_say_what_to_write(make, message):
    with pytest.raises(GoalError, match=message):
        make()


def test_thresholds():
    assert Floor(accuracy=0.9).threshold(0.99) == 0.9
    assert Floor(drop=0.01).threshold(0.99) == pytest.approx(0.98)
    assert Floor(accuracy=np.float64(0.9), label=np.int64(3)).label == 3
