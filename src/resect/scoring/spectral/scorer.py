"""Spectral structural importance: units whose neighbourhood the activation tears apart matter, and two controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from resect.errors import ScoreError
from resect.scoring.scores import DEAD_VARIANCE, ROUNDING, scorer
from resect.scoring.spectral import forms
from resect.scoring.spectral.forms import FULL_LIMIT, Mode
from resect.scoring.spectral.graph import Graph, Laplacian, Search, Weights, neighbour_graph
from resect.tracing import Evidence

Aggregation = Literal["mean", "sum"]
Direction = Literal["expansion", "contraction"]

ROWS = 1024
UNITS_AT_ONCE = 4096
CHOICES = {
    "mode": Mode,
    "weights": Weights,
    "laplacian": Laplacian,
    "aggregation": Aggregation,
    "direction": Direction,
    "search": Search,
}


@dataclass(frozen=True, kw_only=True)
class Spectral:
    """A scorer: how far the output graph drives a unit apart from its neighbours in the input graph; (units,).

    Nodes are the live units of a group. The input graph is that of their pre-activation states, the output graph that of their
    post-activation states. An edge of the input graph gets e_pq (see `forms`), a unit the mean of its edges.

    mode: "full" (all eigenpairs in closed form), "jl" (the same by random projections), "proxy" (the same with the diagonal of
    the output graph), "eig" (the `pairs` largest eigenpairs, all where None), or "auto": full up to 4096 units, jl above.
    neighbours: k of both graphs. weights, laplacian: of both graphs ("distance" or "binary", "plain" or "normalised").
    aggregation: "mean", weighted by the input graph's weights, or "sum". direction: "contraction" swaps the graphs: what the
    activation brings together. compare: False puts the input graph in the place of the output graph (the control
    `input_only`). search: "exact" or "faiss". projections: of mode "jl". states: rows that a trace is asked for.

    Needs `trace(..., states=1024)`, else ScoreError; ScoreError too for fewer than two rows, and for states or options that
    make no sense. Units that are constant on the sample score lowest.

    Source: Wang, "Spectral structural distortion reveals redundant neurons", arXiv 2605.18860 (its abstract); the form of
    SPADE, Cheng et al., ICML 2021. What is ours is said in docs/spectral.md.
    """

    mode: Mode = "auto"
    neighbours: int = 10
    weights: Weights = "distance"
    laplacian: Laplacian = "plain"
    pairs: int | None = None
    projections: int = 64
    aggregation: Aggregation = "mean"
    direction: Direction = "expansion"
    compare: bool = True
    search: Search = "exact"
    states: int = ROWS

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ScoreError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, get_args(choices)))}")
        for name, least in (("neighbours", 1), ("pairs", 1), ("projections", 1), ("states", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ScoreError(f"{name}={value} is too small; write at least {least}")

    @property
    def __name__(self) -> str:
        if not self.compare and self == Spectral(compare=False):
            return "input_only"
        preset = next((name for name, options in PRESETS.items() if options == self), None)
        if preset is not None:
            return "spectral" if preset == "resect" else f"spectral({preset})"
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"spectral({', '.join(f'{f.name}={getattr(self, f.name)}' for f in changed)})"

    @property
    def needs(self) -> Mapping[str, Any]:
        """What a trace must be asked for."""
        return {"states": self.states}

    def __call__(self, evidence: Evidence) -> np.ndarray:
        live = live_units(evidence, self.__name__)
        if not live.any():
            return np.zeros(evidence.units)
        inputs, outputs, order = self.graphs(evidence, live)
        return spread_out(self.of_graphs(inputs, outputs, order, seed=evidence.seed), live)

    def graphs(self, evidence: Evidence, live: np.ndarray) -> tuple[Graph, Graph, np.ndarray]:
        """The input and the output graph of the live units, and their ranks in an order that goes with their states."""
        assert evidence.states is not None
        first, second = (evidence.states.pre, evidence.states.post)[:: 1 if self.direction == "expansion" else -1]
        values = rows_of(first, live)
        drawn = values @ np.random.default_rng(0).standard_normal(values.shape[1], dtype=np.float32)
        inputs = self.graph(values)
        del values
        outputs = self.graph(rows_of(second, live)) if self.compare else inputs
        return inputs, outputs, np.argsort(np.argsort(drawn, kind="stable"), kind="stable")

    def graph(self, values: np.ndarray) -> Graph:
        """The neighbour graph of units by their states, (units, values)."""
        return neighbour_graph(values, neighbours=self.neighbours, weights=self.weights, search=self.search)

    def of_graphs(self, inputs: Graph, outputs: Graph, order: np.ndarray, *, seed: int = 0) -> np.ndarray:
        """(units,) scores of the units of two graphs."""
        if inputs.units < 2 or (inputs.coincide and outputs.coincide):
            return np.zeros(inputs.units)
        mode = self.mode if self.mode != "auto" else "full" if inputs.units <= FULL_LIMIT else "jl"
        if mode == "eig":
            edges = forms.eig(inputs, outputs, self.laplacian, pairs=self.pairs, seed=seed)
        elif mode == "jl":
            edges = forms.jl(inputs, outputs, self.laplacian, projections=self.projections, order=order, seed=seed)
        else:
            edges = (forms.full if mode == "full" else forms.proxy)(inputs, outputs, self.laplacian)
        weight = inputs.weight if self.aggregation == "mean" else np.ones(len(edges))
        total = np.bincount(inputs.ends.ravel(), np.repeat(weight * edges, 2), inputs.units)
        return total / inputs.degree if self.aggregation == "mean" else total


PRESETS: dict[str, Spectral] = {
    "resect": Spectral(),
    "spade": Spectral(mode="eig", pairs=2, weights="binary", laplacian="normalised", aggregation="sum"),
}

spectral = scorer(Spectral())
input_only = scorer(Spectral(compare=False))


@scorer(states=ROWS)
def isolation(evidence: Evidence) -> np.ndarray:
    """One over a unit's weighted degree in the output graph; (units,). A control of `spectral`: it compares no graphs."""
    live = live_units(evidence, "isolation")
    if live.sum() < 2:
        return np.zeros(evidence.units)
    assert evidence.states is not None
    return spread_out(1 / PRESETS["resect"].graph(rows_of(evidence.states.post, live)).degree, live)


def live_units(evidence: Evidence, name: str) -> np.ndarray:
    """(units,) False where a unit is constant on the sample of states; all False where nothing reads the group.

    Raises ScoreError where there is no sample, fewer than two rows, or a value that is not finite.
    """
    states = evidence.states
    if states is None:
        if not evidence.readers:
            return np.zeros(evidence.units, dtype=bool)
        raise ScoreError(f"{name} needs hidden states for group {evidence.group}: trace(..., states={ROWS})")
    if len(states.keys) < 2:
        raise ScoreError(
            f"{name} needs at least 2 rows of hidden states for group {evidence.group} and has {len(states.keys)}; "
            "trace more data, or data that differ"
        )
    wrong = sum(int((~np.isfinite(values)).sum()) for values in (states.pre, states.post))
    if wrong:
        raise ScoreError(
            f"{wrong} hidden states of group {evidence.group} are not finite (NaN or inf); check the data and the weights"
        )
    moments = [_moments(states.post[:, first : first + UNITS_AT_ONCE]) for first in range(0, evidence.units, UNITS_AT_ONCE)]
    variance, square = np.concatenate(moments, axis=1)
    return variance > np.maximum(DEAD_VARIANCE * variance.max(), ROUNDING * square)


def _moments(values: np.ndarray) -> np.ndarray:
    """(2, units) variance and mean square of some units, in float64."""
    exact = values.astype(np.float64)
    return np.stack([exact.var(0).mean(1), np.square(exact).mean((0, 2))])


def rows_of(values: np.ndarray, live: np.ndarray) -> np.ndarray:
    """(live units, rows x width) the states of every unit as one row, around the mean unit, from (rows, units, width)."""
    chosen = values if live.all() else values[:, live]
    made = chosen.transpose(1, 0, 2).astype(np.float32, order="C", copy=True).reshape(chosen.shape[1], -1)
    made -= made.mean(0, dtype=np.float64).astype(np.float32)
    return made


def spread_out(scores: np.ndarray, live: np.ndarray) -> np.ndarray:
    """(units,) the scores of live units in their places; the others score below the lowest."""
    result = np.full(len(live), scores.min() - 1.0)
    result[live] = scores
    return result
