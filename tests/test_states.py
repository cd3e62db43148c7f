"""Hidden states against plain computations with the network's own layers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resect
from resect.tracing import Trace
from resect.tracing.states import digests, find_places
from zoo import WHOLE


def traced(model: nn.Module, data: list, most: int = 1024) -> Trace:
    example = data[0] if isinstance(data[0], dict) else (data[0] if isinstance(data[0], torch.Tensor) else data[0][0])
    few = {name: value[:2] for name, value in example.items()} if isinstance(example, dict) else example[:2]
    return resect.trace(model, data, resect.dissect(model, few), states=most)


def same_rows(found: np.ndarray, expected: torch.Tensor) -> None:
    """The same rows, in some order: (rows, units, width) against (rows, units x width)."""
    a = found.reshape(len(found), -1)
    b = expected.reshape(len(expected), -1).numpy()
    assert a.shape == b.shape
    np.testing.assert_allclose(a[np.lexsort(a.round(3).T)], b[np.lexsort(b.round(3).T)], rtol=1e-4, atol=1e-4)


def test_examples_of_a_perceptron_before_and_after_the_activation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).eval()
    x = torch.randn(90, 5)
    states = traced(model, [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(37)]).states["0"]
    with torch.no_grad():
        before = model[0](x)
        same_rows(np.concatenate([states.pre, states.post], axis=1), torch.cat([before, F.gelu(before)], dim=1))


def test_none_are_kept_unless_they_are_asked_for() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).eval()
    x = torch.randn(30, 5)
    plain = resect.trace(model, [x], resect.dissect(model, x[:2]))
    assert plain.states == {}
    assert (plain + traced(model, [x])).states == {}
    with pytest.raises(resect.ScoreError, match=r"group 0: trace\(\.\.\., states=1024\)"):
        resect.score(plain, "spectral")


def test_any_batches_in_any_order_make_the_same_sample() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 3, 3), nn.Flatten()).eval()
    x = torch.randn(40, 2, 12, 12)
    whole = traced(model, [x], 64).states["0"]
    shuffled = x[torch.randperm(40)]
    other = traced(model, list(shuffled.split(3)), 64).states["0"]
    assert len(whole.keys) == 64
    assert np.array_equal(whole.keys, other.keys)
    np.testing.assert_allclose(whole.pre, other.pre, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole.post, other.post, rtol=1e-4, atol=1e-5)
    shards = [traced(model, list(shuffled[rank::3].split(5)), 64).states["0"] for rank in range(3)]
    merged = shards[2] + shards[0] + shards[1]
    assert np.array_equal(whole.keys, merged.keys)
    # The whole sample of 8 of 100 positions holds every example's, and a part of it is no share of the network's order.
    assert len(set(digests(resect.batches.unpack(x)))) == 40


def test_positions_of_a_convolution_are_where_they_were() -> None:
    """The input carries its own coordinates, so that rows of both graphs, on grids of two sizes, can be told apart."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(2, 2, 1), nn.Flatten()).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)[:, :, None, None])
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    x = torch.stack([torch.stack([rows, columns]) + 100 * number for number in range(5)])
    states = traced(model, [x]).states["0"]
    assert states.pre.shape == (5 * 8, 2, 1)
    assert np.abs(states.pre - states.post).max() == 0.5


def test_a_batch_norm_counts_as_part_of_what_the_convolution_makes() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 3, 3), nn.Flatten()).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 3, 6))
        norm.running_var.copy_(torch.linspace(0.1, 2, 6))
        norm.running_mean.copy_(torch.randn(6))
    folded = copy.deepcopy(model)
    folded[0], folded[1] = torch.nn.utils.fuse_conv_bn_eval(model[0], norm), nn.Identity().eval()
    x = torch.randn(20, 2, 9, 9)
    one, two = (traced(network, [x]) for network in (model, folded))
    np.testing.assert_allclose(one.states["0"].pre, two.states["0"].pre, rtol=1e-3, atol=1e-4)
    a, b = (resect.score(t, "spectral").values["0"] for t in (one, two))
    np.testing.assert_allclose(a, b, rtol=1e-3)


def test_columns_of_a_flattened_convolution_are_positions() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 20, 2)).eval()
    x = torch.randn(7, 1, 4, 5)
    states = traced(model, [x]).states["0"]
    assert states.post.shape == (7 * 8, 3, 1)
    np.testing.assert_allclose(np.maximum(states.pre, 0), states.post, rtol=1e-5, atol=1e-6)


def test_padding_tokens_never_count() -> None:
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return (self.down(F.relu(self.up(values))) * attention_mask[:, :, None]).sum(1)

    model, values = Tokens().eval(), torch.randn(10, 6, 4)
    lengths = torch.arange(10) % 5 + 2
    mask = (torch.arange(6) < lengths[:, None]).long()
    values[mask == 0] = 1e6
    states = traced(model, [{"values": values, "attention_mask": mask}]).states["up"]
    with torch.no_grad():
        same_rows(states.pre, model.up(values)[mask == 1])


def test_what_is_written_and_read_is_found_for_every_kind_of_layer() -> None:
    pytest.importorskip("transformers")
    gates = {
        "mlp_gated": ("gate.weight", 0),
        "mlp_gated_fused": ("up.weight", 16),
        "glu_conv": ("a.weight", 8),
        "llama": ("model.layers.0.mlp.gate_proj.weight", 0),
        "phi3": ("model.layers.0.mlp.gate_up_proj.weight", 0),
        "bert": ("bert.encoder.layer.0.intermediate.dense.weight", 0),
    }
    for name, (tensor, column) in gates.items():
        pre = places(name, "hidden")[0].pre
        assert [(place.tensor, int(place.columns[0, 0]), place.columns.shape[1]) for place in pre] == [(tensor, column, 1)], (
            name
        )
    heads = {
        "bert": ("bert.encoder.layer.0.attention.self.query.weight", 8),
        "llama": ("model.layers.0.self_attn.q_proj.weight", 16),
        "phi3": ("model.layers.0.self_attn.qkv_proj.weight", 16),
        "gpt2": ("transformer.h.0.attn.c_attn.weight", 8),
    }
    for name, (tensor, width) in heads.items():
        found = places(name, "head")[0]
        assert [(place.tensor, int(place.columns[0, 0]), place.columns.shape[1]) for place in found.pre] == [(tensor, 0, width)]
        assert found.post[0].columns.shape[1] == width


def places(name: str, kind: str) -> list:
    model, example = WHOLE[name]()
    anatomy = resect.dissect(model, example)
    found = find_places(model, anatomy, resect.tracing.survey(model, anatomy))
    return [found[group.name] for group in anatomy.groups if group.kind == kind]


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_states_of_language_models_are_those_of_their_layers(name: str) -> None:
    """What the places say is what hooks on the layers see."""
    pytest.importorskip("transformers")
    model, example = WHOLE[name]()
    anatomy = resect.dissect(model, example)
    trace = resect.trace(model, [example], anatomy, states=1024)
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda m, inputs, output, name=name: seen.update({f"{name}.in": inputs[0], f"{name}.out": output})
        )
        for name, module in model.named_modules()
        if "weight" in dict(module.named_parameters(recurse=False))
    ]
    with torch.no_grad():
        model(**example)
    for hook in hooks:
        hook.remove()
    checked = find_places(model, anatomy, trace.readers)
    for group in anatomy.groups:
        if group.kind == "stream":
            continue
        states, (pre,), (post,) = trace.states[group.name], checked[group.name].pre, checked[group.name].post
        made = seen[pre.tensor.removesuffix(".weight") + ".out"].flatten(0, -2)[:, pre.columns.ravel()]
        read = seen[post.tensor.removesuffix(".weight") + ".in"].flatten(0, -2)[:, post.columns.ravel()]
        rows = len(states.keys)
        joined = np.concatenate([states.pre.reshape(rows, -1), states.post.reshape(rows, -1)], axis=1)
        same_rows(joined[:, :, None], torch.cat([made, read], dim=1))
