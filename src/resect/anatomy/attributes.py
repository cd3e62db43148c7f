"""Integers of modules that repeat a width: a table for what torch defines, names that are common, and a guided search.

A rule for one module class is added with `attribute_rule`; whatever a rule says is checked by cutting (see `checking`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import torch
from torch import nn

from resect.anatomy.anatomy import AttributeEdit, Group, Slices

Edits = tuple[AttributeEdit, ...]
AttributeRule = Callable[[nn.Module, str, int], Sequence[str | tuple[str, int]]]

_COMPUTED = re.compile(r"(.*?)\.?parametrizations\.(\w+)\.original\d?$")
_HEADS = re.compile(
    r"^(num|n|nb)_?(attention_|attn_|local_|kv_|key_value_|k_?v_|query_|q_)*heads?(_kv)?$|^heads?$|^h$|^num_attention_heads$|^kv_heads$"
)
_SIZES = re.compile(
    r"^(all_head_size|split_size|inner_dim|inner_size|q_size|kv_size|q_dim|kv_dim|key_dim|query_dim|value_dim|attn_dim|attention_dim"
    r"|all_head_dim|qkv_dim|attention_inner_dim|proj_dim|projection_size)$"
)
_NEVER = re.compile(r"^(training|layer_idx|layer_id|padding_idx|block_idx|call_super_init)$|^_")

_TABLE: list[tuple[type[nn.Module], dict[tuple[str, int], tuple[str | tuple[str, int], ...]]]] = [
    (nn.Linear, {("weight", 0): ("out_features",), ("weight", 1): ("in_features",)}),
    (nn.Bilinear, {("weight", 0): ("out_features",), ("weight", 1): ("in1_features",), ("weight", 2): ("in2_features",)}),
    (nn.Embedding, {("weight", 1): ("embedding_dim",)}),
    (nn.EmbeddingBag, {("weight", 1): ("embedding_dim",)}),
    (nn.LayerNorm, {("weight", -1): (("normalized_shape", -1),)}),
    (nn.RMSNorm, {("weight", -1): (("normalized_shape", -1),)}),
    (nn.modules.batchnorm._NormBase, {("weight", 0): ("num_features",), ("running_mean", 0): ("num_features",)}),
    (nn.PReLU, {("weight", 0): ("num_parameters",)}),
]

_RULES: list[tuple[type[nn.Module], AttributeRule]] = []


def attribute_rule(kind: type[nn.Module]) -> Callable[[AttributeRule], AttributeRule]:
    """Register which attributes of modules of class `kind` repeat an axis of one of their own tensors.

    The rule takes (module, tensor name in the module, axis) and returns attribute names, or (name, entry) for tuples.
    """

    def register(function: AttributeRule) -> AttributeRule:
        _RULES.insert(0, (kind, function))
        return function

    return register


@attribute_rule(nn.modules.conv._ConvNd)
def _convolution(module: nn.Module, tensor: str, axis: int) -> Sequence[str]:
    if tensor != "weight" or axis > 1:
        return ()
    assert isinstance(module, nn.modules.conv._ConvNd)
    if module.groups > 1 and module.groups == module.in_channels:
        return ("out_channels", "in_channels", "groups") if axis == 0 else ()
    return ("in_channels",) if (axis == 0) == bool(module.transposed) else ("out_channels",)


@attribute_rule(nn.GroupNorm)
def _group_norm(module: nn.Module, tensor: str, axis: int) -> Sequence[str]:
    if tensor != "weight":
        return ()
    return ("num_channels",) if module.num_groups == 1 else ("num_channels", "num_groups")


@attribute_rule(nn.Module)
def _by_table(module: nn.Module, tensor: str, axis: int) -> Sequence[str | tuple[str, int]]:
    for kind, entries in _TABLE:
        if isinstance(module, kind):
            ndim = getattr(module, tensor).ndim if getattr(module, tensor, None) is not None else 1
            return entries.get((tensor, axis)) or entries.get((tensor, axis - ndim)) or ()
    if type(module).__name__ == "Conv1D" and tensor == "weight":
        return ("nx",) if axis == 0 else ("nf",)
    return ()


def owner(model: nn.Module, tensor: str) -> tuple[str, str]:
    """The module that a tensor serves and its name there; a parametrized weight serves the module it is computed for."""
    computed = _COMPUTED.match(tensor)
    if computed:
        return computed[1], computed[2]
    path, _, leaf = tensor.rpartition(".")
    return path, {"weight_v": "weight"}.get(leaf, leaf)


def known(model: nn.Module, groups: Sequence[Group], aliases: dict[str, tuple[str, ...]]) -> Edits:
    """What the rules know about the modules that own tensors of the groups."""
    steps: dict[tuple[str, str, int | None, str], int] = {}
    for group in groups:
        for part in group.slices:
            for name in (part.tensor, *aliases.get(part.tensor, ())):
                for key, step in _of_axis(model, group, part, name):
                    steps[key] = max(steps.get(key, 0), step)
    return tuple(AttributeEdit(module=m, attribute=a, item=i, group=g, step=s) for (m, a, i, g), s in steps.items())


def _of_axis(model: nn.Module, group: Group, part: Slices, name: str) -> Iterator[tuple[tuple[str, str, int | None, str], int]]:
    path, leaf = owner(model, name)
    module = model.get_submodule(path)
    tensor = getattr(module, leaf, None)
    size = tensor.shape[part.axis] * part.blocks if isinstance(tensor, torch.Tensor) and part.axis < tensor.ndim else 0
    said = (r(module, leaf, part.axis) for kind, r in _RULES if isinstance(module, kind))
    for entry in next((entries for entries in said if entries), ()):
        attribute, item = entry if isinstance(entry, tuple) else (entry, None)
        value = getattr(module, attribute, None)
        value = value[item] if item is not None and value is not None else value
        width = part.index.shape[1]
        if isinstance(value, int) and size and (width * value) % size == 0:
            yield (path, attribute, item, group.name), width * value // size


# attributes by name and value ---------------------------------------------------------------------------------------------


def guessed(model: nn.Module, group: Group) -> Edits:
    """Attributes around a group of heads that say by their name that they count its heads or their joint width."""
    if group.kind != "head":
        return ()
    return tuple(e for e in candidates(model, group) if _named(e) and "." not in e.attribute)


def _named(edit: AttributeEdit) -> bool:
    leaf = edit.attribute.rpartition(".")[2]
    return bool(_HEADS.match(leaf) or _SIZES.match(leaf))


def candidates(model: nn.Module, group: Group) -> list[AttributeEdit]:
    """Every integer of the modules around a group that is its number of units, or its width on some tensor."""
    found = []
    widths = sorted({p.index.shape[1] for p in group.slices if p.role != "carrier"})
    steps = {1, *widths, *(w // widths[0] for w in widths if w % widths[0] == 0)} if widths else {1}
    for path in _around(model, group):
        for attribute, item, value in _integers(model.get_submodule(path)):
            step = value // group.units
            if value % group.units == 0 and step in steps:
                found.append(AttributeEdit(module=path, attribute=attribute, item=item, group=group.name, step=step))
    return found


def _around(model: nn.Module, group: Group) -> list[str]:
    """The modules that own a group's weights and those above them, innermost first, up to the one they have in common.

    A stream runs through modules without weights as well: all below the common one.
    """
    paths = [owner(model, p.tensor)[0] for p in group.slices]
    common = _shared(paths)
    if group.kind == "stream":
        return [f"{common}.{name}".strip(".") for name, _ in model.get_submodule(common).named_modules()]
    inside: dict[str, None] = {}
    for path in paths:
        while path and path != common:
            inside[path] = None
            path = path.rpartition(".")[0]
    # the modules between which tensors pass are as likely to hold the number as the owners
    siblings = [f"{common}.{name}".lstrip(".") for name, _ in model.get_submodule(common).named_children()]
    return list(dict.fromkeys([common, *sorted(inside, key=lambda p: -p.count(".")), *siblings]))


def _shared(paths: Sequence[str]) -> str:
    shared = []
    for parts in zip(*(p.split(".") for p in paths)):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _integers(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    standard = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.MultiheadAttention)
    if standard:
        return
    for name, value in vars(module).items():
        if _NEVER.match(name):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield name, None, value
        elif isinstance(value, (tuple, list)) and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            yield from ((name, i, v) for i, v in enumerate(value) if v > 0)
    config = getattr(module, "config", None)
    if config is not None and not isinstance(config, (nn.Module, dict)):
        for name, value in vars(config).items() if hasattr(config, "__dict__") else ():
            if isinstance(value, int) and not isinstance(value, bool) and value > 0 and not _NEVER.match(name):
                yield f"config.{name}", None, value


def alternatives(model: nn.Module, group: Group, base: Edits) -> Iterator[Edits]:
    """Sets of edits worth trying for a group that the known ones do not make run, likeliest first; at most about 60."""
    found = [c for c in candidates(model, group) if c not in base]
    own = [c for c in found if "." not in c.attribute]
    yield ()
    named = [c for c in found if _named(c)]
    for chosen in (named, own, found):
        if chosen:
            yield tuple(chosen)
    for chosen in (own, found):
        for name in dict.fromkeys(c.attribute for c in chosen):
            yield tuple(c for c in chosen if c.attribute == name)
    yield from list(combinations(own, 2))[:40]
