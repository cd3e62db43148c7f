"""Matrix products in all their forms."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from resect.anatomy.algebra import Product, contract, meet
from resect.anatomy.labels import Book, Marks, axes, on_axis, vector
from resect.anatomy.watching import Call, Followed, rule, weight_of


def multiply(call: Call, a: Marks, b: Marks, spec: Product) -> Marks:
    """One contraction, followed and counted."""
    out = contract(call.book, a, b, spec)
    sizes = {**dict(zip(spec.b, b.shape)), **dict(zip(spec.a, a.shape))}
    call.product(math.prod(sizes.values()), a, b, labels=outside_weight(a, b, spec))
    return out


def outside_weight(a: Marks, b: Marks, spec: Product) -> list[Tensor]:
    """The labels on every axis of a product that its weight does not have: one vector for each letter that carries any."""
    chosen = weight_of(a, b)
    weight = "" if chosen is None else spec.a if chosen is a else spec.b
    found = []
    for letter in dict.fromkeys(spec.a + spec.b):
        sides = [(m, letters.index(letter)) for m, letters in ((a, spec.a), (b, spec.b)) if letter in letters]
        vectors = [vector(p, axis) for m, axis in sides for p in m.planes if p.shape[axis] > 1]
        if letter not in weight and vectors:
            found.append(vectors[0])
    return found


@rule("aten::mm")
def mm(call: Call) -> Followed:
    """(m, k) @ (k, n)."""
    return multiply(call, call.marks("self"), call.marks("mat2"), Product(a="mk", b="kn", out="mn"))


@rule("aten::addmm", "aten::_addmm_activation")
def addmm(call: Call) -> Followed:
    """bias + (m, k) @ (k, n)."""
    out = multiply(call, call.marks("mat1"), call.marks("mat2"), Product(a="mk", b="kn", out="mn"))
    return replace(meet(call.book, out, call.marks("self")), name=None)


@rule("aten::bmm")
def bmm(call: Call) -> Followed:
    """(b, m, k) @ (b, k, n)."""
    return multiply(call, call.marks("self"), call.marks("mat2"), Product(a="bmk", b="bkn", out="bmn"))


@rule("aten::baddbmm")
def baddbmm(call: Call) -> Followed:
    """bias + (b, m, k) @ (b, k, n)."""
    out = multiply(call, call.marks("batch1"), call.marks("batch2"), Product(a="bmk", b="bkn", out="bmn"))
    return meet(call.book, out, call.marks("self"))


@rule("aten::mv")
def mv(call: Call) -> Followed:
    """(m, k) @ (k); products of vectors are not counted, as torch's own counter has it."""
    return contract(call.book, call.marks("self"), call.marks("vec"), Product(a="mk", b="k", out="m"))


@rule("aten::addmv")
def addmv(call: Call) -> Followed:
    """bias + (m, k) @ (k)."""
    out = contract(call.book, call.marks("mat"), call.marks("vec"), Product(a="mk", b="k", out="m"))
    return meet(call.book, out, call.marks("self"))


@rule("aten::dot", "aten::vdot")
def dot(call: Call) -> Followed:
    """(k) @ (k)."""
    other = "tensor" if call.get("tensor") is not None else "other"
    return contract(call.book, call.marks("self"), call.marks(other), Product(a="k", b="k", out=""))


@rule("aten::linear", "aten::mkldnn_linear")
def linear(call: Call) -> Followed:
    """(..., k) @ (n, k) + bias."""
    x, weight = call.marks("input"), call.marks("weight")
    letters = "abcdefgh"[: len(x.shape) - 1]
    out = multiply(call, x, weight, Product(a=letters + "k", b="nk", out=letters + "n"))
    return out if call.get("bias") is None else meet(call.book, out, call.marks("bias"))


@rule("aten::bilinear", "aten::_trilinear")
def bilinear(call: Call) -> Followed:
    """Every pair of inputs has a weight: all of it stays."""
    return _pinned(call, "multiplies every unit with every other")


@rule("aten::_grouped_mm", "aten::_scaled_grouped_mm")
def grouped_mm(call: Call) -> Followed:
    """Rows of tokens, each block with the weight of its expert: (m, k) @ (e, k, n)."""
    a, b = call.marks("self"), call.marks("mat2")
    if len(a.shape) != 2 or len(b.shape) != 3:
        return _pinned(call, "is a grouped product of a form resect does not follow")
    for p in b.planes:
        if p.shape[0] > 1:
            call.book.pin(p, "one of several experts, chosen by the input")
    aligned = max(16 // call.tensors[0].element_size(), 1)
    for p in (*a.planes, *(q for q in b.planes if q.shape[0] == 1)):
        # the kernel reads rows of whole 16 bytes
        call.book.multiple(p, aligned)
    inner = replace(b, shape=b.shape[1:], planes=tuple(p[0] for p in b.planes if p.shape[0] == 1), flat=frozenset())
    out = contract(call.book, a, inner, Product(a="mk", b="kn", out="mn"))
    call.product(a.shape[0] * a.shape[1] * b.shape[2], a, b)
    return out


def _pinned(call: Call, reason: str) -> Followed:
    for m in call.operands:
        for p in m.planes:
            call.book.pin(p, reason)
    return None


def channels(book: Book, marks: Marks, axis: int) -> list[Tensor]:
    """The label vectors on one axis of an activation, all other axes tied to it; planes elsewhere are left alone."""
    found = []
    for p in marks.planes:
        if p.shape[axis] > 1:
            book.tie_along(p, (a for a in axes(p) if a != axis))
            found.append(vector(p, axis))
    return found


def per_channel(marks: Marks, ndim: int) -> Marks:
    """A vector of one value for each channel, as it is broadcast against axis 1."""
    shape = (1, marks.shape[0], *[1] * (ndim - 2))
    return replace(marks, shape=shape, planes=tuple(on_axis(vector(p, 0), 1, ndim) for p in marks.planes), flat=frozenset())
