"""More families: what computer vision, audio, generation, graphs and tables use beside the classics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.convolutional import conv_bn
from zoo.registry import entry, image


def slow(name: str) -> Any:
    return entry(name, quick=False)


def classifier(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


class Sum(nn.Module):
    """Branches of the same input, added (or concatenated on axis 1)."""

    def __init__(self, *branches: nn.Module, cat: bool = False) -> None:
        super().__init__()
        self.branches, self.cat = nn.ModuleList(branches), cat

    def forward(self, x: Tensor) -> Tensor:
        ys = [b(x) for b in self.branches]
        return torch.cat(ys, 1) if self.cat else torch.stack(ys).sum(0)


def residual(*layers: nn.Module) -> nn.Module:
    return Sum(nn.Identity(), nn.Sequential(*layers))


@slow("vgg_bn")
def _() -> Any:
    return classifier(conv_bn(3, 8), conv_bn(8, 8), nn.MaxPool2d(2), conv_bn(8, 12), conv_bn(12, 12), width=12), image()


@slow("preact_resnet")
def _() -> Any:
    def block() -> nn.Module:
        one = nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1)
        return residual(*one, nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1))

    return classifier(nn.Conv2d(3, 8, 3, padding=1), block(), block(), nn.BatchNorm2d(8), nn.ReLU(), width=8), image()


@slow("resnet_d")
def _() -> Any:
    short = nn.Sequential(nn.AvgPool2d(2), conv_bn(8, 16, 1, act=False))
    return classifier(
        conv_bn(3, 8), Sum(short, nn.Sequential(conv_bn(8, 12, 3, 2), conv_bn(12, 16, act=False))), width=16
    ), image()


@slow("inception")
def _() -> Any:
    def block(i: int) -> nn.Module:
        pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(i, 4, 1))
        return Sum(conv_bn(i, 6, 1), nn.Sequential(conv_bn(i, 4, 1), conv_bn(4, 6)), pool, cat=True)

    return classifier(conv_bn(3, 8), block(8), block(16), width=16), image()


class Ghost(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.main, self.cheap = conv_bn(i, o // 2, 1), conv_bn(o // 2, o // 2, 3, 1, o // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return torch.cat([y, self.cheap(y)], 1)


@slow("ghostnet")
def _() -> Any:
    return classifier(conv_bn(3, 8), Ghost(8, 12), Ghost(12, 16), width=16), image()


@slow("mobilenet_v3")
def _() -> Any:
    se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Hardsigmoid())
    act = nn.Hardswish()
    return classifier(
        conv_bn(3, 8), conv_bn(8, 16, 1, act=False), act, conv_bn(16, 16, 5, 1, 16), Gate(se), conv_bn(16, 8, 1), width=8
    ), image()


class Gate(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


@slow("mobilenet_v4_uib")
def _() -> Any:
    block = residual(
        conv_bn(8, 8, 5, 1, 8, act=False), conv_bn(8, 24, 1), conv_bn(24, 24, 3, 1, 24), conv_bn(24, 8, 1, act=False)
    )
    return classifier(conv_bn(3, 8), block, width=8), image()


@slow("shufflenet_v1")
def _() -> Any:
    inside = (
        conv_bn(16, 8, 1, 1, 4),
        nn.ChannelShuffle(4),
        conv_bn(8, 8, 3, 1, 8, act=False),
        conv_bn(8, 16, 1, 1, 4, act=False),
    )
    return classifier(conv_bn(3, 16), residual(*inside), nn.ReLU(), width=16), image()


class ChannelLast(nn.Module):
    """ConvNeXt: depthwise, LayerNorm and MLP with channels last, scaled per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down, self.scale = nn.Linear(width, 20), nn.Linear(20, width), nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


@slow("convnext_block")
def _() -> Any:
    return classifier(nn.Conv2d(3, 8, 4, 4), ChannelLast(8), ChannelLast(8), width=8), image()


@slow("selective_kernel")
def _() -> Any:
    class Selective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(8, 12, 3), conv_bn(8, 12, 5)
            self.squeeze, self.choose = nn.Linear(12, 6), nn.Linear(6, 24)

        def forward(self, x: Tensor) -> Tensor:
            both = torch.stack([self.a(x), self.b(x)], 1)
            share = self.choose(F.relu(self.squeeze(both.sum(1).mean((2, 3))))).view(len(x), 2, -1).softmax(1)
            return (both * share[..., None, None]).sum(1)

    return classifier(conv_bn(3, 8), Selective(), width=12), image()


@slow("efficient_channel_attention")
def _() -> Any:
    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x.mean((2, 3))[:, None]).sigmoid()
            return x * y[:, 0, :, None, None]

    return classifier(conv_bn(3, 8), Channels(), conv_bn(8, 8), width=8), image()


@slow("coordinate_attention")
def _() -> Any:
    class Coordinate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze, self.h, self.w = conv_bn(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[2]
            y = self.squeeze(torch.cat([x.mean(3, True), x.mean(2, True).transpose(2, 3)], 2))
            h, w = y.split([n, x.shape[3]], 2)
            return x * self.h(h).sigmoid() * self.w(w.transpose(2, 3)).sigmoid()

    return classifier(conv_bn(3, 8), Coordinate(), width=8), image()


@slow("cspnet_chunk")
def _() -> Any:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.convs, self.out = (
                conv_bn(8, 16, 1),
                nn.ModuleList(conv_bn(8, 8) for _ in range(2)),
                conv_bn(32, 12, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            parts = list(self.inp(x).chunk(2, 1))
            for conv in self.convs:
                parts.append(conv(parts[-1]))
            return self.out(torch.cat(parts, 1))

    return classifier(conv_bn(3, 8), Partial(), width=12), image()


@slow("segmentation_aspp")
def _() -> Any:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(conv_bn(8, 6, 3, 1, 1, True, d) for d in (1, 2, 3))
            self.pool, self.out = conv_bn(8, 6, 1), nn.Conv2d(24, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            pooled = F.interpolate(self.pool(x.mean((2, 3), True)), x.shape[2:], mode="bilinear")
            return F.interpolate(self.out(torch.cat([*(c(x) for c in self.convs), pooled], 1)), scale_factor=2.0)

    return nn.Sequential(conv_bn(3, 8, 3, 2), Pyramid()), image()


class Detector(nn.Module):
    """Feature pyramid and a head shared by all levels: anchors by permute and reshape, concatenated over places."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = conv_bn(3, 8, 3, 2), conv_bn(8, 12, 3, 2)
        self.l1, self.l2, self.tower = nn.Conv2d(8, 10, 1), nn.Conv2d(12, 10, 1), conv_bn(10, 10)
        self.classes, self.boxes = nn.Conv2d(10, 2 * 3, 3, padding=1), nn.Conv2d(10, 2 * 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.c1(x)
        b = self.l2(self.c2(a))
        levels = [self.tower(y) for y in (self.l1(a) + F.interpolate(b, scale_factor=2.0), b)]
        flat = [
            f(y).permute(0, 2, 3, 1).reshape(len(x), -1, n) for f, n in ((self.classes, 3), (self.boxes, 4)) for y in levels
        ]
        return torch.cat(flat[:2], 1), torch.cat(flat[2:], 1)


@slow("detector_fpn")
def _() -> Any:
    return Detector(), image()


@slow("high_resolution_fusion")
def _() -> Any:
    class Fusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.high, self.low = conv_bn(3, 8), conv_bn(3, 12, 3, 2)
            self.up, self.down = conv_bn(12, 8, 1, act=False), conv_bn(8, 12, 3, 2, act=False)
            self.out = nn.Linear(20, 5)

        def forward(self, x: Tensor) -> Tensor:
            h, w = self.high(x), self.low(x)
            h, w = F.relu(h + F.interpolate(self.up(w), scale_factor=2.0)), F.relu(w + self.down(h))
            return self.out(torch.cat([h.mean((2, 3)), w.amax((2, 3))], 1))

    return Fusion(), image()


@slow("super_resolution")
def _() -> Any:
    body = residual(nn.Conv2d(8, 12, 3, padding=1), nn.PReLU(12), nn.Conv2d(12, 8, 3, padding=1))
    up = nn.Conv2d(8, 24, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(6)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), body, *up, nn.Conv2d(6, 3, 3, padding=1)), image(8)


@slow("pixel_unshuffle")
def _() -> Any:
    return classifier(nn.Conv2d(3, 4, 3, padding=1), nn.PixelUnshuffle(2), nn.Conv2d(16, 8, 3), nn.ReLU(), width=8), image()


@slow("autoencoder")
def _() -> Any:
    down = conv_bn(3, 8, 3, 2), conv_bn(8, 12, 3, 2)
    up = nn.ConvTranspose2d(12, 8, 2, 2), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2, 2)
    return nn.Sequential(*down, *up, nn.Sigmoid()), image()


class Generator(nn.Module):
    def __init__(self, literal: bool) -> None:
        super().__init__()
        self.literal, self.inp = literal, nn.Linear(6, 8 * 16)
        self.up = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.LeakyReLU(0.2))
        self.out = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inp(x)
        return self.out(self.up(y.view(-1, 8, 4, 4) if self.literal else y.view(len(x), -1, 4, 4)))


@slow("generator")
def _() -> Any:
    return Generator(False), torch.randn(3, 6)


@slow("generator_literal")
def _() -> Any:
    return Generator(True), torch.randn(3, 6)


class Wave(nn.Module):
    """WaveNet: dilated causal convolutions, tanh times sigmoid, skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Conv1d(1, 8, 1), nn.Sequential(nn.ReLU(), nn.Conv1d(10, 6, 1), nn.ReLU(), nn.Conv1d(6, 4, 1))
        self.filters = nn.ModuleList(nn.Conv1d(8, 12, 2, dilation=d) for d in (1, 2, 4))
        self.gates = nn.ModuleList(nn.Conv1d(8, 12, 2, dilation=d) for d in (1, 2, 4))
        self.skips, self.residuals = (nn.ModuleList(nn.Conv1d(12, n, 1) for _ in range(3)) for n in (10, 8))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.inp(x), 0
        for i, (f, g) in enumerate(zip(self.filters, self.gates)):
            padded = F.pad(x, (2**i, 0))
            y = torch.tanh(f(padded)) * torch.sigmoid(g(padded))
            total, x = total + self.skips[i](y), x + self.residuals[i](y)
        return self.out(total)


@slow("wavenet")
def _() -> Any:
    return Wave(), torch.randn(2, 1, 16)


@slow("conv3d")
def _() -> Any:
    layers = nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(6, 8, 3)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 4)), torch.randn(2, 2, 8, 8, 8)


@slow("siamese")
def _() -> Any:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)), nn.Linear(8, 1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.out((self.body(a) - self.body(b)).abs())

    return Twins(), (torch.randn(3, 12), torch.randn(3, 12))


@slow("cosine_towers")
def _() -> Any:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return F.cosine_similarity(self.a(a), self.b(b))

    return Towers(), (torch.randn(3, 12), torch.randn(3, 12))


@slow("pointnet")
def _() -> Any:
    class Points(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 12, 1))
            self.out = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.point(x).max(2)[0])

    return Points(), torch.randn(2, 3, 15)


@slow("graph_convolution")
def _() -> Any:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 3)
            self.register_buffer("links", torch.rand(7, 7).round())

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.links @ self.a(x))
            return self.out(F.relu(self.links @ self.b(x)).mean(1))

    return Graph(), torch.randn(2, 7, 6)


@slow("message_passing_scatter")
def _() -> Any:
    class Messages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.message, self.out = nn.Linear(6, 12), nn.Linear(24, 12), nn.Linear(12, 3)
            self.register_buffer("edges", torch.randint(0, 9, (2, 20)))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.embed(x))
            m = F.relu(self.message(torch.cat([x[self.edges[0]], x[self.edges[1]]], -1)))
            index = self.edges[1][:, None].expand_as(m)
            return self.out(torch.zeros_like(x).scatter_add(0, index, m) + x)

    return Messages(), torch.randn(9, 6)


@slow("deep_sets")
def _() -> Any:
    class Sets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each = nn.Sequential(nn.Linear(5, 12), nn.ELU(), nn.Linear(12, 8))
            self.all = nn.Sequential(nn.Linear(8, 10), nn.ELU(), nn.Linear(10, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.all(self.each(x).sum(1))

    return Sets(), torch.randn(2, 7, 5)


@slow("highway")
def _() -> Any:
    class Highway(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.h, self.t, self.out = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            t = torch.sigmoid(self.t(x))
            return self.out(torch.lerp(x, F.relu(self.h(x)), t))

    return Highway(), torch.randn(3, 6)


@slow("film")
def _() -> Any:
    class Film(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.film, self.out = nn.Conv2d(3, 8, 3), nn.Linear(4, 16), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            scale, shift = self.film(c)[..., None, None].chunk(2, 1)
            return self.out(F.relu(self.conv(x) * (1 + scale) + shift))

    return Film(), (image(), torch.randn(2, 4))


@slow("hypernetwork")
def _() -> Any:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.inp, self.out = nn.Linear(4, 8 * 6), nn.Linear(5, 6), nn.Linear(8, 2)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            weight = self.make(c).view(len(x), 8, 6)
            return self.out(F.relu(torch.bmm(weight, F.relu(self.inp(x))[..., None])[..., 0]))

    return Hyper(), (torch.randn(3, 5), torch.randn(3, 4))


@slow("wide_and_deep")
def _() -> Any:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(9, 4) for _ in range(3))
            self.deep, self.wide = nn.Sequential(nn.Linear(12 + 5, 16), nn.ReLU(), nn.Linear(16, 8)), nn.Linear(5, 8)
            self.out = nn.Linear(8, 1)

        def forward(self, codes: Tensor, x: Tensor) -> Tensor:
            rows = [table(codes[:, i]) for i, table in enumerate(self.tables)]
            return self.out(F.relu(self.deep(torch.cat([*rows, x], 1)) + self.wide(x)))

    return Wide(), (torch.randint(0, 9, (3, 3)), torch.randn(3, 5))


class Cell(nn.Module):
    """A gated recurrent cell written by hand, one fused projection for all gates."""

    def __init__(self, lstm: bool) -> None:
        super().__init__()
        self.lstm, self.size = lstm, 10
        self.x, self.h, self.out = nn.Linear(6, 40 if lstm else 30), nn.Linear(10, 40 if lstm else 30), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(len(x), self.size)
        for t in range(x.shape[1]):
            a, b = self.x(x[:, t]), self.h(h)
            if self.lstm:
                i, f, g, o = (a + b).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (r, z, n), (hr, hz, hn) = a.chunk(3, 1), b.chunk(3, 1)
                z = (z + hz).sigmoid()
                h = (1 - z) * torch.tanh(n + (r + hr).sigmoid() * hn) + z * h
        return self.out(h)


@slow("lstm_cell_by_hand")
def _() -> Any:
    return Cell(True), torch.randn(2, 4, 6)


@slow("gru_cell_by_hand")
def _() -> Any:
    return Cell(False), torch.randn(2, 4, 6)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp_min(0) ** 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@slow("custom_autograd_function")
def _() -> Any:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(Squared.apply(self.a(x)))

    return Custom(), torch.randn(3, 6)


@slow("repvgg")
def _() -> Any:
    def block(i: int) -> nn.Module:
        return nn.Sequential(Sum(conv_bn(i, i, act=False), conv_bn(i, i, 1, act=False), nn.BatchNorm2d(i)), nn.ReLU())

    return classifier(conv_bn(3, 8), block(8), block(8), width=8), image()


@slow("window_attention")
def _() -> Any:
    class Windows(nn.Module):
        """Swin-like: windows of a shifted image, attention inside, and back."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            b, c, h, w = x.shape
            y = torch.roll(x, (-2, -2), (2, 3)).view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
            q, k, v = self.qkv(y).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
            y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
            return x + torch.roll(y, (2, 2), (2, 3))

    return classifier(conv_bn(3, 8), Windows(), conv_bn(8, 8), width=8), image(8)
