"""Every anatomy is tried before it is handed out: cut must equal masked, or the groups concerned are pinned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resect.anatomy.anatomy import Anatomy, AttributeEdit, Group, Pin
from resect.anatomy.attributes import Edits, alternatives, candidates
from resect.anatomy.slicing import apply, masked_weights, named_tensors, skeleton
from resect.anatomy.slicing import replace as put

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 6e-2}


def half(group: Group, seed: int = 0) -> np.ndarray:
    """A random half (at least one, never all) of every part of a group, as a mask of the units that stay."""
    return without(group, 0.5, np.random.default_rng([seed, group.units]))


def without(group: Group, share: float, rng: np.random.Generator, *, odd: bool = False) -> np.ndarray:
    """The mask of a random plan that removes about `share` of a group: equally many of each part, a count the group allows.

    odd: an odd number of each part where that is allowed, so that kernels and views that want even widths are found out.
    """
    parts = int(group.parts.max()) + 1
    step = int(np.lcm(parts, group.multiple_of)) // parts
    most = group.units // parts
    gone = min(max(round(share * most / step) * step, step), most - step)
    gone += odd and gone % 2 == 0 and gone + step < most
    keep = np.ones(group.units, dtype=bool)
    for part in range(parts):
        keep[rng.permutation(np.flatnonzero(group.parts == part))[: max(gone, 0)]] = False
    return keep


def uneven(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """A random plan in which groups of one size keep different numbers, so that none can lean on another's width."""
    seen: dict[int, int] = {}
    plan = {}
    for group in groups:
        place = seen[group.units] = seen.get(group.units, -1) + 1
        rng = np.random.default_rng([place, group.units])
        plan[group.name] = without(group, (0.3, 0.5, 0.7)[place % 3], rng, odd=group.multiple_of == 1)
    return plan


def _few_of_each(kinds: Sequence[str], most: int = 4) -> list[tuple[int, str]]:
    """The first groups of every kind, by place: the layers of one network repeat each other."""
    seen: dict[str, int] = {}
    chosen = []
    for place, kind in enumerate(kinds):
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= most:
            chosen.append((place, kind))
    return chosen


def apart(kinds: Sequence[str], plan: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Parts of a plan in which only some groups are cut, so that none can lean on another being cut as well.

    kinds: the kind of module of every group in `plan`, in order. For any two kinds there are plans that cut only one of
    them; groups of one kind (layers of one network) take turns.
    """
    numbers = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    turn = {kind: -1 for kind in numbers}
    codes = []
    for kind in kinds:
        turn[kind] += 1
        codes.append((numbers[kind], turn[kind] % 2))
    bits = [[n >> bit & 1 for n, _ in codes] for bit in range((len(numbers) - 1).bit_length())]
    bits.append([t for _, t in codes])
    names = list(plan)
    chosen = {tuple(n for n, b in zip(names, row) if b == value) for row in bits for value in (0, 1)}
    return [{n: plan[n] for n in part} for part in sorted(chosen) if 0 < len(part) < len(names)]


def outputs(model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
    """Every tensor that the forward pass returns, with the random numbers of seed 0."""
    args, kwargs = example
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = model(*args, **kwargs)
    return [t for t in leaves(result) if isinstance(t, Tensor)]


def leaves(result: Any, depth: int = 6) -> list[Any]:
    """What a forward pass returned, nested in any way, as a flat list, without its caches: those follow their heads."""
    if isinstance(result, Tensor) or depth == 0:
        return [result]
    if isinstance(result, Mapping):
        return [leaf for key, value in result.items() if key not in _CACHES for leaf in leaves(value, depth - 1)]
    if isinstance(result, (list, tuple, set)):
        return [leaf for value in result for leaf in leaves(value, depth - 1)]
    if hasattr(result, "__dict__") and not isinstance(result, type) and "Cache" not in type(result).__name__:
        return leaves(vars(result), depth - 1)
    return []


_CACHES = frozenset({"past_key_values", "cache_params", "mems", "past_buckets_states", "state", "cache"})


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Largest difference over all outputs, relative to the largest value that is not the same in both.

    So a huge constant (the logits of masked places) hides nothing. Infinite where shapes differ or one is not a number.
    """
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    return max((_difference(a, b) for a, b in zip(one, other) if a.numel() and a.is_floating_point()), default=0.0)


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    differs = (a != b) & ~(a.isnan() & b.isnan())
    if not bool(differs.any()):
        return 0.0
    gap = (a - b)[differs].abs().max()
    value = float(gap / b[differs].abs().max().clamp_min(1e-12))
    return value if value == value else float("inf")


class Trial:
    """Cuts and masks one network on its example, without touching it."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model, self.anatomy = model, anatomy
        dtypes = {t.dtype for t in named_tensors(model).values() if t.is_floating_point()}
        self.tolerance = max((TOLERANCE.get(d, 1e-4) for d in dtypes), default=1e-4)
        self.runs = 0

    def fault(self, groups: Sequence[Group], edits: Edits) -> str | None:
        """None where halves of every one of `groups` can be cut with the effect of masking them; else what went wrong.

        A plan and its complement, so that every unit leaves in one of them: a position that the model's code names literally
        is found out. And parts of it: so is a group that must be as wide as another.
        """
        keep = uneven(groups)
        some = _few_of_each([_kind(self.model, g) for g in groups])
        parts = apart([kind for _, kind in some], {groups[i].name: keep[groups[i].name] for i, _ in some})
        plans = [keep, {n: ~k for n, k in keep.items()}, *parts]
        return next((fault for plan in plans if (fault := self._fault_of(groups, edits, plan))), None)

    def _fault_of(self, groups: Sequence[Group], edits: Edits, keep: Mapping[str, np.ndarray]) -> str | None:
        anatomy = replace(self.anatomy, groups=tuple(groups), edits=tuple(e for e in edits if e.group in keep))
        self.runs += 1
        masked = skeleton(self.model)
        put(masked, anatomy, masked_weights(self.model, anatomy, keep))
        expected = outputs(masked, anatomy.example)
        try:
            got = outputs(apply(skeleton(self.model), anatomy, keep), anatomy.example)
        except Exception as error:  # whatever the user's forward raises means that this cut does not fit
            return _failure(error)
        gap = difference(got, expected)
        return None if gap <= self.tolerance else f"cut and masked network differ by {gap:.1e}"

    def stream_fault(self, group: Group, edits: Edits) -> str | None:
        """A stream cannot be compared with a mask: permuting its units must change nothing, and its cut must run."""
        anatomy = replace(self.anatomy, groups=(group,), edits=tuple(e for e in edits if e.group == group.name))
        self.runs += 1
        gap = difference(outputs(permuted(self.model, anatomy, group), anatomy.example), outputs(self.model, anatomy.example))
        if gap > 10 * self.tolerance:
            return f"permuting its units changes the output by {gap:.1e}"
        try:
            outputs(apply(skeleton(self.model), anatomy, uneven([group])), anatomy.example)
        except Exception as error:  # as above
            return _failure(error)
        return None

    def check(self, groups: Sequence[Group], edits: Edits) -> str | None:
        """The right check for the kind of groups."""
        streams = [g for g in groups if g.kind == "stream"]
        others = [g for g in groups if g.kind != "stream"]
        fault = self.fault(others, edits) if others else None
        for group in streams:
            fault = fault or self.stream_fault(group, edits)
        return fault


def _failure(error: Exception) -> str:
    message = (str(error).splitlines() or [""])[0][:160]
    return f"the forward pass fails after a cut: {type(error).__name__}: {message}"


def permuted(model: nn.Module, anatomy: Anatomy, group: Group) -> nn.Module:
    """The network with the units of one group in another order everywhere: the same function."""
    rng, order = np.random.default_rng(0), np.arange(group.units)
    for part in np.unique(group.parts):
        members = np.flatnonzero(group.parts == part)
        order[members] = rng.permutation(members)
    tensors, new = named_tensors(model), dict[str, Tensor]()
    for part in group.slices:
        source = new.get(part.tensor, tensors[part.tensor].detach())
        if part.blocks == 1:
            index = np.arange(source.shape[part.axis])
            index[part.index.ravel()] = part.index[order].ravel()
            new[part.tensor] = source.index_select(part.axis, torch.as_tensor(index, device=source.device))
        else:
            new[part.tensor] = _permuted_blocks(source, part.axis, part.blocks, part.index, order)
    copy = skeleton(model)
    put(copy, anatomy, new)
    return copy


def _permuted_blocks(source: Tensor, axis: int, blocks: int, index: np.ndarray, order: np.ndarray) -> Tensor:
    size = source.shape[axis]
    positions = np.arange(size * blocks)
    positions[index.ravel()] = index[order].ravel()
    shares = source.chunk(blocks, 0)
    rows = [
        share.index_select(axis, torch.as_tensor(positions[b * size : (b + 1) * size] % size)) for b, share in enumerate(shares)
    ]
    return torch.cat(rows, 0)


# settling -----------------------------------------------------------------------------------------------------------------


class _Settling:
    """Finds the edits that make every group cut right, and the groups that no edit helps."""

    def __init__(self, model: nn.Module, trial: Trial, edits: Edits, guesses: Edits) -> None:
        self.model, self.trial, self.edits = model, trial, (*edits, *guesses)
        self.guesses = frozenset(guesses)
        self.faults: dict[str, str] = {}

    def settle(self, groups: list[Group]) -> list[Group]:
        """The groups that can be cut right, alone and all at once. Groups of one kind of module share what they need."""
        if not groups or self.trial.check(groups, self.edits) is None:
            return groups
        kinds: dict[str, list[Group]] = {}
        for group in groups:
            kinds.setdefault(_kind(self.model, group), []).append(group)
        for members in kinds.values():
            self._settle_kind(members)
        return self._bisect([g for g in groups if g.name not in self.faults])

    def _settle_kind(self, members: list[Group]) -> None:
        first, *rest = members
        fault = self.trial.check([first], self.edits)
        if fault is None:
            return
        found = self._search(first)
        if found is None:
            self.faults[first.name] = fault
            for group in rest:
                self._judge(group)
            return
        self.edits = self._without_guesses(first) + found
        for group in rest:
            matching = tuple(e for e in candidates(self.model, group) if _place(e) in {_place(f) for f in found})
            self.edits = self._without_guesses(group) + matching

    def _judge(self, group: Group) -> bool:
        """Whether a group can be cut as things are; its fault is kept."""
        fault = self.trial.check([group], self.edits)
        if fault is not None:
            self.faults[group.name] = fault
        return fault is None

    def _search(self, group: Group) -> Edits | None:
        """Attributes of the modules around a group with which its cut is right."""
        base = self._without_guesses(group)
        for more in alternatives(self.model, group, base):
            if self.trial.check([group], base + more) is None:
                return more
        return None

    def _without_guesses(self, group: Group) -> Edits:
        return tuple(e for e in self.edits if e.group != group.name or e not in self.guesses)

    def _bisect(self, groups: list[Group]) -> list[Group]:
        if not groups or self.trial.check(groups, self.edits) is None:
            return groups
        if len(groups) == 1:
            return groups if self._rescued(groups[0]) else []
        middle = len(groups) // 2
        return self._together(self._bisect(groups[:middle]), self._bisect(groups[middle:]))

    def _rescued(self, group: Group) -> bool:
        found = self._search(group)
        if found is None:
            return self._judge(group)
        self.edits = self._without_guesses(group) + found
        return True

    def _together(self, one: list[Group], other: list[Group]) -> list[Group]:
        """Both lists at once; where only their combination fails, the later groups that break it stay."""
        if not one or not other or self.trial.check(one + other, self.edits) is None:
            return one + other
        if len(other) == 1:
            self.faults[other[0].name] = f"right alone, but not together with {one[0].name} and others"
            return one
        middle = len(other) // 2
        return self._together(self._together(one, other[:middle]), other[middle:])


def _kind(model: nn.Module, group: Group) -> str:
    return "/".join(sorted({type(model.get_submodule(s.module)).__name__ + s.tensor.rpartition(".")[2] for s in group.slices}))


def _place(edit: AttributeEdit) -> tuple[str, str, int | None]:
    """Where an edit is, the same for modules of one kind in every layer."""
    return edit.module.rpartition(".")[2], edit.attribute, edit.item


def settled(model: nn.Module, anatomy: Anatomy, guesses: Edits) -> Anatomy:
    """The anatomy with the edits that work, and with every group pinned that cannot be cut right."""
    settling = _Settling(model, Trial(model, anatomy), anatomy.edits, guesses)
    hidden = [g for g in anatomy.groups if g.kind != "stream"]
    streams = [g for g in anatomy.groups if g.kind == "stream"]
    good = settling.settle(hidden) + [g for s in streams for g in settling.settle([s])]
    names = {g.name for g in good}
    pins = tuple(Pin(name=g.name, units=g.units, reason=settling.faults[g.name]) for g in anatomy.groups if g.name not in names)
    return replace(
        anatomy,
        groups=tuple(g for g in anatomy.groups if g.name in names),
        pins=(*anatomy.pins, *pins),
        edits=tuple(e for e in settling.edits if e.group in names),
        contractions=tuple(c.without({*c.groups} - {*names}) for c in anatomy.contractions),
    )
