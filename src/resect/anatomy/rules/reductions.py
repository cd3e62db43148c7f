"""Reductions, scans, softmax, sorting: ops that mix values along an axis."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from resect.anatomy.algebra import mix
from resect.anatomy.labels import Marks
from resect.anatomy.rules.views import without
from resect.anatomy.watching import Call, Followed, elementwise, rule


def _over(call: Call, ndim: int) -> list[int]:
    given = call.get("dim")
    if given is None or given == []:
        return list(range(ndim))
    return [int(a) % max(ndim, 1) for a in ([given] if isinstance(given, int) else given)]


def _reduced(call: Call, *, stats: bool, reason: str) -> Followed:
    x = call.operands[0]
    over = _over(call, len(x.shape))
    mixed = mix(call.book, x, over, reason, stats=stats)
    out = mixed if call.get("keepdim") else without(mixed, over)
    return out if isinstance(call.out, Tensor) else [out] * len(call.out)


@rule(
    *("aten::mean", "aten::sum", "aten::var", "aten::std", "aten::var_mean", "aten::std_mean", "aten::norm", "aten::nansum"),
    *("aten::linalg_vector_norm", "aten::nanmean", "aten::var_mean_correction"),
)
def summary(call: Call) -> Followed:
    """Sums and moments; over whole units they may be a norm in the making."""
    return _reduced(call, stats=True, reason="is summed over its units")


@rule(
    *("aten::amax", "aten::amin", "aten::max", "aten::min", "aten::prod", "aten::logsumexp", "aten::median", "aten::mode"),
    *("aten::argmax", "aten::argmin", "aten::any", "aten::all", "aten::aminmax", "aten::count_nonzero", "aten::kthvalue"),
    *("aten::nanmedian", "aten::_amp_foreach_non_finite_check_and_unscale_"),
)
def reduction(call: Call) -> Followed:
    """The largest, the product, a vote: needs all units."""
    if isinstance(call.get("other"), Tensor):
        return elementwise(call)
    return _reduced(call, stats=False, reason="is compared with the other units of its width")


@rule("aten::_softmax", "aten::_log_softmax", "aten::softmax", "aten::log_softmax", "aten::_safe_softmax")
def softmax(call: Call) -> Followed:
    """Shares of a whole: units that are compared stay."""
    return _along(call, "is part of a softmax over its width")


@rule(
    *("aten::cumsum", "aten::cumprod", "aten::logcumsumexp", "aten::_cummax_helper", "aten::cummax", "aten::cummin"),
    *("aten::sort", "aten::argsort", "aten::topk", "aten::msort", "aten::renorm"),
)
def scan(call: Call) -> Followed:
    """Every position depends on the others of its axis."""
    return _along(call, "is ordered or accumulated over its width")


def _along(call: Call, reason: str) -> Followed:
    x = call.operands[0]
    given = call.get("dim")
    out = mix(call.book, x, [(-1 if given is None else int(given)) % max(len(x.shape), 1)], reason)
    return out if isinstance(call.out, Tensor) else [out] * len(call.out)


@rule("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::allclose", "aten::item")
def leaves(call: Call) -> Followed:
    """A value that leaves the tensors: what it decides is not followed."""
    return gone(call, call.operands, "its value decides what the forward pass does")


@rule(
    *("aten::nonzero", "aten::unique_dim", "aten::_unique2", "aten::unique_consecutive", "aten::bincount", "aten::histc"),
    *("aten::masked_select", "aten::searchsorted", "aten::bucketize", "aten::multinomial", "aten::one_hot"),
)
def selects(call: Call) -> Followed:
    """Values that become positions."""
    gone(call, call.operands, "its values become positions")
    sample = call.operands[0] if call.operands else Marks(shape=())
    out = Marks(shape=(), source=sample.source)
    return out if isinstance(call.out, Tensor) else [out] * len(call.out)


def gone(call: Call, operands: Sequence[Marks], reason: str) -> Followed:
    """Pin everything that `operands` carry."""
    for m in operands:
        for p in (*m.planes, *m.stats):
            call.book.pin(p, reason)
    return None
