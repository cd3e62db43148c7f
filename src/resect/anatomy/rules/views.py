"""Ops that move elements and change none: the same op is run on the label planes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from resect.anatomy.algebra import UNLABELLED, meet, mix
from resect.anatomy.labels import Book, Marks, Plane, axes, drop, reshaped, vector
from resect.anatomy.watching import Call, Followed, rule


@rule(
    *("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias", "aten::flatten", "aten::unflatten"),
    *("aten::_reshape_copy", "aten::view_copy"),
)
def reshape(call: Call) -> Followed:
    """Every segment of axes that keeps its product is reshaped on its own."""
    x = call.marks("self")
    flat = x.flat if x.shape == call.shape else frozenset()
    if x.flat and set(range(len(x.shape))) == set(x.flat) | {a for a, s in enumerate(x.shape) if s == 1}:
        flat = frozenset(a for a, s in enumerate(call.shape) if s > 1)
    planes = tuple(reshaped(p, x.shape, call.shape) for p in x.planes)
    return replace(x, planes=planes, flat=flat)


def _moved(call: Call, order: Sequence[int]) -> Followed:
    x = call.marks("self")
    order = [a % len(order) for a in order] if order else []
    flat = frozenset(new for new, old in enumerate(order) if old in x.flat)
    return replace(x, planes=tuple(p.permute(order) for p in x.planes), flat=flat)


@rule("aten::permute", "aten::permute_copy")
def permute(call: Call) -> Followed:
    """Axes in another order."""
    return _moved(call, call["dims"])


@rule("aten::transpose", "aten::transpose_copy", "aten::t", "aten::numpy_T", "aten::adjoint", "aten::mT")
def transpose(call: Call) -> Followed:
    """Two axes swapped; `t` swaps the last two."""
    ndim = len(call.marks("self").shape)
    order = list(range(ndim))
    a, b = (call["dim0"], call["dim1"]) if call.get("dim0") is not None else (-1, -2)
    if ndim > 1:
        order[a], order[b] = order[b], order[a]
    return _moved(call, order)


@rule("aten::unsqueeze", "aten::unsqueeze_copy")
def unsqueeze(call: Call) -> Followed:
    """A new axis of size 1."""
    x = call.marks("self")
    at = call["dim"] % (len(x.shape) + 1)
    flat = frozenset(a + (a >= at) for a in x.flat)
    return replace(x, planes=tuple(p.unsqueeze(at) for p in x.planes), flat=flat)


@rule("aten::squeeze", "aten::squeeze_copy")
def squeeze(call: Call) -> Followed:
    """Axes of size 1 that go."""
    x, given = call.marks("self"), call.get("dim")
    asked = range(len(x.shape)) if given is None else [given] if isinstance(given, int) else given
    return without(x, [a % max(len(x.shape), 1) for a in asked if len(x.shape) and x.shape[a] == 1])


def without(x: Marks, gone: Sequence[int]) -> Marks:
    """The marks of a tensor that lost the axes `gone`, on which its planes must be constant."""
    kept = [a for a in range(len(x.shape)) if a not in gone]
    return replace(
        x,
        shape=tuple(x.shape[a] for a in kept),
        planes=tuple(drop(p, gone).reshape([p.shape[a] for a in kept]) for p in x.planes),
        flat=frozenset(kept.index(a) for a in x.flat if a in kept),
    )


@rule("aten::expand", "aten::expand_copy", "aten::broadcast_to", "aten::expand_as")
def expand(call: Call) -> Followed:
    """Broadcast to a larger shape: constant along the new width."""
    x = call.marks("self").lifted(len(call.shape))
    return replace(x, flat=x.flat | {a for a, s in enumerate(call.shape) if s > 1 and x.shape[a] == 1})


@rule("aten::repeat", "aten::tile")
def repeat(call: Call) -> Followed:
    """Copies side by side."""
    x = call.marks("self").lifted(len(call.shape))
    times = [new // old for new, old in zip(call.shape, x.shape)]
    planes = [p.repeat([t if p.shape[a] > 1 else 1 for a, t in enumerate(times)]) for p in x.planes]
    new = frozenset(a for a, t in enumerate(times) if t > 1 and x.shape[a] == 1)
    return replace(x, planes=tuple(planes), flat=x.flat | new, name=None)


@rule(
    *("aten::clone", "aten::contiguous", "aten::detach", "aten::alias", "aten::lift_fresh", "aten::lift", "aten::_to_copy"),
    *("aten::to", "aten::dropout", "aten::native_dropout", "aten::_conj", "aten::resolve_conj", "aten::positive"),
    *("aten::detach_copy", "aten::lift_fresh_copy", "aten::real", "aten::view_as_real_copy", "aten::requires_grad_"),
    *("aten::nan_to_num", "aten::bernoulli", "aten::_fused_dropout", "aten::feature_dropout", "aten::alpha_dropout"),
)
def same(call: Call) -> Followed:
    """The same elements, in another memory, type or place."""
    marks = call.operands[0]
    return marks if isinstance(call.out, Tensor) else [marks] * len(call.out)


@rule("aten::select", "aten::select_copy")
def select(call: Call) -> Followed:
    """One position of an axis."""
    x, at = call.marks("self"), call.dim()
    planes = tuple(p.narrow(at, call["index"] % x.shape[at] if p.shape[at] > 1 else 0, 1) for p in x.planes)
    return without(replace(x, planes=planes), [at])


@rule("aten::slice", "aten::narrow", "aten::slice_copy", "aten::narrow_copy")
def slice_(call: Call) -> Followed:
    """A range of an axis. On a labelled axis its bounds are numbers that the op was given."""
    x, at = call.marks("self"), call.dim()
    size, step = x.shape[at], call.get("step") or 1
    start, end = call.get("start") or 0, call.get("end")
    if call.get("length") is not None:
        end = start + call["length"]
    bounds = slice(start, end, step).indices(size)
    planes = []
    for p in x.planes:
        if p.shape[at] == 1:
            planes.append(p)
        elif step != 1:
            whole = mix(call.book, x.with_planes([p]), [at], "every n-th position of its width is taken")
            planes += whole.planes
        else:
            _whole_parts(call.book, p, at, bounds[0], bounds[1])
            planes.append(p.narrow(at, bounds[0], bounds[1] - bounds[0]))
    return replace(x, planes=tuple(planes))


def _whole_parts(book: Book, p: Plane, at: int, start: int, end: int) -> None:
    """A range taken from equal parts (halves, thirds) holds after a cut when all parts lose equally."""
    size, length = p.shape[at], end - start
    empty = bool((p.narrow(at, start, max(length, 0)) < 0).all())
    if 0 < length < size and size % length == 0 and start % length == 0 and not empty:
        book.partition(p, _positions(p, at) // length, strict=False)


def _positions(p: Plane, at: int) -> Tensor:
    return torch.arange(p.shape[at]).reshape([-1 if a == at else 1 for a in range(p.ndim)])


@rule("aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unsafe_split", "aten::unsafe_split_with_sizes")
def split(call: Call) -> Followed:
    """Consecutive ranges of an axis. Equal ranges must stay equal."""
    x, at = call.marks("self"), call.dim()
    sizes = [int(t.shape[at]) for t in call.out]
    for p in x.planes:
        if p.shape[at] > 1 and len(set(sizes)) == 1 and len(sizes) > 1:
            call.book.partition(p, _positions(p, at) // sizes[0])
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        replace(x, planes=tuple(p.narrow(at, s, n) if p.shape[at] > 1 else p for p in x.planes)) for s, n in zip(starts, sizes)
    ]


@rule("aten::unbind", "aten::unbind_copy")
def unbind(call: Call) -> Followed:
    """Every position of an axis as a tensor of its own."""
    x, at = call.marks("self"), call.dim()
    return [
        without(replace(x, planes=tuple(p.narrow(at, i if p.shape[at] > 1 else 0, 1) for p in x.planes)), [at])
        for i in range(len(call.out))
    ]


@rule("aten::cat", "aten::concatenate", "aten::concat")
def cat(call: Call) -> Followed:
    """Tensors one after the other along an axis."""
    pieces = [call.of(t) for t in call["tensors"]]
    pieces = [m for m in pieces if m.shape != (0,)]
    return joined(call, pieces, call["dim"] % len(call.shape) if "dim" in call._values else 0)


@rule("aten::stack")
def stack(call: Call) -> Followed:
    """Tensors side by side on a new axis: they share the width of each other axis."""
    at = call["dim"] % len(call.shape)
    pieces = []
    for t in call["tensors"]:
        m = call.of(t)
        shape = (*m.shape[:at], 1, *m.shape[at:])
        pieces.append(replace(m, shape=shape, planes=tuple(p.unsqueeze(at) for p in m.planes), flat=frozenset()))
    return joined(call, pieces, at)


def joined(call: Call, pieces: Sequence[Marks], at: int) -> Marks:
    """Labels of a concatenation: along `at` one after the other, on the other axes tied to each other."""
    across = [m.with_planes(p for p in m.planes if p.shape[at] == 1) for m in pieces]
    along = [[p for p in m.planes if p.shape[at] > 1] for m in pieces]
    if any(len(planes) > 1 for planes in along) or (any(along) and any(m.planes for m in across)):
        return _joined_crosswise(call, pieces, at)
    if not any(along):
        cut = [replace(m, shape=tuple(1 if a == at else s for a, s in enumerate(m.shape))) for m in across]
        return replace(meet(call.book, *cut), name=None)
    size = [max(p.shape[a] for planes in along for p in planes) for a in range(len(call.shape))]
    parts = []
    for m, planes in zip(pieces, along):
        shape = [m.shape[at] if a == at else s for a, s in enumerate(size)]
        parts.append(planes[0].expand(shape) if planes else _follower(m, along, at, shape))
    return Marks(shape=call.shape, planes=(torch.cat(parts, at),), source=_source(pieces))  # type: ignore[arg-type]


def _follower(m: Marks, along: Sequence[Sequence[Plane]], at: int, shape: Sequence[int]) -> Plane:
    """Labels for a piece without any: one that is broadcast over the heads of the others leaves with them."""
    for planes in along:
        others = [a for p in planes for a in axes(p) if a != at]
        if others and not any(m.fixed(a) for a in others):
            return drop(planes[0], [at]).expand(shape)
    return torch.full(shape, -1)


def _joined_crosswise(call: Call, pieces: Sequence[Marks], at: int) -> Marks:
    """Some pieces have labels along the axis and others across it: one plane of both, and what it costs is tied or pinned."""
    if any(len(m.planes) > 1 for m in pieces):
        for m in pieces:
            for p in m.planes:
                call.book.pin(p, "is concatenated with tensors of other widths")
        return Marks(shape=call.shape, source=_source(pieces))  # type: ignore[arg-type]
    size = [max([p.shape[a] for m in pieces for p in m.planes]) for a in range(len(call.shape))]
    parts = []
    for m in pieces:
        shape = [m.shape[at] if a == at else s for a, s in enumerate(size)]
        parts.append(m.planes[0].expand(shape) if m.planes else torch.full(shape, -1))
    return Marks(shape=call.shape, planes=(torch.cat(parts, at),), source=_source(pieces))  # type: ignore[arg-type]


def _source(pieces: Sequence[Marks]) -> str:
    found = {m.source for m in pieces}
    return "activation" if "activation" in found else "parameter" if "parameter" in found else "constant"


@rule("aten::flip", "aten::fliplr", "aten::flipud")
def flip(call: Call) -> Followed:
    """An axis backwards: kept units keep their (reversed) order."""
    x = call.marks("self")
    turned = [a % len(x.shape) for a in call["dims"]]
    return replace(x, planes=tuple(p.flip([a for a in turned if p.shape[a] > 1]) for p in x.planes), name=None)


@rule("aten::roll")
def roll(call: Call) -> Followed:
    """Shifted around by a literal number: a labelled axis must keep its width."""
    x = call.marks("self")
    return mix(call.book, x, [a % len(x.shape) for a in call["dims"]] or range(len(x.shape)), "is rolled by a fixed number")


@rule("aten::constant_pad_nd", "aten::pad")
def pad(call: Call) -> Followed:
    """New positions without labels at the ends of axes."""
    x = call.marks("self")
    flat_pad = [0, 0] * (len(x.shape) - len(call["pad"]) // 2) + _from_first(call["pad"])
    planes = []
    for p in x.planes:
        mine = [n if p.shape[a] > 1 else 0 for a in range(p.ndim) for n in flat_pad[2 * a : 2 * a + 2]]
        backwards = [n for a in reversed(range(p.ndim)) for n in mine[2 * a : 2 * a + 2]]
        planes.append(torch.constant_pad_nd(p, backwards, -1))
    return replace(x, planes=tuple(planes), flat=frozenset(), name=None)


def _from_first(pad_: Sequence[int]) -> list[int]:
    pairs = [list(pad_[i : i + 2]) for i in range(0, len(pad_), 2)]
    return [n for pair in reversed(pairs) for n in pair]


@rule("aten::view_as_complex", "aten::view_as_complex_copy")
def view_as_complex(call: Call) -> Followed:
    """Pairs on the last axis become one number."""
    x = call.marks("self")
    return without(mix(call.book, x, [len(x.shape) - 1]), [len(x.shape) - 1])


@rule("aten::view_as_real")
def view_as_real(call: Call) -> Followed:
    """One number becomes a pair on a new last axis."""
    x = call.marks("self")
    return replace(x, planes=tuple(p.unsqueeze(-1) for p in x.planes))


@rule("aten::diagonal", "aten::diagonal_copy")
def diagonal(call: Call) -> Followed:
    """The diagonal of two axes, as a new last axis."""
    x = call.marks("self")
    first, second = call["dim1"] % len(x.shape), call["dim2"] % len(x.shape)
    planes = []
    for p in x.planes:
        if p.shape[first] > 1 or p.shape[second] > 1:
            call.book.pin(p, "only the diagonal of its width is used")
        else:
            planes.append(drop(p, (first, second)).diagonal(0, first, second))
    return replace(x, planes=tuple(planes), flat=frozenset(), name=None)


@rule("aten::unfold")
def unfold(call: Call) -> Followed:
    """Sliding windows over one axis, on a new last axis."""
    x, at = call.marks("self"), call.get("dimension", 0) % len(call.marks("self").shape)
    x = mix(call.book, x, [at], UNLABELLED)
    return replace(x, planes=tuple(p.unsqueeze(-1) for p in x.planes), flat=frozenset(), name=None)


@rule("aten::pixel_shuffle", "aten::pixel_unshuffle", "aten::channel_shuffle", "aten::native_channel_shuffle")
def shuffle(call: Call) -> Followed:
    """Channels exchanged with space or with each other: run on the full planes."""
    x = call.marks("self")
    given = [call[a.name] for a in call.func._schema.arguments[1:]]
    planes = []
    for p in x.planes:
        if len(axes(p)) == 1 and p.shape[1] > 1 and "unshuffle" not in call.name:
            full = [s if a == 1 else 1 for a, s in enumerate(x.shape)]
        else:
            full = list(x.shape)
        moved = call.func(p.expand(full), *given)
        planes.append(_over_space(moved, call.shape))
    return replace(x, planes=tuple(planes), flat=frozenset(), name=None)


def _over_space(plane: Plane, shape: Sequence[int]) -> Plane:
    """A plane that repeats with period (r, r) in space, repeated to the full size."""
    times = [1 if p in (1, s) else s // p for p, s in zip(plane.shape, shape)]
    return plane.repeat(times)


@rule("aten::im2col")
def im2col(call: Call) -> Followed:
    """Every channel becomes kernel-many consecutive rows."""
    x = call.marks("self")
    x = mix(call.book, x, range(2, len(x.shape)))
    kernel = call["kernel_size"][0] * call["kernel_size"][1]
    planes = [vector(p, 1).repeat_interleave(kernel).reshape(1, -1, 1) for p in x.planes if p.shape[1] > 1]
    return Marks(shape=call.shape, planes=tuple(planes), source=x.source)


@rule("aten::col2im")
def col2im(call: Call) -> Followed:
    """Kernel-many consecutive rows are added up into one channel."""
    x = call.marks("self")
    kernel = call["kernel_size"][0] * call["kernel_size"][1]
    planes = []
    for p in x.planes:
        folded = vector(p, 1).reshape(-1, kernel)
        call.book.tie_along(folded, [1])
        planes.append(folded[:, 0].reshape(1, -1, 1, 1))
    return Marks(shape=call.shape, planes=tuple(planes), source=x.source)


@rule("aten::as_strided", "aten::as_strided_copy")
def as_strided(call: Call) -> Followed:
    """Followed where only the memory is described anew (same shape, every element once), else pinned."""
    x = call.marks("self")
    strides = [step for size, step in zip(call.shape, call["stride"]) if size > 1]
    if x.shape == call.shape and 0 not in strides and len(set(strides)) == len(strides):
        return replace(x, name=None)
    for p in x.planes:
        call.book.pin(p, "is read through a literal memory layout")
    return None
