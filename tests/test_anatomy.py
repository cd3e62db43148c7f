"""Anatomy: what is found, that every cut it allows equals masking, and that nothing else is allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from resect.anatomy import Anatomy, Call, attribute_rule, dissect, rule
from resect.anatomy.attributes import _RULES
from resect.anatomy.checking import difference, half, outputs, permuted
from resect.anatomy.slicing import apply, masked_weights, named_tensors, skeleton
from resect.anatomy.slicing import replace as put
from resect.anatomy.watching import RULES
from resect.errors import ModelError
from zoo import ZOO

TOLERANCE = 1e-4

# groups that must be found: name -> (kind, units, parts)
FOUND: dict[str, dict[str, tuple[str, int, int]]] = {
    "mlp_relu": {"0": ("hidden", 24, 1), "2": ("hidden", 16, 1)},
    "mlp_layernorm": {"0": ("stream", 24, 1)},
    "mlp_residual": {"inp": ("hidden", 16, 1), "up.0": ("hidden", 20, 1), "up.1": ("hidden", 20, 1)},
    "mlp_concat": {"a": ("hidden", 8, 1), "b": ("hidden", 10, 1)},
    "mlp_gated_fused": {"up": ("hidden", 16, 1)},
    "shared_layer": {"inp": ("hidden", 16, 1)},
    "bare_parameters": {"w1": ("hidden", 16, 1), "w2": ("hidden", 10, 1)},
    "maxout": {"a": ("hidden", 8, 1)},
    "outer_product": {"mid": ("hidden", 6, 1)},
    "gram_features": {},
    "index_select_permutation": {"b": ("hidden", 10, 1)},
    "in_place": {"a": ("hidden", 16, 1), "b": ("hidden", 16, 1)},
    "embedding_flatten": {"table": ("hidden", 12, 1), "body": ("hidden", 20, 1)},
    "cnn_flatten": {"0": ("hidden", 8, 1), "4": ("hidden", 12, 1), "8": ("hidden", 20, 1)},
    "grouped": {"0.0": ("hidden", 16, 4), "1.0": ("hidden", 24, 4), "2.0": ("hidden", 12, 2)},
    "grouped_transposed": {"0": ("hidden", 8, 4), "2": ("hidden", 12, 4)},
    "grouped_fed_by_concat": {"a": ("hidden", 8, 1), "g": ("hidden", 16, 2)},
    "groupnorm": {"0": ("hidden", 4, 1), "3": ("stream", 8, 1)},
    "pixel_shuffle": {"a": ("hidden", 8, 1), "b": ("hidden", 6, 1), "c": ("hidden", 8, 1)},
    "hard_coded_view": {"b": ("hidden", 16, 1)},
    "attribute_view": {"a": ("hidden", 8, 1), "b": ("hidden", 16, 1)},
    "cbam": {},
}


def cut(model: nn.Module, anatomy: Anatomy, keep: dict[str, np.ndarray]) -> nn.Module:
    return apply(skeleton(model), anatomy, keep)


def masked(model: nn.Module, anatomy: Anatomy, keep: dict[str, np.ndarray]) -> nn.Module:
    copy = skeleton(model)
    put(copy, anatomy, masked_weights(model, anatomy, keep))
    return copy


def gap(model: nn.Module, anatomy: Anatomy, keep: dict[str, np.ndarray]) -> float:
    """Law 2: the difference between cut and masked, relative to the largest output."""
    return difference(
        outputs(cut(model, anatomy, keep), anatomy.example), outputs(masked(model, anatomy, keep), anatomy.example)
    )


@pytest.mark.parametrize("name", ZOO)
def test_cut_equals_masked(name: str) -> None:
    model, example = ZOO[name]()
    anatomy = dissect(model, example)
    hidden = [g for g in anatomy.groups if g.kind != "stream"]
    for group in hidden:
        assert gap(model, anatomy, {group.name: half(group, seed=1)}) <= TOLERANCE, group.name
    for seed in range(2, 4):
        assert gap(model, anatomy, {g.name: half(g, seed) for g in hidden}) <= TOLERANCE


@pytest.mark.parametrize("name", ZOO)
def test_streams_may_be_permuted_and_cut(name: str) -> None:
    model, example = ZOO[name]()
    anatomy = dissect(model, example)
    for group in anatomy.groups:
        if group.kind == "stream":
            same = outputs(permuted(model, anatomy, group), anatomy.example)
            assert difference(same, outputs(model, anatomy.example)) <= 10 * TOLERANCE
            outputs(cut(model, anatomy, {group.name: half(group)}), anatomy.example)


@pytest.mark.parametrize("name", FOUND)
def test_groups_found(name: str) -> None:
    anatomy = dissect(*ZOO[name]())
    assert {g.name: (g.kind, g.units, int(g.parts.max()) + 1) for g in anatomy.groups} == FOUND[name]


@pytest.mark.parametrize("name", ZOO)
def test_anatomy_is_well_formed(name: str) -> None:
    anatomy = dissect(*ZOO[name]())
    owned: dict[tuple[str, int], np.ndarray] = {}
    for group in anatomy.groups:
        assert group.readers, group.name
        assert group.writers, group.name
        assert group.units > 1
        assert len(set(np.bincount(group.parts).tolist())) == 1
        for part in group.slices:
            assert part.index.shape[0] == group.units
            assert part.index.max() < anatomy.shapes[part.tensor][part.axis] * part.blocks
            before = owned.get((part.tensor, part.axis), np.empty(0, int))
            assert not np.intersect1d(before, part.index).size, "a position belongs to one unit only"
            assert np.unique(part.index).size == part.index.size
            owned[part.tensor, part.axis] = np.concatenate([before, part.index.ravel()])
    assert 0 <= anatomy.prunable <= 1
    assert all(pin.reason for pin in anatomy.pins)


@pytest.mark.parametrize("name", ZOO)
def test_macs_agree_with_a_counted_pass(name: str) -> None:
    model, example = ZOO[name]()
    anatomy = dissect(model, example)
    # torch's counter does not know the fused CPU kernels
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            outputs(model, anatomy.example)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    batch = next(t for t in (*anatomy.example[0], *anatomy.example[1].values()) if isinstance(t, Tensor)).shape[0]
    assert sum(c.macs for c in anatomy.contractions) * batch == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)


@pytest.mark.parametrize("name", ["resnet_basic", "in_place", "weight_norm", "spectral_norm", "shared_layer", "lstm_tagger"])
def test_the_network_is_left_as_it_was(name: str) -> None:
    model, example = ZOO[name]()
    before = {n: t.clone() for n, t in named_tensors(model).items()}
    attributes = {n: {k: v for k, v in vars(m).items() if isinstance(v, int)} for n, m in model.named_modules()}
    dissect(model, example)
    assert all(torch.equal(t, before[n]) for n, t in named_tensors(model).items())
    assert attributes == {n: {k: v for k, v in vars(m).items() if isinstance(v, int)} for n, m in model.named_modules()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.nn.modules.module._global_forward_hooks


def test_the_same_network_gives_the_same_anatomy() -> None:
    one, other = dissect(*ZOO["resnet_basic"]()), dissect(*ZOO["resnet_basic"]())
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != dissect(*ZOO["resnet_padded"]()).fingerprint
    assert str(one) == str(other)


def test_tied_tensors_are_replaced_under_all_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.a(x)) + torch.relu(self.b(x)))

    model = Tied().eval()
    anatomy = dissect(model, torch.randn(2, 6))
    assert anatomy.aliases == {"a.weight": ("b.weight",)}
    (group,) = anatomy.groups
    small = cut(model, anatomy, {group.name: half(group)})
    assert small.a.weight is small.b.weight  # type: ignore[union-attr]
    assert (small.a.out_features, small.b.out_features, small.out.in_features) == (4, 4, 4)  # type: ignore[union-attr]
    assert model.a.weight.shape == (8, 6)


def test_requires_grad_and_dtype_survive_a_cut() -> None:
    model, example = ZOO["detached_and_frozen"]()
    model, example = model.double(), example.double()
    anatomy = dissect(model, example)
    small = cut(model, anatomy, {g.name: half(g) for g in anatomy.groups})
    dense = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        assert (parameter.requires_grad, parameter.dtype) == (dense[name].requires_grad, dense[name].dtype)


def test_ignore_and_only() -> None:
    model, example = ZOO["cnn_flatten"]()
    assert [g.name for g in dissect(model, example, ignore=["4"]).groups] == ["0", "8"]
    assert [g.name for g in dissect(model, example, only=["8|10"]).groups] == ["8"]
    assert any(p.reason == "left alone on request" for p in dissect(model, example, ignore=["4"]).pins)


def test_training_mode_is_refused() -> None:
    with pytest.raises(ModelError, match=r"eval\(\)"):
        dissect(nn.Linear(3, 3).train(), torch.ones(1, 3))


def test_a_failing_forward_names_its_module_and_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(5, 2))).eval()
    with pytest.raises(ModelError, match=r"'1\.0'"):
        dissect(model, torch.ones(1, 3))
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a_lazy_network_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'0\.weight' has no shape yet"):
        dissect(nn.Sequential(nn.LazyLinear(4)).eval(), torch.ones(1, 3))


def test_a_scripted_network_is_refused() -> None:
    with pytest.raises(ModelError, match="scripted"):
        dissect(torch.jit.trace(nn.Linear(3, 3).eval(), torch.ones(1, 3)), torch.ones(1, 3))


@pytest.mark.parametrize(("example", "match"), [(torch.full((2, 12), float("nan")), "nan"), (torch.ones(0, 12), "empty")])
def test_an_example_that_verifies_nothing_is_refused(example: Tensor, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        dissect(ZOO["mlp_relu"]()[0], example)


def two_layers(middle: Callable[[Tensor], Tensor], example: Tensor | None = None) -> Anatomy:
    """The anatomy of two linear layers with something between them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(middle(self.a(x)))

    return dissect(Net().eval(), torch.randn(2, 6) if example is None else example)


SCALE = torch.rand(8)
PINNED: dict[str, Callable[[Tensor], Tensor]] = {
    "a tensor that is no buffer": lambda h: h * SCALE,
    "a value that decides": lambda h: h if h.mean() > 0 else -h,
    "numpy on the way": lambda h: torch.from_numpy(h.numpy() * 2),
    "noise of the same shape": lambda h: h + torch.randn(h.shape),
    "columns one by one": lambda h: torch.stack([h[:, i] for i in range(8)], 1),
    "a column added to all": lambda h: h + h[:, 2:3],
    "running sums": lambda h: torch.relu(h).cumsum(1),
    "every second column twice": lambda h: h[:, ::2].repeat(1, 2),
    "sorted columns": lambda h: h.sort(1)[0],
    "a softmax": lambda h: h.softmax(1),
    "rolled columns": lambda h: h.roll(1, 1),
    "a fourier transform": lambda h: torch.fft.fft(h).real,
}


@pytest.mark.parametrize("name", PINNED)
def test_what_cannot_follow_is_pinned_with_a_reason(name: str) -> None:
    anatomy = two_layers(PINNED[name])
    assert not anatomy.groups
    assert any(pin.name == "a" and pin.units == 8 and pin.reason for pin in anatomy.pins)


FOLLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "reversed columns": lambda h: h.flip(1),
    "masked places": lambda h: h.masked_fill(h < 0, 0),
    "zeros of the same shape": lambda h: h + torch.zeros_like(h),
    "a clipped copy": lambda h: torch.where(h > 0, h, h.clone().clamp_(-1)),
    "checkpointing": lambda h: torch.utils.checkpoint.checkpoint(torch.relu, h, use_reentrant=False),
    "vmap": lambda h: torch.vmap(torch.sin)(h),
    "an in-place tail": lambda h: h.add_(1).mul_(2).sigmoid_(),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_can_follow_is_found(name: str) -> None:
    (group,) = two_layers(FOLLOWED[name]).groups
    assert (group.name, group.kind, group.units) == ("a", "hidden", 8)


def test_an_anatomy_without_weights_is_the_same() -> None:
    model, example = ZOO["attention_grouped_queries"]()
    real = dissect(model, example)
    weightless = dissect(model.to("meta"), example)
    assert [(g.name, g.kind, g.units) for g in weightless.groups] == [(g.name, g.kind, g.units) for g in real.groups]
    assert sum(c.macs for c in weightless.contractions) == sum(c.macs for c in real.contractions)


def test_an_op_without_a_rule_pins_what_it_touches() -> None:
    torch.library.define("resect_test::mystery", "(Tensor x) -> Tensor")
    torch.library.impl("resect_test::mystery", "CPU", lambda x: x.flip(-1) * torch.arange(x.shape[-1]))

    class Mysterious(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.b(torch.ops.resect_test.mystery(self.a(x)))))

    anatomy = dissect(Mysterious().eval(), torch.randn(2, 6))
    assert [g.name for g in anatomy.groups] == ["b"]
    assert any(p.name == "a" and "resect_test::mystery has no rule" in p.reason for p in anatomy.pins)


def test_a_rule_can_be_added() -> None:
    torch.library.define("resect_test::double", "(Tensor x) -> Tensor")
    torch.library.impl("resect_test::double", "CPU", lambda x: 2 * x)

    @rule("resect_test::double")
    def double(call: Call) -> Any:
        return replace(call.marks("x"), name=None)

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.ops.resect_test.double(self.a(x)))

    try:
        anatomy = dissect(Doubled().eval(), torch.randn(2, 6))
    finally:
        del RULES["resect_test::double"]
    assert [g.name for g in anatomy.groups] == ["a"]


def test_an_attribute_rule_can_be_added() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.breadth = nn.Parameter(torch.randn(8)), 8

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    @attribute_rule(Scaled)
    def scaled(module: nn.Module, tensor: str, axis: int) -> tuple[str, ...]:
        return ("breadth",)

    try:
        anatomy = dissect(nn.Sequential(nn.Linear(6, 8), Scaled(), nn.Linear(8, 3)).eval(), torch.randn(2, 6))
    finally:
        _RULES.pop(0)
    assert ("1", "breadth") in {(e.module, e.attribute) for e in anatomy.edits}


def test_an_unreached_sibling_pins_what_it_may_read() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.body(x))
            return self.out(x + self.experts[int(len(x) > 5)](x))

    anatomy = dissect(Switch().eval(), torch.randn(2, 6))
    assert [g.name for g in anatomy.groups] == ["experts.0.0"]
    assert any("does not reach" in p.reason and p.name == "body" for p in anatomy.pins)


def test_str_shows_groups_pins_and_the_share() -> None:
    text = str(dissect(*ZOO["cnn_flatten"]()))
    assert "3 groups" in text
    assert "network output" in text
    assert "99.9% of 5,081 parameters" in text


def test_unknown_group_names_the_nearest() -> None:
    anatomy = dissect(*ZOO["mlp_concat"]())
    assert anatomy.group("a").units == 8
    with pytest.raises(KeyError, match="nearest"):
        anatomy.group("aa")
