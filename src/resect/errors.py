"""The few exceptions users meet. Each message says what, where, which values, and what to write instead."""


class ResectError(Exception):
    """Base of every error resect raises on purpose; catch this one to catch them all."""


class ModelError(ResectError):
    """The network cannot be operated on: training mode, non-finite values, non-deterministic outputs, a failing forward."""


class DataError(ResectError):
    """The data cannot be used: empty, unlabelled where labels are needed, labels out of range, wrong shapes."""


class PlanError(ResectError):
    """A plan does not fit the anatomy it is used with, or asks for something that cannot be cut."""


class ScoreError(ResectError):
    """A scorer is unknown, lacks the evidence it needs, or breaks the laws scorers must keep."""


class SurgeryError(ResectError):
    """A cut network does not equal its masked original; nothing was delivered."""


class FileError(ResectError):
    """A file is missing, truncated, edited, of another version, or cannot be written."""


class GoalError(ResectError):
    """A floor or budget that makes no sense: outside [0, 1], above the dense network, or contradictory."""
