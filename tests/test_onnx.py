"""ONNX files: delivered only when onnxruntime answers as torch does, on lengths the file was not exported with as well."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import resect
from resect import DataError, FileError, ModelError, Plan

pytest.importorskip("onnxscript", reason="needs the extra resect[onnx]")
from resect.exporting.onnx import session_of


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 4, 3)

    def forward(self, pixels):
        return self.second(self.norm(self.first(pixels)).relu()).mean((2, 3))


class Attending(nn.Module):
    """Token ids and a mask by keyword, as in language models; logits in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.project, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        heads = [part(x).unflatten(2, (-1, 4)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        mixed = nn.functional.scaled_dot_product_attention(*heads, attn_mask=attention_mask[:, None, None].bool())
        return {"logits": self.head(self.project(mixed.transpose(1, 2).flatten(2)).relu()[:, 0])}


class Positioned(nn.Module):
    """Token ids of one length only, as many as there are positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position, self.head = nn.Embedding(20, 8), nn.Parameter(torch.ones(6, 8)), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head((self.embedding(ids) + self.position).tanh().mean(1))


class Fixed(nn.Module):
    """A forward that only takes two examples."""

    def forward(self, x):
        return x.reshape(2, 4).cumsum(1)


class Branching(nn.Module):
    """A forward that looks at the data to decide what to do."""

    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


def cut_in_half(model: nn.Module, example):
    anatomy = resect.dissect(model.eval(), example)
    return resect.cut(model, Plan.random(anatomy, 0.5))


def tokens(examples: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 20, (examples, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < max(1, length - 2)).long().expand(examples, length)}


@pytest.mark.parametrize("batch", [1, 5])
def test_a_cut_convolutional_network_answers_the_same_for_any_batch(batch, tmp_path_factory) -> None:
    torch.manual_seed(0)
    small = cut_in_half(Convolved(), torch.randn(2, 3, 8, 8))
    path = resect.export_onnx(small, torch.randn(1, 3, 8, 8), tmp_path_factory.mktemp("new") / "deep" / "net.onnx")
    assert [file.name for file in path.parent.iterdir()] == ["net.onnx"]
    x = torch.randn(batch, 3, 8, 8)
    (got,) = session_of(path).run(None, {"pixels": x.numpy()})
    np.testing.assert_allclose(got, small(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_cut_language_model_answers_the_same_for_any_batch_and_sequence(tmp_path) -> None:
    torch.manual_seed(0)
    model = Attending().eval()
    anatomy = resect.dissect(model, tokens(2, 6))
    assert any(group.kind == "head" for group in anatomy.groups)
    small = resect.cut(model, Plan.random(anatomy, 0.5))
    session = session_of(resect.export_onnx(small, tokens(2, 6), tmp_path / "net.onnx"))
    for examples, length in ((1, 1), (3, 9)):
        inputs = tokens(examples, length)
        (got,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        np.testing.assert_allclose(got, small(**inputs)["logits"].detach(), rtol=1e-4, atol=1e-5)


def test_a_sequence_that_the_network_fixes_stays_fixed(tmp_path) -> None:
    model = Positioned().eval()
    session = session_of(resect.export_onnx(model, tokens(2, 6)["input_ids"], tmp_path / "net.onnx"))
    assert [entry.shape for entry in session.get_inputs()] == [["batch", 6]]
    ids = tokens(5, 6)["input_ids"]
    np.testing.assert_allclose(session.run(None, {"ids": ids.numpy()})[0], model(ids).detach(), rtol=1e-4, atol=1e-5)


def test_exporting_leaves_the_network_as_it_was(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    before = resect.surgery.state_digest(model)
    resect.export_onnx(model, torch.ones(2, 4), tmp_path / "net.onnx")
    assert resect.surgery.state_digest(model) == before
    assert not any(module.training or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("model", [Fixed(), Branching()])
def test_what_cannot_be_exported_leaves_the_old_file(model, tmp_path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ModelError, match=r"cannot be exported|cannot run|fixes a length"):
        resect.export_onnx(model.eval(), torch.ones(2, 4), path)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert path.read_bytes() == b"old"


def test_bad_input(tmp_path, monkeypatch) -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(ModelError, match=r"call model\.eval\(\)"):
        resect.export_onnx(model.train(), torch.ones(2, 4), tmp_path / "net.onnx")
    with pytest.raises(FileError, match="is a directory"):
        resect.export_onnx(model.eval(), torch.ones(2, 4), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot write"):
        resect.export_onnx(model, torch.ones(2, 4), tmp_path / "file" / "net.onnx")
    with pytest.raises(DataError, match="batch axis"):
        resect.export_onnx(model, (3,), tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DataError, match=r"resect\[onnx\]"):
        resect.export_onnx(model, torch.ones(2, 4), tmp_path / "net.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
