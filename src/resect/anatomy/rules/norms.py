"""Norms: their parameters are tied to the normalised axis; those that mix units make a stream of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from resect.anatomy.algebra import meet, mix
from resect.anatomy.labels import Marks, axes
from resect.anatomy.rules.contractions import channels, per_channel
from resect.anatomy.watching import Call, Followed, rule


def _with_state(call: Call, x: Marks, names: Sequence[str]) -> Marks:
    for name in names:
        if isinstance(call.get(name), Tensor):
            x = meet(call.book, x, per_channel(call.marks(name), len(x.shape)))
    return x


def _each(call: Call, first: Marks) -> Followed:
    return first if isinstance(call.out, Tensor) else [first] + [None] * (len(call.out) - 1)


@rule(
    *("aten::native_batch_norm", "aten::_native_batch_norm_legit", "aten::_native_batch_norm_legit_no_training"),
    *("aten::cudnn_batch_norm", "aten::batch_norm", "aten::_batch_norm_no_update", "aten::_batch_norm_with_update"),
    "aten::miopen_batch_norm",
)
def batch_norm(call: Call) -> Followed:
    """Every channel on its own: state is tied to the channel axis."""
    x = call.operands[0]
    return _each(call, _with_state(call, x, ("weight", "bias", "running_mean", "running_var")))


@rule("aten::native_layer_norm", "aten::layer_norm", "aten::_fused_rms_norm", "aten::rms_norm")
def layer_norm(call: Call) -> Followed:
    """Mixes the last axes: whole units there become a stream, parts of a unit (per-head norms) are tied."""
    x = call.marks("input")
    over = range(len(x.shape) - len(call["normalized_shape"]), len(x.shape))
    for p in x.planes:
        inside = [a for a in axes(p) if a in over]
        if len(inside) == len(axes(p)):
            call.book.stream(p)
        else:
            call.book.tie_along(p, inside)
    affine = [call.marks(n) for n in ("weight", "bias") if isinstance(call.get(n), Tensor)]
    return _each(call, meet(call.book, x, *affine))


@rule("aten::native_group_norm", "aten::group_norm")
def group_norm(call: Call) -> Followed:
    """One group mixes all channels (a stream); with several, every norm group is one unit, exact to remove."""
    x = call.marks("input")
    groups = int(call.get("group") or call.get("num_groups"))
    for labels in channels(call.book, x, 1):
        if groups == 1:
            call.book.stream(labels)
        else:
            call.book.tie_along(labels.reshape(groups, -1), [1])
    return _each(call, _with_state(call, x, ("weight", "bias")))


@rule("aten::_weight_norm_interface", "aten::_weight_norm")
def weight_norm(call: Call) -> Followed:
    """g * v / |v|: rows keep their labels; columns are mixed by the norm and stay."""
    v, g = call.marks("v"), call.marks("g")
    dim = int(call["dim"])
    norm = mix(call.book, v, [a for a in range(len(v.shape)) if a != dim], "is normalised by weight_norm")
    out = replace(meet(call.book, norm, g), name=v.name)
    return out if isinstance(call.out, Tensor) else [out] + [None] * (len(call.out) - 1)


@rule("aten::local_response_norm")
def local_response_norm(call: Call) -> Followed:
    """Mixes neighbouring channels."""
    return mix(call.book, call.operands[0], [1])
