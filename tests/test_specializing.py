"""Specialists: what may pass, what may not, and that one is an ordinary network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import resect
from resect import DataError, Floor, GoalError, ModelError, Panel, Specialist
from resect.evaluation import Evaluation
from resect.specializing.judging import Answers, Rates, Seen, auroc, choose_threshold, rates_of
from resect.specializing.overlap import Overlap
from resect.specializing.question import Question, asked
from resect.specializing.readout import output_layer
from resect.specializing.telling import harm, telling
from resect.surgery import state_digest
from resect.tracing import trace

NAMES = ("ant", "bee", "cow", "dog")


def blobs(count: int, seed: int = 0, classes: tuple[int, ...] = (0, 1, 2, 3)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Four noisy clusters in eight dimensions, in batches of 100."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 8, generator=torch.Generator().manual_seed(99)) * 1.7
    labels = torch.tensor(classes)[torch.randint(0, len(classes), (count,), generator=draw)]
    inputs = centres[labels] + torch.randn(count, 8, generator=draw)
    return list(zip(inputs.split(100), labels.split(100)))


def trained(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(8):
        for x, y in blobs(1000, seed=1):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


MODEL = trained()
CALIB, SEARCH, CERTIFY, TEST = blobs(1000, 2), blobs(2000, 3), blobs(2000, 4), blobs(2000, 5)
EASY = {"floor": Floor(drop=0.03), "false_positives": 0.05, "evaluations": 6, "names": NAMES}


@pytest.fixture(scope="module")
def cow() -> resect.Specialised:
    return resect.specialize(MODEL, CALIB, SEARCH, certify=CERTIFY, classes=["cow"], **EASY)


@pytest.fixture(scope="module")
def every() -> resect.Specialists:
    return resect.specialize(MODEL, CALIB, SEARCH, certify=CERTIFY, each_class=True, **EASY)


def test_a_specialist_is_smaller_certified_and_keeps_its_promise_on_test(cow) -> None:
    assert cow.certified
    assert 0.3 < cow.removed < 1
    dense, small = rates_of(cow.model, Seen.of(MODEL, TEST, "test"))
    assert small.recall >= dense.recall - 0.03
    assert small.false_positive_rate <= 0.05
    assert small.auroc > 0.98
    assert "cow: recall at most 3 points below the dense network and false-positive rate at most 5 %" in str(cow.certificate)
    assert sum(p.numel() for p in cow.model.parameters()) == cow.cost.parameters


def test_what_the_search_alone_would_deliver_keeps_the_promise_as_measured_there(cow, every) -> None:
    for one in (cow, *every):
        model, plan = one.searched
        dense, small = rates_of(model, Seen.of(MODEL, SEARCH, "search"))
        assert small.recall >= dense.recall - 0.03
        assert small.false_positive_rate <= 0.05
        assert sum(p.numel() for p in model.parameters()) == plan.cost().parameters <= one.cost.parameters


def test_false_positives_beside_the_dense_networks() -> None:
    found = resect.specialize(
        MODEL, CALIB, SEARCH, certify=CERTIFY, classes=[2], **{**EASY, "false_positives": Floor(drop=0.02)}
    )
    assert "false-positive rate at most 2 points above the dense network" in found.certificate.promise
    assert found.certified
    assert found.certify.false_positive_rate <= found.dense_certify.false_positive_rate + 0.02


def test_predict_is_the_score_at_the_threshold(cow) -> None:
    x = TEST[0][0]
    with torch.no_grad():
        score = cow.model(x)
    assert score.shape == (100,)
    assert torch.equal(cow.model.predict(x), score >= cow.model.threshold)
    assert (cow.model.predict(x) == (TEST[0][1] == 2)).float().mean() > 0.9


def test_an_uncut_network_scores_its_own_log_odds() -> None:
    x = TEST[0][0]
    with torch.no_grad():
        odds = torch.logit(torch.softmax(MODEL(x).double(), 1)[:, 2])
        assert torch.allclose(Specialist(MODEL, Question(own=(2,), classes=4))(x).double(), odds, atol=1e-3)


def test_the_network_is_left_alone(cow) -> None:
    before = state_digest(MODEL)
    resect.specialize(MODEL, CALIB, SEARCH, certify=CERTIFY, classes=[1], **EASY)
    assert state_digest(MODEL) == before
    assert all(parameter.grad is None for parameter in MODEL.parameters())


def test_same_seed_same_specialist(cow) -> None:
    again = resect.specialize(MODEL, CALIB, SEARCH, certify=CERTIFY, classes=[2], **EASY)
    assert again.frozen == cow.frozen
    assert state_digest(again.model) == state_digest(cow.model)


@pytest.mark.parametrize("answer", [-100.0, 100.0])
def test_a_constant_answer_never_passes(answer: float) -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((len(x), 1), answer) * torch.tensor([0.0, 0.0, 1.0, 0.0])

    question = Question(own=(2,), classes=4)
    seen = Seen.of(MODEL, CERTIFY, "certify")
    said = Answers.of(Specialist(Constant().eval(), question), seen)
    floors = [Floor(drop=0.2, label=1), Floor(accuracy=0.8, label=0)]
    for threshold in (choose_threshold(said, seen.dense(question), floors, (500, 1500)).threshold, 0.0):
        certificate = resect.certify(floors, seen.dense(question), [said.judged(threshold)])
        assert not certificate.passed
        assert certificate.p_value > 0.5


def test_the_threshold_is_the_best_of_all() -> None:
    draw = np.random.default_rng(0)
    own = np.arange(400) < 100
    answers = Answers(own=own, margin=draw.normal(size=400) + 3 * own, told=np.ones(400, dtype=bool), rejects=True)
    dense = Evaluation(correct=np.ones(400, dtype=bool), labels=own.astype(int), predictions=own.astype(int))
    floors = [Floor(accuracy=0.8, label=1), Floor(accuracy=0.8, label=0)]
    chosen = choose_threshold(answers, dense, floors, (100, 300))
    certificates = [
        resect.certify(floors, dense, [answers.judged(t)]).p_value for t in (chosen.threshold, *np.linspace(-1, 4, 41))
    ]
    assert certificates[0] <= min(certificates[1:]) * 1.5


def test_auroc_counts_pairs() -> None:
    draw = np.random.default_rng(1)
    margin, own = draw.integers(0, 5, 60).astype(float), draw.random(60) < 0.4
    pairs = margin[own][:, None] - margin[~own][None]
    assert auroc(margin, own) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_rates_of_a_table() -> None:
    labels = np.array([1] * 10 + [0] * 90)
    correct = np.array([True] * 9 + [False] + [True] * 81 + [False] * 9)
    rates = Rates.of(Evaluation(correct=correct, labels=labels, predictions=np.where(correct, labels, 1 - labels)))
    assert (rates.recall, rates.false_positive_rate) == pytest.approx((0.9, 0.1))
    assert rates.precision == pytest.approx(0.5)
    assert rates.balanced_accuracy == pytest.approx(0.9)


def test_several_classes_keep_their_logits_in_the_order_asked() -> None:
    pair = resect.specialize(MODEL, CALIB, SEARCH, certify=CERTIFY, classes=["dog", "ant"], **EASY)
    x, y = TEST[0]
    assert pair.model(x).shape == (100, 2)
    assert pair.false_positives is None
    answer = pair.model.predict(x)
    assert set(answer.tolist()) <= {0, 3}
    rows = (y == 0) | (y == 3)
    assert (answer[rows] == y[rows]).float().mean() > 0.9
    assert (np.isin([0, 1, 2, 3], [0, 3]) == pair.plan.keep["4"]).all()


def test_reject_refuses_strangers() -> None:
    pair = resect.specialize(MODEL, CALIB, SEARCH, certify=CERTIFY, classes=["bee", "ant"], other="reject", **EASY)
    x, y = (torch.cat(part) for part in zip(*TEST))
    answer = pair.model.predict(x)
    strangers = (y == 2) | (y == 3)
    assert (answer[strangers] == -1).float().mean() >= 0.95
    assert (answer[~strangers] == y[~strangers]).float().mean() > 0.85
    assert "false-accept rate at most 5 %" in pair.certificate.promise
    assert pair.model(x).shape == (2000, 3)


def test_each_class_and_the_panel(every) -> None:
    assert [one.question.name for one in every] == list(NAMES)
    panel = every.panel()
    x, y = (torch.cat(part) for part in zip(*TEST))
    together, dense = (panel.predict(x) == y).float().mean(), resect.evaluate(MODEL, TEST).accuracy
    assert together > dense - 0.03
    assert resect.evaluate(panel, TEST).accuracy == pytest.approx(float(together))
    two = Panel([every["dog"].model, every[0].model])
    assert set(two.predict(x).tolist()) <= {0, 3}


def test_overlap_counts_units_by_their_users(every) -> None:
    overlap = every.overlap()
    assert overlap.by_users.sum() == 48
    assert np.allclose(np.diag(overlap.shared), 1)
    masks = [np.concatenate([one.plan.keep["0"], one.plan.keep["2"]]) for one in every]
    assert overlap.shared[0, 1] == pytest.approx((masks[0] & masks[1]).sum() / masks[0].sum())
    tiny = Overlap(names=("a", "b"), kept=np.array([[True, True, False], [True, False, False]]))
    assert tiny.by_users.tolist() == [1, 1, 1]
    assert tiny.shared.tolist() == [[1.0, 0.5], [1.0, 1.0]]


def test_selectivity_finds_units_that_serve_one_class() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[2].weight.copy_(torch.eye(4))
        for layer in (model[0], model[2]):
            layer.bias.zero_()
    data = [(torch.eye(4).repeat(25, 1), torch.arange(4).repeat(25))]
    seen = trace(model, data, resect.dissect(model, data[0][0][:2]))
    assert np.allclose(resect.selectivity(seen)["0"], 2 * np.eye(4) - 1)
    for entry in resect.collapse(model, seen, data, share=0.25):
        assert (entry.own_before, entry.others_before, entry.others_after) == (1, 1, 1)
        assert entry.own_after <= float(entry.label == 0)


def test_the_threshold_method_sweeps_and_stops_at_the_first_drop() -> None:
    found = resect.specialize(MODEL, CALIB, SEARCH, certify=CERTIFY, classes=[2], method="threshold", **EASY)
    assert [trial.above for trial in found.trials[:-1]] == [True] * (len(found.trials) - 1)
    assert found.method == "threshold"
    assert len(found.frozen) == 1
    kept = [sum(trial.kept.values()) for trial in found.trials]
    assert kept == sorted(kept, reverse=True)


def test_ten_specialists_share_one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = resect.pipeline.trace
    monkeypatch.setattr(resect.pipeline, "trace", lambda *a, **k: calls.append(1) or original(*a, **k))
    resect.specialize(MODEL, CALIB, SEARCH, certify=CERTIFY, each_class=True, **{**EASY, "evaluations": 1})
    assert len(calls) == 1


def test_convolutions_and_networks_that_return_mappings() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 12, 3, padding=1)
            self.norm = nn.BatchNorm2d(12)
            self.head = nn.Linear(12, 3, bias=False)

        def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.head(torch.relu(self.norm(self.conv(pixels))).mean((2, 3)))}

    torch.manual_seed(0)
    model = Small().eval()
    with torch.no_grad():
        model.head.weight.mul_(20)

    def images(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
        x = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            logits = model(x)["logits"]
        return [{"pixels": a, "labels": b} for a, b in zip(x.split(50), (logits - logits.mean(0)).argmax(1).split(50))]

    with torch.no_grad():
        shift = model(torch.cat([item["pixels"] for item in images(500, 9)]))["logits"].mean(0)
    model.head.bias = nn.Parameter(-shift)
    found = resect.specialize(
        model, images(400, 0), images(800, 1), certify=images(800, 2), classes=[0], floor=Floor(drop=0.1), false_positives=0.1
    )
    assert found.model(images(50, 3)[0]["pixels"]).shape == (50,)
    assert found.kept["conv"] <= 12


def test_where_repair_from_the_trace_is_not_enough_sizes_are_tried_with_the_final_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from resect.specializing import search

    monkeypatch.setattr(search._One, "trial", lambda self, scores, plan: False)
    found = resect.specialize(MODEL, CALIB, SEARCH, certify=CERTIFY, classes=["cow"], **EASY)
    assert found.certified
    assert 0.3 < found.removed < 1
    assert "sizes were tried finally repaired" in " ".join(found.notes)


def test_a_deep_network_is_repaired_on_the_examples_that_tell_most() -> None:
    seen = Seen.of(MODEL, CALIB, "calibrate")
    (question,) = asked(["cow"], False, count=4, names=NAMES)
    chosen = telling(seen, question, 100, seed=1)
    own = chosen.own(question)
    assert (chosen.examples, own.sum()) == (100, 40)
    # The others that the dense network is least sure to refuse are all there, and some that it is sure of.
    hard = np.sort(seen.score(question)[~seen.own(question)])[::-1][:40]
    others = chosen.score(question)[~own]
    assert set(hard) <= set(others)
    assert others.min() < hard.min()
    again, other = telling(seen, question, 100, seed=1), telling(seen, question, 100, seed=2)
    assert np.array_equal(chosen.logits, again.logits)
    assert not np.array_equal(chosen.logits, other.logits)
    assert telling(seen, question, 5000) is seen


def test_where_own_examples_are_few_others_take_their_place_unless_others_never_come() -> None:
    seen = Seen.of(MODEL, CALIB, "calibrate")
    few = seen.take((seen.labels != 2) | (np.cumsum(seen.labels == 2) <= 5))
    (question,) = asked(["cow"], False, count=4, names=NAMES)
    chosen = telling(few, question, 200)
    assert (chosen.examples, chosen.own(question).sum()) == (200, 5)
    (pair,) = asked(["ant", "cow"], False, count=4, names=NAMES)
    assert telling(seen, pair, 100).own(pair).all()
    assert telling(seen, pair, 100).examples == 100


@pytest.mark.parametrize("classes", [["cow"], ["ant", "cow"]])
def test_harm_is_none_for_the_dense_network_and_grows_with_what_is_lost(classes: list[str]) -> None:
    seen = Seen.of(MODEL, CALIB, "calibrate")
    (question,) = asked(classes, False, count=4, names=NAMES)
    # One class is told from all others; several keep their own rows, and none here rejects.
    rows = (0, 1, 2, 3) if question.one else question.own
    network = copy.deepcopy(MODEL)
    network[4].weight.data, network[4].bias.data = network[4].weight.data[list(rows)], network[4].bias.data[list(rows)]
    tells = harm(question, rows, seen)
    assert tells(network) == pytest.approx(0, abs=1e-6)
    network[2].weight.data.mul_(0.8)
    little = tells(network)
    network[2].weight.data.mul_(0.5)
    assert 0 < little < tells(network)


def test_a_deep_network_is_allocated_by_the_harm_to_the_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from resect.specializing import search

    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).eval()
    inputs = torch.randn(900, 1, 6, 6)
    with torch.no_grad():
        logits = model(inputs)
        model[6].bias -= logits.mean(0)
        model[6].weight.mul_(20)
        model[6].bias.mul_(20)
    data = list(zip(inputs.split(100), model(inputs).argmax(1).split(100)))
    measured = []
    original = search.weighed
    monkeypatch.setattr(search, "weighed", lambda *a, **k: measured.append(original(*a, **k)) or measured[-1])
    resect.specialize(
        model, data[:3], data[3:6], certify=data[6:], classes=[1], floor=Floor(drop=0.2), false_positives=0.2, evaluations=1
    )
    assert measured
    for errors in measured[0][0].errors.values():
        assert errors[0] > errors[-1]


def unlabelled(data: list) -> list:
    return [x for x, _ in data]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ["cwo"]}, "there is no class 'cwo'; did you mean 'cow'"),
        ({"classes": [2, "cow"]}, "class cow is named twice"),
        ({"classes": [0, 1, 2, 3]}, "are all 4 classes"),
        ({"classes": [7]}, "there is no class 7; the network has 4 outputs"),
        ({"classes": []}, "is not a list of classes"),
        ({"classes": "cow"}, "is not a list of classes"),
        ({}, "say which classes"),
        ({"classes": [1], "each_class": True}, "say which classes"),
        ({"classes": [1], "names": ("ant", "bee", "bee", "dog")}, "the name 'bee' stands for the classes 1, 2"),
        ({"classes": [1], "names": ("ant", "bee")}, "2 class names were given and the network has 4 outputs"),
        ({"classes": ["x"], "names": ()}, "the classes have no names here"),
        ({"classes": [0, 1], "other": "maybe"}, "other='maybe'"),
        ({"classes": [1], "method": "magic"}, "method='magic'"),
        ({"classes": [1], "evaluations": 0}, "evaluations=0"),
        ({"classes": [1], "false_positives": 1.5}, "false_positives=1.5"),
        ({"classes": [1], "floor": Floor(accuracy=0.99999)}, "the dense network itself has"),
        ({"classes": [1], "floor": Floor(drop=0.1, label=1)}, "given label=1"),
    ],
)
def test_bad_questions(arguments: dict, message: str) -> None:
    with pytest.raises(GoalError, match=message):
        resect.specialize(MODEL, CALIB, SEARCH, certify=CERTIFY, **{**EASY, **arguments})


@pytest.mark.parametrize("where", ["calibrate", "search", "certify"])
def test_a_class_that_is_absent_is_named_with_its_split(where: str) -> None:
    splits = {"calibrate": CALIB, "search": SEARCH, "certify": CERTIFY} | {where: blobs(500, 6, classes=(0, 1, 3))}
    with pytest.raises(DataError, match=f"the {where} data hold no example of class 'cow'"):
        resect.specialize(MODEL, splits["calibrate"], splits["search"], certify=splits["certify"], classes=["cow"], **EASY)


@pytest.mark.parametrize("where", ["calibrate", "search", "certify"])
def test_without_negatives_it_refuses(where: str) -> None:
    splits = {"calibrate": CALIB, "search": SEARCH, "certify": CERTIFY} | {where: blobs(500, 6, classes=(2,))}
    with pytest.raises(DataError, match="a network that always says yes would pass"):
        resect.specialize(MODEL, splits["calibrate"], splits["search"], certify=splits["certify"], classes=["cow"], **EASY)


@pytest.mark.parametrize("where", ["calibrate", "search", "certify"])
def test_unlabelled_and_empty_data(where: str) -> None:
    for broken, message in ((unlabelled(CALIB), "have no labels"), ([], "empty")):
        splits = {"calibrate": CALIB, "search": SEARCH, "certify": CERTIFY} | {where: broken}
        with pytest.raises(DataError, match=f"{where} data .*{message}"):
            resect.specialize(MODEL, splits["calibrate"], splits["search"], certify=splits["certify"], classes=[2], **EASY)


def test_few_positives_are_warned_of_with_the_power_that_remains() -> None:
    found = resect.specialize(MODEL, CALIB, SEARCH, certify=CERTIFY[:4], classes=["cow"], **EASY)
    note = next(text for text in found.certificate.advice if "fewer than 300" in text)
    count = int(sum((y == 2).sum() for _, y in CERTIFY[:4]))
    assert f"only {count} of 'cow'" in note
    # What the note promises is exactly where the test's own p-value turns.
    drop = float(note.split("a drop of ")[1].split(" points")[0]) / 100
    right = np.ones(count, dtype=bool)
    evaluation = Evaluation(correct=right, labels=np.ones(count, dtype=int), predictions=np.ones(count, dtype=int))
    assert resect.certify(Floor(drop=drop + 2e-3), evaluation, [evaluation]).passed
    assert not resect.certify(Floor(drop=drop - 2e-3), evaluation, [evaluation]).passed


def test_a_regression_model() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)).eval()
    with pytest.raises(ModelError, match="a regression or a single score has no classes"):
        resect.specialize(model, CALIB, SEARCH, certify=CERTIFY, classes=[0])


def test_labels_that_are_numbers_of_a_regression() -> None:
    floats = [(x, y.float()) for x, y in CALIB]
    with pytest.raises(DataError, match="one integer class per example"):
        resect.specialize(MODEL, floats, SEARCH, certify=CERTIFY, classes=[0])


def test_an_output_that_is_not_a_linear_layers_own() -> None:
    model = nn.Sequential(copy.deepcopy(MODEL), nn.LogSoftmax(1)).eval()
    with pytest.raises(ModelError, match="not that of a linear layer of its own"):
        resect.specialize(model, CALIB, SEARCH, certify=CERTIFY, classes=[0], **EASY)


def test_a_panel_of_the_wrong_members(every) -> None:
    several = Specialist(MODEL, Question(own=(0, 1), classes=4))
    with pytest.raises(ModelError, match=r"and 0-1 has several"):
        Panel([several])
    with pytest.raises(ModelError, match="same class"):
        Panel([every[0].model, every[0].model])
    with pytest.raises(ModelError, match="none was given"):
        Panel([])
    with pytest.raises(GoalError, match="no specialist for class 'cat'"):
        every["cat"]


def test_rivals_that_never_come_close_are_not_kept() -> None:
    (question,) = asked([2], False, count=4, names=NAMES)
    assert question.others == (0, 1, 3)
    layer = output_layer(MODEL, resect.dissect(MODEL, CALIB[0][0][:2]))
    assert layer.tensor == "4.weight"
    assert layer.group.units == 4


def test_saved_and_loaded_it_answers_the_same(cow, every, tmp_path) -> None:
    x = TEST[0][0]
    resect.save(cow.model, cow.plan, tmp_path / "cow", found=cow)
    again = resect.load(tmp_path / "cow", lambda: trained())
    assert isinstance(again, Specialist)
    assert torch.equal(again(x), cow.model(x))
    assert torch.equal(again.predict(x), cow.model.predict(x))
    resect.save(again, cow.plan, tmp_path / "again", found=cow)
    for file in ("model.safetensors", "plan.json"):
        assert (tmp_path / "cow" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    resect.save_panel(every, tmp_path / "panel")
    assert torch.equal(resect.load_panel(tmp_path / "panel", trained)(x), every.panel()(x))
    two = resect.load_panel(tmp_path / "panel", trained, classes=[3, 1])
    assert two.classes == (3, 1)
    with pytest.raises(GoalError, match="no specialist for class 9"):
        resect.load_panel(tmp_path / "panel", trained, classes=[9])
    (tmp_path / "panel" / "panel.json").write_text("{")
    with pytest.raises(resect.FileError, match="truncated or was edited"):
        resect.load_panel(tmp_path / "panel", trained)
    with pytest.raises(resect.FileError, match="not a panel"):
        resect.load_panel(tmp_path / "cow", trained)


def test_a_panel_does_not_overwrite_what_is_mine(every, tmp_path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(resect.FileError, match=r"chapter\.txt"):
        resect.save_panel(every, tmp_path / "thesis")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_exported_it_answers_the_same(cow, tmp_path) -> None:
    program = torch.export.export(cow.model, (TEST[0][0],))
    assert torch.equal(program.module()(TEST[0][0]), cow.model(TEST[0][0]))
    measured = resect.latency(MODEL, cow.model, TEST[0][0][:1], batches=(1,), rounds=2)
    assert measured[0].small_ms.median > 0
