"""Networks and data by name, for the command line and the demonstration; the core never imports this."""

from resect.sources.data import load_data
from resect.sources.models import Source, fitted, load_model
from resect.sources.splits import ArrayData, Splits

__all__ = ["ArrayData", "Source", "Splits", "fitted", "load_data", "load_model"]
