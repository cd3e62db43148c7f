"""Networks with something in them that is easily got wrong."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.convolutional import conv_bn
from zoo.registry import entry, image


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
