"""The two tools of the side by side, each asked to remove half of everything at random: resect, and torch-pruning.

torch-pruning is given every hint that can be derived mechanically: what to leave alone so that the outputs keep their shapes,
which layers are attention and how many heads they have, and a rule for a norm that it does not know.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import resect
from judging import Cut, Example, fill, number, read


def by_resect(model: nn.Module, given: Any) -> Cut:
    """Dissect (which verifies) and cut by a random half plan over all groups; no hints."""
    anatomy = resect.dissect(model, given)
    plan = resect.Plan.random(anatomy, ratio=0.5)
    small = resect.cut(model, plan, verify=False)
    numbers = copy.deepcopy(model)
    number(numbers)
    return Cut(small=small, kept=read(resect.cut(numbers, plan, verify=False), model))


def output_layers(model: nn.Module, example: Example) -> list[Any]:
    """The layers and bare parameters that make what the network returns: those met first on the way back from its outputs."""
    made: dict[Any, nn.Module] = {}

    def note(module: nn.Module, _: Any, result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                made[tensor.grad_fn] = module

    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, kinds):
                hooks.callback(module.register_forward_hook(note).remove)
        result = model(*example[0], **example[1])
    stack = [t.grad_fn for t in tree_leaves(_plain(result)) if isinstance(t, Tensor) and t.grad_fn is not None]
    seen, found = set(stack), list[Any]()
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if node in made:
            found.append(made[node])
        elif variable is not None:
            found += [variable, *(m for m in model.modules() if isinstance(m, kinds) and variable in set(m.parameters(False)))]
        else:
            product = any(word in node.name() for word in ("mmBackward", "MmBackward", "Bmm", "Convolution", "ScaledDot"))
            fresh = {n for n, _ in node.next_functions if n is not None and n not in seen}
            stack += [n for n in fresh if not product or "AccumulateGrad" in n.name() or n.name() == "TBackward0"]
            seen |= fresh
    return list(dict.fromkeys(found))


def _plain(result: Any) -> Any:
    if isinstance(result, Mapping):
        return {k: v for k, v in result.items() if "cache" not in type(v).__name__.lower()}
    return result


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention module: its query, key and value layers (or the fused one), and its heads (0 where nothing tells)."""

    module: nn.Module
    layers: tuple[nn.Module, ...]
    heads: int
    kv: int


_QUERY, _KEY = ("q", "query", "q_proj", "q_lin", "query_proj"), ("k", "key", "k_proj", "k_lin", "key_proj")
_VALUE = ("v", "value", "v_proj", "v_lin", "value_proj")
_FUSED = ("qkv", "query_key_value", "qkv_proj", "Wqkv", "c_attn", "in_proj")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_KV = ("num_key_value_heads", "num_kv_heads", "kv")
_SIZE = ("head_dim", "attention_head_size", "head_size", "size", "key_value_proj_dim")
_WIDTH = ("all_head_size", "inner_dim", "embed_dim", "split_size", "hidden_size", "dim", "n_embd", "d_model")


def attentions(model: nn.Module) -> list[Attention]:
    """The attention modules as their names tell them, with the head counts their attributes or configurations give."""
    found = []
    for module in model.modules():
        child = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
        parts = [next((child[n] for n in names if n in child), None) for names in (_QUERY, _KEY, _VALUE)]
        fused = next((child[n] for n in _FUSED if n in child), None)
        heads = next((getattr(module, n) for n in _HEADS if isinstance(getattr(module, n, None), int)), None)
        heads = heads or getattr(getattr(module, "config", None), "num_attention_heads", None) or 0
        if isinstance(module, nn.MultiheadAttention):
            found.append(Attention(module=module, layers=(module,), heads=module.num_heads, kv=module.num_heads))
        elif all(p is not None for p in parts):
            kv = parts[1].out_features * heads // parts[0].out_features  # type: ignore[union-attr]
            found.append(Attention(module=module, layers=tuple(parts), heads=heads, kv=kv))  # type: ignore[arg-type]
        elif fused is not None:
            found.append(Attention(module=module, layers=(fused,), heads=heads, kv=heads))
        elif parts[0] is not None and "kv" in child:
            found.append(Attention(module=module, layers=(parts[0], child["kv"]), heads=0, kv=0))
    return found


def follow(attention: Attention, heads: int, width: int) -> None:
    """Set the attributes of an attention module after pruning, as the examples of torch-pruning do by hand."""
    module, layers = attention.module, attention.layers
    now = layers[0].out_features // (3 if len(layers) == 1 else 1)
    size = now // heads
    kv = layers[1].out_features // size if len(layers) == 3 else heads
    values = {**dict.fromkeys(_HEADS, heads), **dict.fromkeys(_KV, kv), **dict.fromkeys(_SIZE, size)}
    values |= {"num_key_value_groups": max(heads // max(kv, 1), 1)}
    for name, value in values.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)
    for name in _WIDTH:
        if getattr(module, name, None) == width:
            setattr(module, name, now)


def by_torch_pruning(model: nn.Module, example: Example, way: str) -> Cut:
    """Half of every width at random; only the output layers are ignored. way: "plain", or a hint about attention."""
    import torch_pruning as tp

    dense, found = copy.deepcopy(model), attentions(model) if way != "plain" else []
    if way in ("heads", "head dims"):
        found = [a for a in found if a.heads]
    widths = [getattr(a.layers[0], "out_features", 0) // (3 if len(a.layers) == 1 else 1) for a in found]
    hints: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
    ignored = output_layers(model, example)
    if way == "attention ignored":
        ignored += [layer for a in found for layer in a.layers]
    else:
        for a in found:
            hints["num_heads"] |= dict(zip(a.layers, (a.heads, a.kv, a.kv)))
    if way != "plain":
        hints["customized_pruners"] = {nn.RMSNorm: _rms_pruner()}
    if way == "heads":
        hints |= {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
    inputs = example[1] or example[0]
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.RandomImportance(),
        global_pruning=False,
        pruning_ratio=0.5,
        ignored_layers=ignored,
        **hints,
    )
    computed = any("parametrizations" in name for name, _ in model.named_modules())
    if not computed:
        number(model)
    torch.manual_seed(0)
    pruner.step()
    kept = None if computed else read(model, dense)
    if kept is not None:
        fill(model, dense, kept)
    scale: dict[str, Tensor] = {}
    if way in ("heads", "head dims"):
        for a, width in zip(found, widths):
            if isinstance(a.module, nn.MultiheadAttention):
                continue
            heads = pruner.num_heads[a.layers[0]]
            follow(a, heads, width)
            scale |= _rescaled(dense, model, a, heads, width)
    return Cut(small=model, kept=kept, scale=scale)


def hinted(model: nn.Module, way: str) -> bool:
    """Whether a hint applies to a network."""
    if way == "rules":
        return any(isinstance(m, nn.RMSNorm) for m in model.modules())
    return any(a.heads or way == "attention ignored" for a in attentions(model))


def _rms_pruner() -> Any:
    """The rule for nn.RMSNorm that torch-pruning lacks, written as its documentation says."""
    import torch_pruning as tp

    class RMSNormPruner(tp.pruner.function.BasePruningFunc):
        def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
            kept = sorted(set(range(layer.weight.numel())) - set(idxs))
            layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 0)
            layer.normalized_shape = (len(kept),)
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return layer.weight.numel()

        prune_in_channels, get_in_channels = prune_out_channels, get_out_channels

    return RMSNormPruner()


def _rescaled(dense: nn.Module, small: nn.Module, a: Attention, heads: int, width: int) -> dict[str, Tensor]:
    """Softmax scales taken from the size of a head change where its dimensions are cut: as factors of the dense query rows."""
    layer = a.layers[0]
    now = layer.out_features // (3 if len(a.layers) == 1 else 1)
    factor = math.sqrt((width / a.heads) / max(now / max(heads, 1), 1))
    if abs(factor - 1) < 1e-9:
        return {}
    name = next(n for n, m in small.named_modules() if m is layer)
    rows = torch.ones(dense.get_submodule(name).out_features)  # type: ignore[arg-type]
    rows[:width] = factor
    full = dense.get_submodule(name)
    return {f"{name}.{leaf}": rows.view(-1, *[1] * (t.ndim - 1)) for leaf, t in full._parameters.items() if t is not None}
