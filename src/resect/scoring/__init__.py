"""How much each unit matters: pure functions of the evidence, one file per family, a registry by name."""

from resect.scoring import activity, gradient, reconstruction, weights
from resect.scoring.scores import SCORERS, Scorer, Scores, score, scorer

__all__ = ["SCORERS", "Scorer", "Scores", "activity", "gradient", "reconstruction", "score", "scorer", "weights"]
