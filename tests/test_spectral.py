"""The spectral scorer against its formulas, on graphs that can be worked out and on layers of trained networks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from scipy.stats import spearmanr
from torch import nn

import resect
from resect.scoring import PRESETS, Spectral
from resect.scoring.spectral import Graph, neighbour_graph, neighbours
from resect.scoring.spectral.forms import full, output_matrix, solve
from resect.scoring.spectral.neighbours import nearest
from resect.testing import check_scorer, example_evidence
from resect.tracing import Evidence, States


def evidence_of(pre: np.ndarray, post: np.ndarray, seed: int = 0) -> Evidence:
    """Evidence of one group from (rows, units) or (rows, units, width) states."""
    pre, post = (np.asarray(v, dtype=np.float32).reshape(*v.shape[:2], -1) for v in (pre, post))
    states = States(keys=np.arange(len(pre), dtype=np.uint64), pre=pre, post=post, most=len(pre))
    return replace(example_evidence(seed, units=pre.shape[1]), states=states)


def drawn(units: int, rows: int = 64, seed: int = 0) -> Evidence:
    """Units in loose clusters, behind a rectifier."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(rows, 1 + units // 8))
    pre = centres[:, draw.integers(0, centres.shape[1], units)] + draw.normal(size=(rows, units)) * draw.uniform(0.3, 1, units)
    return evidence_of(pre, np.maximum(pre, 0))


VARIANTS = {
    "full": Spectral(mode="full"),
    "jl": Spectral(mode="jl"),
    "proxy": Spectral(mode="proxy"),
    "eig": Spectral(mode="eig", pairs=4),
    "spade": PRESETS["spade"],
    "contraction": Spectral(direction="contraction"),
    "sum": Spectral(aggregation="sum", weights="binary"),
    "normalised jl": Spectral(mode="jl", laplacian="normalised"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_keeps_the_laws_of_scorers(name: str) -> None:
    for seed in range(3):
        assert check_scorer(VARIANTS[name], seed=seed)


@pytest.mark.parametrize("laplacian", ["plain", "normalised"])
@pytest.mark.parametrize("weights", ["distance", "binary"])
def test_full_is_all_eigenpairs(laplacian: str, weights: str) -> None:
    options = {"laplacian": laplacian, "weights": weights}
    evidence = drawn(90)
    np.testing.assert_allclose(
        Spectral(mode="full", **options)(evidence), Spectral(mode="eig", **options)(evidence), rtol=1e-8, atol=1e-12
    )


def test_an_iterative_eigensolver_finds_the_same_pairs_as_a_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence, scorer = drawn(200), Spectral(mode="eig", pairs=5)
    dense = scorer(evidence)
    monkeypatch.setattr("resect.scoring.spectral.forms.DENSE_EIGEN", 10)
    np.testing.assert_allclose(scorer(evidence), dense, rtol=1e-6)


def layers(model: nn.Module, data: list, example) -> dict[str, Evidence]:
    anatomy = resect.dissect(model, example)
    anatomy = anatomy.without([g.name for g in anatomy.groups if g.kind == "stream"], "stream")
    trace = resect.trace(model, data, anatomy, grams=False, states=1024)
    return {group.name: trace.evidence(group) for group in anatomy.groups}


def agreement(evidence: Evidence, scorer: Spectral) -> float:
    """Spearman's rank correlation of a scorer with mode "full"."""
    return float(spearmanr(scorer(evidence), Spectral(mode="full")(evidence))[0])


@pytest.fixture(scope="module")
def digits() -> Evidence:
    pytest.importorskip("sklearn")
    from resect.sources import load_data
    from resect.sources.demo import mlp, train

    splits = load_data("digits", seed=0)
    model = train(mlp((64, 512, 10), 0), splits.train, seed=0, epochs=20)
    return next(iter(layers(model, [splits.train.inputs], splits.train.inputs[:2]).values()))


def test_projections_and_proxy_rank_a_trained_perceptron_like_full(digits: Evidence) -> None:
    assert agreement(digits, Spectral(mode="jl", projections=256)) > 0.99
    assert agreement(digits, Spectral(mode="proxy")) > 0.98


@pytest.mark.skipif("RESECT_WEIGHTS" not in os.environ, reason="RESECT_WEIGHTS does not name a folder of trained networks")
def test_projections_and_proxy_rank_minilm_like_full() -> None:
    transformers = pytest.importorskip("transformers")
    folder = Path(os.environ["RESECT_WEIGHTS"]) / "minilm_sst2"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = ("film", "plot", "dull", "bright", "slow", "funny", "actor", "end", "voice")
    sentences = [f"the {a} was {b} and {c}" for a in words for b in words for c in words][::9]
    batch = dict(tokenizer(sentences, padding=True, return_tensors="pt"))
    found = layers(model, [batch], {name: value[:2] for name, value in batch.items()})
    evidence = found["bert.encoder.layer.3.intermediate.dense"]
    assert agreement(evidence, Spectral(mode="jl", projections=256)) > 0.99
    assert agreement(evidence, Spectral(mode="proxy")) > 0.98
    heads = Spectral()(found["bert.encoder.layer.3.attention"])
    assert heads.shape == (12,)
    assert len(set(heads)) == 12


@pytest.mark.skipif(
    not {"RESECT_WEIGHTS", "RESECT_DATA"} <= set(os.environ), reason="RESECT_WEIGHTS and RESECT_DATA do not name folders"
)
def test_projections_and_proxy_rank_resnet_like_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from networks import cifar_images, trained_resnet

    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(str(Path(os.environ["RESECT_DATA"]) / "cifar10"), split="train[:200]")["img"]
    images = cifar_images(torch.from_numpy(np.stack([np.asarray(image) for image in rows])).permute(0, 3, 1, 2) / 255)
    for name, evidence in layers(trained_resnet(20), list(images.split(100)), images[:2]).items():
        assert agreement(evidence, Spectral(mode="jl", projections=256)) > 0.99, name
        assert agreement(evidence, Spectral(mode="proxy")) > 0.98, name


@pytest.mark.skipif("RESECT_WEIGHTS" not in os.environ, reason="RESECT_WEIGHTS does not name a folder of trained networks")
def test_neurons_and_heads_of_a_trained_llama_are_scored() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(Path(os.environ["RESECT_WEIGHTS"]) / "stories260K").eval()
    model.config.use_cache = False
    tokens = torch.randint(3, 500, (16, 64), generator=torch.Generator().manual_seed(0))
    found = layers(model, [{"input_ids": tokens}], {"input_ids": tokens[:2]})
    assert sorted({(e.kind, e.units, len(e.states.keys)) for e in found.values()}) == [("head", 4, 1024), ("hidden", 172, 1024)]
    for name, evidence in found.items():
        assert len(set(Spectral()(evidence))) == evidence.units, name


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_small_language_model_is_pruned_by_it(name: str) -> None:
    pytest.importorskip("transformers")
    from zoo import WHOLE

    model, example = WHOLE[name]()
    found = resect.prune(model, [example], budget=resect.Budget(parameters=0.9), scorer="spectral")
    assert found.cost.parameters <= 0.9 * found.dense_cost.parameters
    kinds = {group.kind for group in found.plan.anatomy.groups if not found.plan.keep[group.name].all()}
    assert kinds


def test_a_scaled_copy_gives_effective_resistance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resect.scoring.spectral.forms.REGULAR", 1e-9)
    states = np.random.default_rng(0).normal(size=(30, 50)).astype(np.float32)
    inputs, outputs = (neighbour_graph(c * states.T, neighbours=4) for c in (1.0, 2.0))
    np.testing.assert_allclose(inputs.weight, outputs.weight, rtol=1e-5)
    pseudo = np.linalg.pinv(inputs.laplacian("plain").toarray())
    p, q = inputs.ends.T
    resistance = pseudo[p, p] + pseudo[q, q] - 2 * pseudo[p, q]
    np.testing.assert_allclose(full(inputs, outputs, "plain"), resistance, rtol=1e-4)


def by_hand(values: np.ndarray, k: int) -> dict[tuple[int, int], float]:
    """The union graph of nearest neighbours with its weights, pair by pair."""
    square = {(i, j): float(np.sum((values[i] - values[j]) ** 2)) for i in range(len(values)) for j in range(len(values))}
    ends = set()
    for i in range(len(values)):
        ends |= {tuple(sorted((i, j))) for j in sorted(set(range(len(values))) - {i}, key=lambda j: square[i, j])[:k]}
    floor = 1e-3 * np.median([square[e] for e in ends])
    weight = {e: 1 / (square[e] + floor) for e in ends}
    return {e: w / np.mean(list(weight.values())) for e, w in weight.items()}


def test_the_graph_and_the_controls_by_hand() -> None:
    evidence = drawn(40, rows=20)
    values = evidence.states.post[:, :, 0].T.astype(np.float64)
    expected = by_hand(values, 10)
    graph = neighbour_graph(values.astype(np.float32), neighbours=10)
    assert [tuple(e) for e in graph.ends] == sorted(expected)
    np.testing.assert_allclose(graph.weight, [expected[tuple(e)] for e in graph.ends], rtol=1e-4)
    degree = np.zeros(40)
    for (i, j), weight in expected.items():
        degree[[i, j]] += weight
    np.testing.assert_allclose(resect.SCORERS["isolation"](evidence), 1 / degree, rtol=1e-4)
    alike = evidence_of(evidence.states.pre, evidence.states.pre)
    np.testing.assert_allclose(resect.SCORERS["input_only"](evidence), Spectral()(alike), rtol=1e-9)


def test_the_score_by_hand() -> None:
    """Every formula of docs/spectral.md with dense matrices and loops."""
    evidence = drawn(25, rows=12)
    sides = [by_hand(v[:, :, 0].T.astype(np.float64), 10) for v in (evidence.states.pre, evidence.states.post)]
    laplacians = []
    for edges in sides:
        matrix = np.zeros((25, 25))
        for (i, j), weight in edges.items():
            matrix[[i, j], [i, j]] += weight
            matrix[[i, j], [j, i]] -= weight
        laplacians.append(matrix)
    inverse = np.linalg.inv(laplacians[1] + 1e-3 * np.diag(laplacians[1]).mean() * np.eye(25))
    exact, rough, contracted = np.zeros(25), np.zeros(25), np.diag(1 / np.diag(np.linalg.inv(inverse)))
    for form, total in ((inverse @ laplacians[0] @ inverse, exact), (contracted @ laplacians[0] @ contracted, rough)):
        for (i, j), weight in sides[0].items():
            total[[i, j]] += weight * (form[i, i] + form[j, j] - 2 * form[i, j])
    degree = np.diag(laplacians[0])
    np.testing.assert_allclose(Spectral(mode="full")(evidence), exact / degree, rtol=1e-4)
    np.testing.assert_allclose(Spectral(mode="proxy")(evidence), rough / degree, rtol=1e-4)


@pytest.mark.parametrize("blocks", [64, 4096])
def test_nearest_is_exact_in_blocks(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resect.scoring.spectral.neighbours.BLOCK", blocks)
    monkeypatch.setattr("resect.scoring.spectral.neighbours.RUN", 4)
    values = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    square = np.square(values[:, None].astype(np.float64) - values[None]).sum(2)
    np.fill_diagonal(square, np.inf)
    assert np.array_equal(nearest(torch.from_numpy(values), 7), np.argsort(square, axis=1, kind="stable")[:, :7])
    labels = np.arange(300) % 3
    square[labels[:, None] == labels] = np.inf
    for rows in (np.arange(10, 90), np.arange(10, 290)):
        found = nearest(torch.from_numpy(values), 2, rows=rows, apart=labels)
        assert np.array_equal(found, np.argsort(square, axis=1, kind="stable")[rows, :2])


@pytest.mark.parametrize("spread", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_nearest_is_exact_where_products_are_rough(spread: float, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Clusters that are tight, so that rounding hides who is near, or wide.
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(5, 64))
    values = scale * (centres[draw.integers(0, 5, 400)] + spread * draw.normal(size=(400, 64)))
    values = torch.from_numpy((values - values.mean(0)).astype(np.float32))
    labels = np.arange(400) % 3
    exact = nearest(values, 7), nearest(values, 2, apart=labels), nearest(values, 2, rows=np.arange(10, 390), apart=labels)
    sure = []
    original = neighbours._roughly
    monkeypatch.setattr(neighbours, "_roughly", lambda *a: sure.append(original(*a)) or sure[-1])
    monkeypatch.setattr(neighbours, "ROUGH_FROM", 100)
    monkeypatch.setattr(neighbours, "rough_is_fast", lambda device: True)
    monkeypatch.setattr(neighbours, "BLOCK", 128)
    rough = nearest(values, 7), nearest(values, 2, apart=labels), nearest(values, 2, rows=np.arange(10, 390), apart=labels)
    for one, other in zip(exact, rough):
        assert np.array_equal(np.sort(one), np.sort(other))
    assert len(sure) == 3
    # Where neighbours differ by less than rounding, few are taken for sure; where they differ by more, some are.
    assert sure[0][1].float().mean() < 0.05 if spread == 0.02 else sure[0][1].any()


def test_what_rough_products_miss_is_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ROUGH_FROM", 10)
    monkeypatch.setattr(neighbours, "rough_is_fast", lambda device: True)
    # On a line far out, where bfloat16 holds every second number.
    line = torch.zeros(200, 2)
    line[:, 0] = 1 + torch.arange(200) / 256
    found = np.sort(nearest(line, 2), axis=1)
    middle = np.arange(1, 199)
    assert np.array_equal(found[middle], np.stack([middle - 1, middle + 1], axis=1))


def test_components_are_joined_by_their_shortest_edges() -> None:
    draw = np.random.default_rng(0)
    places = np.array([[0.0, 0], [50, 0], [50, 40], [0, 300]])
    values = np.concatenate([place + draw.normal(size=(12, 2)) for place in places]).astype(np.float32)
    graph = neighbour_graph(values, neighbours=3)
    cluster = np.arange(48) // 12
    across = {tuple(e) for e in graph.ends if cluster[e[0]] != cluster[e[1]]}
    expected = set()
    for a, b in ((0, 1), (1, 2), (2, 3)):
        pairs = [(i, j) for i in np.flatnonzero(cluster == a) for j in np.flatnonzero(cluster == b)]
        expected.add(min(pairs, key=lambda pair: float(np.sum((values[pair[0]] - values[pair[1]]) ** 2))))
    assert across == expected


def test_many_components_are_joined_like_a_minimum_spanning_tree() -> None:
    draw = np.random.default_rng(1)
    cluster = np.arange(300) // 6
    values = (4 * draw.normal(size=(50, 5))[cluster] + 0.3 * draw.normal(size=(300, 5))).astype(np.float32)
    graph = neighbour_graph(values, neighbours=3)
    square = np.square(values[:, None].astype(np.float64) - values[None]).sum(2)
    own = square.copy()
    np.fill_diagonal(own, np.inf)
    near = np.zeros((300, 300))
    near[np.arange(300)[:, None], np.argsort(own, axis=1)[:, :3]] = 1
    count, label = connected_components(near, directed=False)
    assert count > 20
    between = np.array([[square[np.ix_(label == a, label == b)].min() for b in range(count)] for a in range(count)])
    tree = minimum_spanning_tree(between).tocoo()
    across = [tuple(sorted((label[p], label[q]))) for p, q in graph.ends if label[p] != label[q]]
    assert sorted(across) == sorted(tuple(sorted(pair)) for pair in zip(tree.row, tree.col))
    lengths = [square[p, q] for p, q in graph.ends if label[p] != label[q]]
    np.testing.assert_allclose(sorted(lengths), sorted(tree.data), rtol=1e-6)


@pytest.mark.parametrize("units", [1, 2, 3, 10, 11])
@pytest.mark.parametrize("name", VARIANTS)
def test_small_groups(units: int, name: str) -> None:
    evidence = drawn(units)
    scores = VARIANTS[name](evidence)
    assert scores.shape == (units,)
    assert np.isfinite(scores).all()
    if units > 2 and VARIANTS[name].weights == "distance":
        assert len(set(scores.round(12))) > 1


def test_twins_score_alike_and_identical_units_all_the_same() -> None:
    evidence = drawn(40)
    pre, post = evidence.states.pre[:, :, 0].copy(), evidence.states.post[:, :, 0].copy()
    pre[:, 7], post[:, 7] = pre[:, 3], post[:, 3]
    for mode in ("full", "proxy"):
        scores = Spectral(mode=mode, neighbours=39)(evidence_of(pre, post))
        assert scores[3] == pytest.approx(scores[7], rel=1e-9)
    same = np.repeat(pre[:, :1], 15, axis=1)
    assert set(Spectral()(evidence_of(same, same))) == {0.0}
    assert np.isfinite(Spectral()(evidence_of(same, post[:, :15]))).all()
    assert np.isfinite(Spectral()(evidence_of(pre[:, :15], same))).all()


def test_units_that_are_constant_on_the_sample_score_lowest() -> None:
    evidence = drawn(30)
    post = evidence.states.post[:, :, 0].copy()
    post[:, [4, 9]] = 0.0, 3.0
    for scorer in (Spectral(), resect.SCORERS["isolation"]):
        scores = scorer(evidence_of(evidence.states.pre, post))
        assert set(np.argsort(scores)[:2]) == {4, 9}
    assert not resect.SCORERS["spectral"](evidence_of(post * 0, post * 0)).any()


def test_auto_takes_projections_for_wide_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = drawn(60)
    monkeypatch.setattr("resect.scoring.spectral.scorer.FULL_LIMIT", 50)
    assert np.array_equal(Spectral()(evidence), Spectral(mode="jl")(evidence))
    assert np.array_equal(Spectral()(drawn(50)), Spectral(mode="full")(drawn(50)))


def test_conjugate_gradients_solve_or_say_that_they_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = output_matrix(
        Graph(units=5, ends=np.array([[0, 1], [1, 2], [2, 3], [3, 4]]), weight=np.logspace(-3, 3, 4)), "plain"
    )
    right = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_allclose(solve(matrix, right), np.linalg.solve(matrix.toarray(), right), rtol=1e-6)
    monkeypatch.setattr("resect.scoring.spectral.forms.ITERATIONS", 2)
    with pytest.raises(resect.ScoreError, match="badly conditioned"):
        solve(matrix, right)


def test_bad_input_is_named() -> None:
    evidence = drawn(12)
    with pytest.raises(resect.ScoreError, match=r"trace\(\.\.\., states=1024\)"):
        Spectral()(replace(evidence, states=None))
    with pytest.raises(resect.ScoreError, match="at least 2 rows of hidden states for group group and has 1"):
        Spectral()(evidence_of(np.ones((1, 12)), np.ones((1, 12))))
    broken = evidence.states.pre.copy()
    broken[3, 4] = np.nan
    broken[0, 1] = np.inf
    for name in ("spectral", "isolation", "input_only"):
        with pytest.raises(resect.ScoreError, match="2 hidden states of group group are not finite"):
            resect.SCORERS[name](evidence_of(broken, evidence.states.post))
    for options, message in (
        ({"mode": "exact"}, "mode='exact' is not one of 'auto', 'eig'"),
        ({"neighbours": 0}, "neighbours=0 is too small"),
        ({"states": 1}, "states=1 is too small; write at least 2"),
    ):
        with pytest.raises(resect.ScoreError, match=message):
            Spectral(**options)


def test_the_same_example_again_and_again_is_one_row() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    x = torch.ones(1, 4).repeat(20, 1)
    trace = resect.trace(model, [x], resect.dissect(model, x[:2]), states=16)
    with pytest.raises(resect.ScoreError, match="has 1; trace more data, or data that differ"):
        resect.score(trace, "spectral")


def test_names_and_needs() -> None:
    assert {name: options.__name__ for name, options in PRESETS.items()} == {"resect": "spectral", "spade": "spectral(spade)"}
    assert Spectral(mode="jl", projections=8).__name__ == "spectral(mode=jl, projections=8)"
    assert resect.scoring.needs("magnitude") == {}
    assert resect.scoring.needs("taylor", "isolation", Spectral(states=50)) == {"gradients": True, "states": 1024}
    with pytest.raises(resect.ScoreError, match="did you mean 'spectral'"):
        resect.scoring.needs("spectrum")


def test_variants_are_scorers_and_show_their_names() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    x = torch.randn(64, 4)
    found = resect.prune(model, [x], budget=resect.Budget(parameters=0.5), scorer=Spectral(mode="proxy", states=32))
    assert found.cost.parameters <= 0.5 * found.dense_cost.parameters
    trace = resect.trace(model, [x], resect.dissect(model, x[:2]), states=32)
    assert resect.score(trace, Spectral(mode="proxy")).scorer == "spectral(mode=proxy)"


def test_faiss_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(resect.ScoreError, match=r"resect\[wide\]"):
        Spectral(search="faiss")(drawn(20))


def test_faiss_finds_nearly_the_same_graph() -> None:
    pytest.importorskip("faiss")
    values = drawn(3000).states.pre[:, :, 0].T.copy()
    exact, near = (neighbour_graph(values, neighbours=10, search=search) for search in ("exact", "faiss"))
    pairs = [set(map(tuple, graph.ends)) for graph in (exact, near)]
    assert len(pairs[0] & pairs[1]) > 0.9 * len(pairs[0])
