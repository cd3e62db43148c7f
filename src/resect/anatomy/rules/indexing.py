"""Lookups and writes by position: embeddings, gathers, scatters, the token routing of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from resect.anatomy.algebra import meet, mix
from resect.anatomy.labels import Book, Marks, Plane, axes
from resect.anatomy.watching import Call, Followed, rule

INDEXED = "is looked up by position"


@rule("aten::embedding", "aten::embedding_bag", "aten::_embedding_bag", "aten::_embedding_bag_forward_only")
def embedding(call: Call) -> Followed:
    """Rows of a table: rows stay, columns are written."""
    weight, index = call.marks("weight"), call.marks("indices")
    columns = []
    for p in weight.planes:
        if p.shape[0] > 1:
            call.book.pin(p, "is a row of a lookup table")
        else:
            call.book.role(p, "writer")
            columns.append(p.reshape([1] * (len(call.shape) - 1) + [-1]))
    source = "activation" if "activation" in (index.source, weight.source) else weight.source
    out = Marks(shape=call.shape, planes=tuple(columns), source=source)
    return out if isinstance(call.out, Tensor) else [out] + [None] * (len(call.out) - 1)


@rule("aten::index_select")
def index_select(call: Call) -> Followed:
    """Positions of one axis by a list."""
    x, at = call.marks("self"), call.dim()
    planes = [_taken(call.book, p, at, call["index"], call.marks("index")) for p in x.planes]
    return replace(x, planes=tuple(p for p in planes if p is not None), name=None, flat=frozenset())


def _taken(book: Book, p: Plane, at: int, index: Tensor, how: Marks) -> Plane | None:
    """A labelled axis may be repeated element by element by indices made on the way; any other list is literal."""
    if p.shape[at] == 1:
        return p
    size = p.shape[at]
    if index.device.type != "meta" and index.numel() and index.numel() % size == 0 and how.name is None:
        times = index.numel() // size
        if torch.equal(index.cpu().reshape(-1), torch.arange(size).repeat_interleave(times)):
            return p.repeat_interleave(times, at)
    book.pin(p, INDEXED)
    return None


@rule("aten::index", "aten::_unsafe_index")
def index(call: Call) -> Followed:
    """Advanced indexing; labels on other axes pass."""
    x, chosen = call.marks("self"), call["indices"]
    _pin_indices(call, chosen)
    dims = _indexed(chosen)
    planes, ndim = [], len(call.shape)
    for p in x.planes:
        if len(dims) == 1 and p.shape[dims[0]] > 1 and _made_on_the_way(call, chosen[dims[0]]):
            # positions written in the model's code: whether they hold after a cut is for verification to say
            planes.append(p.index_select(dims[0], chosen[dims[0]].cpu() % x.shape[dims[0]]))
            continue
        if any(p.shape[d] > 1 for d in dims):
            p_rest = mix(call.book, replace(x, planes=(p,)), dims, INDEXED).planes
            if not p_rest:
                continue
            p = p_rest[0]
        planes.append(_at_zero(p, chosen, dims, ndim))
    lookup = [call.of(t) for t in chosen if t is not None]
    source = "activation" if any(m.source == "activation" for m in (x, *lookup)) else x.source
    return Marks(shape=call.shape, planes=tuple(planes), source=source)


def _made_on_the_way(call: Call, index: Tensor) -> bool:
    how = call.of(index)
    return index.ndim == 1 and index.dtype == torch.int64 and index.device.type != "meta" and how.source == "constant"


def _indexed(chosen: Sequence[Tensor | None]) -> list[int]:
    """The axes that indices consume; a boolean mask consumes as many as it has."""
    dims, at = [], 0
    for t in chosen:
        many = t.ndim if t is not None and t.dtype in (torch.bool, torch.uint8) else 1
        if t is not None:
            dims += list(range(at, at + many))
        at += many
    return dims


def _at_zero(p: Plane, chosen: Sequence[Tensor | None], dims: Sequence[int], ndim: int) -> Plane:
    """The plane after indexing axes on which it is constant: new axes of size 1 in the place where indexing puts them."""
    rest = [p.shape[a] for a in range(p.ndim) if a not in dims]
    new = ndim - len(rest)
    together = list(dims) == list(range(dims[0], dims[0] + len(dims)))
    at = dims[0] if together and _adjacent(chosen) else 0
    return p.reshape(rest[:at] + [1] * new + rest[at:])


def _adjacent(chosen: Sequence[Tensor | None]) -> bool:
    used = [i for i, t in enumerate(chosen) if t is not None]
    return used == list(range(used[0], used[0] + len(used)))


def _pin_indices(call: Call, chosen: Sequence[Tensor | None]) -> None:
    for t in chosen:
        if t is not None:
            for p in call.of(t).planes:
                call.book.pin(p, "its values become positions")


@rule("aten::index_put", "aten::_unsafe_index_put", "aten::_index_put_impl_")
def index_put(call: Call) -> Followed:
    """Writes at positions; labels on the other axes of values and target are tied."""
    x, chosen = call.marks("self"), call["indices"]
    _pin_indices(call, chosen)
    dims = _indexed(chosen)
    target = mix(call.book, x, dims, INDEXED)
    rest = [a for a in range(len(x.shape)) if a not in dims]
    values = call.marks("values")
    keep = min(len(rest), len(values.shape))
    if rest and rest != list(range(len(x.shape) - len(rest), len(x.shape))):
        for p in (*target.planes, *values.planes):
            call.book.pin(p, INDEXED)
        return replace(target, planes=())
    trailing = _trailing(call.book, values, keep)
    return _written(call, target, trailing.lifted(len(x.shape)))


def _trailing(book: Book, m: Marks, keep: int) -> Marks:
    """The last `keep` axes of a tensor, the others mixed."""
    many = len(m.shape) - keep
    mixed = mix(book, m, range(many), INDEXED)
    planes = tuple(p.reshape(p.shape[many:]) for p in mixed.planes)
    return Marks(shape=m.shape[many:], planes=planes, source=m.source, flat=frozenset(a - many for a in m.flat if a >= many))


def _written(call: Call, target: Marks, values: Marks) -> Marks:
    """Target after values were written into some of its positions."""
    source = "activation" if "activation" in (target.source, values.source) else target.source
    if not target.planes:
        planes = values.planes
        for p in planes:
            if any(target.fixed(a) for a in axes(p)) and target.source == "parameter":
                call.book.pin(p, "is written into a tensor of fixed width")
        return replace(target, planes=planes, source=source, flat=frozenset(), name=None)
    out = meet(call.book, target, values)
    return replace(out, source=source, name=None)


@rule("aten::gather", "aten::take_along_dim")
def gather(call: Call) -> Followed:
    """Positions of one axis, chosen for every place; labels on the other axes pass."""
    x, at = mix(call.book, call.marks("self"), [call.dim()], INDEXED), call.dim()
    how = call.marks("index")
    for p in how.planes:
        if p.shape[at] > 1:
            call.book.pin(p, "its values become positions")
    other = replace(how, planes=tuple(p for p in how.planes if p.shape[at] == 1))
    flat = frozenset(a for a in range(len(how.shape)) if how.shape[a] == x.shape[a])
    return replace(meet(call.book, x, replace(other, flat=other.flat | flat)), flat=frozenset())


@rule(
    *("aten::scatter", "aten::scatter_add", "aten::scatter_reduce", "aten::index_add", "aten::index_copy"),
    *("aten::index_fill", "aten::index_reduce"),
)
def scatter(call: Call) -> Followed:
    """Writes at positions of one axis; labels on the other axes are tied."""
    at = call.dim()
    x = mix(call.book, call.marks("self"), [at], INDEXED)
    values = next((call.get(n) for n in ("src", "source", "value") if call.get(n) is not None), None)
    if not isinstance(values, Tensor):
        return x
    written = mix(call.book, call.of(values), [at], INDEXED)
    flat = written.flat | {at}
    return _written(call, x, replace(written, flat=flat, shape=tuple(1 if a == at else s for a, s in enumerate(written.shape))))


@rule("aten::masked_scatter")
def masked_scatter(call: Call) -> Followed:
    """Values in the order of a mask."""
    for m in call.operands:
        for p in m.planes:
            call.book.pin(p, "is written in the order of a mask")
    return None
