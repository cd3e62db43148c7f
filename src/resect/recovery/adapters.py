"""Low-rank adapters: where a network is too large to train whole, only a product of two thin matrices beside each weight is."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from typing import Any

import torch
from torch import nn

from resect.errors import ModelError

# Adapters count twice their rank over their rank, as is usual; the learning rate does the rest.
SCALE = 2


def attach(model: nn.Module, rank: int) -> Any:
    """Put adapters into a network, in place, and freeze everything else; what comes back is for `merge`.

    rank: inner width of the adapters; those of a layer that is narrower are as wide as the layer. Adapted are linear layers,
    convolutions without groups and the projections of GPT-2, except those that are frozen, and those whose weight is used by
    another module too, or in another place: merging would change it there as well. Raises ModelError where nothing can be
    adapted. Source: Hu et al. 2021, arXiv 2106.09685.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    ranks = {name: min(rank, min(_sides(module))) for name, module in _adaptable(model).items()}
    if not ranks:
        raise ModelError(
            f"no layer of {type(model).__name__} can take an adapter: these are linear layers and convolutions without groups "
            "inside a network, whose weights require gradients and are used once; leave adapters out"
        )
    narrow = {name: own for name, own in ranks.items() if own < rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=SCALE * rank,
        target_modules="|".join(map(re.escape, ranks)),
        rank_pattern={f"^{re.escape(name)}": own for name, own in narrow.items()},
        alpha_pattern={f"^{re.escape(name)}": SCALE * own for name, own in narrow.items()},
    )
    with warnings.catch_warnings():
        # Whether a weight is stored transposed (GPT-2's projections are) peft finds out by itself, and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        adapted = LoraModel(model, config, "default")
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()  # small steps would be lost
    return adapted


def merge(adapted: Any, like: nn.Module) -> nn.Module:
    """The network that was adapted, with the adapters added to its weights; parameters require gradients as in `like`."""
    model: nn.Module = adapted.merge_and_unload(safe_merge=False)
    if "peft_config" in vars(model):
        del model.peft_config
    for (_, mine), (_, theirs) in zip(model.named_parameters(), like.named_parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return model


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {
        name: module
        for name, module in model.named_modules()
        if name and _takes_one(module) and module.weight.requires_grad and uses[id(module.weight)] == 1
    }


def _takes_one(module: nn.Module) -> bool:
    # Subclasses may use their weights in a way of their own, as the output projection of nn.MultiheadAttention does.
    if type(module) in (nn.Conv1d, nn.Conv2d):
        return bool(module.groups == 1)
    return type(module) is nn.Linear or (
        type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
    )


def _sides(module: nn.Module) -> tuple[int, int]:
    shape: tuple[int, ...] = module.weight.shape  # type: ignore[assignment]
    return shape[0], shape[1]
