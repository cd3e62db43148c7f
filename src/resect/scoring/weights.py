"""Scorers that look at the weights around a unit, alone or times its activity; and the control that looks at nothing."""

from __future__ import annotations

import hashlib

import numpy as np

from resect.scoring.scores import scorer
from resect.tracing import Evidence


@scorer
def magnitude(evidence: Evidence) -> np.ndarray:
    """Norm of a unit's writer rows times the norm of its reader columns; (units,). Source: Li et al. 2017, arXiv 1608.08710."""
    columns = [reader.column_norm**2 for reader in evidence.readers]
    return evidence.writer_norm * np.sqrt(np.sum(columns, axis=0)) if columns else evidence.writer_norm


@scorer
def activation_weight(evidence: Evidence) -> np.ndarray:
    """Root mean square of a unit's activation times its readers' column norm; (classes, units).

    Source: Wanda, arXiv 2306.11695, eq. 1, summed over the columns of a unit; squares add over readers.
    """
    parts = [reader.mean_square * reader.column_norm**2 for reader in evidence.readers]
    return np.sqrt(np.sum(parts, axis=0)) if parts else np.zeros((len(evidence.examples), evidence.units))


@scorer
def random(evidence: Evidence) -> np.ndarray:
    """Seeded uniform scores: the control that any scorer must beat; (units,)."""
    name = int.from_bytes(hashlib.sha256(evidence.group.encode()).digest()[:4], "big")
    return np.random.default_rng([evidence.seed, name]).random(evidence.units)
