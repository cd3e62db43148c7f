"""Networks that peers are known to get wrong and the zoo does not hold yet; importing this registers them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.convolutional import conv_bn
from zoo.registry import entry, image


class Squeeze(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


class Inverted(nn.Module):
    """EfficientNetV2: an inverted bottleneck, fused (one full convolution) or depthwise with squeeze and excite."""

    def __init__(self, width: int, out: int, fused: bool) -> None:
        super().__init__()
        inner = 3 * width
        layers = [conv_bn(width, inner)] if fused else [conv_bn(width, inner, 1), conv_bn(inner, inner, 3, 1, inner)]
        self.body = nn.Sequential(*layers, *([] if fused else [Squeeze(inner)]), conv_bn(inner, out, 1, act=False))
        self.short = width == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.short else self.body(x)


@entry("efficientnet_v2", quick=False)
def _() -> Any:
    blocks = Inverted(8, 8, True), Inverted(8, 12, True), Inverted(12, 12, False), Inverted(12, 16, False)
    net = nn.Sequential(conv_bn(3, 8), *blocks, conv_bn(16, 24, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))
    return net, image()


class Spread(nn.Module):
    """MaxViT: attention inside windows, or over a grid across them, with a bias for every head and pair of places."""

    def __init__(self, width: int, grid: bool, heads: int = 2) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias, self.grid, self.num_heads = nn.Parameter(torch.randn(heads, 16, 16)), grid, heads
        self.head_dim = width // heads

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        order = (0, 3, 5, 2, 4, 1) if self.grid else (0, 2, 4, 3, 5, 1)
        shape = (b, c, 4, h // 4, 4, w // 4) if self.grid else (b, c, h // 4, 4, w // 4, 4)
        y = x.reshape(shape).permute(order).reshape(-1, 16, c)
        q, k, v = self.qkv(self.norm(y)).reshape(len(y), 16, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias).transpose(1, 2).flatten(2)
        y = self.proj(y).reshape(b, *(shape[i] for i in order[1:5]), c)
        return x + y.permute([order.index(i) for i in range(6)]).reshape(b, c, h, w)


@entry("maxvit", quick=False)
def _() -> Any:
    blocks = Inverted(8, 8, False), Spread(8, False), Spread(8, True)
    return nn.Sequential(conv_bn(3, 8), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), image(8)


class Idle(nn.Module):
    """A router that sends every token of the example to the first expert; the second is never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.router, self.out = nn.Linear(6, 12), nn.Linear(12, 2), nn.Linear(12, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 12)) for _ in range(2))
        nn.init.zeros_(self.router.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inp(x))
        best = (self.router(x) * 0 + torch.tensor([1.0, 0.0])).argmax(-1)
        for i, expert in enumerate(self.experts):
            if bool((best == i).any()):
                x = x + expert(x) * (best == i)[:, None]
        return self.out(x)


@entry("expert_unreached", quick=False)
def _() -> Any:
    return Idle(), torch.randn(5, 6)
