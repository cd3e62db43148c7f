"""resect: brain surgery on trained PyTorch networks.

It watches which neurons do the work, cuts the rest out, and keeps a promise about what must stay true.
The listing of this package reads as the story of the operation: anatomy, tracing, scoring, plan, surgery, repair, searching.
"""

from resect import testing
from resect.anatomy import Anatomy, Group, dissect
from resect.errors import (
    DataError,
    FileError,
    GoalError,
    ModelError,
    PlanError,
    ResectError,
    ScoreError,
    SurgeryError,
)
from resect.evaluation import Evaluation, Latency, evaluate, latency
from resect.exporting import export_onnx, load, load_panel, load_plan, save, save_panel
from resect.pipeline import prune, specialize
from resect.plan import Cost, Plan
from resect.recovery import Recovered, Recovery, recover
from resect.repair import reestimate, repair, repair_sequentially
from resect.scoring import SCORERS, Scores, score, scorer
from resect.searching import Budget, Certificate, Floor, Found, Trial, certify, fit, search
from resect.shrinking import Round, Shrunk, shrink
from resect.specializing import Panel, Specialised, Specialist, Specialists, collapse, selectivity
from resect.surgery import cut, masked, verify
from resect.tracing import Evidence, Trace, trace

__version__ = "0.1.0"

__all__ = [
    "SCORERS", "Anatomy", "Budget", "Certificate", "Cost", "DataError", "Evaluation", "Evidence", "FileError", "Floor",
    "Found", "GoalError", "Group", "Latency", "ModelError", "Panel", "Plan", "PlanError", "Recovered", "Recovery",
    "ResectError", "Round", "ScoreError", "Scores", "Shrunk", "Specialised", "Specialist", "Specialists", "SurgeryError",
    "Trace", "Trial", "certify", "collapse", "cut", "dissect", "evaluate", "export_onnx", "fit", "latency", "load",
    "load_panel", "load_plan", "masked", "prune", "recover", "reestimate", "repair", "repair_sequentially", "save",
    "save_panel", "score", "scorer", "search", "selectivity", "shrink", "specialize", "testing", "trace", "verify",
]  # fmt: skip
