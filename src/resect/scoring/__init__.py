"""How much each unit matters: pure functions of the evidence, one file per family, a registry by name."""

from resect.scoring import activity, gradient, reconstruction, weights
from resect.scoring.scores import SCORERS, Scorer, Scores, needs, score, scorer
from resect.scoring.spectral import PRESETS, Spectral

__all__ = [
    "PRESETS", "SCORERS", "Scorer", "Scores", "Spectral", "activity", "gradient", "needs", "reconstruction", "score", "scorer",
    "weights",
]  # fmt: skip
