"""The judge of the side by side: knows no tool, only a dense network and a cut one made from it.

The elements of every tensor are numbered before a cut, so that the cut network tells which elements stayed and where they went.
It is right where it computes what the dense network computes with every removed element at zero (or, where that means nothing,
with those at zero that read a removed channel), its norms seeing only the channels that stay.
"""

from __future__ import annotations

import copy
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from resect.anatomy.checking import difference, outputs

TOLERANCE = 1e-4
Example = tuple[tuple[Any, ...], dict[str, Any]]


# the record of a cut ------------------------------------------------------------------------------------------------------


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every float parameter and buffer under each of its names."""
    found = (
        (f"{path}.{leaf}" if path else leaf, tensor)
        for path, module in model.named_modules()
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    return {name: tensor for name, tensor in found if tensor is not None and tensor.is_floating_point()}


def number(model: nn.Module) -> None:
    """Replace the elements of every tensor by their positions (exact in float32: these networks are small)."""
    for tensor in tensors(model).values():
        tensor.data = torch.arange(tensor.numel(), dtype=torch.float32).view(tensor.shape).to(tensor.dtype)


def read(numbered: nn.Module, dense: nn.Module) -> dict[str, Tensor]:
    """From a cut network of numbers: for every tensor, the flat position in the dense tensor that each element came from."""
    return {name: tensor.detach().round().long() for name, tensor in tensors(numbered).items() if name in tensors(dense)}


def fill(numbered: nn.Module, dense: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Give a cut network of numbers its weights back."""
    old, new = tensors(dense), tensors(numbered)
    for name, positions in kept.items():
        new[name].data = old[name].detach().flatten()[positions]


# the judge ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A cut network. kept: what `read` found, None where weights are computed from others; scale: factors of masked rows."""

    small: nn.Module
    kept: Mapping[str, Tensor] | None
    scale: Mapping[str, Tensor] = field(default_factory=dict)


def masked(dense: nn.Module, kept: Mapping[str, Tensor], *, readers_only: bool) -> nn.Module:
    """The dense network with what was removed zeroed: everything, or only where a row of the weight stays (its readers)."""
    model = copy.deepcopy(dense)
    for name, tensor in tensors(dense).items():
        if name not in kept or kept[name].numel() == tensor.numel():
            continue
        stays = torch.zeros(tensor.numel(), dtype=torch.bool)
        stays[kept[name].flatten()] = True
        stays = stays.view(tensor.shape)
        if readers_only:
            gone = ~stays.flatten(1).any(1) if stays.ndim > 1 else slice(None)
            stays[gone] = True
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        zeroed = torch.where(stays, tensor.detach(), 0)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(zeroed, requires_grad=False)
        else:
            owner._buffers[leaf] = zeroed
    return model


@dataclass(frozen=True, kw_only=True)
class Narrow:
    """What a norm of the cut network takes a mean over: how many channels; which of all (None where no weight tells)."""

    channels: int
    stays: Tensor | None

    def only(self, x: Tensor, axis: int) -> Tensor:
        """x with the removed channels of an axis at zero, so that sums are sums over those that stay."""
        if self.stays is None:
            return x
        return x * self.stays.view([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


class Narrowed(TorchFunctionMode):
    """Layer and group norms of a masked network see only the channels that the cut network has."""

    def __init__(self) -> None:
        super().__init__()
        self.current: list[Narrow | None] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        narrow = self.current[-1] if self.current else None
        if narrow is not None and func is F.layer_norm:
            return _layer_norm(narrow, *args, **(kwargs or {}))
        if narrow is not None and func is F.group_norm:
            return _group_norm(narrow, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _standard(x: Tensor, axes: Sequence[int], count: int, eps: float) -> Tensor:
    mean = x.sum(axes, keepdim=True) / count
    spread = (x**2).sum(axes, keepdim=True) / count - mean**2
    return (x - mean) / (spread + eps).sqrt()


def _layer_norm(narrow: Narrow, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    x = narrow.only(x, -1) if len(shape) == 1 else x
    y = _standard(x, list(range(-len(shape), 0)), narrow.channels, eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _group_norm(narrow: Narrow, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    parts = narrow.only(x, 1).unflatten(1, (groups, -1)).flatten(2)
    y = _standard(parts, [2], narrow.channels * math.prod(x.shape[2:]), eps).view_as(x)
    y = y if weight is None else y * weight.view(-1, *[1] * (x.ndim - 2))
    return y if bias is None else y + bias.view(-1, *[1] * (x.ndim - 2))


def _channels(norm: nn.Module) -> int | None:
    """How many channels a norm module takes a mean over; None for other modules."""
    weight = getattr(norm, "weight", None)
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels // norm.num_groups
    if _is_rms(norm) or _is_own_layer_norm(norm) or _is_grn(norm):
        return weight.numel() if isinstance(weight, Tensor) else None
    shape = getattr(norm, "normalized_shape", None)
    return math.prod(shape) if isinstance(shape, (tuple, list)) else None


def _is_rms(norm: nn.Module) -> bool:
    return "RMSNorm" in type(norm).__name__ or type(norm).__name__ == "T5LayerNorm"


def _is_own_layer_norm(norm: nn.Module) -> bool:
    """A layer norm written out by hand, as in DeBERTa."""
    return type(norm).__name__.endswith("LayerNorm") and not hasattr(norm, "normalized_shape") and not _is_rms(norm)


def _is_grn(norm: nn.Module) -> bool:
    """The global response norm of ConvNeXt V2, which divides by a mean over channels."""
    return type(norm).__name__.endswith("GRN")


@contextmanager
def narrowed(full: nn.Module, cut: Cut) -> Iterator[None]:
    """For the time of the context the norms of the masked network `full` see only the channels that the cut one has."""
    with Narrowed() as mode, ExitStack() as hooks:
        others = dict(cut.small.named_modules())
        for path, module in full.named_modules():
            before, now = _channels(module), _channels(others[path]) if path in others else None
            if before is None or now is None:
                continue
            stays = None
            if cut.kept is not None and f"{path}.weight" in cut.kept and getattr(module, "weight", None) is not None:
                stays = torch.zeros(module.weight.numel())  # type: ignore[union-attr, operator]
                stays[cut.kept[f"{path}.weight"].flatten()] = 1
            narrow = None if before == now else Narrow(channels=now, stays=stays)
            for hook in _hooks(module, narrow, before, mode):
                hooks.callback(hook.remove)
        yield


def _hooks(module: nn.Module, narrow: Narrow | None, before: int, mode: Narrowed) -> list[Any]:
    if _is_rms(module):
        return _rms_hooks(module, narrow, before)
    if _is_grn(module):
        return [] if narrow is None else [module.register_forward_hook(lambda m, x, y: _grn(m, narrow, x[0], y, before))]
    if _is_own_layer_norm(module):
        return [] if narrow is None else [module.register_forward_hook(lambda m, x, y: _own_layer_norm(m, narrow, x[0]))]
    return [
        module.register_forward_pre_hook(lambda m, inputs: mode.current.append(narrow)),
        module.register_forward_hook(lambda m, inputs, y: mode.current.pop() and None),
    ]


def _own_layer_norm(module: Any, narrow: Narrow, x: Tensor) -> Tensor:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-5))
    return _layer_norm(narrow, x, module.weight.shape, module.weight, getattr(module, "bias", None), eps)


def _grn(module: Any, narrow: Narrow, x: Tensor, y: Tensor, before: int) -> Tensor:
    """What is multiplied by the norm is divided by a mean over channels; x and the bias are added to it."""
    return x + module.bias + (y - x - module.bias) * (narrow.channels / before)


def _rms_hooks(module: nn.Module, narrow: Narrow | None, before: int) -> list[Any]:
    """A mean over all channels becomes a mean over those that stay when the input, and then the output, is scaled."""
    if narrow is None:
        return []
    root = math.sqrt(before / narrow.channels)
    return [
        module.register_forward_pre_hook(lambda m, inputs: (narrow.only(inputs[0], -1) * root, *inputs[1:])),
        module.register_forward_hook(lambda m, inputs, y: y / root),
    ]


def shuffled(example: Example) -> Example:
    """Other inputs of the same shapes and values in other places: not the ones that the tools were shown."""
    draw = torch.Generator().manual_seed(1)

    def mix(x: Any) -> Any:
        return x.flatten()[torch.randperm(x.numel(), generator=draw)].view(x.shape) if isinstance(x, Tensor) else x

    return tree_map(mix, example)


def gaps(dense: nn.Module, cut: Cut, example: Example) -> dict[str, float]:
    """Difference of the cut network from each of the networks that it may equal, over two inputs, relative to the output."""
    assert cut.kept is not None
    both = (example, shuffled(example))
    got = [outputs(cut.small, inputs) for inputs in both]
    found = {}
    for way in ("all", "readers", *(["scaled"] if cut.scale else [])):
        full = masked(dense, cut.kept, readers_only=way == "readers")
        for name, factor in cut.scale.items() if way == "scaled" else ():
            tensors(full)[name].data.mul_(factor)
        with ExitStack() as stack:
            if way != "readers":
                stack.enter_context(narrowed(full, cut))
            found[way] = max(difference(mine, outputs(full, inputs)) for mine, inputs in zip(got, both))
    return found


def judged(dense: nn.Module, work: Callable[[], Cut], example: Example) -> dict[str, Any]:
    """Verdict, seconds and megabytes of one tool on one network."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        cut = work()
    except Exception as error:
        return {"verdict": "fails", "why": told_of("pruning", error), "seconds": time.perf_counter() - start}
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    full, now = (sum(p.numel() for p in m.parameters()) for m in (dense, cut.small))
    result = {"seconds": seconds, "megabytes": (peak - before) / 1024, "removed": 1 - now / max(full, 1)}
    if full == now:
        return {**result, "verdict": "nothing"}
    try:
        shapes = [[tuple(y.shape) for y in outputs(m, example)] for m in (cut.small, dense)]
    except Exception as error:
        return {**result, "verdict": "fails", "why": told_of("forward pass of the pruned network", error)}
    if shapes[0] != shapes[1]:
        return {**result, "verdict": "fails", "why": f"outputs of other shapes: {shapes[0]} for {shapes[1]}"[:200]}
    if cut.kept is None:
        return {**result, "verdict": "not judged", "why": "weights are computed from other weights"}
    try:
        found = gaps(dense, cut, example)
    except Exception as error:
        return {**result, "verdict": "not judged", "why": told_of("reference", error)}
    gap, effect = min(found.values()), difference(outputs(cut.small, example), outputs(dense, example))
    result |= {"gap": gap, "gaps": found, "effect": effect}
    if effect < 10 * TOLERANCE:
        return {**result, "verdict": "not judged", "why": f"the cut changes the outputs by {effect:.0e} only"}
    return {**result, "verdict": "right" if gap <= TOLERANCE else "wrong"}


def told_of(where: str, error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{where}: {type(error).__name__}: {lines[0]}"[:200]
