"""Closed-form correction of what is left after a cut: no gradients, no labels."""

from resect.repair.batchnorm import reestimate
from resect.repair.closed_form import METHODS, Choice, Method, Repair, repair
from resect.repair.sequential import Step, fidelity, repair_sequentially

__all__ = ["METHODS", "Choice", "Method", "Repair", "Step", "fidelity", "reestimate", "repair", "repair_sequentially"]
