"""What can be removed from a network: Anatomy, its groups, and the slices every unit owns.

An anatomy is data. After it is made, nothing else in resect needs to know whether the network was an MLP, a CNN or a
language model: everything is a table of per-group vectors, plus the list of slices that must go together.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from resect.anatomy import table

Role = Literal["writer", "reader", "carrier"]
Kind = Literal["hidden", "head", "expert", "stream"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Slices:
    """The positions that the units of one group own on one axis of one tensor.

    `index` has shape (units, width): row i lists the positions that leave with unit i. A neuron owns one position of its
    writer's axis 0; a channel that is flattened into 49 columns owns 49 positions of its reader's axis 1; a head owns
    `head_dim` of them.

    `blocks` > 1 describes the weight of a grouped convolution, whose axis 1 exists once per convolution group. Positions then
    run through the blocks: position p is entry ``p % shape[axis]`` of block ``p // shape[axis]``, and block b covers the b-th
    contiguous share of axis 0. For every other tensor `blocks` is 1.

    Roles: a *writer* produces the units (its output axis), a *reader* consumes them (its contracted axis), a *carrier*
    holds per-unit state on the way (norm weights and statistics, depthwise kernels, biases, gates).
    """

    tensor: str
    axis: int
    index: np.ndarray
    role: Role
    blocks: int = 1

    @property
    def module(self) -> str:
        """Qualified name of the module that owns the tensor ("" for the network itself)."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """All interchangeable units of one width, and what leaves with each of them.

    `parts` has shape (units,): a plan must keep equally many units of every part (convolution groups, group norm, equal
    head widths). It is all zeros where units are free. `multiple_of`: the kept count must be a multiple of it.
    `kind`: "hidden", "head" and "expert" units can be masked at their readers with exactly the effect of a cut; "stream"
    units pass through a layer norm, where masking and cutting differ.
    """

    name: str
    kind: Kind
    units: int
    slices: tuple[Slices, ...]
    parts: np.ndarray
    multiple_of: int = 1

    @property
    def readers(self) -> tuple[Slices, ...]:
        """The slices where the units are read, in execution order."""
        return tuple(s for s in self.slices if s.role == "reader")

    @property
    def writers(self) -> tuple[Slices, ...]:
        """The slices that produce the units, in execution order."""
        return tuple(s for s in self.slices if s.role == "writer")


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A width that stays as it is, and why: the op or line of the model that resect could not, or must not, follow."""

    name: str
    units: int
    reason: str
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """One product counted in the cost: `macs` multiply-accumulates for the dense network on one example.

    With `tensor` the product reads a weight, and its MACs scale with the number of that weight's elements that remain.
    They scale with the share of units that remain of every group in `groups` as well: those on axes that the weight does not
    have, such as heads and inner widths in products of activations, or the units that a token mixing is applied to one by one.
    """

    op: str
    macs: float
    tensor: str | None = None
    groups: tuple[str, ...] = ()

    def without(self, names: Collection[str]) -> Contraction:
        """The same product where these groups are no longer cut."""
        return replace(self, groups=tuple(name for name in self.groups if name not in names))


@dataclass(frozen=True, kw_only=True)
class AttributeEdit:
    """An integer (or tuple entry) of a module that repeats a width and must follow it.

    After a cut, ``getattr(module, attribute)`` (entry `item` where it is a tuple) is lower by `step` for every unit of
    `group` that left. An attribute that adds up several groups (a reader of a concatenation) has one edit for each.
    A dotted attribute ("config.num_heads") lives on an object that the module may share; the module gets its own copy.
    """

    module: str
    attribute: str
    group: str
    step: int
    item: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Anatomy:
    """What can be removed from one network, found by watching one forward pass.

    shapes: shape and dtype of every parameter and buffer by canonical name. aliases: other names of the same tensor (tied
    weights) by canonical name. example: the positional and keyword inputs the network was watched on; kept so that every cut
    can be verified on it. Two anatomies are of the same architecture when their `fingerprint` is equal.
    """

    groups: tuple[Group, ...]
    pins: tuple[Pin, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    parameters: frozenset[str]
    aliases: Mapping[str, tuple[str, ...]]
    contractions: tuple[Contraction, ...]
    edits: tuple[AttributeEdit, ...]
    example: tuple[tuple[Any, ...], dict[str, Any]] = field(repr=False)

    def group(self, name: str) -> Group:
        """The group called `name`; KeyError naming the nearest group otherwise."""
        for group in self.groups:
            if group.name == name:
                return group
        names = [group.name for group in self.groups]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        hint = f"the nearest of its {len(names)} groups is {near[0]!r}" if near else "it has no groups at all"
        raise KeyError(f"no group {name!r} in this anatomy; {hint}")

    @property
    def prunable(self) -> float:
        """Share of the parameters, in [0, 1], that belong to at least one unit."""
        return table.prunable(self) / max(table.total(self), 1)

    def to_json(self) -> dict[str, Any]:
        """Groups, pins, edits and totals as plain JSON values."""
        return table.as_json(self)

    def __str__(self) -> str:
        """A table of the groups, of what stays and why, and of the share of parameters that belong to units."""
        return table.render(self)

    def without(self, names: Iterable[str], reason: str) -> Anatomy:
        """The same network with some groups left alone: they become pins with a reason."""
        left = set(names)
        pins = tuple(Pin(name=g.name, units=g.units, reason=reason) for g in self.groups if g.name in left)
        return replace(
            self,
            groups=tuple(g for g in self.groups if g.name not in left),
            pins=self.pins + pins,
            contractions=tuple(c.without(left) for c in self.contractions),
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the architecture: shapes and the slices of every group, not the weights."""
        digest = hashlib.sha256()
        digest.update(json.dumps(sorted((n, list(s)) for n, s in self.shapes.items())).encode())
        for group in self.groups:
            digest.update(json.dumps([group.name, group.kind, group.units, group.multiple_of]).encode())
            digest.update(np.ascontiguousarray(group.parts, dtype=np.int64).tobytes())
            for part in group.slices:
                digest.update(json.dumps([part.tensor, part.axis, part.role, part.blocks]).encode())
                digest.update(np.ascontiguousarray(part.index, dtype=np.int64).tobytes())
        return digest.hexdigest()
