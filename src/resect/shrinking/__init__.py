"""Cutting in rounds to a cost, each scored on the network that the one before left; then one recovery."""

from resect.shrinking.keeping import Round
from resect.shrinking.shrinking import Shrunk, shrink

__all__ = ["Round", "Shrunk", "shrink"]
