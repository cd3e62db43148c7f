"""Data and networks by name: seeded disjoint splits, and one clear message for everything that is not there."""

import os
import socket

import numpy as np
import pytest
import torch
from torch import nn

from resect.errors import DataError, ModelError
from resect.sources import ArrayData, Splits, fitted, load_data, load_model
from resect.sources.demo import mlp, recipe, train

ROLES = ("train", "calibrate", "search", "certify", "test")


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def rows(data):
    return {(x.numpy().tobytes(), int(y)) for x, y in zip(data.inputs, data.labels)}


def write_module(tmp_path, monkeypatch, name, body):
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.chdir(tmp_path)


def test_array_data_is_read_again_and_again():
    data = ArrayData(inputs=torch.arange(10.0).reshape(5, 2), labels=torch.arange(5), batch_size=2)
    first, second = list(data), list(data)
    assert [len(y) for _, y in first] == [2, 2, 1]
    assert len(data) == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second))
    assert torch.equal(torch.cat([y for _, y in first]), data.labels)


def test_fingerprint_is_of_the_bytes():
    data = ArrayData(inputs=torch.zeros(4, 2), labels=torch.zeros(4, dtype=torch.int64))
    changed = ArrayData(inputs=torch.zeros(4, 2), labels=torch.tensor([0, 0, 0, 1]))
    assert data.fingerprint == ArrayData(inputs=torch.zeros(4, 2), labels=data.labels, batch_size=3).fingerprint
    assert len({data.fingerprint, changed.fingerprint, data.flattened().take(torch.arange(3)).fingerprint}) == 3


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (4, torch.zeros(3, dtype=torch.int64), "4 inputs but 3 labels"),
        (3, torch.zeros(3), "float32"),
        (2, torch.zeros(2, 2).long(), "shape"),
    ],
)
def test_labels_that_do_not_fit(inputs, labels, message):
    with pytest.raises(DataError, match=message):
        ArrayData(inputs=torch.zeros(inputs, 2), labels=labels)


def test_digits_are_split_by_seed_into_disjoint_parts(offline):
    pytest.importorskip("sklearn")
    splits, again, other = load_data("digits", seed=1), load_data("digits", seed=1), load_data("digits", seed=2)
    assert splits.fingerprints == again.fingerprints
    assert splits.fingerprints["certify"] != other.fingerprints["certify"]
    disjoint = [rows(getattr(splits, role)) for role in ("train", "search", "certify", "test")]
    assert len(set.union(*disjoint)) == sum(map(len, disjoint)) == 1797
    assert rows(splits.calibrate) <= rows(splits.train)
    assert splits.classes == 10
    assert splits.train.inputs.shape[1:] == (1, 8, 8)
    assert float(splits.train.inputs.max()) == 1.0


def test_digits_leave_enough_to_certify_95_percent():
    pytest.importorskip("sklearn")
    assert load_data("digits").certify.examples >= 500


def write_images(folder, examples, size=5, mode="L", column="picture", seed=0):
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(seed)
    shape = (size, size) if mode == "L" else (size, size, 3)
    features = datasets.Features({column: datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog", "hen"])})
    for split, count in examples.items():
        pictures = [image.fromarray(draw.integers(0, 256, shape).astype(np.uint8)) for _ in range(count)]
        table = datasets.Dataset.from_dict({column: pictures, "kind": draw.integers(0, 3, count)}, features=features)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_local_image_folder_without_network(tmp_path, offline, mode, channels):
    write_images(tmp_path, {"train": 200, "test": 40}, mode=mode)
    splits = load_data(str(tmp_path), seed=0)
    assert splits.train.inputs.shape[1:] == (channels, 5, 5)
    assert splits.train.inputs.dtype == torch.float32
    assert 0.9 < float(splits.train.inputs.max()) <= 1.0
    assert splits.class_names == ("cat", "dog", "hen")
    assert splits.test.examples == 40
    assert not rows(splits.certify) & (rows(splits.train) | rows(splits.search) | rows(splits.test))


def test_certify_from_the_test_split_leaves_training_whole(tmp_path, offline):
    write_images(tmp_path, {"train": 100, "test": 60})
    splits = load_data(str(tmp_path), certify_from="test")
    assert (splits.train.examples, splits.certify.examples, splits.test.examples) == (100, 30, 30)
    assert not rows(splits.certify) & (rows(splits.train) | rows(splits.test))
    assert rows(splits.search) <= rows(splits.train)


@pytest.mark.skipif("RESECT_DATA" not in os.environ, reason="RESECT_DATA does not name a folder of data sets")
def test_mnist(offline):
    splits = load_data(os.path.join(os.environ["RESECT_DATA"], "mnist"))
    sizes = [getattr(splits, role).examples for role in ("train", "search", "certify", "test")]
    assert sizes == [45_000, 5_000, 10_000, 10_000]
    assert splits.train.inputs.shape[1:] == (1, 28, 28)
    assert torch.bincount(splits.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_images_of_several_sizes_are_refused(tmp_path):
    write_images(tmp_path, {"train": 50})
    write_images(tmp_path, {"test": 20}, size=6)
    (tmp_path / "test-00000-of-00001.parquet").rename(tmp_path / "train-00001-of-00002.parquet")
    with pytest.raises(DataError, match="differ in size"):
        load_data(str(tmp_path))


def test_data_without_images_are_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="no image column among \\['sentence', 'label'\\]"):
        load_data(str(tmp_path))


def test_a_folder_that_is_no_data_set(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="could not be loaded"):
        load_data(str(tmp_path))


def test_data_from_my_own_function(tmp_path, monkeypatch):
    body = (
        "import numpy as np\n"
        "def pair(seed=0):\n"
        "    draw = np.random.default_rng(0)\n"
        "    return draw.normal(size=(300, 6)).astype('float32'), draw.integers(0, 3, 300)\n"
        "def both():\n"
        "    x, y = pair()\n"
        "    return {'train': (x[:200], y[:200]), 'test': (x[200:], y[200:])}\n"
        "def wrong():\n"
        "    return {'practice': pair()}\n"
        "def nothing():\n"
        "    return 7\n"
    )
    write_module(tmp_path, monkeypatch, "my_data_module", body)
    pool, both = load_data("my_data_module:pair"), load_data("my_data_module:both")
    assert sum(getattr(pool, role).examples for role in ("train", "search", "certify", "test")) == 300
    assert both.test.examples == 100
    with pytest.raises(DataError, match="practice"):
        load_data("my_data_module:wrong")
    with pytest.raises(DataError, match="returned int"):
        load_data("my_data_module:nothing")
    with pytest.raises(DataError, match="Did you mean 'pair'"):
        load_data("my_data_module:pairs")


@pytest.mark.parametrize(
    ("spec", "message"), [("digit", "Did you mean 'digits'"), ("./nowhere", "no data set"), ("a/b/c", "no data set")]
)
def test_unknown_data(spec, message):
    with pytest.raises(DataError, match=message):
        load_data(spec)


def test_too_few_examples_are_refused():
    data = ArrayData(inputs=torch.zeros(3, 2), labels=torch.tensor([0, 1, 0]))
    empty = data.take(torch.arange(0))
    with pytest.raises(DataError, match="no example is left for certify"):
        Splits(name="tiny", train=data, calibrate=data, search=data, certify=empty, test=data)


def test_splits_are_flattened_for_networks_that_want_it():
    images = ArrayData(inputs=torch.rand(4, 1, 5, 5), labels=torch.tensor([0, 1, 2, 0]))
    splits = Splits(name="images", **dict.fromkeys(ROLES, images))
    assert fitted(nn.Linear(25, 3), splits).test.inputs.shape == (4, 25)
    assert fitted(mlp((25, 4, 3)).eval(), splits).test.inputs.shape == (4, 1, 5, 5)
    with pytest.raises(DataError, match="does not take"):
        fitted(nn.Linear(24, 3), splits)


def test_modules_that_are_not_finite_are_named_and_no_hook_survives():
    data = ArrayData(inputs=torch.rand(4, 6), labels=torch.tensor([0, 1, 2, 0]))
    splits = Splits(name="rows", **dict.fromkeys(ROLES, data))
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    assert fitted(model, splits) is splits
    model[2].bias.data[1] = float("inf")
    with pytest.raises(ModelError, match=r"module '2' .* NaN or infinite"):
        fitted(model, splits)
    assert not any(module._forward_hooks for module in model.modules())


def test_demo_networks_are_seeded():
    data = ArrayData(inputs=torch.rand(60, 6), labels=torch.arange(60) % 3)
    before = torch.random.get_rng_state()
    one, two = (train(mlp((6, 8, 3), seed=4), data, epochs=2, seed=4, noise=0.1) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not one.training


def test_demo_network_learns_digits_well_enough_to_be_cut():
    pytest.importorskip("sklearn")
    splits = load_data("digits", seed=0)
    widths, settings = recipe(splits)
    assert widths == (64, 128, 64, 10)
    model = train(mlp(widths), splits.train, seed=0, **settings)
    with torch.no_grad():
        right = (model(splits.certify.inputs).argmax(1) == splits.certify.labels).double().mean()
    assert right > 0.968  # what 503 examples must show for a certificate of 95 %


def test_networks_by_name(tmp_path, monkeypatch):
    body = (
        "from torch import nn\n"
        "def make():\n    return nn.Linear(3, 2)\n"
        "network = nn.Linear(3, 2)\n"
        "def number():\n    return 3\n"
        "def needs(width):\n    return nn.Linear(width, 2)\n"
    )
    write_module(tmp_path, monkeypatch, "my_network_module", body)
    source = load_model("my_network_module:make")
    assert (source.architecture, source.model.training) == ("my_network_module:make", False)
    assert load_model("my_network_module:network").architecture is None
    with pytest.raises(ModelError, match="gave int"):
        load_model("my_network_module:number")
    with pytest.raises(ModelError, match="failed when called without arguments"):
        load_model("my_network_module:needs")


def test_unknown_networks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "plan.json").write_text("{}")
    (tmp_path / "thesis").mkdir()
    with pytest.raises(ModelError, match="Did you mean 'small'"):
        load_model("smal")
    with pytest.raises(ModelError, match=r"no plan\.json"):
        load_model("thesis")
