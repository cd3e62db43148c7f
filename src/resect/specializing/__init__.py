"""One network per class, or per subset of the classes, as small as its promise allows."""

from resect.specializing.judging import Rates
from resect.specializing.overlap import Collapse, Overlap, collapse, selectivity
from resect.specializing.question import Question
from resect.specializing.results import Specialised, Specialists
from resect.specializing.specialist import Panel, Specialist
from resect.specializing.specialists import specialists

__all__ = [
    "Collapse", "Overlap", "Panel", "Question", "Rates", "Specialised", "Specialist", "Specialists", "collapse", "selectivity",
    "specialists",
]  # fmt: skip
