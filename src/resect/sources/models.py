"""Networks by name: your own function, or a directory that resect wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """A network and how to make its architecture again: "module:function" and arguments, where that is known.

    trained_on: fingerprint of the train split it is recorded to have been trained on, or "".
    """

    model: nn.Module
    name: str
    architecture: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trained_on: str = ""


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
    name, trained_on = Path(spec).name, record["data"].get("train", "")
    if record["shapes"] != record["dense_shapes"]:
        return Source(model=model, name=name, architecture=spec, trained_on=trained_on)
    recorded = record["architecture"]
    if architecture is not None and (recorded is None or recorded["factory"] != architecture):
        recorded = {"factory": architecture, "arguments": {}}
    factory, arguments = recorded["factory"], recorded["arguments"]
    return Source(model=model, name=name, architecture=factory, arguments=arguments, trained_on=trained_on)


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

    DataError, with what the network said, where it takes neither. ModelError where a module gives NaN or infinite values.
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
            _refuse_not_finite(model, candidate.search.inputs[:2])
            return candidate
        reasons.append(
            f"{tuple(candidate.search.inputs.shape)}: its output has shape {tuple(output.shape)}, not (examples, classes)"
        )
    raise DataError(f"the network does not take the examples of {splits.name!r}. Tried " + "; ".join(reasons) + ".")


def _refuse_not_finite(model: nn.Module, inputs: torch.Tensor) -> None:
    """ModelError that names the first module, in execution order, whose output is NaN or infinite."""

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                raise ModelError(
                    f"module {name!r} of the network gives NaN or infinite values; check its weights and the inputs."
                )

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
