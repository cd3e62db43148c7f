"""Modules of torch that cannot work with fewer units than they were built with, and what they become after a cut."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NarrowMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention with fewer heads than its width holds; `embed_dim` stays, `num_heads * head_dim` is smaller.

    torch's own forward insists that both are equal. Parameters, their names and the call are the same; `bias_k` and
    `add_zero_attn` are not supported.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: the attended values, and the weights where they are asked for."""
        if self.bias_k is not None or self.add_zero_attn:
            raise NotImplementedError("an attention with bias_k or add_zero_attn cannot lose heads")
        swap = query.dim() == 3 and not self.batch_first
        q, k, v = (self._heads(x, i, swap) for i, x in enumerate((query, key, value)))
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            y = F.dropout(weights, dropout) @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if query.dim() == 3 else weights[0]
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        return (y.transpose(0, 1) if swap else y if query.dim() == 3 else y[0]), weights

    def _heads(self, x: Tensor, which: int, swap: bool) -> Tensor:
        """Query, key or value (0, 1, 2) as (batch, heads, positions, head_dim)."""
        if self.in_proj_weight is not None:
            weight = self.in_proj_weight.chunk(3)[which]
        else:
            weight = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[which]
        bias = None if self.in_proj_bias is None else self.in_proj_bias.chunk(3)[which]
        x = x.transpose(0, 1) if swap else x if x.dim() == 3 else x[None]
        return F.linear(x, weight, bias).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores."""
        masks = []
        if attn_mask is not None:
            masks.append(
                _added(attn_mask, q).unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else _added(attn_mask, q)
            )
        if padding is not None:
            masks.append(_added(padding if padding.dim() == 2 else padding[None], q)[:, None, None])
        return None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]


def _added(mask: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else mask


def narrow(model: nn.Module) -> None:
    """Exchange the class of every attention whose weights no longer have the shapes that torch insists on."""
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and module.out_proj.weight.shape != (module.embed_dim, module.embed_dim):
            module.__class__ = NarrowMultiheadAttention
            # also keeps the layers around it from calling torch's fused kernel, which insists as well
            module._qkv_same_embed_dim = False
