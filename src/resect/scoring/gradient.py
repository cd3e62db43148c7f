"""Scorers that look at the slope of the loss."""

from __future__ import annotations

import numpy as np

from resect.errors import ScoreError
from resect.scoring.scores import scorer
from resect.tracing import Evidence


@scorer(gradients=True)
def taylor(evidence: Evidence) -> np.ndarray:
    """Mean |activation x gradient of the cross-entropy|, summed over a unit's positions; (classes, units).

    The first-order change of the loss when the unit is zeroed. Needs `trace(..., gradients=True)`, else ScoreError.
    Source: Molchanov et al. 2019, arXiv 1906.10771, in its activation form.
    """
    if any(reader.slope is None for reader in evidence.readers):
        raise ScoreError(f"taylor needs gradients for group {evidence.group}: trace with gradients=True and labelled data")
    parts = [reader.slope for reader in evidence.readers if reader.slope is not None]
    return np.sum(parts, axis=0) if parts else np.zeros((len(evidence.examples), evidence.units))
