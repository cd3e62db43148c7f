"""Reading a cut network back: verified, exact to the bit, and without running code that a file names."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from resect.anatomy.narrow import narrow
from resect.errors import FileError, ModelError, PlanError
from resect.exporting.naming import named_function
from resect.exporting.plan_file import PLAN, read_plan
from resect.exporting.saving import BUFFERS, WEIGHTS, file_checksum
from resect.plan import Plan
from resect.specializing.specialist import Specialist

if TYPE_CHECKING:
    from resect.anatomy import Anatomy

OWN_ARCHITECTURES = ("resect.sources.demo",)

MakeModel = Callable[[], nn.Module] | nn.Module | str


def load(directory: str | os.PathLike[str], make_model: MakeModel | None = None, *, device: str = "cpu") -> nn.Module:
    """The network saved in `directory`, in evaluation mode, equal to the one saved bit for bit (a Specialist where that was
    saved).

    make_model: a function without arguments (or a module, or "module:function") that makes the dense architecture. It is
    built on the meta device where its constructor allows, so that its weights are never in memory; then shapes, attributes
    and tensors are set from the files. It may be left out only where the recorded architecture is resect's own: a file
    cannot make resect run other code.

    FileError: missing, truncated or edited files, another format version. PlanError: another architecture, naming the first
    tensor that differs.
    """
    directory = Path(directory)
    record = read_plan(directory)
    tensors = _read_tensors(directory, record, device)
    model = _build(_factory(directory, record, make_model))
    _refuse_other_architecture(model, record, directory)
    _assign(model, tensors, record, directory)
    _set_attributes(model, record["attributes"])
    narrow(model)
    if "specialist" in record:
        model = Specialist.from_record(model, record["specialist"])
    return model.to(device).eval()


def load_plan(directory: str | os.PathLike[str], anatomy: Anatomy) -> Plan:
    """The plan saved in `directory`, for the dense network that `anatomy` describes.

    PlanError where the plan was made for another architecture; FileError where the file is missing or damaged.
    """
    record = read_plan(directory)
    dense = {name: tuple(shape) for name, shape in record["dense_shapes"].items()}
    difference = _first_difference(dense, {name: tuple(shape) for name, shape in anatomy.shapes.items()})
    if difference or record["anatomy"] != anatomy.fingerprint:
        what = difference or "the tensors agree, but the units or what goes with them do not"
        raise PlanError(
            f"the plan in {directory} is for another architecture: {what}. Use it with the network it was made for."
        )
    keep = {}
    for name, entry in record["keep"].items():
        keep[name] = np.zeros(entry["units"], dtype=bool)
        keep[name][entry["kept"]] = True
    return Plan(anatomy=anatomy, keep=keep)


def make_dense(directory: str | os.PathLike[str], make_model: MakeModel | None = None) -> nn.Module:
    """The dense architecture that the network in `directory` was cut from, with the fresh weights of its constructor.

    make_model and errors as in `load`. Good for comparing speed, which does not depend on the weights.
    """
    record = read_plan(directory)
    with torch.random.fork_rng():
        model = _checked_module(_factory(Path(directory), record, make_model)())
    _refuse_other_architecture(model, record, Path(directory))
    return model.eval()


def make_example(directory: str | os.PathLike[str]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Inputs of the shapes and types that the network in `directory` was made with, all zeros: (positional, keyword)."""
    recorded = read_plan(directory)["example"]
    if recorded is None:
        raise FileError(f"{directory} does not record the shapes of its inputs; give them, as in --shape 1,3,32,32.")
    positional, keyword = recorded
    return tuple(map(_zeros, positional)), {name: _zeros(entry) for name, entry in keyword.items()}


def _zeros(entry: Mapping[str, Any]) -> Tensor:
    return torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))


def _read_tensors(directory: Path, record: Mapping[str, Any], device: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in (WEIGHTS, BUFFERS):
        path, expected = directory / file, record["files"].get(file)
        if expected is None and file != WEIGHTS:
            continue
        if not path.is_file():
            raise FileError(f"{path} is missing; {directory / PLAN} says it belongs to the saved network. Save it again.")
        if file_checksum(path) != expected:
            raise FileError(f"{path} is truncated or was edited: its SHA-256 is not the one in {PLAN}. Save the network again.")
        try:
            tensors |= load_file(path, device=device)
        except (safetensors.SafetensorError, OSError) as error:
            raise FileError(f"{path} cannot be read: {error}. Save the network again.") from error
    return tensors


def _factory(directory: Path, record: Mapping[str, Any], make_model: MakeModel | None) -> Callable[[], nn.Module]:
    """The function without arguments that makes the dense architecture."""
    if isinstance(make_model, nn.Module):
        given = make_model
        return lambda: copy.deepcopy(given)
    if make_model is not None and not isinstance(make_model, str):
        return make_model
    recorded = record["architecture"]
    name = _own_architecture(directory, recorded) if make_model is None else make_model
    function = named_function(name)
    same = recorded is not None and recorded["factory"] == name
    return lambda: function(**(recorded["arguments"] if same else {}))


def _own_architecture(directory: Path, recorded: Mapping[str, Any] | None) -> str:
    """The recorded architecture, where it is one that resect may call without being asked to."""
    if recorded is None:
        raise ModelError(f"{directory} does not say how to make its architecture; pass a function that makes it.")
    name: str = recorded["factory"]
    if name.partition(":")[0] not in OWN_ARCHITECTURES:
        raise ModelError(
            f"{directory} names {name} as its architecture. resect runs no code because a file names it: if you trust that "
            f"function, name it yourself, as in resect.load({str(directory)!r}, {name!r}) or --architecture {name}."
        )
    return name


def _build(make_model: Callable[[], nn.Module]) -> nn.Module:
    """The dense architecture: on the meta device, or for real where its constructor needs values."""
    with torch.random.fork_rng():
        try:
            with torch.device("meta"):
                model = make_model()
        except Exception:
            return _checked_module(make_model())
        if any(value.is_meta for value in _plain_tensors(_checked_module(model))):
            return _checked_module(make_model())
    return model


def _checked_module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(f"the function that makes the architecture returned {type(model).__name__}, not a torch.nn.Module.")
    return model


def _plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules hold as ordinary attributes; no file holds them, so only the constructor can make them."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def _refuse_other_architecture(model: nn.Module, record: Mapping[str, Any], directory: Path) -> None:
    built = {name: tuple(t.shape) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    dense = {name: tuple(shape) for name, shape in record["dense_shapes"].items()}
    difference = _first_difference(dense, built)
    if difference:
        raise PlanError(f"{directory} was cut from another architecture: {difference}. Pass the function that made that one.")


def _first_difference(expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]]) -> str:
    """The first tensor, by the order of `actual`, that is missing, extra or of another shape; "" where there is none."""
    for name in [*actual, *expected]:
        if actual.get(name) != expected.get(name):
            return f"{name} has shape {_shown(expected.get(name))} in the file and {_shown(actual.get(name))} in the network"
    return ""


def _shown(shape: tuple[int, ...] | None) -> str:
    return "no place" if shape is None else f"({', '.join(map(str, shape))})"


def _assign(model: nn.Module, tensors: dict[str, Tensor], record: Mapping[str, Any], directory: Path) -> None:
    """Put every tensor of the files in its place, tied ones in all their places."""
    for name, tensor in tensors.items():
        if list(tensor.shape) != record["shapes"].get(name):
            raise FileError(
                f"{directory}: {name} has shape {_shown(tuple(tensor.shape))}, not the one in {PLAN}. Save it again."
            )
        value: Tensor | None = None
        for place in [name, *record["aliases"].get(name, [])]:
            value = _put(model, place, tensor, value, directory)
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise PlanError(f"{directory} holds no tensor for {left[0]} of the network; it was cut from another architecture.")


def _put(model: nn.Module, place: str, tensor: Tensor, value: Tensor | None, directory: Path) -> Tensor:
    """Set the parameter or buffer at `place` to `value`, made from `tensor` at the first place, and return it."""
    module_name, _, leaf = place.rpartition(".")
    try:
        module = model.get_submodule(module_name)
    except AttributeError:
        module = nn.Module()
    if leaf in module._parameters:
        old = module._parameters[leaf]
        if value is None:
            value = nn.Parameter(tensor, requires_grad=tensor.is_floating_point() if old is None else old.requires_grad)
        module._parameters[leaf] = value  # type: ignore[assignment]
    elif leaf in module._buffers:
        value = tensor if value is None else value
        module._buffers[leaf] = value
    else:
        raise PlanError(f"{directory} holds {place}, for which the network has no place; it was cut from another architecture.")
    return value


def _set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    for module_name, values in attributes.items():
        for attribute, value in values.items():
            _set_attribute(model.get_submodule(module_name), attribute, value)


def _set_attribute(module: nn.Module, attribute: str, value: Any) -> None:
    """Set `attribute` ("config.width" too), in the type it had; tuples are lists in JSON."""
    owner: Any = module
    path, _, leaf = attribute.rpartition(".")
    if path:
        # a configuration object is shared by all layers, but a width belongs to one
        owner = copy.copy(getattr(module, path))
        setattr(module, path, owner)
    old = getattr(owner, leaf)
    setattr(owner, leaf, type(old)(value) if isinstance(old, list | tuple) else value)
