"""save -> load -> save gives the same bytes, loaded networks the same logits, and damaged files one clear message."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from resect.anatomy import dissect
from resect.batches import forward, unpack
from resect.errors import FileError, ModelError, PlanError
from resect.exporting import load, load_plan, make_dense, make_example, named_function, read_plan, save
from resect.exporting.plan_file import checksum
from resect.plan import Plan
from resect.sources.demo import ARCHITECTURE, mlp
from resect.surgery import cut
from zoo import ZOO

WIDTHS = (12, 16, 10, 4)


class ConvNet(nn.Module):
    """BatchNorm, a depthwise convolution, a flatten and a residual: buffers, attributes and blocks that follow a width."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12 * 16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.wide(x + self.depthwise(x)))
        return self.head(x.flatten(1))


class Rotating(nn.Module):
    """A buffer that is not in the state dict, and a tensor that is an ordinary attribute."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("frequencies", 1 / torch.arange(1, 7, dtype=torch.float32), persistent=False)
        self.shift = torch.linspace(0, 1, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x * torch.cos(self.frequencies)))) + self.shift


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 4)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.inner.weight

    def forward(self, x):
        return self.outer(torch.relu(self.again(torch.relu(self.inner(x)))))


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.ndim and buffer.shape[0] == 8:
                buffer.uniform_(0.5, 1.5)
    return model.eval()


ARCHITECTURES = {
    "mlp": (lambda: mlp(WIDTHS), torch.Size([3, 12])),
    "conv": (ConvNet, torch.Size([3, 3, 4, 4])),
    "rotating": (Rotating, torch.Size([3, 6])),
    "tied": (Tied, torch.Size([3, 6])),
    "half": (lambda: mlp(WIDTHS).to(torch.bfloat16), torch.Size([3, 12])),
}


@pytest.fixture(params=sorted(ARCHITECTURES))
def case(request):
    make, shape = ARCHITECTURES[request.param]
    model = seeded(make)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
    anatomy = dissect(model, x)
    plan = Plan.random(anatomy, 0.4, seed=2)
    return make, cut(model, plan), plan, x


@pytest.fixture
def saved(tmp_path):
    """A saved perceptron: (directory, small network, plan)."""
    model = mlp(WIDTHS).eval()
    plan = Plan.random(dissect(model, torch.zeros(2, 12)), 0.5, seed=0)
    small = cut(model, plan)
    save(small, plan, tmp_path / "small", architecture=ARCHITECTURE, arguments={"widths": list(WIDTHS)}, seed=3)
    return tmp_path / "small", small, plan


def content(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_loaded_logits_are_equal_and_saving_again_gives_the_same_bytes(case, tmp_path):
    make, small, plan, x = case
    save(small, plan, tmp_path / "one", seed=0)
    again = load(tmp_path / "one", make)
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
    save(again, load_plan(tmp_path / "one", plan.anatomy), tmp_path / "two", seed=0)
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize("name", sorted(ZOO))
def test_law_9_over_the_zoo(name, tmp_path):
    model, example = ZOO[name]()
    plan = Plan.random(dissect(model, example), 0.5, seed=0)
    small = cut(model, plan)
    save(small, plan, tmp_path / "one")
    again = load(tmp_path / "one", lambda: ZOO[name]()[0])
    batch = unpack(example)
    with torch.no_grad():
        assert torch.equal(forward(again, batch), forward(small, batch))
    save(again, load_plan(tmp_path / "one", plan.anatomy), tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_loading_leaves_the_random_state_alone(saved):
    before = torch.random.get_rng_state()
    load(saved[0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_attributes_follow_the_widths(case, tmp_path):
    make, small, plan, _ = case
    again = load(save(small, plan, tmp_path / "small"), make)
    shown = {name: module.extra_repr() for name, module in small.named_modules()}
    assert {name: module.extra_repr() for name, module in again.named_modules()} == shown


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    model = seeded(Tied)
    plan = Plan.all(dissect(model, torch.zeros(2, 6)))
    again = load(save(model, plan, tmp_path / "tied"), Tied)
    assert again.again.weight is again.inner.weight
    assert read_plan(tmp_path / "tied")["aliases"] == {"inner.weight": ["again.weight"]}


def test_the_architecture_is_built_without_its_weights(tmp_path):
    model = seeded(ConvNet)
    plan = Plan.all(dissect(model, torch.zeros(2, 3, 4, 4)))
    save(model, plan, tmp_path / "small")
    devices = []

    def make():
        built = ConvNet()
        devices.append(built.head.weight.device.type)
        return built

    load(tmp_path / "small", make)
    assert devices == ["meta"]


def test_a_bias_that_repair_added_comes_back(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2, bias=False))

    model = seeded(make)
    plan = Plan.all(dissect(model, torch.zeros(2, 4)))
    model[2].bias = nn.Parameter(torch.ones(2))
    again = load(save(model, plan, tmp_path / "small"), make)
    assert torch.equal(again[2].bias, torch.ones(2))


def test_nothing_is_pickled(saved):
    for name, raw in content(saved[0]).items():
        if name.endswith(".safetensors"):
            assert raw[8:9] == b"{"
        else:
            json.loads(raw)


def test_plan_says_what_was_kept(saved):
    directory, _, plan = saved
    record = read_plan(directory)
    assert {name: entry["kept"] for name, entry in record["keep"].items()} == {
        name: np.flatnonzero(mask).tolist() for name, mask in plan.keep.items()
    }
    assert (record["seed"], record["format_version"]) == (3, 1)
    assert record["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


def test_further_files_are_written_with_the_network(saved):
    directory, small, plan = saved
    save(small, plan, directory, files={"report.html": "<p>", "result.json": "{}"})
    assert (directory / "report.html").read_text() == "<p>"


def test_example_and_dense_architecture_come_from_the_directory(saved):
    directory, small, _ = saved
    (x,), keyword = make_example(directory)
    assert (tuple(x.shape), keyword) == ((1, 12), {})
    assert make_dense(directory)(x).shape == small(x).shape


@pytest.mark.parametrize("file", ["model.safetensors", "plan.json"])
def test_missing_files_are_named(saved, file):
    (saved[0] / file).unlink()
    with pytest.raises(FileError, match=file):
        load(saved[0])


@pytest.mark.parametrize("file", ["model.safetensors", "plan.json"])
def test_truncated_files_are_named(saved, file):
    raw = (saved[0] / file).read_bytes()
    (saved[0] / file).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(FileError, match=f"{file}.*truncated"):
        load(saved[0])


def test_one_flipped_bit_of_a_weight_is_found(saved):
    path = saved[0] / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FileError, match=r"model\.safetensors .* edited"):
        load(saved[0])


def test_an_edited_plan_is_found(saved):
    path = saved[0] / "plan.json"
    text = path.read_text()
    assert '"seed": 3' in text
    path.write_text(text.replace('"seed": 3', '"seed": 4'))
    with pytest.raises(FileError, match=r"plan\.json was edited"):
        load(saved[0])


def test_other_format_version(saved):
    path = saved[0] / "plan.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 7'))
    with pytest.raises(FileError, match="format version 7, this resect reads version 1"):
        load(saved[0])


def test_other_architecture_names_the_first_tensor_that_differs(saved):
    with pytest.raises(PlanError, match=r"hidden1\.weight has shape \(16, 12\) in the file and \(17, 12\) in the network"):
        load(saved[0], lambda: mlp((12, 17, 10, 4)))


def test_plan_for_another_anatomy(saved):
    other = dissect(mlp((12, 16, 11, 4)).eval(), torch.zeros(2, 12))
    with pytest.raises(PlanError, match=r"hidden2\.weight"):
        load_plan(saved[0], other)


def test_a_directory_of_other_things_is_left_alone(saved, tmp_path):
    _, small, plan = saved
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("mine")
    with pytest.raises(FileError, match=r"chapter\.txt"):
        save(small, plan, other)
    assert (other / "chapter.txt").read_text() == "mine"


def test_a_file_of_mine_among_resects_is_not_lost(saved):
    directory, small, plan = saved
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match=r"notes\.txt"):
        save(small, plan, directory)
    assert (directory / "notes.txt").read_text() == "mine"


def test_unwritable_directory(saved, tmp_path):
    _, small, plan = saved
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        save(small, plan, tmp_path / "file" / "small")
    with pytest.raises(FileError, match="is a file"):
        save(small, plan, tmp_path / "file")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_the_old_network_whole(saved, monkeypatch, failure):
    directory, small, plan = saved
    before = content(directory)

    def interrupt(*_, **__):
        raise failure

    monkeypatch.setattr("resect.exporting.saving._write_tensors", interrupt)
    with pytest.raises(failure):
        save(small, plan, directory, seed=99)
    assert content(directory) == before
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_file_cannot_make_resect_run_code(saved):
    directory = saved[0]
    record = read_plan(directory)
    record["architecture"] = {"factory": "os:getcwd", "arguments": {}}
    record["checksum"] = checksum(record)
    (directory / "plan.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="os:getcwd"):
        load(directory)


def test_without_a_recorded_architecture_one_must_be_given(saved, tmp_path):
    _, small, plan = saved
    save(small, plan, tmp_path / "bare")
    with pytest.raises(ModelError, match="pass a function"):
        load(tmp_path / "bare")
    with pytest.raises(ModelError, match="returned str"):
        load(tmp_path / "bare", lambda: "network")


def test_arguments_need_their_architecture(saved, tmp_path):
    _, small, plan = saved
    with pytest.raises(ModelError, match="architecture"):
        save(small, plan, tmp_path / "x", arguments={"widths": [1]})


def test_replacing_a_saved_network(saved):
    directory, _, plan = saved
    dense = mlp(WIDTHS).eval()
    save(dense, Plan.all(plan.anatomy), directory, architecture=ARCHITECTURE, arguments={"widths": list(WIDTHS)})
    assert load(directory).hidden1.out_features == 16


def test_a_link_is_followed_and_kept(saved, tmp_path):
    directory, small, plan = saved
    (tmp_path / "link").symlink_to(directory)
    save(small, plan, tmp_path / "link", seed=8)
    assert (tmp_path / "link").is_symlink()
    assert read_plan(directory)["seed"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "small"]


def test_a_moved_directory_loads(saved, tmp_path):
    shutil.move(saved[0], tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere").hidden1.out_features == saved[1].hidden1.out_features


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("math:sqr", "Did you mean 'sqrt'"),
        ("no_such_module_here:make", "no module 'no_such_module_here'"),
        ("math", "module:function"),
        ("math:", "module:function"),
    ],
)
def test_names_that_lead_nowhere(spec, message):
    with pytest.raises(ModelError, match=message):
        named_function(spec)


def test_modules_beside_the_working_directory_are_found(tmp_path, monkeypatch):
    (tmp_path / "a_network_of_mine.py").write_text("def make():\n    return 41\n")
    (tmp_path / "a_broken_network.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    assert named_function("a_network_of_mine:make")() == 41
    with pytest.raises(ModelError, match="ZeroDivisionError"):
        named_function("a_broken_network:make")


def test_a_network_that_is_cut_again_is_described_from_its_dense_one(saved, tmp_path):
    directory, small, plan = saved
    second = Plan.random(dissect(small, torch.zeros(2, 12)), 0.5, seed=1)
    smaller = cut(small, second)
    save(smaller, second, tmp_path / "smaller", architecture=str(directory))
    x = torch.randn(5, 12)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "smaller")(x), smaller(x))
    whole = load_plan(tmp_path / "smaller", plan.anatomy)
    assert whole.kept == second.kept
    assert all((whole.keep[name] <= mask).all() for name, mask in plan.keep.items())
    with pytest.raises(PlanError, match="hidden1"):
        save(small, plan, tmp_path / "wrong", architecture=str(directory))
