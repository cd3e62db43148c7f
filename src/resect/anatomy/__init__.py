"""What can be removed from a network, found by watching one forward pass."""

from resect.anatomy.anatomy import Anatomy, AttributeEdit, Contraction, Group, Kind, Pin, Role, Slices
from resect.anatomy.attributes import attribute_rule
from resect.anatomy.dissecting import dissect, known_ops
from resect.anatomy.watching import Call, rule

__all__ = [
    "Anatomy",
    "AttributeEdit",
    "Call",
    "Contraction",
    "Group",
    "Kind",
    "Pin",
    "Role",
    "Slices",
    "attribute_rule",
    "dissect",
    "known_ops",
    "rule",
]
