"""Ops that make tensors and fill them: constants, copies, tensors like others."""

from __future__ import annotations

from dataclasses import replace

from resect.anatomy.algebra import meet
from resect.anatomy.labels import Marks
from resect.anatomy.watching import Call, Followed, rule


@rule("aten::copy_", "aten::copy")
def copy_(call: Call) -> Followed:
    """The second tensor's elements, in the place of the first's."""
    target, written = call.marks("self"), call.marks("src").lifted(len(call.shape))
    if target.planes:
        return replace(meet(call.book, target, written), stats=())
    return replace(written, name=None)


@rule("aten::fill_", "aten::fill", "aten::zero_", "aten::zero")
def fill(call: Call) -> Followed:
    """One value everywhere: the width stays, and is constant."""
    x = call.marks("self")
    return replace(x, flat=frozenset(a for a, s in enumerate(x.shape) if s > 1))


@rule(
    *("aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like", "aten::rand_like", "aten::randn_like"),
)
def like(call: Call) -> Followed:
    """A tensor of the same width."""
    x = call.marks("self")
    return replace(x, source="constant", name=None, flat=frozenset(a for a, s in enumerate(x.shape) if s > 1), stats=())


@rule(
    *("aten::zeros", "aten::ones", "aten::full", "aten::empty", "aten::new_zeros", "aten::new_ones", "aten::new_full"),
    *("aten::new_empty", "aten::scalar_tensor", "aten::empty_strided", "aten::new_empty_strided"),
)
def filled(call: Call) -> Followed:
    """A new tensor of one value: constant along every axis."""
    return Marks(shape=call.shape, flat=frozenset(a for a, s in enumerate(call.shape) if s > 1))


@rule(
    *("aten::arange", "aten::linspace", "aten::logspace", "aten::eye", "aten::tril_indices", "aten::triu_indices"),
    *("aten::rand", "aten::randn", "aten::randint", "aten::randperm", "aten::_efficientzerotensor", "aten::normal"),
    *("aten::hann_window", "aten::range"),
)
def made(call: Call) -> Followed:
    """A new tensor of a given width."""
    return Marks(shape=call.shape)
