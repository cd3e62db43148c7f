"""The command line: exit codes, one clear line for every mistake, and files that are there whole or not at all."""

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from resect.cli import app
from resect.exporting import load, named_function, read_plan

NETWORK = """
import numpy as np
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))

def trained():
    model, data = make(), examples()
    x, y = (torch.as_tensor(part) for part in data)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model

def sick():
    model = make()
    model[0].weight.data[0, 0] = float("nan")
    return model

def examples(examples=1500):
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, examples)
    return (draw.normal(size=(examples, 6)) + 3 * np.eye(3, 6)[labels]).astype("float32"), labels

def three_of_a_kind():
    inputs, labels = examples()
    return inputs, labels + 5

def few():
    return examples(60)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a module of networks and data; nothing may use the network."""
    (tmp_path / "my_cli_module.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_cli_module", raising=False)

    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def prune(*arguments, model="my_cli_module:trained", data="my_cli_module:examples", floor=("--floor", 0.8)):
    return run("prune", model, "--data", data, *floor, "--evaluations", 6, *arguments)


def message(result):
    """The one line on standard error."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


def test_a_certified_floor_is_exit_code_0(here):
    result = prune("--out", "small")
    assert result.exit_code == 0, result.output
    assert "Certified" in result.stdout
    assert {path.name for path in (here / "small").iterdir()} == {
        "model.safetensors",
        "plan.json",
        "result.json",
        "report.html",
        "trials.jsonl",
    }
    assert [path.name for path in here.glob("small*")] == ["small"]


@pytest.mark.parametrize("scorer", ["spectral", "taylor"])
def test_a_scorer_gets_what_it_needs_from_the_trace(here, scorer):
    result = prune("--out", "small", "--scorer", scorer)
    assert result.exit_code == 0, result.output


def test_what_was_written_can_be_used(here):
    assert prune("--out", "small").exit_code == 0
    record, result = read_plan("small"), json.loads((here / "small" / "result.json").read_text())
    network = load("small", "my_cli_module:trained")
    assert network[0].out_features == sum(entry["kept"] and len(entry["kept"]) for entry in record["keep"].values())
    assert result["certified"] is True
    assert record["goal"]["accuracy"] == 0.8
    assert set(record["data"]) == {"train", "calibrate", "search", "certify", "test"}
    assert len((here / "small" / "trials.jsonl").read_text().splitlines()) == len(result["trials"])


def test_same_seed_same_network(here):
    for name in ("one", "two"):
        assert prune("--out", name, "--seed", 3).exit_code == 0
    for file in ("model.safetensors", "plan.json"):
        assert (here / "one" / file).read_bytes() == (here / "two" / file).read_bytes()


def test_an_uncertified_floor_is_exit_code_3_and_still_writes(here):
    result = prune("--out", "small", data="my_cli_module:few", floor=("--drop", 0.0001))
    assert result.exit_code == 3, result.output
    assert "not certified" in result.stderr
    assert json.loads((here / "small" / "result.json").read_text())["certified"] is False


def test_json_is_the_only_thing_on_standard_output(here):
    result = prune("--json")
    assert json.loads(result.stdout)["certified"] is True
    assert json.loads(result.stdout) == json.loads((here / "small" / "result.json").read_text())


def test_quiet_prints_the_verdict_only(here):
    assert prune("--quiet").stdout.strip() == "Certified: Accuracy at least 80 %, 95 % sure."


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"model": "my_cli_module:traned"}, "Did you mean 'trained'"),
        ({"model": "nowhere"}, "no network 'nowhere'"),
        ({"model": "my_cli_modul:make"}, "Did you mean 'my_cli_module'"),
        ({"model": "my_cli_module:sick"}, "module '0' of the network gives NaN"),
        ({"model": "my_cli_module:examples"}, "not a torch.nn.Module"),
        ({"data": "digit"}, "Did you mean 'digits'"),
        ({"data": "my_cli_module:three_of_a_kind"}, "labels run from 5 to 7"),
        ({"floor": ()}, "--floor 0.95"),
        ({"floor": ("--floor", 0.9, "--drop", 0.1)}, "--floor 0.95"),
        ({"floor": ("--floor", 95)}, "0.95"),
        ({"floor": ("--floor", 0.9999)}, "dense network itself"),
        ({"floor": ("--floor", 0.8, "--delta", 3)}, "delta"),
        ({"floor": ("--floor", 0.8, "--scorer", "magnitud")}, "magnitude"),
        ({"floor": ("--floor", 0.8, "--repair", "glue")}, "glue"),
        ({"floor": ("--floor", 0.8, "--allocation", "fair")}, "fair"),
        ({"floor": ("--floor", 0.8, "--round-to", "fast")}, "write round_to="),
        ({"floor": ("--floor", 0.8, "--round-to", 0)}, "a whole number above 0"),
        ({"floor": ("--floor", 0.8, "--round-to", -8)}, "a whole number above 0"),
        ({"floor": ("--macs", 0.5, "--batch", 8)}, "give latency_ms as well"),
        ({"floor": ("--floor", 0.8, "--out", ".")}, "the working directory"),
        ({"floor": ("--floor", 0.8, "--out", "..")}, "the working directory"),
        ({"floor": ("--floor", 0.8, "--out", "my_cli_module.py")}, "is a file"),
        ({"floor": ("--floor", 0.8, "--out", "my_cli_module.py/small")}, "cannot write"),
    ],
)
def test_bad_input_is_one_clear_line(here, arguments, expected):
    assert expected in message(prune(**arguments))
    assert {path.name for path in here.iterdir()} - {"__pycache__"} == {"my_cli_module.py"}


def test_a_directory_of_mine_is_not_overwritten(here):
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.txt").write_text("mine")
    assert "chapter.txt" in message(prune("--out", "thesis"))
    assert (here / "thesis" / "chapter.txt").read_text() == "mine"


def test_usage_errors_are_exit_code_2(here):
    assert run("prune").exit_code == 2
    assert run("prune", "x", "--data", "digits", "--floor", "many").exit_code == 2
    assert run("amputate").exit_code == 2


def test_ctrl_c_keeps_the_trials_that_ended_and_writes_nothing_else(here, monkeypatch):
    from resect.searching.judging import Judge

    judge = Judge.judge

    def interrupted(self, *arguments):
        if len(self.trials) == 3:
            raise KeyboardInterrupt
        return judge(self, *arguments)

    monkeypatch.setattr(Judge, "judge", interrupted)
    result = prune("--out", "small")
    assert result.exit_code == 130, result.output
    assert "small.trials.jsonl" in result.stderr
    assert len((here / "small.trials.jsonl").read_text().splitlines()) == 3
    assert [path.name for path in here.glob("*small*")] == ["small.trials.jsonl"]


def test_inspect(here):
    result = run("inspect", "my_cli_module:make", "--shape", "1,6")
    assert result.exit_code == 0, result.output
    assert "24" in result.stdout
    groups = json.loads(run("inspect", "my_cli_module:make", "--shape", "1,6", "--json").stdout)["groups"]
    assert [group["units"] for group in groups] == [24]
    assert "--shape" in message(run("inspect", "my_cli_module:make"))
    assert "--shape" in message(run("inspect", "my_cli_module:make", "--shape", "1,six"))


def test_bench_and_inspect_of_what_was_written(here):
    assert prune("--out", "small").exit_code == 0
    code = ("--architecture", "my_cli_module:trained")
    measured = json.loads(run("bench", "small", "--rounds", 3, "--batches", "1,4", "--json", *code).stdout)
    assert [entry["batch"] for entry in measured] == [1, 4]
    assert "my_cli_module:trained" in message(run("bench", "small"))
    assert run("inspect", "small", *code).exit_code == 0


def test_a_damaged_network_is_one_clear_line(here):
    assert prune("--out", "small").exit_code == 0
    weights = here / "small" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "truncated" in message(run("bench", "small", "--architecture", "my_cli_module:trained"))


def test_demo(here):
    pytest.importorskip("sklearn")
    result = run("demo", "--out", "out", "--seed", 0)
    assert result.exit_code == 0, result.output
    assert "Certified" in result.stdout
    small, dense = load("out/small"), load("out/dense")
    assert small.hidden1.out_features < dense.hidden1.out_features == 128
    assert run("prune", "out/dense", "--data", "digits", "--drop", 0.2, "--evaluations", 4, "--out", "again").exit_code == 0
    assert load("again").hidden1.in_features == 64
    assert "was not trained on them" not in (here / "again" / "report.html").read_text()
    other = run("prune", "out/dense", "--data", "digits", "--floor", 0.5, "--evaluations", 4, "--seed", 1, "--out", "other")
    assert "was not trained on them" in " ".join(other.stdout.split())


def test_python_dash_m_resect():
    result = subprocess.run([sys.executable, "-m", "resect", "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    for verb in ("demo", "prune", "inspect", "bench"):
        assert verb in result.stdout


def test_the_python_of_the_readme_runs(here):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    block = readme.split("```python\n")[1].split("```")[0]
    network = named_function("my_cli_module:trained")
    inputs, labels = (torch.as_tensor(part) for part in named_function("my_cli_module:examples")())
    batches = list(zip(inputs.split(100), labels.split(100)))
    model = network().eval()
    names = {"model": model, "example": inputs[:2], "calib": batches, "val": batches, "make_model": network}
    exec(block, names)
    with torch.no_grad():
        assert torch.equal(names["again"](inputs), names["small"](inputs))


def test_a_budget_in_place_of_a_promise(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out"), "--quiet"])
    assert result.exit_code in (0, 3), result.output
    arguments = ["prune", str(tmp_path / "out" / "dense"), "--data", "digits", "--out", str(tmp_path / "half")]
    result = CliRunner().invoke(app, [*arguments, "--macs", "0.5", "--parameters", "0.4", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)
    assert (tmp_path / "half" / "model.safetensors").exists()
    plan = json.loads((tmp_path / "half" / "plan.json").read_text())
    dense = sum(math.prod(shape) for shape in plan["dense_shapes"].values())
    kept = sum(math.prod(shape) for shape in plan["shapes"].values())
    assert kept <= 0.4 * dense
    result = CliRunner().invoke(app, [*arguments, "--macs", "0.5", "--round-to", "auto", "--json"])
    assert result.exit_code == 0, result.output
    assert all(count % 8 == 0 for count in json.loads(result.stdout)["kept"].values())
    result = CliRunner().invoke(app, [*arguments, "--latency-ms", "1000", "--batch", "4", "--json"])
    assert result.exit_code == 0, result.output
    assert any("batch 4" in note for note in json.loads(result.stdout)["notes"])
    result = CliRunner().invoke(app, [*arguments, "--macs", "0.5", "--floor", "0.9"])
    assert result.exit_code == 2


def specialize(*arguments, data="my_cli_module:examples", which=("--classes", "1"), floor=("--drop", 0.1)):
    promise = (*floor, "--false-positives", 0.1)
    return run("specialize", "my_cli_module:trained", "--data", data, *which, *promise, "--evaluations", 4, *arguments)


def test_one_specialist_is_a_saved_network_like_any_other(here):
    result = specialize("--out", "one")
    assert result.exit_code == 0, result.output
    assert "Certified: 1: recall at most 10 points below the dense network" in result.stdout
    files = {"model.safetensors", "plan.json", "result.json", "report.html"}
    assert {path.name for path in (here / "one").iterdir()} == files
    network, inputs = load("one", "my_cli_module:trained"), torch.as_tensor(named_function("my_cli_module:examples")()[0])
    assert network.predict(inputs).dtype == torch.bool
    assert read_plan("one")["specialist"]["own"] == [1]
    code = ("--architecture", "my_cli_module:trained")
    assert run("bench", "one", "--rounds", 2, "--batches", "1", *code).exit_code == 0
    record = json.loads((here / "one" / "result.json").read_text())
    assert record["certified"] is True
    assert record["test"]["1"]["small"]["recall"] > 0.8
    assert specialize("--out", "one").exit_code == 0


def test_a_specialist_for_each_class(here):
    result = specialize("--out", "panel", "--json", which=("--each-class",))
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record == json.loads((here / "panel" / "result.json").read_text())
    assert len(record["specialists"]) == 3
    assert record["panel"]["specialists"] > record["panel"]["dense"] - 0.1
    assert {path.name for path in (here / "panel").iterdir()} == {"0", "1", "2", "panel.json", "result.json", "report.html"}
    assert "What the classes share" in (here / "panel" / "report.html").read_text()
    assert load("panel/2", "my_cli_module:trained").question.own == (2,)
    assert specialize("--out", "panel", "--quiet", which=("--each-class",)).stdout.count("Certified: ") == 3


def test_a_specialist_that_is_not_certified_is_exit_code_3(here):
    result = specialize("--out", "one", data="my_cli_module:few", floor=("--drop", 0.001))
    assert result.exit_code == 3, result.output
    assert "not certified: 1;" in result.stderr
    assert (here / "one" / "plan.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"which": ()}, "say which classes: --each-class"),
        ({"which": ("--each-class", "--classes", "1")}, "say which classes: --each-class"),
        ({"which": ("--classes", "7")}, "there is no class 7"),
        ({"which": ("--classes", "one")}, "write indices from 0 to 2"),
        ({"which": ("--classes", "0,1,2")}, "are all 3 classes"),
        ({"which": ("--classes", "0,1", "--other", "maybe")}, "other='maybe'"),
        ({"which": ("--classes", "1", "--method", "magic")}, "method='magic'"),
        ({"which": ("--classes", "1", "--out", "my_cli_module.py")}, "is a file"),
        ({"which": ("--each-class", "--out", "my_cli_module.py")}, "is a file"),
        ({"which": ("--each-class", "--out", ".")}, "the working directory"),
    ],
)
def test_bad_input_of_specialists_is_one_clear_line(here, arguments, expected):
    assert expected in message(specialize(**arguments))
    assert {path.name for path in here.iterdir()} - {"__pycache__"} == {"my_cli_module.py"}
