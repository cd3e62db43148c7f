"""dissect: from a network and an example to its anatomy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from resect.anatomy import rules
from resect.anatomy.anatomy import Anatomy, Contraction, Group, Pin
from resect.anatomy.attributes import guessed, known
from resect.anatomy.checking import leaves, outputs, settled
from resect.anatomy.grouping import Grouped, group
from resect.anatomy.watching import RULES, Watch
from resect.anatomy.weightless import is_weightless, real_positions
from resect.errors import ModelError

Example = tuple[tuple[Any, ...], dict[str, Any]]

assert rules.__all__, "importing the rules registers them"


def dissect(
    model: nn.Module,
    example: Any,
    *,
    ignore: Sequence[str] = (),
    only: Sequence[str] = (),
    verify: bool = True,
) -> Anatomy:
    """What can be removed from a network, found by watching one forward pass on `example`.

    `example` is a tensor, a tuple of positional inputs or a mapping of keyword inputs. `ignore` and `only` are regular
    expressions for the names of groups or of the modules (or weights) that write their units. With `verify` (not on meta
    tensors) every group is cut once and compared with its masked original; what differs is pinned.

    Raises ModelError when the network is in training mode or its forward pass fails.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> anatomy = dissect(net, torch.ones(1, 4))
    >>> [(g.name, g.kind, g.units) for g in anatomy.groups]
    [('0', 'hidden', 8)]
    """
    _check(model)
    inputs = real_positions(as_inputs(example)) if is_weightless(model) else as_inputs(example)
    watch = Watch(model)
    _forward(watch, model, inputs)
    grouped = group(watch.book)
    if _pin_unreached_readers(model, watch, grouped):
        grouped = group(watch.book)
    anatomy = _anatomy(model, inputs, watch, grouped)
    anatomy = _chosen(anatomy, ignore, only)
    guesses = tuple(e for g in anatomy.groups for e in guessed(model, g))
    anatomy = replace(anatomy, edits=known(model, anatomy.groups, dict(anatomy.aliases)))
    if verify and not is_weightless(model):
        _check_comparable(model, inputs)
        return settled(model, anatomy, guesses)
    return replace(anatomy, edits=(*anatomy.edits, *guesses))


def as_inputs(example: Any) -> Example:
    """An example as positional and keyword inputs."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        if len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], dict):
            return example[0], example[1]
        return tuple(example), {}
    return (example,), {}


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"dissect needs an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a scripted module cannot be cut; pass the nn.Module it was made from")
    lazy = next((n for n, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise ModelError(f"parameter {lazy!r} has no shape yet; run the lazy network once on an example before dissecting it")
    if model.training:
        raise ModelError(
            "the network is in training mode, where dropout and batch statistics hide its structure; call model.eval()"
        )


def _check_comparable(model: nn.Module, inputs: Example) -> None:
    """Verification compares outputs: there must be some, and they must be numbers."""
    found = [t for t in outputs(model, inputs) if t.is_floating_point()]
    if found and not any(t.numel() for t in found):
        raise ModelError("the network returns nothing for this example (is the batch empty?); give at least one example")
    if any(bool(t.isnan().any()) for t in found):
        raise ModelError(
            "the outputs on the example are not numbers (nan), so no cut can be verified; check the example's values"
        )


def _forward(watch: Watch, model: nn.Module, inputs: Example) -> None:
    args, kwargs = inputs
    for tensor in tree_leaves([args, kwargs]):
        if isinstance(tensor, Tensor):
            watch.input(tensor)
    try:
        with _plain_attention(), torch.no_grad(), torch.random.fork_rng(devices=[]), watch.modules_named(), watch:
            torch.manual_seed(0)
            result = model(*args, **kwargs)
    except Exception as error:
        where = f"module {watch.module!r}" if watch.module else "the network"
        raise ModelError(f"the forward pass on the example failed in {where}: {type(error).__name__}: {error}") from error
    watch.finish([t for t in leaves(result) if isinstance(t, Tensor)])


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused encoder layers of torch, whose single op hides everything inside."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _pin_unreached_readers(model: nn.Module, watch: Watch, grouped: Grouped) -> bool:
    """Weights that the example did not reach (an expert no token chose) may read what their reached siblings read.

    True where that pinned anything.
    """
    before = len(watch.book.pins)
    unreached = [(n, p) for n, p in model.named_parameters() if n not in watch.touched and p.ndim > 0]
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    patterns = {(pattern, shapes[n]) for n, _ in unreached for pattern, _ in _numbered(n)}
    sizes = {size for _, p in unreached for size in p.shape if size > 1}
    for g, found in enumerate(grouped.groups):
        tensors = {s.tensor for s in found.slices}
        inside = {prefix for t in tensors for pattern, prefix in _numbered(t) if (pattern, shapes.get(t)) in patterns}
        outside = inside and any(not t.startswith(tuple(inside)) for t in tensors)
        spread = found.kind == "stream" and any(found.units == size for size in sizes)
        if outside or spread:
            labels = np.flatnonzero(grouped.group_of == g)
            watch.book.pin(labels, f"may be read by weights that the example does not reach, such as {unreached[0][0]}")
    return len(watch.book.pins) > before


def _numbered(name: str) -> Iterator[tuple[str, str]]:
    """For every number in a name: the name with "#" in its place, and the name up to the number ("experts.3.")."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            yield ".".join([*parts[:i], "#", *parts[i + 1 :]]), ".".join(parts[: i + 1]) + "."


def _anatomy(model: nn.Module, inputs: Example, watch: Watch, grouped: Grouped) -> Anatomy:
    names: dict[int, list[str]] = {}
    state = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in state:
        names.setdefault(id(tensor), []).append(name)
    tensors = {n[0]: t for name, t in state if (n := names[id(t)])[0] == name}
    return Anatomy(
        groups=grouped.groups,
        pins=grouped.pins + _unreached(model, watch),
        shapes={name: tuple(t.shape) for name, t in tensors.items()},
        dtypes={name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()},
        parameters=frozenset(name for name, t in tensors.items() if isinstance(t, nn.Parameter)),
        aliases={n[0]: tuple(n[1:]) for n in names.values() if len(n) > 1},
        contractions=tuple(_contractions(watch, grouped, _batch(inputs))),
        edits=(),
        example=inputs,
    )


def _unreached(model: nn.Module, watch: Watch) -> tuple[Pin, ...]:
    modules: dict[str, int] = {}
    for name, p in model.named_parameters():
        if name not in watch.touched and p.ndim > 0:
            module = name.rpartition(".")[0] or name
            modules[module] = max(modules.get(module, 0), p.shape[0])
    return tuple(Pin(name=m, units=n, reason="the example does not reach it") for m, n in modules.items())


def _batch(inputs: Example) -> int:
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim]
    return max(int(tensors[0].shape[0]), 1) if tensors else 1


def _contractions(watch: Watch, grouped: Grouped, batch: int) -> Iterator[Contraction]:
    for product in watch.products:
        owners = [grouped.group_of[labels[labels >= 0].numpy()] for labels in product.labels]
        # an axis that several groups share, or that has positions of none, counts as constant
        names = [grouped.groups[int(o[0])].name for o in owners if len(o) and o[0] >= 0 and (o == o[0]).all()]
        yield Contraction(op=product.op, macs=product.macs / batch, tensor=product.tensor, groups=tuple(dict.fromkeys(names)))


def _chosen(anatomy: Anatomy, ignore: Sequence[str], only: Sequence[str]) -> Anatomy:
    """The anatomy without the groups that the caller wants left alone."""
    left = [g.name for g in anatomy.groups if _matches(g, ignore) or (only and not _matches(g, only))]
    return anatomy.without(left, "left alone on request")


def _matches(found: Group, patterns: Sequence[str]) -> bool:
    names = {found.name, *(s.module for s in found.writers), *(s.tensor for s in found.writers)}
    return any(re.fullmatch(p, name) for p in patterns for name in names)


def known_ops() -> tuple[str, ...]:
    """Names of the ops that have a rule of their own; pointwise ops need none."""
    return tuple(sorted(RULES))
