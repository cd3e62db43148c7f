"""What every op does to labels, one module per op family; importing this package registers them all."""

from resect.anatomy.rules import attention, contractions, convolutions, indexing, making, norms, reductions, views

__all__ = ["attention", "contractions", "convolutions", "indexing", "making", "norms", "reductions", "views"]
