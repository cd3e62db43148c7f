"""Scorers that compare two graphs of units, of what goes into their activation and of what comes out; and their controls."""

from resect.scoring.spectral.graph import Graph, neighbour_graph
from resect.scoring.spectral.scorer import PRESETS, Spectral, input_only, isolation, spectral

__all__ = ["PRESETS", "Graph", "Spectral", "input_only", "isolation", "neighbour_graph", "spectral"]
