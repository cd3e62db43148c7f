"""Running a forward pass on `meta` tensors: widths without weights, while positions, masks and routing stay real numbers.

Models look at positions and masks ("are all tokens valid?"), which meta tensors cannot answer. So integers and booleans are
kept on the CPU, everything else on meta; an op that gets both runs on meta. Choices that depend on weights (which expert?)
are made in turn, so that all of them are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_any, tree_map, tree_map_only

_META, _CPU = torch.device("meta"), torch.device("cpu")


def is_weightless(model: nn.Module) -> bool:
    """Whether any tensor of the network is on meta."""
    return any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def real_positions(example: Any) -> Any:
    """An example with its integer inputs real: token zero everywhere where they were on meta."""

    def real(t: Tensor) -> Tensor:
        return torch.zeros_like(t, device=_CPU) if t.is_meta and _countable(t.dtype) else t

    return tree_map_only(Tensor, real, example)


def run(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """One op on tensors of which some may be on meta."""
    if not tree_any(_is_meta, (args, kwargs)):
        return _without_meta(func, args, dict(kwargs))
    args, kwargs = tree_map(_unmasked, (args, kwargs)) if "index" in func._schema.name else (args, kwargs)
    if func._schema.name == "aten::_grouped_mm" and args[0].ndim == 2 and args[1].ndim == 3:
        # its meta kernel takes one type only
        return args[0].new_empty((args[0].shape[0], args[1].shape[2]), device=_META)
    out = func(*_on_meta(args), **_on_meta(kwargs))
    return _in_turn(func, args, out) if func._schema.name in _CHOICES else out


_CHOICES = {"aten::topk", "aten::sort", "aten::argsort", "aten::argmax", "aten::argmin", "aten::multinomial"}


def _countable(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _on_meta(values: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t if t.is_meta or t.ndim == 0 else t.to(_META), values)


def _unmasked(value: Any) -> Any:
    """A boolean mask as the positions it selects, which is what indexing with it means."""
    if isinstance(value, list) and any(isinstance(v, Tensor) and v.dtype == torch.bool and not v.is_meta for v in value):
        flat = [v.nonzero().unbind(1) if isinstance(v, Tensor) and v.dtype == torch.bool else (v,) for v in value]
        return [v for each in flat for v in each]
    return value


def _without_meta(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """New tensors and copies that were asked for on meta: countable ones are made on the CPU instead."""
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
        real = func(*args, **{**kwargs, "device": _CPU}) if _small(args, kwargs) else None
        if isinstance(real, Tensor) and _countable(real.dtype):
            return real
    try:
        return func(*args, **kwargs)
    except NotImplementedError:
        # some counts exist for integers on accelerators only
        floats = tree_map_only(Tensor, lambda t: t.float() if _countable(t.dtype) else t, args)
        return func(*floats, **kwargs)


def _small(args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether what is asked for is a matter of positions: not a floating-point type."""
    dtype = kwargs.get("dtype")
    return dtype is None or _countable(dtype)


def _in_turn(func: Any, args: Any, out: Any) -> Any:
    """Positions chosen by values nobody knows: all of them in turn."""
    size = args[0].shape[-1] if args[0].ndim else 1

    def chosen(t: Tensor) -> Tensor:
        return (torch.arange(t.numel()) % max(size, 1)).reshape(t.shape)

    return tree_map_only(Tensor, lambda t: chosen(t) if _countable(t.dtype) else t, out)
