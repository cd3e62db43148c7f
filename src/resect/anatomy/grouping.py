"""From tied labels to groups: connected components, the units that can leave, and those that are pinned, with the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from resect.anatomy.anatomy import Group, Kind, Pin, Slices
from resect.anatomy.labels import Book

_ROLES = ("carrier", "writer", "reader")
_UNEQUAL = "its convolution groups, halves or norm groups cannot lose equally"
_ONE = "its units hang together as one"
_UNREAD = "no weight reads it"
_UNWRITTEN = "no weight writes it but the one that reads it"


@dataclass(frozen=True, kw_only=True, eq=False)
class Grouped:
    """The groups, the pins, and for every label the index of its group (-1 where it is pinned)."""

    groups: tuple[Group, ...]
    pins: tuple[Pin, ...]
    group_of: np.ndarray


def group(book: Book) -> Grouped:
    """Resolve everything the book has learned."""
    return _Resolution(book).grouped()


def _classes(book: Book) -> np.ndarray:
    """For every label the number of its class of tied labels."""
    one = np.concatenate([a for a, _ in book.edges] or [np.empty(0, np.int64)])
    other = np.concatenate([b for _, b in book.edges] or [np.empty(0, np.int64)])
    graph = coo_matrix((np.ones(len(one), np.int8), (one, other)), shape=(book.count, book.count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


class _Resolution:
    """The tables of one resolution, all indexed by label or by class."""

    def __init__(self, book: Book) -> None:
        self.book = book
        self._settle()
        self.axis_of = np.repeat(np.arange(len(book.axes)), [a.size * a.blocks for a in book.axes])
        self.role, self.clock = self._label_roles()

    # classes and pins -------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Classes, pins, and ties that follow from them, until nothing changes."""
        for _ in range(8):
            self.of = _classes(self.book)
            self.count = int(self.of.max()) + 1 if self.of.size else 0
            self.pin_of = np.full(self.count, -1)
            for number in range(len(self.book.pins) - 1, -1, -1):
                self.pin_of[self.of[self.book.pins[number][0]]] = number
            if not self._fold():
                return
        raise AssertionError("the folds of an anatomy did not settle")

    def _fold(self) -> bool:
        """Make the units on every plane of several axes whole slabs of one axis; True where that needed new ties or pins."""
        changed = False
        for array, where in self.book.folds.values():
            classes = np.where(array >= 0, self.of[array], -1)
            classes[(classes >= 0) & (self.pin_of[classes] >= 0)] = -1
            if not any(_slabs(classes, axis) for axis in range(classes.ndim)):
                changed = True
                self._tie_slabs(array, classes, where)
        return changed

    def _tie_slabs(self, array: np.ndarray, classes: np.ndarray, where: object) -> None:
        widest = int(np.argmax(array.shape))
        rows = np.moveaxis(classes, widest, 0).reshape(array.shape[widest], -1)
        labels = np.moveaxis(array, widest, 0).reshape(array.shape[widest], -1)
        lonely = (rows < 0).any(1)
        stuck = labels[lonely][rows[lonely] >= 0]
        if stuck.size:
            self.book.pins.append((np.unique(stuck), "shares a shape with positions that cannot leave", where))  # type: ignore[arg-type]
        whole = labels[~lonely]
        self.book.edges.append((np.repeat(whole[:, 0], whole.shape[1]), whole.ravel()))

    def _label_roles(self) -> tuple[np.ndarray, np.ndarray]:
        role = np.zeros(self.book.count, np.int64)
        clock = np.full(self.book.count, np.iinfo(np.int64).max)
        for labels, name, time in self.book.roles:
            role[labels] = np.maximum(role[labels], _ROLES.index(name))
            clock[labels] = np.minimum(clock[labels], time)
        for one, other in self.book.shared_roles[::-1] + self.book.shared_roles:
            role[one] = role[other] = np.maximum(role[one], role[other])
            clock[one] = clock[other] = np.minimum(clock[one], clock[other])
        return role, clock

    def _multiples(self) -> np.ndarray:
        """For every class the number whose multiples may stay in its group."""
        found = np.ones(self.count, np.int64)
        for labels, of in self.book.multiples:
            found[self.of[labels[labels >= 0]]] = of
        return found

    def _flag(self, marked: list[np.ndarray]) -> np.ndarray:
        flags = np.zeros(self.count, bool)
        for labels in marked:
            flags[self.of[labels[labels >= 0]]] = True
        return flags

    # groups -----------------------------------------------------------------------------------------------------------

    def grouped(self) -> Grouped:
        """Groups of classes with the same signature; classes whose parts cannot lose equally are pinned."""
        for attempt in range(4):
            group_of_class, groups = self._signatures()
            parts, unequal = self._parts(group_of_class, groups)
            if not unequal:
                return self._finished(group_of_class, groups, parts)
            self._equalise(unequal, group_of_class, tie=attempt == 0)
            self._settle()
        raise AssertionError("the parts of an anatomy did not settle")

    def _signatures(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """For every class its group (-1: pinned, unread or alone), and for every group its classes in unit order."""
        keys = self.axis_of * 3 + self.role
        many = 3 * len(self.book.axes) + 1
        pairs, counts = np.unique(self.of * many + keys, return_counts=True)
        signature = np.zeros(self.count, np.uint64)
        np.add.at(signature, pairs // many, _scramble(pairs % many * np.int64(1_000_003) + counts))
        self.alive = (self.pin_of < 0) & self._has("writer") & self._has("reader")
        _, numbers = np.unique(signature, return_inverse=True)
        numbers = np.where(self.alive, numbers, -1)
        sizes = np.bincount(numbers[numbers >= 0], minlength=1)
        self.single = self.alive & (sizes[numbers] == 1)
        numbers[self.single] = -1
        first = self._first_writer()
        order = np.argsort(first, kind="stable")
        order = order[numbers[order] >= 0]
        names, starts = np.unique(numbers[order], return_index=True)
        rank = {int(n): i for i, n in enumerate(names[np.argsort(starts)])}
        lookup = np.full(max(rank, default=-1) + 2, -1)
        for number, place in rank.items():
            lookup[number] = place
        group_of_class = lookup[numbers]
        members = order[np.argsort(group_of_class[order], kind="stable")]
        bounds = np.searchsorted(group_of_class[members], np.arange(1, len(rank)))
        return group_of_class, [m for m in np.split(members, bounds) if m.size]

    def _has(self, role: str) -> np.ndarray:
        flags = np.zeros(self.count, bool)
        flags[self.of[self.role == _ROLES.index(role)]] = True
        return flags

    def _first_writer(self) -> np.ndarray:
        """For every class a sort key: when its first writer ran, then the position there."""
        writers = np.flatnonzero(self.role == _ROLES.index("writer"))
        order = np.lexsort((writers, self.clock[writers]))
        rank = np.empty(len(writers), np.int64)
        rank[order] = np.arange(len(writers))
        first = np.full(self.count, np.iinfo(np.int64).max)
        np.minimum.at(first, self.of[writers], rank)
        return first

    def _parts(self, group_of_class: np.ndarray, groups: list[np.ndarray]) -> tuple[list[np.ndarray], dict[int, int]]:
        """For every group its parts, and the groups whose partitions do not work out, with the partition's number."""
        unit_of = np.zeros(self.count, np.int64)
        for members in groups:
            unit_of[members] = np.arange(len(members))
        parts = [np.zeros((len(members), 1), np.int64) for members in groups]
        unequal: dict[int, int] = {}
        for number, (labels, cells, _, strict) in enumerate(self.book.partitions):
            known = labels >= 0
            classes, where = self.of[labels[known]], np.unique(cells[known], return_inverse=True)[1]
            for g in np.unique(group_of_class[classes]):
                if g < 0:
                    continue
                mine = group_of_class[classes] == g
                table = np.zeros((len(groups[g]), len(np.unique(cells))), np.int64)
                np.add.at(table, (unit_of[classes[mine]], where[mine]), 1)
                cell = _cells(table)
                if cell is None:
                    unequal.update({int(g): number} if strict else {})
                else:
                    parts[g] = np.concatenate([parts[g], cell[:, None]], 1)
        done = []
        for g, columns in enumerate(parts):
            _, joint, sizes = np.unique(columns, axis=0, return_inverse=True, return_counts=True)
            if g not in unequal and len(sizes) > 1 and (len(set(sizes.tolist())) > 1 or sizes[0] == 1):
                unequal[g] = -1
            done.append(joint.reshape(-1).astype(np.int64))
        return done, unequal

    def _equalise(self, unequal: dict[int, int], group_of_class: np.ndarray, *, tie: bool) -> None:
        """First try: the n-th positions of all parts leave together. Where that does not help either, the group stays."""
        for g, number in unequal.items():
            if tie and number >= 0 and self._tie_parts(*self.book.partitions[number][:2]):
                continue
            labels = np.flatnonzero(group_of_class[self.of] == g)
            where = self.book.partitions[number][2]
            self.book.pins.append((labels, _UNEQUAL, where))

    def _tie_parts(self, labels: np.ndarray, cells: np.ndarray) -> bool:
        order = np.argsort(cells, kind="stable")
        sizes = np.unique(cells, return_counts=True)[1]
        if len(set(sizes.tolist())) > 1:
            return False
        rows = labels[order].reshape(len(sizes), -1)
        good = (rows >= 0).all(0)
        self.book.edges.append((np.repeat(rows[:1, good], len(rows), 0).ravel(), rows[:, good].ravel()))
        lonely = rows[:, ~good]
        if (lonely >= 0).any():
            self.book.pin(lonely, _UNEQUAL)
        return True

    # results ----------------------------------------------------------------------------------------------------------

    def _finished(self, group_of_class: np.ndarray, groups: list[np.ndarray], parts: list[np.ndarray]) -> Grouped:
        kinds = self._kinds()
        unit_of = np.zeros(self.count, np.int64)
        for members in groups:
            unit_of[members] = np.arange(len(members))
        label_group = group_of_class[self.of] if self.count else np.empty(0, np.int64)
        order = np.argsort(label_group, kind="stable")
        bounds = np.searchsorted(label_group[order], np.arange(len(groups) + 1))
        names, multiple = _Names(), self._multiples()
        done = []
        for g, members in enumerate(groups):
            labels = np.sort(order[bounds[g] : bounds[g + 1]])
            slices = self._slices(labels, unit_of[self.of[labels]], len(members))
            kind: Kind = next((k for k, flags in kinds if flags[members].any()), "hidden")
            if kind == "hidden" and re.search(r"(^|\.)experts?\.", next(s.tensor for s in slices if s.role == "writer")):
                kind = "expert"
            done.append(
                Group(
                    name=names(slices, kind),
                    kind=kind,
                    units=len(members),
                    slices=slices,
                    parts=parts[g],
                    multiple_of=int(multiple[members[0]]),
                )
            )
        return Grouped(groups=tuple(done), pins=tuple(self._pinned()), group_of=label_group)

    def _kinds(self) -> tuple[tuple[Kind, np.ndarray], ...]:
        """For every kind but "hidden" the classes that are of it, the most telling kind first."""
        book = self.book
        return ("stream", self._flag(book.streams)), ("head", self._flag(book.heads)), ("expert", self._flag(book.experts))

    def _slices(self, labels: np.ndarray, units: np.ndarray, count: int) -> tuple[Slices, ...]:
        keys = self.axis_of[labels] * 3 + self.role[labels]
        found = []
        for key in np.unique(keys):
            mine = keys == key
            axis = self.book.axes[key // 3]
            ordered = labels[mine][np.argsort(units[mine], kind="stable")]
            time = int(self.clock[ordered].min())
            part = Slices(
                tensor=axis.tensor,
                axis=axis.axis,
                index=(ordered - axis.start).reshape(count, -1),
                role=_ROLES[key % 3],  # type: ignore[arg-type]
                blocks=axis.blocks,
            )
            found.append((time, int(key), part))
        return tuple(part for _, _, part in sorted(found, key=lambda f: f[:2]))

    def _pinned(self) -> list[Pin]:
        """Pinned widths by the weight that writes them (or reads them), and the reason."""
        pin_of = self.pin_of.copy()
        reasons = [(reason, str(where)) for _, reason, where in self.book.pins] + [(_ONE, ""), (_UNREAD, ""), (_UNWRITTEN, "")]
        pin_of[self.single] = len(reasons) - 3
        pin_of[(pin_of < 0) & ~self.alive & self._has("writer")] = len(reasons) - 2
        pin_of[(pin_of < 0) & ~self.alive & self._has("reader")] = len(reasons) - 1
        rows: dict[tuple[str, str], tuple[int, str]] = {}
        named = np.zeros(self.count, bool)
        for role in ("writer", "reader"):
            labels = np.flatnonzero((self.role == _ROLES.index(role)) & (pin_of[self.of] >= 0) & ~named[self.of])
            labels = labels[np.argsort(self.clock[labels], kind="stable")]
            labels = labels[np.unique(self.of[labels], return_index=True)[1]]
            keys, first, counts = np.unique(
                np.stack([self.axis_of[labels], pin_of[self.of[labels]]]), axis=1, return_index=True, return_counts=True
            )
            for i in np.argsort(self.clock[labels[first]], kind="stable"):
                axis, (reason, where) = self.book.axes[keys[0, i]], reasons[keys[1, i]]
                name = axis.tensor.rpartition(".")[0] if role == "writer" else f"{axis.tensor} (axis {axis.axis})"
                held, before = rows.get((name or axis.tensor, reason), (0, where))
                rows[name or axis.tensor, reason] = (held + int(counts[i]), before)
            named[self.of[labels]] = True
        return [Pin(name=name, units=units, reason=reason, where=where) for (name, reason), (units, where) in rows.items()]


def _slabs(classes: np.ndarray, axis: int) -> bool:
    """Whether every slab across `axis` is of one class."""
    rows = np.moveaxis(classes, axis, 0).reshape(classes.shape[axis], -1)
    return bool((rows == rows[:, :1]).all())


def _scramble(values: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every integer (splitmix64)."""
    x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _cells(table: np.ndarray) -> np.ndarray | None:
    """The part of every unit from its positions in each part (units, parts); zeros where it is in all; None where unequal."""
    if (table == table[:, :1]).all():
        return np.zeros(len(table), np.int64)
    if ((table > 0).sum(1) != 1).any() or len(set(table.sum(0).tolist())) > 1:
        return None
    return table.argmax(1).astype(np.int64)


class _Names:
    """Gives every group the name of its first writer (heads: of their attention), unique."""

    def __init__(self) -> None:
        self.given: Mapping[str, int] | dict[str, int] = {}

    def __call__(self, slices: tuple[Slices, ...], kind: str) -> str:
        writers = [s for s in slices if s.role == "writer"]
        name = writers[0].module or writers[0].tensor
        if kind == "head":
            name = _common([s.module for s in slices if s.role != "carrier"]) or name
        count = self.given.get(name, 0)
        self.given[name] = count + 1  # type: ignore[index]
        return name if not count else f"{name}#{count + 1}"


def _common(modules: list[str]) -> str:
    paths = [m.split(".") for m in modules]
    shared = []
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
