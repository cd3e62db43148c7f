"""Convolutions: plain, depthwise, grouped and transposed; and the ops that only look around in space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from resect.anatomy.algebra import UNLABELLED, meet, mix
from resect.anatomy.labels import Book, Marks, Plane, axes, on_axis, vector
from resect.anatomy.rules.contractions import channels, per_channel
from resect.anatomy.watching import Call, Followed, rule

SPACE = "is mixed along a labelled axis by a window"
FIXED_INPUT = "reads the network's input or another tensor of fixed width"


@rule("aten::convolution", "aten::_convolution", "aten::mkldnn_convolution", "aten::cudnn_convolution", "aten::conv2d")
def convolution(call: Call) -> Followed:
    """Every kind of convolution; the channel axis of activations is axis 1."""
    x, weight = call.marks("input") if call.get("input") is not None else call.marks("self"), call.marks("weight")
    transposed, groups = bool(call.get("transposed")), int(call["groups"])
    batch = _outside(call.book, x, pointwise=_is_pointwise(call, weight))
    space = math.prod(x.shape[2:] if transposed else call.shape[2:])
    outside = [batch[0].reshape(-1)] if batch else []
    call.product(x.shape[0] * space * math.prod(weight.shape), x, weight, labels=outside)
    read = channels(call.book, x, 1)
    for summed in x.stats:
        call.book.pin(summed, "its mean or norm is read by a convolution")
    for p in weight.planes:
        if any(a > 1 for a in axes(p)) and len(axes(p)) > 1:
            call.book.pin(p, "is a kernel that was computed in a way resect does not follow")
    if groups == 1:
        written = _plain(call.book, weight, read, 1 if not transposed else 0)
    elif x.shape[1] == groups:
        written = _depthwise(call.book, weight, read, call.shape[1] // groups, transposed)
    else:
        written = _grouped(call, weight, read, groups, transposed)
    ndim = len(call.shape)
    planes = batch + ([on_axis(written, 1, ndim)] if written is not None else [])
    out = Marks(shape=call.shape, planes=tuple(planes), source="activation" if x.source == "activation" else x.source)
    if call.get("bias") is None:
        return out
    return meet(call.book, out, per_channel(call.marks("bias"), ndim))


def _is_pointwise(call: Call, weight: Marks) -> bool:
    """Whether every place is worked on alone."""
    steps = (*call["stride"], *weight.shape[2:])
    return all(s == 1 for s in steps) and not any(call["padding"])


def _outside(book: Book, x: Marks, *, pointwise: bool) -> list[Plane]:
    """Planes that are not on the channel axis: carried on the batch axis, and in space where windows are single places."""
    carried = []
    for p in x.planes:
        if p.shape[1] == 1:
            if any(a > 1 for a in axes(p)) and not pointwise:
                book.pin(p, SPACE)
            else:
                carried.append(p)
    return carried


def _on(weight: Marks, axis: int) -> list[Tensor]:
    return [vector(p, axis) for p in weight.planes if axes(p) == (axis,)]


def _plain(book: Book, weight: Marks, read: Sequence[Tensor], reads: int) -> Tensor | None:
    inner, outer = _on(weight, reads), _on(weight, 1 - reads)
    for labels in inner:
        book.role(labels, "reader")
        _read(book, labels, read)
    if not inner:
        _hold(book, read)
    for labels in outer:
        book.role(labels, "writer")
    return outer[0] if outer else None


def _read(book: Book, labels: Tensor, read: Sequence[Tensor]) -> None:
    for channel in read:
        book.tie(labels, channel, FIXED_INPUT)
    if not read:
        book.pin(labels, FIXED_INPUT)


def _hold(book: Book, read: Sequence[Tensor]) -> None:
    for channel in read:
        book.pin(channel, UNLABELLED)


def _depthwise(book: Book, weight: Marks, read: Sequence[Tensor], many: int, transposed: bool) -> Tensor | None:
    """Every channel has a kernel of its own: kernels are carriers, `many` outputs for each input."""
    own = _on(weight, 0)
    for labels in own:
        repeated = [channel if transposed else channel.repeat_interleave(many) for channel in read]
        _read(book, labels, repeated)
    if not own:
        _hold(book, read)
        return None
    return own[0].repeat_interleave(many) if transposed else own[0]


def _grouped(call: Call, weight: Marks, read: Sequence[Tensor], groups: int, transposed: bool) -> Tensor | None:
    """Axis 1 exists once for every convolution group: it gets blocked labels, and every group must lose equally."""
    book = call.book
    if weight.name is None or weight.source != "parameter":
        _hold(book, read)
        for p in weight.planes:
            book.pin(p, "is a grouped kernel that was computed, not stored")
        return None
    blocked = book.allocate(weight.name, 1, weight.shape[1], blocks=groups)
    own = _on(weight, 0)
    rows = own[0] if own else None
    inner, outer = (rows, blocked) if transposed else (blocked, rows)
    for labels, role in ((inner, "reader"), (outer, "writer")):
        if labels is not None:
            book.role(labels, role)
            book.partition(labels, torch.arange(len(labels)) // (len(labels) // groups))
    if inner is not None:
        _read(book, inner, read)
    return outer


@rule(
    *("aten::max_pool2d_with_indices", "aten::max_pool3d_with_indices", "aten::max_pool2d", "aten::max_pool1d"),
    *("aten::avg_pool1d", "aten::avg_pool2d", "aten::avg_pool3d", "aten::mkldnn_max_pool2d", "aten::max_pool3d"),
    *("aten::_adaptive_avg_pool2d", "aten::_adaptive_avg_pool3d", "aten::adaptive_avg_pool1d", "aten::adaptive_avg_pool2d"),
    *("aten::adaptive_max_pool1d", "aten::adaptive_max_pool2d", "aten::adaptive_max_pool3d", "aten::fractional_max_pool2d"),
    *("aten::upsample_nearest1d", "aten::upsample_nearest2d", "aten::upsample_nearest3d", "aten::_upsample_nearest_exact1d"),
    *("aten::upsample_bilinear2d", "aten::upsample_bicubic2d", "aten::upsample_linear1d", "aten::upsample_trilinear3d"),
    *("aten::_upsample_nearest_exact2d", "aten::_upsample_bilinear2d_aa", "aten::_upsample_bicubic2d_aa"),
    *("aten::reflection_pad1d", "aten::reflection_pad2d", "aten::replication_pad1d", "aten::replication_pad2d"),
    *("aten::reflection_pad3d", "aten::replication_pad3d", "aten::_upsample_nearest_exact3d"),
)
def in_space(call: Call) -> Followed:
    """Windows over the last axes: channels pass, labels in space are mixed."""
    x = call.operands[0]
    count = 1 if "1d" in call.name else 3 if "3d" in call.name else 2
    x = mix(call.book, x, range(len(x.shape) - count, len(x.shape)), SPACE)
    out = replace(x, flat=frozenset())
    return out if isinstance(call.out, Tensor) else [out] * len(call.out)


@rule("aten::grid_sampler_2d", "aten::grid_sampler", "aten::grid_sampler_3d")
def grid_sampler(call: Call) -> Followed:
    """Samples at given places: channels pass."""
    x, grid = call.marks("input"), call.marks("grid")
    for p in grid.planes:
        call.book.pin(p, SPACE)
    return replace(mix(call.book, x, range(2, len(x.shape)), SPACE), flat=frozenset())
