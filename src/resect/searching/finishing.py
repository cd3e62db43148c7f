"""The network of a plan as it would ship: cut, verified, and repaired as far as the data at hand allow."""

from __future__ import annotations

from typing import Any

from torch import nn

from resect.plan import Plan
from resect.repair import Method, reestimate, repair, repair_sequentially
from resect.scoring import Scores
from resect.surgery import cut

# How often a weight and the one that it feeds are fitted in turn; more gains little.
ALTERNATIONS = 5


def finish(
    model: nn.Module,
    scores: Scores,
    plan: Plan,
    calib: list[Any] | None,
    method: Method,
    *,
    sweeps: int = 1,
    alternations: int = ALTERNATIONS,
    quiet: bool = True,
) -> tuple[nn.Module, dict[str, str]]:
    """The cut network and what repaired each reader of it.

    First in closed form from the trace; then, with calibrate data, reader by reader in execution order, and batch norm
    statistics, each kept only where it helps on held-out data.
    """
    fixed = repair(scores.trace, plan, method)
    small = cut(model, plan, weights=fixed.weights)
    methods: dict[str, str] = {name: choice.method for name, choice in fixed.choices.items()}
    if calib is not None and method == "least_squares" and plan.share < 1:
        small, steps = repair_sequentially(model, small, plan, calib, sweeps=sweeps, alternations=alternations, quiet=quiet)
        methods |= {step.tensor: "sequential" for step in steps if step.kept}
        small, renewed = reestimate(model, small, calib)
        if renewed:
            methods["batch norm statistics"] = "re-estimated"
    return small, methods
