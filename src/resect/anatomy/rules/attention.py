"""Fused attention in all its forms: two products and a softmax."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from resect.anatomy.algebra import Product, contract, meet, mix
from resect.anatomy.labels import Marks
from resect.anatomy.rules.contractions import outside_weight
from resect.anatomy.watching import Call, Followed, rule

_SCORES = Product(a="bhtd", b="bhsd", out="bhts")
_OUTPUT = Product(a="bhts", b="bhsd", out="bhtd")


@rule(
    *("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention"),
    *("aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_attention_math"),
    *("aten::_scaled_dot_product_cudnn_attention", "aten::scaled_dot_product_attention"),
    *("aten::_scaled_dot_product_fused_attention_overrideable", "aten::_scaled_dot_product_attention_math_for_mps"),
)
def attention(call: Call) -> Followed:
    """softmax(q k^T + bias) v over (batch, heads, positions, width)."""
    q, k, v = (call.marks(n) for n in ("query", "key", "value"))
    if len(q.shape) == 3:
        q, k, v = (m.lifted(4) for m in (q, k, v))
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    scores = contract(call.book, q, k, _SCORES)
    bias = call.get("attn_mask") if call.get("attn_mask") is not None else call.get("attn_bias")
    if isinstance(bias, Tensor):
        scores = meet(call.book, scores, call.of(bias))
        call.watch.adopt(bias, scores)
    out = contract(call.book, mix(call.book, scores, [3]), v, _OUTPUT)
    batch, many, targets, width = q.shape
    pairs = batch * many * targets * k.shape[2]
    call.product(pairs * width, q, k, labels=outside_weight(q, k, _SCORES))
    call.product(pairs * v.shape[3], v, labels=outside_weight(scores, v, _OUTPUT))
    if len(call.shape) == 3:
        out = replace(out, shape=call.shape, planes=tuple(p[0] for p in out.planes))
    return out if isinstance(call.out, Tensor) else [out] + [None] * (len(call.out) - 1)


def _repeated(m: Marks, many: int) -> Marks:
    """K/V heads repeated for grouped queries."""
    times = many // m.shape[1]
    if times <= 1:
        return m
    planes = tuple(p.repeat_interleave(times, 1) if p.shape[1] > 1 else p for p in m.planes)
    return replace(m, shape=(m.shape[0], many, *m.shape[2:]), planes=planes, flat=m.flat | ({1} if m.shape[1] == 1 else set()))
