"""Nearest-neighbour graphs of units: who holds the same values on the same data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sparse
import torch
from scipy.sparse.csgraph import connected_components

from resect.errors import ScoreError

Weights = Literal["distance", "binary"]
Laplacian = Literal["plain", "normalised"]
Search = Literal["exact", "faiss"]

FLOOR = 1e-3
# Distances of so many units to as many others are held at once: 64 MB.
BLOCK = 4096
# Minima of so many distances are taken before the smallest are looked for: several times faster, and exact.
RUN = 32
# Candidates beyond the wanted neighbours; where the first of them is as near as the last neighbour, up to the rounding of
# products (a share of the squared norms), all are measured again.
SPARE = 6
UNSURE = 1e-5
# A mean whose square is so small a share of the states' own is left where it is.
CENTRED = 1e-3
# Numbers that are measured again at once: few enough to stay in cache.
MEASURED = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """An undirected, connected graph of units.

    ends: (edges, 2) units, the smaller first, every pair once, in order. weight: (edges,) positive, 1 on average. coincide: all
    units are in one place.
    """

    units: int
    ends: np.ndarray
    weight: np.ndarray
    coincide: bool = False

    @property
    def degree(self) -> np.ndarray:
        """(units,) sum of the weights of a unit's edges."""
        return np.bincount(self.ends.ravel(), np.repeat(self.weight, 2), self.units)

    def incidence(self, kind: Laplacian) -> sparse.csr_array:
        """(edges, units) matrix C with C^T C = L: a row is sqrt(w) (e_p - e_q), for "normalised" over the roots of degrees."""
        share = np.ones(self.units) if kind == "plain" else 1 / np.sqrt(self.degree)
        values = np.sqrt(self.weight)[:, None] * share[self.ends] * np.array([1.0, -1.0])
        rows = np.repeat(np.arange(len(self.ends)), 2)
        return sparse.csr_array((values.ravel(), (rows, self.ends.ravel())), shape=(len(self.ends), self.units))

    def laplacian(self, kind: Laplacian) -> sparse.csr_array:
        """(units, units) D - W, or for "normalised" 1 - D^-1/2 W D^-1/2."""
        matrix = self.incidence(kind)
        return (matrix.T @ matrix).tocsr()


def neighbour_graph(states: np.ndarray, *, neighbours: int, weights: Weights = "distance", search: Search = "exact") -> Graph:
    """The union graph of every unit's nearest neighbours by Euclidean distance; components are joined by their shortest edges.

    states: (units, values) float32, raw. neighbours: of a unit, at most all others. weights: "distance" is
    1 / (d^2 + 1e-3 median d^2), divided by the mean weight; "binary" is 1. search: "exact", or "faiss" for very wide groups.
    """
    units = len(states)
    if units < 2:
        return Graph(units=units, ends=np.zeros((0, 2), dtype=np.int64), weight=np.zeros(0))
    values = _on_device(states)
    find = nearest if search == "exact" else nearest_by_faiss
    found = find(values, min(neighbours, units - 1))
    ends = _unique(np.stack([np.repeat(np.arange(units), found.shape[1]), found.ravel()], axis=1))
    ends = _joined(values, ends)
    square = _squares(values, torch.from_numpy(ends)).double().cpu().numpy()
    weight = np.ones(len(ends)) if weights == "binary" else _weights(square)
    return Graph(units=units, ends=ends, weight=weight, coincide=not square.any())


def _weights(square: np.ndarray) -> np.ndarray:
    """Inverse squared distances with a floor, 1 on average; where over half of the pairs coincide, the others set the floor."""
    floor = FLOOR * (np.median(square) or np.median(square[square > 0] if (square > 0).any() else 1.0))
    weight = 1 / (square + floor)
    return weight / weight.mean()


def _on_device(states: np.ndarray) -> torch.Tensor:
    """The states around their mean, on the GPU where there is one: distances stay, and products are more exact.

    States whose mean is small beside them are taken as they are, without a copy.
    """
    values = torch.from_numpy(np.ascontiguousarray(states, dtype=np.float32)).to("cuda" if torch.cuda.is_available() else "cpu")
    mean = values.mean(0)
    return values if float(mean.square().sum()) <= CENTRED * float(values[:BLOCK].square().sum(1).mean()) else values - mean


def _unique(ends: np.ndarray) -> np.ndarray:
    low, high = ends.min(1), ends.max(1)
    units = high.max() + 1
    pairs = np.unique(low * units + high)
    return np.stack([pairs // units, pairs % units], axis=1)


def _joined(values: torch.Tensor, ends: np.ndarray) -> np.ndarray:
    """Edges with the shortest edge out of every component but the largest, again and again until there is one component."""
    units = len(values)
    outside, square = np.full(units, -1), np.full(units, np.inf)
    while True:
        ones = np.ones(len(ends))
        count, label = connected_components(sparse.coo_array((ones, (ends[:, 0], ends[:, 1])), shape=(units, units)), False)
        if count == 1:
            return ends
        rows = np.flatnonzero(label != np.bincount(label).argmax())
        # The nearest unit of another component stays that until the two components are one.
        stale = rows[(outside[rows] < 0) | (label[outside[rows]] == label[rows])]
        outside[stale] = nearest(values, 1, rows=stale, apart=label)[:, 0]
        square[stale] = _squares(values, torch.from_numpy(np.stack([stale, outside[stale]], axis=1))).cpu().numpy()
        order = np.lexsort((rows, square[rows], label[rows]))
        first = rows[order[np.r_[True, np.diff(label[rows[order]]) > 0]]]
        ends = _unique(np.concatenate([ends, np.stack([first, outside[first]], axis=1)]))


def _squares(values: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """(pairs,) squared distances, from differences: exact to rounding, also where two units nearly coincide."""
    pairs = pairs.to(values.device)
    step = max(1, MEASURED // values.shape[1])
    return torch.cat([(values[part[:, 0]] - values[part[:, 1]]).square().sum(1) for part in pairs.split(step)])


def nearest(values: torch.Tensor, count: int, *, rows: np.ndarray | None = None, apart: np.ndarray | None = None) -> np.ndarray:
    """(rows, count) nearest other units of some units (default: all), the nearest first; exact, ties by index.

    values: (units, features), around their mean. apart: (units,) labels; only units of another label count.
    """
    labels = None if apart is None else torch.from_numpy(apart).to(values.device)
    wanted = min(count + SPARE, len(values) - 1)
    many = rows is None or len(rows) > len(values) // 2
    asked = torch.arange(len(values)) if many else torch.from_numpy(rows)
    chosen = asked.to(values.device)
    found = _Nearest.of(values, labels, chosen, wanted)
    if many:
        found.look_at_all()
    else:
        found.look_from(chosen)
    # Products of rounded numbers order neighbours well, but not those that are about as far: they are measured again.
    last, spare = found.square[:, count - 1], found.square[:, min(count, wanted - 1)]
    unsure = torch.nonzero(spare - last <= UNSURE * (found.norms[chosen] + found.norms.max()))[:, 0]
    for part in unsure.split(BLOCK):
        found.measure(part, chosen[part])
    at = found.at[:, :count].cpu().numpy()
    return at[rows] if many and rows is not None else at


@dataclass(frozen=True, kw_only=True, eq=False)
class _Nearest:
    """The other units (of another label) nearest to some rows so far, by distances from products: (rows, count), sorted."""

    values: torch.Tensor
    labels: torch.Tensor | None
    norms: torch.Tensor
    square: torch.Tensor
    at: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor, labels: torch.Tensor | None, rows: torch.Tensor, count: int) -> _Nearest:
        square = torch.full((len(rows), count), torch.inf, device=values.device)
        at = torch.zeros_like(square, dtype=torch.int64)
        return cls(values=values, labels=labels, norms=values.square().sum(1), square=square, at=at)

    def look_at_all(self) -> None:
        """Every row is a unit: every pair of blocks is multiplied once."""
        units = torch.arange(len(self.values), device=self.values.device)
        for first in range(0, len(units), BLOCK):
            for second in range(first, len(units), BLOCK):
                one, other = slice(first, first + BLOCK), slice(second, second + BLOCK)
                square = self._between(units[one], other)
                self._keep(one, square, second)
                if first != second:
                    self._keep(other, square.T.contiguous(), first)

    def look_from(self, rows: torch.Tensor) -> None:
        """Some units as rows, against all units."""
        for start in range(0, len(rows), BLOCK):
            for first in range(0, len(self.values), BLOCK):
                square = self._between(rows[start : start + BLOCK], slice(first, first + BLOCK))
                self._keep(slice(start, start + BLOCK), square, first)

    def measure(self, places: torch.Tensor, rows: torch.Tensor) -> None:
        """Order some rows by distances from differences, ties by index."""
        candidates = self.at[places].sort(1)[0]
        pairs = torch.stack([rows[:, None].expand_as(candidates), candidates], dim=-1)
        square = _squares(self.values, pairs.flatten(0, 1)).view(candidates.shape)
        if self.labels is not None:
            square.masked_fill_(self.labels[candidates] == self.labels[rows][:, None], torch.inf)
        self.at[places] = candidates.gather(1, torch.sort(square, stable=True)[1])

    def _between(self, rows: torch.Tensor, block: slice) -> torch.Tensor:
        """(rows, block) squared distances, infinite from a unit to itself and to units of its label."""
        square = torch.addmm(self.norms[block], self.values[rows], self.values[block].T, alpha=-2).add_(self.norms[rows, None])
        if self.labels is not None:
            return square.masked_fill_(self.labels[rows, None] == self.labels[block], torch.inf)
        inside = torch.nonzero((rows >= block.start) & (rows < block.stop))[:, 0]
        square[inside, rows[inside] - block.start] = torch.inf
        return square

    def _keep(self, rows: slice, square: torch.Tensor, first: int) -> None:
        smallest, place = _smallest(square, self.square.shape[1])
        smallest, place = torch.cat([self.square[rows], smallest], 1), torch.cat([self.at[rows], place + first], 1)
        self.square[rows], order = torch.topk(smallest, self.square.shape[1], largest=False)
        self.at[rows] = place.gather(1, order)


def _smallest(square: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` smallest of every row and where they are: they lie in the `count` runs with the smallest minima."""
    columns = square.shape[1]
    if columns % RUN or columns // RUN <= 2 * count:
        return torch.topk(square, min(count, columns), largest=False)
    runs = square.view(len(square), -1, RUN)
    place = torch.topk(runs.amin(2), count, largest=False)[1]
    inside = (place[:, :, None] * RUN + torch.arange(RUN, device=square.device)).flatten(1)
    smallest, order = torch.topk(square.gather(1, inside), count, largest=False)
    return smallest, inside.gather(1, order)


def nearest_by_faiss(values: torch.Tensor, count: int) -> np.ndarray:
    """(units, count) near units by an inverted file of about 4 sqrt(units) cells, of which 32 are searched; nearly exact.

    Needs the extra `wide` (faiss), else ScoreError.
    """
    try:
        import faiss
    except ImportError:
        raise ScoreError('search="faiss" needs faiss: pip install "resect[wide]", or write search="exact"') from None
    data = values.cpu().numpy()
    cells = max(1, min(int(4 * len(data) ** 0.5), len(data) // 40))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(data.shape[1]), data.shape[1], cells)
    index.cp.seed = 0
    index.train(data)
    index.add(data)
    index.nprobe = min(32, cells)
    found = index.search(data, count + 1)[1]
    own = found == np.arange(len(data))[:, None]
    own[~own.any(1), -1] = True
    found = found[~own].reshape(len(data), count)
    return np.where(found < 0, np.roll(np.arange(len(data)), 1)[:, None], found)
