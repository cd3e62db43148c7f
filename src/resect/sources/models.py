"""Networks by name: your own function, or a directory that resect wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resect.errors import DataError, ModelError
from resect.exporting import is_saved, load, named_function, nearest, read_plan
from resect.sources.splits import Splits


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A network and how to make its architecture again: "module:function" and arguments, where that is known."""

    model: nn.Module
    name: str
    architecture: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def load_model(spec: str, *, architecture: str | None = None) -> Source:
    """The network called `spec`, in evaluation mode.

    spec: ``module:function`` (a function that returns the network, or the network itself) or a directory that resect wrote.
    architecture: for a saved directory, the ``module:function`` that makes its dense architecture, where it is not resect's
    own.

    ModelError where there is no such network, naming the nearest; FileError and PlanError as `resect.load`.
    """
    if is_saved(spec):
        return _from_directory(spec, architecture)
    if ":" in spec:
        return _from_function(spec)
    if Path(spec).exists():
        raise ModelError(f"{spec} is not a directory that resect wrote (it has no plan.json).")
    folders = [str(path.parent) for path in Path().glob("*/plan.json")]
    modules = [f"{path.stem}:" for path in Path().glob("*.py")]
    raise ModelError(
        f"no network {spec!r}: name a function as module:function, or a directory that resect wrote."
        + nearest(spec, [*folders, *modules])
    )


def _from_directory(spec: str, architecture: str | None) -> Source:
    """A saved network; one that is cut already is described by its directory, a dense one by its own architecture."""
    model, record = load(spec, architecture), read_plan(spec)
    if record["shapes"] != record["dense_shapes"]:
        return Source(model=model, name=Path(spec).name, architecture=spec)
    recorded = record["architecture"]
    if architecture is not None and (recorded is None or recorded["factory"] != architecture):
        recorded = {"factory": architecture, "arguments": {}}
    return Source(model=model, name=Path(spec).name, architecture=recorded["factory"], arguments=recorded["arguments"])


def _from_function(spec: str) -> Source:
    value = named_function(spec)
    factory = not isinstance(value, nn.Module)
    try:
        model = value() if factory else value
    except Exception as error:
        raise ModelError(f"{spec} failed when called without arguments: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} gave {type(model).__name__}, not a torch.nn.Module.")
    return Source(model=model.eval(), name=spec, architecture=spec if factory else None)


def fitted(model: nn.Module, splits: Splits) -> Splits:
    """`splits` in the shape that `model` takes: as they are, or flattened for a network of plain linear layers.

    DataError, with what the network said, where it takes neither.
    """
    reasons = []
    for candidate in (splits, splits.flattened()):
        try:
            with torch.no_grad():
                output = model(candidate.search.inputs[:2])
        except Exception as error:
            reasons.append(f"{tuple(candidate.search.inputs.shape)}: {str(error).splitlines()[0]}")
            continue
        if not isinstance(output, torch.Tensor) or output.ndim == 2:
            return candidate
        reasons.append(
            f"{tuple(candidate.search.inputs.shape)}: its output has shape {tuple(output.shape)}, not (examples, classes)"
        )
    raise DataError(f"the network does not take the examples of {splits.name!r}. Tried " + "; ".join(reasons) + ".")
