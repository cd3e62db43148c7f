"""Which units stay: Plan, a mask per group and nothing else; and what it costs."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from resect.anatomy import Anatomy, Group
from resect.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a network costs: parameters (count), macs (multiply-accumulates per example), bytes (parameters and buffers)."""

    parameters: int
    macs: float
    bytes: int

    def share_of(self, dense: Cost) -> dict[str, float]:
        """Each cost as a share of the dense network's, in [0, 1]."""
        return {
            "parameters": self.parameters / max(dense.parameters, 1),
            "macs": self.macs / max(dense.macs, 1),
            "bytes": self.bytes / max(dense.bytes, 1),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Which units of every group stay.

    keep: bool array (units,) per group of the anatomy. Raises PlanError for unknown or missing groups, wrong lengths, groups
    left empty, unequal parts, and counts that are not the multiple a group needs: a plan that exists can be cut.

    >>> from resect.anatomy import dissect
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)).eval()
    >>> anatomy = dissect(model, torch.zeros(2, 4))
    >>> Plan.random(anatomy, ratio=0.5, seed=0).kept
    {'0': 3}
    """

    anatomy: Anatomy
    keep: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        groups = {group.name: group for group in self.anatomy.groups}
        for name in self.keep:
            if name not in groups:
                near = difflib.get_close_matches(name, groups, 1)
                raise PlanError(
                    f"the plan names group {name!r}, which this network lacks{f'; nearest: {near[0]!r}' if near else ''}"
                )
        missing = [name for name in groups if name not in self.keep]
        if missing:
            raise PlanError(f"the plan says nothing of group {missing[0]!r}; give a mask of {groups[missing[0]].units} for it")
        object.__setattr__(self, "keep", {name: np.array(self.keep[name], dtype=bool) for name in groups})
        for name, group in groups.items():
            check_mask(group, self.keep[name])

    @classmethod
    def all(cls, anatomy: Anatomy) -> Plan:
        """The plan that keeps everything."""
        return cls(anatomy=anatomy, keep={group.name: np.ones(group.units, dtype=bool) for group in anatomy.groups})

    @classmethod
    def random(cls, anatomy: Anatomy, ratio: float, seed: int = 0) -> Plan:
        """A seeded plan that removes a share `ratio` of every group."""
        draw = np.random.default_rng(seed)
        scores = {group.name: draw.random(group.units) for group in anatomy.groups}
        return cls.top(anatomy, scores, {group.name: round((1 - ratio) * group.units) for group in anatomy.groups})

    @classmethod
    def top(cls, anatomy: Anatomy, scores: Mapping[str, np.ndarray], counts: Mapping[str, float]) -> Plan:
        """Keep the `counts` best units of every group (all where a group is not named); counts go up to the next valid one."""
        keep = {}
        for group in anatomy.groups:
            wanted = valid_count(group, counts.get(group.name, group.units))
            keep[group.name] = best(group, np.asarray(scores[group.name], dtype=np.float64), wanted)
        return cls(anatomy=anatomy, keep=keep)

    @property
    def kept(self) -> dict[str, int]:
        """Number of units that stay, per group."""
        return {name: int(mask.sum()) for name, mask in self.keep.items()}

    @property
    def share(self) -> float:
        """Share of all units that stay, in [0, 1] (1 where the network has no group)."""
        units = sum(group.units for group in self.anatomy.groups)
        return sum(self.kept.values()) / units if units else 1.0

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the masks: equal plans of one network have equal digests."""
        digest = hashlib.sha256(self.anatomy.fingerprint.encode())
        for name, mask in self.keep.items():
            digest.update(name.encode() + np.packbits(mask).tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return int(self.digest[:15], 16)

    def __or__(self, other: Plan) -> Plan:
        """The plan that keeps what either keeps. Raises PlanError for plans of two networks."""
        if self.anatomy.fingerprint != other.anatomy.fingerprint:
            raise PlanError("plans of two different networks do not join; make both from the anatomy of one network")
        return Plan(anatomy=self.anatomy, keep={name: self.keep[name] | other.keep[name] for name in self.keep})

    def then(self, later: Plan) -> Plan:
        """The plan, for this network, of a cut by this plan and by `later`, which is for the network that this one leaves.

        Groups that `later` does not name stay as they are. Raises PlanError where the counts of units do not match.
        """
        keep = {name: mask.copy() for name, mask in self.keep.items()}
        for name, mask in later.keep.items():
            left = np.flatnonzero(keep.get(name, ()))
            if len(left) != len(mask):
                raise PlanError(
                    f"the later plan has {len(mask)} units in group {name!r}, and the first leaves {len(left)}; dissect the "
                    "network that was cut by the first"
                )
            keep[name][left] = mask
        return Plan(anatomy=self.anatomy, keep=keep)

    def __str__(self) -> str:
        rows = [f"{group.name}: {self.kept[group.name]} of {group.units}" for group in self.anatomy.groups]
        return f"keeps {self.share:.1%} of the units ({'; '.join(rows)})"

    def cost(self) -> Cost:
        """Parameters, MACs and bytes of the network after the cut, without cutting it."""
        return cost_of(self.anatomy, self.kept)


def cost_of(anatomy: Anatomy, kept: Mapping[str, int]) -> Cost:
    """Cost of any plan that keeps so many units per group: which ones makes no difference."""
    parameters, macs, size = costs_of(anatomy, np.array([kept[group.name] for group in anatomy.groups]))[0]
    return Cost(parameters=round(parameters), macs=float(macs), bytes=round(size))


def check_mask(group: Group, mask: np.ndarray) -> None:
    """Raise PlanError unless the mask has one entry per unit, keeps at least one, equally many of each part, a valid count."""
    where = f"group {group.name!r}"
    if mask.shape != (group.units,):
        raise PlanError(f"the mask of {where} has shape {mask.shape}; it needs one entry for each of {group.units} units")
    if not mask.any():
        raise PlanError(f"the plan removes every unit of {where}; keep at least one")
    kept = np.bincount(group.parts, weights=mask, minlength=int(group.parts.max()) + 1)
    if kept.min() != kept.max():
        counts = kept.astype(int).tolist()
        raise PlanError(f"{where} must keep equally many units of each of its {len(kept)} parts; this plan keeps {counts}")
    if int(mask.sum()) % group.multiple_of:
        raise PlanError(f"{where} must keep a multiple of {group.multiple_of} units; this plan keeps {int(mask.sum())}")


def count_step(group: Group) -> int:
    """The counts of units a group may keep are the multiples of this number."""
    return int(np.lcm(int(group.parts.max()) + 1, group.multiple_of))


def valid_count(group: Group, wanted: float, step: int | None = None) -> int:
    """The smallest count of units that may be kept and is at least `wanted` (at least one, at most all).

    step: a multiple of the group's own step that the count should be a multiple of.
    """
    step = step or count_step(group)
    return min(max(1, int(np.ceil(wanted / step - 1e-9))) * step, group.units)


def best(group: Group, scores: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` best units, equally many of each part; ties by index."""
    parts = int(group.parts.max()) + 1
    mask = np.zeros(group.units, dtype=bool)
    for part in range(parts):
        members = np.flatnonzero(group.parts == part)
        order = members[np.argsort(-scores[members], kind="stable")]
        mask[order[: count // parts]] = True
    return mask


class _Counter:
    """Counts what tensors keep, for many plans at once: axis lengths are linear in the counts, elements their products."""

    def __init__(self, anatomy: Anatomy):
        names = list(anatomy.shapes)
        self.groups = {group.name: place for place, group in enumerate(anatomy.groups)}
        self.units = np.array([group.units for group in anatomy.groups], dtype=np.float64)
        axes = [(name, axis) for name in names for axis in range(max(len(anatomy.shapes[name]), 1))]
        self.starts = np.flatnonzero([axis == 0 for _, axis in axes])
        self.sizes = np.array([(*anatomy.shapes[name], 1)[axis] for name, axis in axes], dtype=np.float64)
        self.axes = {key: place for place, key in enumerate(axes)}
        self.width = self._widths(anatomy, self.axes)
        place = {name: number for number, name in enumerate(names)}
        self.is_parameter = np.array([name in anatomy.parameters for name in names], dtype=np.float64)
        self.itemsize = np.array([torch.empty((), dtype=getattr(torch, anatomy.dtypes[name])).element_size() for name in names])
        # MACs add up products: a share of a weight's elements (column 0: no weight) times shares of groups.
        self.terms: dict[tuple[int, ...], np.ndarray] = {}
        for product in anatomy.contractions:
            owners = tuple(sorted(self.groups[name] for name in product.groups))
            column = 0 if product.tensor is None else 1 + place[product.tensor]
            elements = 1 if product.tensor is None else math.prod(anatomy.shapes[product.tensor])
            self.terms.setdefault(owners, np.zeros(1 + len(names)))[column] += product.macs / max(elements, 1)

    def _widths(self, anatomy: Anatomy, place: Mapping[tuple[str, int], int]) -> np.ndarray:
        """(axes, groups) how much of an axis leaves with one unit."""
        width = np.zeros((len(place), len(self.units)))
        for group in anatomy.groups:
            for part in group.slices:
                width[place[part.tensor, part.axis], self.groups[group.name]] += part.index.shape[1] / part.blocks
        return width

    def lengths(self, kept: np.ndarray, places: Sequence[int] | slice = slice(None)) -> np.ndarray:
        """kept: (plans, groups) units that stay; (plans, axes) lengths of all axes, or of those in some places."""
        return np.round(self.sizes[places] - (self.units - kept) @ self.width[places].T)

    def count(self, kept: np.ndarray) -> np.ndarray:
        """kept: (plans, groups) units that stay; (plans, 3) parameters, MACs and bytes."""
        lengths = self.lengths(kept)
        elements = np.multiply.reduceat(lengths, self.starts, axis=1)
        weights = np.concatenate([np.ones((len(kept), 1)), elements], axis=1)
        macs = np.zeros(len(kept))
        for owners, per in self.terms.items():
            macs += (weights @ per) * (kept[:, owners] / self.units[list(owners)]).prod(1)
        return np.stack([elements @ self.is_parameter, macs, elements @ self.itemsize], axis=1)


def costs_of(anatomy: Anatomy, kept: np.ndarray) -> np.ndarray:
    """(plans, 3) parameters, MACs and bytes of plans that keep so many units, (plans, groups) in the anatomy's order."""
    return _counter(anatomy).count(np.atleast_2d(np.asarray(kept, dtype=np.float64)))


def lengths_of(anatomy: Anatomy, kept: np.ndarray, axes: Sequence[tuple[str, int]]) -> np.ndarray:
    """(plans, axes) lengths that some axes (tensor, axis) have after plans that keep so many units, (plans, groups)."""
    counter = _counter(anatomy)
    places = [counter.axes[axis] for axis in axes]
    return counter.lengths(np.atleast_2d(np.asarray(kept, dtype=np.float64)), places)


def _counter(anatomy: Anatomy) -> _Counter:
    """One counter per anatomy, kept with it: a search costs thousands of plans."""
    counter = anatomy.__dict__.get("_counter")
    if counter is None:
        counter = _Counter(anatomy)
        object.__setattr__(anatomy, "_counter", counter)
    return counter
