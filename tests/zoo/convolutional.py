"""Convolutional networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import entry, image


@entry("cnn_flatten")
def _() -> Any:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(12 * 16, 20), nn.ReLU(), nn.Linear(20, 5)),
    )
    return net, image()


@entry("lenet")
def _() -> Any:
    net = nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
    )
    return net, image(28, 1)


def conv_bn(i: int, o: int, k: int = 3, s: int = 1, g: int = 1, act: bool = True, d: int = 1) -> nn.Sequential:
    layers = [nn.Conv2d(i, o, k, s, d * (k // 2), groups=g, bias=False, dilation=d), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if act else nn.Sequential(*layers)


class Block(nn.Module):
    """Basic (k = 3, 3) or bottleneck (1, 3, 1) residual block, plain or grouped; padded shortcut where asked."""

    def __init__(self, i: int, o: int, s: int = 1, bottleneck: bool = False, groups: int = 1, padded: bool = False) -> None:
        super().__init__()
        mid = o // 2 if bottleneck else o
        kernels = (
            [(i, mid, 1, 1, 1), (mid, mid, 3, s, groups), (mid, o, 1, 1, 1)]
            if bottleneck
            else [(i, o, 3, s, 1), (o, o, 3, 1, 1)]
        )
        self.body = nn.Sequential(*(conv_bn(*k, act=n + 1 < len(kernels)) for n, k in enumerate(kernels)))
        self.padded, self.stride, self.more = padded, s, o - i
        self.short = nn.Identity() if padded or (i == o and s == 1) else conv_bn(i, o, 1, s, act=False)

    def forward(self, x: Tensor) -> Tensor:
        short = self.short(x)
        if self.padded and self.more:
            short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(self.body(x) + short)


class ResNet(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (8, 16, 24), blocks: int = 1, **kwargs: Any) -> None:
        super().__init__()
        self.stem = conv_bn(3, widths[0])
        layers: list[nn.Module] = []
        before = widths[0]
        for n, width in enumerate(widths):
            for b in range(blocks):
                layers.append(Block(before, width, 2 if n and not b else 1, **kwargs))
                before = width
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(widths[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


@entry("resnet_basic")
def _() -> Any:
    return ResNet(blocks=2), image()


@entry("resnet_bottleneck")
def _() -> Any:
    return ResNet(blocks=2, bottleneck=True), image()


@entry("resnet_padded")
def _() -> Any:
    return ResNet(blocks=2, padded=True), image()


@entry("resnext")
def _() -> Any:
    return ResNet((16, 32), blocks=2, bottleneck=True, groups=4), image()


class Inverted(nn.Module):
    def __init__(self, i: int, o: int, s: int, expand: int, squeeze: bool) -> None:
        super().__init__()
        mid = i * expand
        self.expand = conv_bn(i, mid, 1)
        self.depthwise = conv_bn(mid, mid, 3, s, mid)
        self.squeeze = (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(mid, 4, 1), nn.SiLU(), nn.Conv2d(4, mid, 1), nn.Sigmoid())
            if squeeze
            else None
        )
        self.project, self.residual = conv_bn(mid, o, 1, act=False), i == o and s == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y = y * self.squeeze(y) if self.squeeze else y
        y = self.project(y)
        return x + y if self.residual else y


def _mobile(squeeze: bool) -> nn.Module:
    blocks = [Inverted(8, 8, 1, 2, squeeze), Inverted(8, 12, 2, 3, squeeze), Inverted(12, 12, 1, 3, squeeze)]
    return nn.Sequential(conv_bn(3, 8), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


@entry("mobilenet")
def _() -> Any:
    return _mobile(False), image()


@entry("efficientnet")
def _() -> Any:
    return _mobile(True), image()


@entry("mobilenet_v1")
def _() -> Any:
    layers = [m for i, o in ((8, 12), (12, 16)) for m in (conv_bn(i, i, 3, 1, i), conv_bn(i, o, 1))]
    return nn.Sequential(conv_bn(3, 8), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)), image()


@entry("depthwise_multiplier")
def _() -> Any:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), nn.Conv2d(16, 6, 1))
    return net, image()


@entry("grouped")
def _() -> Any:
    net = nn.Sequential(
        conv_bn(3, 16), conv_bn(16, 24, 3, 1, 4), conv_bn(24, 12, 3, 1, 2), nn.Flatten(), nn.Linear(12 * 256, 5)
    )
    return net, image()


class GroupedConcat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.g, self.out = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(16, 16, 3, groups=2),
            nn.Conv2d(16, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.g(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1))))


@entry("grouped_fed_by_concat")
def _() -> Any:
    return GroupedConcat(), image()


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 6 * n), nn.ReLU(), nn.Conv2d(8 + 6 * n, 6, 3, padding=1)) for n in range(3)
        )
        self.out = nn.Linear(26, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.out(F.relu(x).mean((2, 3)))


@entry("densenet")
def _() -> Any:
    return Dense(), image()


class ShuffleUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            conv_bn(width // 2, width // 2, 1),
            conv_bn(width // 2, width // 2, 3, 1, width // 2, act=False),
            conv_bn(width // 2, width // 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        keep, work = x.chunk(2, 1)
        return shuffled(torch.cat([keep, self.branch(work)], 1), 2)


def shuffled(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


@entry("shufflenet_v2")
def _() -> Any:
    return nn.Sequential(conv_bn(3, 16), ShuffleUnit(16), ShuffleUnit(16), nn.Conv2d(16, 5, 1)), image()


class ShuffleGroups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.out = (
            conv_bn(3, 16),
            conv_bn(16, 16, 1, 1, 4),
            conv_bn(16, 16, 3, 1, 4),
            nn.Conv2d(16, 5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(shuffled(self.a(self.stem(x)), 4)))


@entry("channel_shuffle")
def _() -> Any:
    return ShuffleGroups(), image()


class Fire(nn.Module):
    def __init__(self, i: int) -> None:
        super().__init__()
        self.squeeze, self.one, self.three = nn.Conv2d(i, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


@entry("squeezenet")
def _() -> Any:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), Fire(8), nn.MaxPool2d(2), Fire(16), nn.Conv2d(16, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ), image()


class UNet(nn.Module):
    def __init__(self, upsample: bool) -> None:
        super().__init__()
        self.down1, self.down2, self.mid = conv_bn(3, 8), conv_bn(8, 12), conv_bn(12, 16)
        self.up2 = nn.Upsample(scale_factor=2) if upsample else nn.ConvTranspose2d(16, 16, 2, 2)
        self.up1 = nn.Upsample(scale_factor=2, mode="bilinear") if upsample else nn.ConvTranspose2d(12, 8, 2, 2)
        self.dec2, self.dec1, self.out = conv_bn(28, 12), conv_bn(20 if upsample else 16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.mid(F.max_pool2d(b, 2))
        b = self.dec2(torch.cat([self.up2(c), b], 1))
        return self.out(self.dec1(torch.cat([self.up1(b), a], 1)))


@entry("unet_transposed")
def _() -> Any:
    return UNet(False), image()


@entry("unet_upsample")
def _() -> Any:
    return UNet(True), image()


@entry("grouped_transposed")
def _() -> Any:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, 2, groups=4), nn.ReLU()),
        *(nn.ConvTranspose2d(12, 12, 3, groups=12), nn.Conv2d(12, 4, 1)),
    )
    return net, image(8)
