"""The raw mechanics of a cut: which positions of every tensor stay, the slices themselves, and their zeroed counterparts.

Everything here takes `keep`, one boolean array (units,) per group name; a group that is not named keeps all its units.
No check is made that a plan is allowed: that is the plan's business. Surgery is a thin layer over these functions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resect.anatomy.anatomy import Anatomy, AttributeEdit, Slices
from resect.anatomy.narrow import narrow

Keep = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """The positions of one tensor axis that stay, ascending; they run through `blocks` as in `Slices`."""

    positions: np.ndarray
    blocks: int = 1

    def per_block(self, size: int) -> np.ndarray:
        """Kept entries of every block, shape (blocks, kept); ValueError where blocks keep different numbers."""
        counts = np.bincount(self.positions // size, minlength=self.blocks)
        if len(set(counts.tolist())) > 1:
            raise ValueError(f"convolution groups keep different numbers of positions: {counts.tolist()}")
        return (self.positions % size).reshape(self.blocks, -1)


def keep_positions(anatomy: Anatomy, keep: Keep) -> dict[str, dict[int, Kept]]:
    """Per tensor and axis the positions that stay; only axes that lose something are listed."""
    removed: dict[str, dict[int, list[np.ndarray]]] = {}
    blocks: dict[tuple[str, int], int] = {}
    for part, rows in _leaving(anatomy, keep):
        removed.setdefault(part.tensor, {}).setdefault(part.axis, []).append(part.index[rows].ravel())
        blocks[part.tensor, part.axis] = part.blocks
    return {
        name: {
            axis: Kept(
                positions=np.setdiff1d(np.arange(anatomy.shapes[name][axis] * blocks[name, axis]), np.concatenate(gone)),
                blocks=blocks[name, axis],
            )
            for axis, gone in sorted(axes.items())
        }
        for name, axes in removed.items()
    }


def sliced(tensor: Tensor, kept: Mapping[int, Kept]) -> Tensor:
    """A new contiguous tensor with only the kept positions on every axis in `kept`; `tensor` itself when there are none."""
    blocked = {axis: k for axis, k in kept.items() if k.blocks > 1}
    for axis, k in kept.items():
        if k.blocks == 1 and not (axis == 0 and blocked):
            tensor = tensor.index_select(axis, torch.as_tensor(k.positions, device=tensor.device))
    for axis, k in blocked.items():
        rows = kept[0].positions if 0 in kept else np.arange(tensor.shape[0])
        tensor = _sliced_blocks(tensor, axis, k, rows)
    return tensor


def _sliced_blocks(tensor: Tensor, axis: int, kept: Kept, rows: np.ndarray) -> Tensor:
    """Rows `rows` of `tensor`, each with the entries on `axis` that its own block keeps."""
    share = tensor.shape[0] // kept.blocks
    entries = kept.per_block(tensor.shape[axis])[rows // share]
    picked = tensor.index_select(0, torch.as_tensor(rows, device=tensor.device))
    index = torch.as_tensor(entries, device=tensor.device)
    shape = [len(rows)] + [1] * (tensor.ndim - 1)
    shape[axis] = entries.shape[1]
    target = list(picked.shape)
    target[axis] = entries.shape[1]
    return picked.gather(axis, index.reshape(shape).expand(target))


def sliced_tensors(model: nn.Module, anatomy: Anatomy, keep: Keep) -> dict[str, Tensor]:
    """Canonical name -> smaller copy, for every parameter and buffer that loses something."""
    tensors = named_tensors(model)
    with torch.no_grad():
        return {name: sliced(tensors[name].detach(), kept) for name, kept in keep_positions(anatomy, keep).items()}


def apply(model: nn.Module, anatomy: Anatomy, keep: Keep) -> nn.Module:
    """Cut `model` in place: replace its tensors under all their names and correct the attributes that repeat a width.

    Dtype, device, `requires_grad` and ties are preserved. Works on `meta` models. Pass a `skeleton` to leave a model alone.
    """
    replace(model, anatomy, sliced_tensors(model, anatomy, keep))
    edit(model, anatomy.edits, keep)
    narrow(model)
    return model


def replace(model: nn.Module, anatomy: Anatomy, tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors` in the place of the parameters and buffers of the same canonical name, under all their names."""
    old = named_tensors(model)
    for name, tensor in tensors.items():
        previous = old[name]
        is_parameter = isinstance(previous, nn.Parameter)
        new = nn.Parameter(tensor, requires_grad=previous.requires_grad) if is_parameter else tensor
        for alias in (name, *anatomy.aliases.get(name, ())):
            path, _, leaf = alias.rpartition(".")
            owner = model.get_submodule(path)
            (owner._parameters if is_parameter else owner._buffers)[leaf] = new  # type: ignore[assignment]


def edit(model: nn.Module, edits: tuple[AttributeEdit, ...], keep: Keep) -> None:
    """Lower every attribute in `edits` by its step for each unit that leaves."""
    for change in edits:
        gone = int((~keep[change.group]).sum()) if change.group in keep else 0
        if gone:
            _lower(model.get_submodule(change.module), change.attribute, change.item, change.step * gone)


def _lower(module: nn.Module, attribute: str, item: int | None, by: int) -> None:
    path, _, leaf = attribute.rpartition(".")
    owner: Any = module
    if path:
        # a configuration object is shared by all layers, but a width belongs to one
        owner = copy.copy(getattr(module, path))
        setattr(module, path, owner)
    value = getattr(owner, leaf)
    if item is None:
        new: Any = value - by
    else:
        entries = list(value)
        entries[item] -= by
        new = torch.Size(entries) if isinstance(value, torch.Size) else type(value)(entries)
    setattr(owner, leaf, new)


def masked_weights(model: nn.Module, anatomy: Anatomy, keep: Keep) -> dict[str, Tensor]:
    """Canonical name -> full-size copy with the removed units zeroed, for every weight that reads a removed unit."""
    tensors, masked = named_tensors(model), dict[str, Tensor]()
    with torch.no_grad():
        for part, rows in _leaving(anatomy, keep):
            if part.role == "reader":
                if part.tensor not in masked:
                    masked[part.tensor] = tensors[part.tensor].detach().clone()
                _zero(masked[part.tensor], part, part.index[rows].ravel())
    return masked


def _zero(tensor: Tensor, part: Slices, positions: np.ndarray) -> None:
    size, share = tensor.shape[part.axis], tensor.shape[0] // part.blocks
    for block in range(part.blocks):
        inside = positions[positions // size == block] % size
        rows = tensor[block * share : (block + 1) * share] if part.blocks > 1 else tensor
        rows.index_fill_(part.axis, torch.as_tensor(inside, device=tensor.device), 0)


def _leaving(anatomy: Anatomy, keep: Keep) -> Iterator[tuple[Slices, np.ndarray]]:
    """Every slice of a group that loses units, with the boolean mask (units,) of those that leave."""
    for group in anatomy.groups:
        rows = ~np.asarray(keep[group.name], dtype=bool) if group.name in keep else np.zeros(group.units, dtype=bool)
        if rows.any():
            yield from ((part, rows) for part in group.slices)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of `model` by canonical name (the first of its names)."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the modules of `model` that shares every tensor with it: cheap, and free to be cut by `apply`."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)
