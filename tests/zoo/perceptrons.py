"""Multi-layer perceptrons."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import entry, image


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
