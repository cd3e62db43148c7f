"""mask (reversible), cut (physical) and verify (that the two agree): the only place where a network loses anything."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resect.anatomy import slicing
from resect.batches import device_of, example_batch, forward
from resect.errors import ModelError, PlanError, SurgeryError
from resect.plan import Plan

TOLERANCE = 1e-4


def check_fits(model: nn.Module, plan: Plan) -> None:
    """Raise PlanError naming the first tensor of the plan's anatomy that the network lacks or has in another shape."""
    tensors = slicing.named_tensors(model)
    for name, shape in plan.anatomy.shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != tuple(shape):
            raise PlanError(
                f"the plan is for another network: {name} has shape {tuple(shape)} there and {found or 'no counterpart'} here; "
                "dissect this network and make a new plan"
            )


def cut(
    model: nn.Module,
    plan: Plan,
    *,
    weights: Mapping[str, Tensor] | None = None,
    inplace: bool = False,
    verify: bool = True,
) -> nn.Module:
    """Remove the units that a plan drops; returns an ordinary, smaller module and leaves `model` as it was.

    weights: full-size tensors by name that replace the network's own before the cut (a repair). inplace: cut `model` itself,
    for networks too large to copy. verify: compare with masking on the anatomy's example (skipped with `inplace`).

    Raises PlanError when the plan is of another network, SurgeryError when the cut network differs from the masked one by more
    than 1e-4 of the largest output.
    """
    check_fits(model, plan)
    small = model if inplace else copy.deepcopy(model)
    if weights:
        slicing.replace(small, plan.anatomy, {name: tensor.to(device_of(small)) for name, tensor in weights.items()})
    if verify and not inplace:
        full = copy.deepcopy(small)
        slicing.apply(small, plan.anatomy, plan.keep)
        check_equal(full, small, plan)
    else:
        slicing.apply(small, plan.anatomy, plan.keep)
    return small


@contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """The network with the plan's units zeroed where they are read, for the time of the context; then as it was, always.

    Shapes stay. For units of kind hidden, head and expert the outputs equal those of the cut network.

    >>> from resect.anatomy import dissect
    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).eval()
    >>> plan = Plan.random(dissect(model, torch.ones(1, 2)), ratio=0.5)
    >>> with masked(model, plan) as quiet:
    ...     int((quiet[2].weight == 0).sum())
    2
    >>> int((model[2].weight == 0).sum())
    0
    """
    check_fits(model, plan)
    replaced = slicing.masked_weights(model, plan.anatomy, plan.keep)
    original: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, tensor in replaced.items():
            for alias in (name, *plan.anatomy.aliases.get(name, ())):
                path, _, leaf = alias.rpartition(".")
                module = model.get_submodule(path)
                owner: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
                original.append((owner, leaf, owner[leaf]))
                owner[leaf] = nn.Parameter(tensor, requires_grad=False) if leaf in module._parameters else tensor
        yield model
    finally:
        for owner, leaf, tensor in reversed(original):
            owner[leaf] = tensor


def verify(model: nn.Module, small: nn.Module, plan: Plan) -> float:
    """Largest difference between the cut and the masked network on the anatomy's example, relative to the largest output."""
    batch = example_batch(plan.anatomy.example)
    with torch.no_grad():
        with masked(model, plan):
            expected = forward(model, batch).double()
        got = forward(small, batch).double()
    if got.shape != expected.shape:
        raise SurgeryError(f"the cut network returns shape {tuple(got.shape)}, the dense one {tuple(expected.shape)}")
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def check_equal(model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Raise SurgeryError unless the cut network equals the masked one to 1e-4 (1e-2 in half precision)."""
    if any(group.kind == "stream" and not plan.keep[group.name].all() for group in plan.anatomy.groups):
        return
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    error = verify(model, small, plan)
    if not error <= (1e-2 if half else TOLERANCE):
        raise SurgeryError(
            f"the cut network differs from the masked one by {error:.2g} of the largest output (limit {TOLERANCE:g}); "
            "nothing was delivered. Find the group with resect.testing.check_cut(model, example) and name it in ignore="
        )


def check_deterministic(model: nn.Module, plan: Plan) -> None:
    """Raise ModelError unless the network gives the same output twice for the same input."""
    batch = example_batch(plan.anatomy.example)
    with torch.no_grad():
        first, second = forward(model, batch), forward(model, batch)
    if not torch.equal(first, second):
        raise ModelError(
            "the network gives two different outputs for the same input (dropout, noise or sampling in evaluation mode); "
            "make its forward deterministic"
        )


def state_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers by name: what freezes a network before it is tested."""
    digest = hashlib.sha256()
    for name, tensor in sorted(slicing.named_tensors(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
