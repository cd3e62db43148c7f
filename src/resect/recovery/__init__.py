"""One fine-tune after the last cut: cross-entropy and distillation from the dense network."""

from resect.recovery.recovering import Check, Recovered, recover
from resect.recovery.settings import Recovery

__all__ = ["Check", "Recovered", "Recovery", "recover"]
