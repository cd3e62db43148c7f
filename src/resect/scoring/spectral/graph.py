"""Nearest-neighbour graphs of units: who holds the same values on the same data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sparse
import torch
from scipy.sparse.csgraph import connected_components

from resect.scoring.spectral.neighbours import nearest, nearest_by_faiss, squares

Weights = Literal["distance", "binary"]
Laplacian = Literal["plain", "normalised"]
Search = Literal["exact", "faiss"]

FLOOR = 1e-3
# A mean whose square is so small a share of the states' own is left where it is.
CENTRED = 1e-3
# Of so many units the norm is looked at for that.
SAMPLED = 4096


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
    square = squares(values, torch.from_numpy(ends)).double().cpu().numpy()
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
    return values if float(mean.square().sum()) <= CENTRED * float(values[:SAMPLED].square().sum(1).mean()) else values - mean


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
        square[stale] = squares(values, torch.from_numpy(np.stack([stale, outside[stale]], axis=1))).cpu().numpy()
        order = np.lexsort((rows, square[rows], label[rows]))
        first = rows[order[np.r_[True, np.diff(label[rows[order]]) > 0]]]
        ends = _unique(np.concatenate([ends, np.stack([first, outside[first]], axis=1)]))
