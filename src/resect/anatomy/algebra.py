"""What happens to labels when tensors meet: elementwise, in a reduction, in a product. Every op rule is made of these three."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resect.anatomy.labels import Book, Marks, Plane, axes, drop, vector

UNLABELLED = "meets a tensor of fixed width (a constant, a literal size or an input)"
BROADCAST = "broadcast against several units at once"
MIXED = "mixed with the other units of its width"
MULTIPLIED = "units are multiplied with one another, not by a weight"


def source(marks: Iterable[Marks]) -> str:
    """Where a tensor made from these comes from: input before parameters before constants."""
    found = {m.source for m in marks}
    return "activation" if "activation" in found else "parameter" if "parameter" in found else "constant"


def meet(book: Book, *operands: Marks) -> Marks:
    """The result of an elementwise op: labels that meet are tied."""
    if len(operands) == 1:
        return replace(operands[0], name=None)
    result = operands[0]
    for other in operands[1:]:
        result = _meet(book, result, other)
    return result


def _meet(book: Book, x: Marks, y: Marks) -> Marks:
    ndim = max(len(x.shape), len(y.shape))
    x, y = x.lifted(ndim), y.lifted(ndim)
    shape = tuple(b if a == 1 else a for a, b in zip(x.shape, y.shape))
    taken: set[int] = set()
    planes: list[Plane] = []
    for p in x.planes:
        partners = [i for i, q in enumerate(y.planes) if set(axes(q)) & set(axes(p))]
        taken.update(partners)
        joined: Plane | None = p if partners else alone(book, p, y)
        for i in partners:
            joined = join(book, joined, y.planes[i], x, y) if joined is not None else None
        planes += [] if joined is None else [joined]
    for i, q in enumerate(y.planes):
        if i not in taken:
            left = alone(book, q, x)
            planes += [] if left is None else [left]
    flat = frozenset(a for a in range(ndim) if not x.fixed(a) and not y.fixed(a) and shape[a] > 1)
    stats = _normalised(book, x, y) + _normalised(book, y, x)
    name = x.name if x.source == "parameter" and shape == x.shape else y.name if shape == y.shape else None
    where = source((x, y))
    return Marks(
        shape=shape,
        planes=tuple(planes),
        source=where,  # type: ignore[arg-type]
        name=name if where == "parameter" else None,
        flat=flat,
        stats=stats,
    )


def _normalised(book: Book, summary: Marks, x: Marks) -> tuple[Plane, ...]:
    """The summaries of `summary` that have not met their own units in `x`; those that have make a stream of them."""
    left = []
    for labels in summary.stats:
        if any(torch.equal(labels.reshape(-1), p.reshape(-1)) for p in x.planes):
            book.stream(labels)
        else:
            left.append(labels)
    return tuple(left)


def alone(book: Book, p: Plane, other: Marks) -> Plane | None:
    """A plane that meets a tensor without labels on its axes: free where that is broadcast, else held by its width."""
    held = [a for a in axes(p) if other.fixed(a)]
    if not held:
        return p
    if len(held) == len(axes(p)):
        book.pin(p, UNLABELLED)
        return None
    book.tie_along(p, held)
    return p


def join(book: Book, p: Plane, q: Plane, x: Marks, y: Marks) -> Plane | None:
    """Two planes that meet on some axis: one plane for the result, or None where both stay."""
    vp, vq = set(axes(p)), set(axes(q))
    if vp == vq:
        book.tie(p, q, UNLABELLED)
        if x.source == y.source == "parameter":
            book.share_role(p, q)
        return torch.where((p >= 0) & (q >= 0), p, torch.full_like(p, -1))
    if vq < vp:
        return _cover(book, p, q, y)
    if vp < vq:
        return _cover(book, q, p, x)
    book.pin(p, BROADCAST)
    book.pin(q, BROADCAST)
    return None


def _cover(book: Book, p: Plane, q: Plane, narrow: Marks) -> Plane:
    """`p` varies on more axes than `q`. Where q's axes are the outer ones of p's labels (heads), q is one more property of
    the same unit and is tied; where they are the inner ones (positions within every head), q's width must stay."""
    mine = set(axes(q))
    if _outermost(p, mine):
        book.tie(p, q, UNLABELLED)
        return p
    book.pin(q, BROADCAST)
    held = mine | {a for a in axes(p) if narrow.fixed(a)}
    book.tie_along(p, held)
    return p


def _outermost(p: Plane, chosen: set[int]) -> bool:
    steps = {a: _step(p, a) for a in axes(p)}
    return min(steps[a] for a in chosen) > max(steps[a] for a in steps if a not in chosen)


def _step(p: Plane, axis: int) -> int:
    """The smallest change of label from one position of an axis to the next."""
    jumps = vector(p, axis).diff().abs()
    return int(jumps[jumps > 0].min()) if bool((jumps > 0).any()) else 0


def mix(book: Book, x: Marks, over: Iterable[int], reason: str = MIXED, *, stats: bool = False) -> Marks:
    """`x` after an op that mixes values along the axes `over`, shape kept: units inside one mix leave together.

    With `stats` a summary of whole units (mean, norm) is remembered, not pinned, until it meets them again.
    """
    mixed, planes, summaries = set(over), list[Plane](), list(x.stats)
    for p in x.planes:
        inside = [a for a in axes(p) if a in mixed]
        if len(inside) < len(axes(p)):
            book.tie_along(p, inside)
            planes.append(drop(p, inside))
        elif inside and stats:
            summaries.append(p)
        elif inside:
            book.pin(p, reason)
    return replace(x, planes=tuple(planes), stats=tuple(summaries), name=None)


@dataclass(frozen=True, kw_only=True)
class Product:
    """A contraction by letters, as einsum writes them: axes of both operands and of the result."""

    a: str
    b: str
    out: str

    @property
    def batch(self) -> str:
        """Letters of both operands that the result keeps."""
        return "".join(c for c in self.a if c in self.b and c in self.out)

    @property
    def summed(self) -> str:
        """Letters of both operands that the result loses."""
        return "".join(c for c in self.a if c in self.b and c not in self.out)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Side:
    """One operand's planes by what they vary on: whole batch indices (heads), the contracted axis, or free axes."""

    marks: Marks
    letters: str
    heads: list[Plane]
    summed: list[Plane]
    free: list[Plane]
    headed: list[Plane]

    def at(self, letter: str) -> int:
        return self.letters.index(letter)


def contract(book: Book, a: Marks, b: Marks, spec: Product) -> Marks:
    """The result of a product: contracted labels are tied, free ones carried; heads on batch axes become whole units."""
    left, right = _side(book, a, spec.a, spec), _side(book, b, spec.b, spec)
    _roles(book, left, right, spec)
    _meet_heads(book, left, right, spec)
    _rows_of_heads(book, left, right, spec)
    for letter in spec.summed:
        _sum(book, left, right, letter)
    heads = [_carried(p, side, spec) for side in (left, right) for p in (*side.heads, *side.headed)]
    free = [_carried(p, side, spec) for side in (left, right) for p in side.free]
    planes = (*_without_doubles([p for p in heads if axes(p)]), *(p for p in free if axes(p)))
    sizes = {**dict(zip(spec.a, a.shape)), **dict(zip(spec.b, b.shape))}
    for c in spec.batch:
        sizes[c] = max(a.shape[spec.a.index(c)], b.shape[spec.b.index(c)])
    where = source((a, b))
    for labels in (*a.stats, *b.stats):
        book.pin(labels, "its mean or norm is read by a product")
    return Marks(shape=tuple(sizes[c] for c in spec.out), planes=planes, source=where)  # type: ignore[arg-type]


def _side(book: Book, marks: Marks, letters: str, spec: Product) -> _Side:
    heads, summed, free, headed = list[Plane](), list[Plane](), list[Plane](), list[Plane]()
    for p in marks.planes:
        on = {letters[i] for i in axes(p)}
        batch = [i for i in axes(p) if letters[i] in spec.batch]
        if batch:
            book.tie_along(p, (i for i in axes(p) if i not in batch))
            heads.append(p)
        elif on & set(spec.summed):
            (headed if _rows_are_heads(p, letters, spec) else summed).append(p)
        else:
            free.append(p)
    return _Side(marks=marks, letters=letters, heads=heads, summed=summed, free=free, headed=headed)


def _rows_are_heads(p: Plane, letters: str, spec: Product) -> bool:
    """Heads folded into the rows of a product: the labels vary on free axes, and there more coarsely than on the summed."""
    rows = {i for i in axes(p) if letters[i] not in spec.summed}
    return bool(rows) and _outermost(p, rows)


def _roles(book: Book, left: _Side, right: _Side, spec: Product) -> None:
    reading = left.marks.source == "parameter"
    both = reading and right.marks.source == "parameter"
    for side in (left, right):
        if side.marks.source == "parameter":
            for p in side.summed:
                # between two weights only one of them is the reader of the inner width
                book.role(p, "writer" if side is right and reading else "reader")
            for p in () if both else side.free:
                # what two weights make together is read or written where it is used
                book.role(p, "writer")


def _meet_heads(book: Book, left: _Side, right: _Side, spec: Product) -> None:
    for side, other in ((left, right), (right, left)):
        if side.heads and side.marks.source == "parameter" and not other.heads:
            for p in side.heads:
                book.pin(p, "one of several experts, chosen by the input")
            for p in (*side.free, *side.summed):
                book.expert(p)
            side.heads.clear()
    for p in left.heads:
        for q in right.heads:
            one, across = _batch_plane(p, left, spec), _batch_plane(q, right, spec)
            if set(axes(one)) & set(axes(across)):
                book.tie(one, across)
    for side, other in ((left, right), (right, left)):
        if side.heads:
            _hold(book, side, other, spec)
            if side.marks.source == "activation":
                for p in side.heads:
                    book.head(p)


def _hold(book: Book, side: _Side, other: _Side, spec: Product) -> None:
    """`side` has heads; what `other` has in one width for all heads cannot follow any of them."""
    letters = {side.letters[i] for p in side.heads for i in axes(p) if side.letters[i] in spec.batch}
    fixed = any(other.marks.fixed(other.at(c)) for c in letters)
    if fixed and not other.heads and other.marks.source == "constant":
        for p in side.heads:
            book.pin(p, UNLABELLED)
    if not other.heads:
        for q in (*other.summed, *other.free):
            book.pin(q, BROADCAST)
        other.summed.clear()
        other.free.clear()


def _batch_plane(p: Plane, side: _Side, spec: Product) -> Plane:
    """The heads of `p` on the batch letters alone, axes in the order of `spec.batch`."""
    p = drop(p, (i for i, c in enumerate(side.letters) if c not in spec.batch))
    order = [side.at(c) for c in spec.batch]
    return p.reshape([p.shape[i] for i in order])


def _rows_of_heads(book: Book, left: _Side, right: _Side, spec: Product) -> None:
    """Heads in the rows stay whole; what the other side has in one width for all of them stays."""
    for side, other in ((left, right), (right, left)):
        for p in side.headed:
            book.tie_along(p, (i for i in axes(p) if side.letters[i] in spec.summed))
        if side.headed:
            for q in (*other.summed, *other.headed):
                book.pin(q, BROADCAST)
            other.summed.clear()
            other.headed.clear()


def _sum(book: Book, left: _Side, right: _Side, letter: str) -> None:
    """Tie the labels of one contracted axis; pin those that have no partner."""
    ours = [(p, left.at(letter)) for p in left.summed if p.shape[left.at(letter)] > 1]
    theirs = [(q, right.at(letter)) for q in right.summed if q.shape[right.at(letter)] > 1]
    for p, axis in ours + theirs:
        book.tie_along(p, (a for a in axes(p) if a != axis))
    for one, another in _pairs([vector(p, axis) for p, axis in ours], [vector(q, across) for q, across in theirs]):
        book.tie(one, another, UNLABELLED)
    if bool(ours) != bool(theirs):
        other, at = (right, right.at(letter)) if ours else (left, left.at(letter))
        if book.lenient and other.marks.source == "constant" and not other.marks.fixed(at):
            return  # zeros of a width that an attribute may hold: verification will tell
        for p, _ in ours + theirs:
            book.pin(p, "is contracted with a tensor of fixed width (an input, a constant or a literal size)")
    elif min(len(left.letters), len(right.letters)) == 1 and left.marks.source == right.marks.source == "parameter":
        for p, _ in ours + theirs:
            book.pin(p, "is normalised by a product of weights")
    elif "parameter" not in (left.marks.source, right.marks.source):
        for p, _ in ours + theirs:
            book.pin(p, MULTIPLIED)


def _pairs(ours: list[Plane], theirs: list[Plane]) -> list[tuple[Plane, Plane]]:
    """Which labels of a contracted axis meet: all, unless both sides are products of the same factors (heads, positions)."""
    if len(ours) == len(theirs) > 1:
        alike = [(p, q) for p in ours for q in theirs if torch.equal(_pattern(p), _pattern(q))]
        if len(alike) == len(ours):
            return alike
    return [(p, q) for p in ours for q in theirs]


def _pattern(labels: Plane) -> Tensor:
    """Which positions have equal labels."""
    return torch.unique(labels, return_inverse=True)[1]


def _carried(p: Plane, side: _Side, spec: Product) -> Plane:
    """A plane of an operand as a plane of the result."""
    p = drop(p, (i for i, c in enumerate(side.letters) if c not in spec.out))
    shape = [p.shape[side.at(c)] if c in side.letters else 1 for c in spec.out]
    kept = [side.at(c) for c in spec.out if c in side.letters]
    return p.permute(kept + [i for i in range(p.ndim) if i not in kept]).reshape(shape)


def _without_doubles(planes: Sequence[Plane]) -> tuple[Plane, ...]:
    """Planes of heads that vary on axes of another, wider one say nothing more: the product has tied them."""
    return tuple(
        p
        for i, p in enumerate(planes)
        if not any(
            set(axes(p)) < set(axes(q)) or (set(axes(p)) == set(axes(q)) and j < i) for j, q in enumerate(planes) if j != i
        )
    )
