"""Small networks of every kind, seeded and in eval mode: `ZOO[name]()` gives (model, example)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Entry = Callable[[], tuple[nn.Module, Any]]
ZOO: dict[str, Entry] = {}


def entry(name: str) -> Callable[[Entry], Entry]:
    """Register a network; weights and statistics are random, so that nothing is right by accident."""

    def register(make: Entry) -> Entry:
        def seeded() -> tuple[nn.Module, Any]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model, example = make()
                return settle(model), example

        ZOO[name] = seeded
        return make

    return register


def settle(model: nn.Module) -> nn.Module:
    """Eval mode, with norm parameters and statistics away from their neutral initial values."""
    for module in model.modules():
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor) and tensor.ndim == 1 and tensor.is_floating_point():
                with torch.no_grad():
                    spread = torch.rand_like(tensor) * 0.5
                    tensor.copy_(spread + 0.75 if name in ("weight", "running_var") else spread - 0.25)
    return model.eval()


def image(size: int = 16, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size)


# multi-layer perceptrons --------------------------------------------------------------------------------------------------


def _mlp(activation: nn.Module, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(12, 24, bias=bias), activation, nn.Linear(24, 16, bias=bias), activation, nn.Linear(16, 5, bias=bias)
    )


for _name, _activation in {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "elu": nn.ELU(),
}.items():
    entry(f"mlp_{_name}")(lambda a=_activation: (_mlp(a), torch.randn(3, 12)))  # type: ignore[misc]


@entry("mlp_no_bias")
def _() -> Any:
    return _mlp(nn.SiLU(), bias=False), torch.randn(3, 12)


@entry("mlp_batchnorm")
def _() -> Any:
    net = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 5))
    return net, torch.randn(3, 12)


@entry("mlp_prelu")
def _() -> Any:
    return nn.Sequential(nn.Linear(12, 24), nn.PReLU(24), nn.Linear(24, 16), nn.PReLU(), nn.Linear(16, 5)), torch.randn(3, 12)


@entry("mlp_layernorm")
def _() -> Any:
    return nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 5)), torch.randn(3, 12)


class ResidualMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(12, 16), nn.Linear(16, 5)
        self.up, self.down = (
            nn.ModuleList(nn.Linear(16, 20) for _ in range(2)),
            nn.ModuleList(nn.Linear(20, 16) for _ in range(2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for up, down in zip(self.up, self.down):
            x = x + down(F.relu(up(x)))
        return self.out(x)


@entry("mlp_residual")
def _() -> Any:
    return ResidualMLP(), torch.randn(3, 12)


class ConcatMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(12, 8), nn.Linear(12, 10), nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([F.relu(self.a(x)), torch.tanh(self.b(x))], -1))


@entry("mlp_concat")
def _() -> Any:
    return ConcatMLP(), torch.randn(3, 12)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mid, self.out = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inp(x))
        return self.out(F.relu(self.mid(F.relu(self.mid(x)))))


@entry("shared_layer")
def _() -> Any:
    return Shared(), torch.randn(3, 12)


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(12, 8)
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.encode(x)), self.encode.weight.t(), self.bias)


@entry("tied_autoencoder")
def _() -> Any:
    return TiedAutoencoder(), torch.randn(3, 12)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 7), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(x))
        return self.a(x) * torch.sigmoid(self.b(x))


@entry("two_readers")
def _() -> Any:
    return TwoReaders(), torch.randn(3, 12)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.neck = nn.Linear(12, 16), nn.Linear(16, 10)
        self.a, self.b = nn.Linear(10, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = F.relu(self.body(x))
        return {"a": self.a(F.relu(self.neck(x))), "nested": [self.b(x)]}


@entry("two_outputs")
def _() -> Any:
    return TwoOutputs(), torch.randn(3, 12)


class Bare(nn.Module):
    """Weights as bare parameters: x @ W, F.linear, einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(12, 16)), nn.Parameter(torch.randn(10, 16))
        self.w3, self.b1 = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x @ self.w1 + self.b1)
        return torch.einsum("bi,io->bo", torch.relu(F.linear(x, self.w2)), self.w3)


@entry("bare_parameters")
def _() -> Any:
    return Bare(), torch.randn(3, 12)


class Gated(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.up = nn.Linear(12, 32) if fused else nn.Linear(12, 16)
        self.gate, self.down = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            value, gate = self.up(x).chunk(2, -1)
        else:
            value, gate = self.up(x), self.gate(x)
        return self.down(F.silu(gate) * value)


@entry("mlp_gated")
def _() -> Any:
    return Gated(False), torch.randn(3, 12)


@entry("mlp_gated_fused")
def _() -> Any:
    return Gated(True), torch.randn(3, 12)


class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(12, 24), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).reshape(len(x), -1, 3).amax(-1))


@entry("maxout")
def _() -> Any:
    return Maxout(), torch.randn(3, 12)


class OuterProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.mid, self.out = nn.Linear(12, 4), nn.Linear(16, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.out(F.relu(self.mid((x[:, :, None] * x[:, None, :]).flatten(1))))


@entry("outer_product")
def _() -> Any:
    return OuterProduct(), torch.randn(3, 12)


class Gram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 6, 3), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2)
        return self.out((x @ x.transpose(1, 2)).flatten(1))


@entry("gram_features")
def _() -> Any:
    return Gram(), image()


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        a.relu_()
        both = torch.zeros(len(x), a.shape[1] + b.shape[1])
        both[:, : a.shape[1]] = a
        both[:, a.shape[1] :] = b.mul_(2).tanh_()
        return self.out(both)


@entry("in_place")
def _() -> Any:
    return InPlace(), torch.randn(3, 12)


class Permuted(nn.Module):
    """Units in another order by a literal list: nothing can be removed there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(12, 16), nn.Linear(16, 10), nn.Linear(10, 5)
        self.register_buffer("order", torch.randperm(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.b(torch.relu(self.a(x)).index_select(1, self.order))))


@entry("index_select_permutation")
def _() -> Any:
    return Permuted(), torch.randn(3, 12)


class StackSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches, self.out = nn.ModuleList(nn.Linear(12, 16) for _ in range(3)), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.stack([F.relu(b(x)) for b in self.branches]).sum(0))


@entry("stack_then_sum")
def _() -> Any:
    return StackSum(), torch.randn(3, 12)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.out = nn.Embedding(30, 12), nn.Linear(12 * 6, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.body(self.table(x).flatten(1))))


@entry("embedding_flatten")
def _() -> Any:
    return Embedded(), torch.randint(0, 30, (3, 6))


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(12, 16), nn.Linear(16, 10), nn.Linear(10, 5)
        self.a.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.b(torch.relu(self.a(x)).detach())))


@entry("detached_and_frozen")
def _() -> Any:
    return Detached(), torch.randn(3, 12)


# convolutional networks ---------------------------------------------------------------------------------------------------


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


class PixelUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 24, 3, padding=1),
            nn.Conv2d(6, 8, 3),
            nn.Conv2d(8, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.b(F.relu(self.a(x))), 2)
        return self.out(F.relu(self.c(F.relu(x))))


@entry("pixel_shuffle")
def _() -> Any:
    return PixelUp(), image(8)


@entry("groupnorm")
def _() -> Any:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.GroupNorm(1, 8),
        nn.ReLU(),
        nn.Conv2d(8, 5, 1),
    )
    return net, image()


@entry("instancenorm")
def _() -> Any:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3), nn.InstanceNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1)),
    )
    return net, image()


class GLUConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv1d(4, 16, 3), nn.Conv1d(8, 12, 3), nn.Conv1d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.glu(self.b(F.glu(self.a(x), 1)), 1))


@entry("glu_conv")
def _() -> Any:
    return GLUConv(), torch.randn(2, 4, 20)


class Res2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = conv_bn(3, 16, 1), nn.Conv2d(16, 5, 1)
        self.convs = nn.ModuleList(conv_bn(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.inp(x), 4, 1)
        done = [parts[0]]
        for part, conv in zip(parts[1:], self.convs):
            done.append(conv(part + done[-1]))
        return self.out(torch.cat(done, 1))


@entry("res2net")
def _() -> Any:
    return Res2(), image()


class HardCoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        return self.out(F.relu(self.b(x.view(x.shape[0], 8 * 64))))


@entry("hard_coded_view")
def _() -> Any:
    return HardCoded(), image()


class AttributeView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat = 8 * 64
        self.a, self.b, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        return self.out(F.relu(self.b(x.view(x.shape[0], self.flat))))


@entry("attribute_view")
def _() -> Any:
    return AttributeView(), image()


class Attended(nn.Module):
    """CBAM: channel attention by pooling, spatial attention by statistics over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.space, self.out = (
            nn.Conv2d(3, 8, 3),
            nn.Linear(8, 8),
            nn.Conv2d(2, 1, 3, padding=1),
            nn.Conv2d(8, 5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]
        return self.out(x * torch.sigmoid(self.space(torch.cat([x.mean(1, True), x.amax(1, True)], 1))))


@entry("cbam")
def _() -> Any:
    return Attended(), image()


@entry("weight_norm")
def _() -> Any:
    wn = nn.utils.parametrizations.weight_norm
    return nn.Sequential(wn(nn.Linear(12, 16)), nn.ReLU(), wn(nn.Linear(16, 10)), nn.ReLU(), nn.Linear(10, 5)), torch.randn(
        3, 12
    )


@entry("spectral_norm")
def _() -> Any:
    sn = nn.utils.parametrizations.spectral_norm
    net = nn.Sequential(sn(nn.Linear(12, 16)), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 5))
    return net, torch.randn(3, 12)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.table, self.rnn, self.mid, self.out = (
            nn.Embedding(20, 8),
            kind(8, 10, batch_first=True),
            nn.Linear(10, 12),
            nn.Linear(12, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.mid(self.rnn(self.table(x))[0])))


@entry("lstm_tagger")
def _() -> Any:
    return Recurrent(nn.LSTM), torch.randint(0, 20, (2, 5))


@entry("gru_tagger")
def _() -> Any:
    return Recurrent(nn.GRU), torch.randint(0, 20, (2, 5))


class Vgg(nn.Sequential):
    def __init__(self) -> None:
        plan = [(3, 8), (8, 8), None, (8, 12), (12, 12), None]
        layers = [
            m for p in plan for m in ([nn.MaxPool2d(2)] if p is None else [nn.Conv2d(*p, 3, padding=1), nn.ReLU(inplace=True)])
        ]
        super().__init__(
            *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5)
        )


@entry("vgg")
def _() -> Any:
    return Vgg(), image()
