"""How a network enters the zoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Entry = Callable[[], tuple[nn.Module, Any]]
ZOO: dict[str, Entry] = {}
WHOLE: dict[str, Entry] = {}


def entry(name: str, *, quick: bool = True) -> Callable[[Entry], Entry]:
    """Register a network, `quick` ones for every law; weights and statistics are random: nothing is right by accident."""

    def register(make: Entry) -> Entry:
        def seeded() -> tuple[nn.Module, Any]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model, example = make()
                return settle(model), example

        WHOLE[name] = seeded
        if quick:
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
    lively(model)
    return model.eval()


def lively(model: nn.Module) -> None:
    """Weights of at least unit gain: with the small ones of an untrained transformer a wrong attention head hardly shows."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            size = float(weight.double().square().mean().sqrt()) if weight.numel() and weight.is_floating_point() else 1e9
            fan = 1 if id(weight) in embedded else 16 if weight.ndim < 2 else weight.numel() / weight.shape[0]
            if size < 1e-3 * fan**-0.5:
                weight.copy_(torch.randn(weight.shape, generator=draw) * fan**-0.5)
            elif size < fan**-0.5:
                weight.mul_(fan**-0.5 / size)


def image(size: int = 16, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size)
