"""An anatomy for people and for programs: the printed table, and the same as plain JSON values."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from resect.anatomy.anatomy import Anatomy, Group, Slices


def prunable(anatomy: Anatomy, groups: Iterable[Group] | None = None) -> int:
    """Number of parameters that belong to at least one unit of `groups` (default: all of them)."""
    owned: dict[str, list[Slices]] = {}
    for group in anatomy.groups if groups is None else groups:
        for part in group.slices:
            if part.tensor in anatomy.parameters:
                owned.setdefault(part.tensor, []).append(part)
    return sum(_owned(anatomy.shapes[name], parts) for name, parts in owned.items())


def _owned(shape: tuple[int, ...], parts: list[Slices]) -> int:
    """Elements of a tensor in at least one of the slices: all but those whose every coordinate is free."""
    if any(p.blocks > 1 for p in parts):
        return _owned_in_blocks(shape, parts)
    free = list(shape)
    for part in parts:
        free[part.axis] -= part.index.size
    return math.prod(shape) - math.prod(free)


def _owned_in_blocks(shape: tuple[int, ...], parts: list[Slices]) -> int:
    axes = {0, *(p.axis for p in parts)}
    mask = np.zeros([n if a in axes else 1 for a, n in enumerate(shape)], dtype=bool)
    for part in parts:
        positions, size, share = part.index.ravel(), shape[part.axis], shape[0] // part.blocks
        for block in range(part.blocks):
            rows = mask[block * share : (block + 1) * share] if part.blocks > 1 else mask
            inside = positions[positions // size == block] % size
            rows[(slice(None),) * part.axis + (inside,)] = True
    return int(mask.sum()) * (math.prod(shape) // mask.size)


def total(anatomy: Anatomy) -> int:
    """Number of parameters of the network."""
    return sum(math.prod(anatomy.shapes[name]) for name in anatomy.parameters)


def per_unit(anatomy: Anatomy, group: Group) -> int:
    """Parameters that one unit of a group carries (those it shares with a unit of another group count for both)."""
    return round(prunable(anatomy, [group]) / group.units)


def as_json(anatomy: Anatomy) -> dict[str, Any]:
    """Groups, pins, edits and totals as plain values; positions are left out."""
    return {
        "fingerprint": anatomy.fingerprint,
        "parameters": total(anatomy),
        "prunable_parameters": prunable(anatomy),
        "macs": sum(c.macs for c in anatomy.contractions),
        "groups": [_group_json(anatomy, g) for g in anatomy.groups],
        "pins": [dataclasses.asdict(p) for p in anatomy.pins],
        "edits": [
            {"module": e.module, "attribute": e.attribute, "item": e.item, "group": e.group, "step": e.step}
            for e in anatomy.edits
        ],
    }


def _group_json(anatomy: Anatomy, group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "kind": group.kind,
        "units": group.units,
        "parts": int(group.parts.max()) + 1 if group.units else 1,
        "multiple_of": group.multiple_of,
        "parameters_per_unit": per_unit(anatomy, group),
        "macs_per_unit": macs_per_unit(anatomy, group),
        "slices": [
            {"tensor": s.tensor, "axis": s.axis, "role": s.role, "width": int(s.index.shape[1]), "blocks": s.blocks}
            for s in group.slices
        ],
    }


def macs_per_unit(anatomy: Anatomy, group: Group) -> float:
    """Multiply-accumulates per example that one unit of a group is part of."""
    owned = {s.tensor: s for s in group.slices if s.role != "carrier" or len(anatomy.shapes[s.tensor]) > 1}
    found = 0.0
    for c in anatomy.contractions:
        if c.tensor in owned:
            part = owned[c.tensor]
            found += c.macs * part.index.shape[1] / (anatomy.shapes[part.tensor][part.axis] * part.blocks)
        elif group.name in c.groups:
            found += c.macs / group.units
    return found


def render(anatomy: Anatomy, width: int = 128) -> str:
    """The table that `print(anatomy)` shows."""
    console = Console(width=width, record=True, file=io.StringIO(), color_system=None)
    console.print(_groups(anatomy))
    console.print(_pins(anatomy))
    share = prunable(anatomy) / max(total(anatomy), 1)
    macs = sum(c.macs for c in anatomy.contractions)
    console.print(
        f"{share:.1%} of {total(anatomy):,} parameters belong to units; {macs:,.0f} MACs per example", highlight=False
    )
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def _groups(anatomy: Anatomy) -> Table:
    table = Table(title=f"{len(anatomy.groups)} groups", title_justify="left", box=None, pad_edge=False)
    for name in ("group", "kind", "units", "written by", "read by"):
        table.add_column(name, justify="right" if name == "units" else "left", overflow="fold")
    table.add_column("parameters\neach", justify="right")
    table.add_column("MACs\neach", justify="right")
    for group in anatomy.groups:
        parts = int(group.parts.max()) + 1
        units = f"{group.units}" + (f" ({parts} equal parts)" if parts > 1 else "")
        each = f"{per_unit(anatomy, group):,}", f"{macs_per_unit(anatomy, group):,.0f}"
        table.add_row(group.name, group.kind, units, _modules(group.writers), _modules(group.readers), *each)
    return table


def _modules(slices: Iterable[Slices]) -> str:
    names = list(dict.fromkeys(s.module or s.tensor for s in slices))
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _pins(anatomy: Anatomy) -> Table:
    table = Table(title=f"\n{len(anatomy.pins)} widths stay", title_justify="left", box=None, pad_edge=False)
    for name in ("width", "units", "why it stays", "where"):
        table.add_column(name, justify="right" if name == "units" else "left", overflow="fold")
    for pin in anatomy.pins:
        table.add_row(pin.name, str(pin.units), pin.reason, pin.where)
    return table
