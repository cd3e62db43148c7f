"""What every unit did on data, class by class, as sums that add up."""

from resect.tracing.observing import Reader, Reading, observing, survey
from resect.tracing.states import States
from resect.tracing.sums import Sums
from resect.tracing.trace import Evidence, ReaderEvidence, Trace, trace

__all__ = ["Evidence", "Reader", "ReaderEvidence", "Reading", "States", "Sums", "Trace", "observing", "survey", "trace"]
