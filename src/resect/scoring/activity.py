"""Scorers that look at what units do: how often, how strongly and how variably they fire."""

from __future__ import annotations

import numpy as np

from resect.scoring.scores import scorer
from resect.tracing import Evidence


@scorer
def firing_rate(evidence: Evidence) -> np.ndarray:
    """Share of examples (positions) on which a unit fires, per class; (classes, units) in [0, 1].

    Source: one minus the average percentage of zeros (APoZ), Hu et al. 2016, arXiv 1607.03250, taken per class.
    """
    return evidence.over_readers("rate")


@scorer
def peak(evidence: Evidence) -> np.ndarray:
    """Largest activation over a class; (classes, units). Source: the original Brain-Slimmer program's criterion."""
    return evidence.over_readers("peak")


@scorer
def contribution(evidence: Evidence) -> np.ndarray:
    """Mean activation over a class times what the readers make of it; (classes, units).

    At an output layer the size is |w[c, i] - mean over classes of w[:, i]|, elsewhere the reader's column norm.
    Source: class-aware pruning, the CAP'NN family (arXiv 1812.11059).
    """
    total = np.zeros((len(evidence.examples), evidence.units))
    for reader in evidence.readers:
        size = reader.column_norm if reader.readout is None else np.abs(reader.readout - reader.readout.mean(0))
        total += np.abs(reader.mean) * size
    return total


@scorer
def fluctuation(evidence: Evidence) -> np.ndarray:
    """Variance of a unit's activation times its readers' squared column norm; (units,). Source: FLAP, arXiv 2312.11983."""
    parts = [reader.variance * reader.column_norm**2 for reader in evidence.readers]
    return np.sum(parts, axis=0) if parts else np.zeros(evidence.units)
