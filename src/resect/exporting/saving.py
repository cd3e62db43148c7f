"""Writing a cut network: tensors, plan and reports, in one rename."""

from __future__ import annotations

import hashlib
import operator
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from resect.errors import FileError, ModelError, PlanError
from resect.exporting.plan_file import FORMAT, FORMAT_VERSION, PLAN, is_saved, read_plan, sealed
from resect.plan import Plan
from resect.specializing.specialist import Specialist

if TYPE_CHECKING:
    from resect.anatomy import Anatomy
    from resect.searching import Found
    from resect.specializing import Specialised

WEIGHTS, BUFFERS = "model.safetensors", "buffers.safetensors"
_KNOWN_FILES = frozenset({WEIGHTS, BUFFERS, PLAN, "result.json", "report.html", "trials.jsonl"})


def save(
    model: nn.Module,
    plan: Plan,
    directory: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    found: Found | Specialised | None = None,
    data: Mapping[str, str] | None = None,
    seed: int | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write `model`, which was cut by `plan`, to `directory` and return its path. A specialist is written with its threshold.

    architecture: "module:function" that makes the dense network, called with `arguments` (anything JSON can hold); or the
    saved directory that the dense network was loaded from, when a cut network is cut again. found: the outcome of a search;
    its goal and certificate go into ``plan.json``. data: fingerprints by split. files: further text files by name, such as
    ``{"report.html": ...}``.

    A directory that resect wrote before is replaced in one rename. FileError where the directory holds anything else, or
    cannot be written; nothing is left half-written.
    """
    directory = Path(directory)
    check_writable(directory)
    specialist = model.record() if isinstance(model, Specialist) else None
    model = model.network if isinstance(model, Specialist) else model
    with renamed_into(directory) as folder:
        record = _record(model, plan, architecture, arguments, found, data, seed)
        if specialist is not None:
            record["specialist"] = specialist
        record["files"] = _write_tensors(model, folder)
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / PLAN).write_text(sealed(record), encoding="utf-8")
    return directory


def check_writable(directory: str | os.PathLike[str]) -> None:
    """FileError unless `save` could write `directory`, so that a long search does not end in one; makes its parent."""
    directory = Path(directory)
    _refuse_foreign(directory)
    with renamed_into(directory, keep=False):
        pass


def _record(
    model: nn.Module,
    plan: Plan,
    architecture: str | None,
    arguments: Mapping[str, Any] | None,
    found: Found | Specialised | None,
    data: Mapping[str, str] | None,
    seed: int | None,
) -> dict[str, Any]:
    anatomy = plan.anatomy
    persistent, transient = _split_tensors(model)
    if arguments and architecture is None:
        raise ModelError("arguments were given without the architecture they belong to; pass architecture='module:function'.")
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": None if architecture is None else {"factory": architecture, "arguments": dict(arguments or {})},
        "example": _example(anatomy),
        "anatomy": anatomy.fingerprint,
        "keep": {n: {"units": len(k), "kept": np.flatnonzero(k).tolist()} for n, k in sorted(plan.keep.items())},
        "goal": None if found is None else found.goal.to_dict(),
        "certificate": None if found is None or found.certificate is None else found.certificate.to_dict(),
        "seed": seed,
        "data": dict(data or {}),
        "versions": _versions(),
        "dense_shapes": {name: list(shape) for name, shape in sorted(anatomy.shapes.items())},
        "shapes": {name: list(t.shape) for name, t in sorted({**persistent, **transient}.items())},
        "aliases": _aliases(model),
        "attributes": _attributes(model, anatomy),
    }
    return record if architecture is None or not is_saved(architecture) else _cut_again(record, read_plan(architecture))


def _cut_again(record: dict[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """`record` of a network that was cut from a cut network, in terms of the dense network that the `first` record is about."""
    keep = {}
    for name, entry in first["keep"].items():
        again = record["keep"].get(name, {"units": len(entry["kept"]), "kept": range(len(entry["kept"]))})
        if again["units"] != len(entry["kept"]):
            raise PlanError(
                f"group {name!r} has {again['units']} units in this plan and {len(entry['kept'])} in the directory it is said "
                "to come from; name the directory that the network was loaded from."
            )
        keep[name] = {"units": entry["units"], "kept": [entry["kept"][unit] for unit in again["kept"]]}
    attributes = {module: dict(values) for module, values in first["attributes"].items()}
    for module, values in record["attributes"].items():
        attributes.setdefault(module, {}).update(values)
    same = {name: first[name] for name in ("architecture", "anatomy", "dense_shapes")}
    return {**record, **same, "keep": keep, "attributes": attributes}


def _example(anatomy: Anatomy) -> list[Any] | None:
    """Shapes and types of the inputs the network was watched on, one example each; None where they are not all tensors."""
    positional, keyword = anatomy.example
    if not all(isinstance(value, Tensor) and value.ndim for value in (*positional, *keyword.values())):
        return None

    def entry(value: Tensor) -> dict[str, Any]:
        return {"shape": [1, *value.shape[1:]], "dtype": str(value.dtype).removeprefix("torch.")}

    return [[entry(value) for value in positional], {name: entry(value) for name, value in keyword.items()}]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("resect", "torch", "numpy", "safetensors")}


def _split_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(state dict, other buffers) by canonical name: a tied tensor is there once, under the first of its names."""
    first_names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    state = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    transient = {name: b for name, b in model.named_buffers() if name not in state}
    return {name: tensor for name, tensor in state.items() if name in first_names}, transient


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Other names of the same tensor, by its first name."""
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names: dict[int, list[str]] = {}
    for name, tensor in every:
        names.setdefault(id(tensor), []).append(name)
    return {first: others for first, *others in names.values() if others}


def _attributes(model: nn.Module, anatomy: Anatomy) -> dict[str, dict[str, Any]]:
    """Values, after the cut, of the attributes that repeat a width, by module and attribute."""
    values: dict[str, dict[str, Any]] = {}
    for edit in anatomy.edits:
        value = operator.attrgetter(edit.attribute)(model.get_submodule(edit.module))
        values.setdefault(edit.module, {})[edit.attribute] = list(value) if isinstance(value, tuple) else value
    return values


def _write_tensors(model: nn.Module, folder: Path) -> dict[str, str]:
    """Write the tensor files and return their checksums by file name."""
    persistent, transient = _split_tensors(model)
    checksums = {}
    for file, tensors in ((WEIGHTS, persistent), (BUFFERS, transient)):
        if tensors or file == WEIGHTS:
            path = folder / file
            path.touch()
            mode = path.stat().st_mode  # safetensors makes files that only their owner can read
            save_file({name: _own_copy(tensor) for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
            path.chmod(mode)
            checksums[file] = file_checksum(path)
    return checksums


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_foreign(directory: Path) -> None:
    """FileError where writing to `directory` would destroy something that resect did not write."""
    if Path.cwd().is_relative_to(directory.resolve()):
        raise FileError(f"{directory} is, or holds, the working directory, which cannot be replaced; name one inside it.")
    if not directory.exists():
        return
    if not directory.is_dir():
        raise FileError(f"{directory} is a file; name a directory to write the network to.")
    present = sorted(path.name for path in directory.iterdir())
    foreign = [name for name in present if name not in _KNOWN_FILES]
    if present and (foreign or not is_saved(directory)):
        what = foreign[0] if foreign else present[0]
        raise FileError(
            f"{directory} holds {what}, which is not part of a network saved by resect; it was left as it is. "
            "Name an empty or new directory."
        )


@contextmanager
def renamed_into(directory: Path, *, keep: bool = True) -> Iterator[Path]:
    """A new folder beside `directory` that takes its place when the block ends well, and vanishes when it does not.

    keep: False only tries whether it could. FileError where the folder cannot be made or written.
    """
    resolved = directory.resolve()
    token = f".{resolved.name}.{secrets.token_hex(4)}"
    new, old = (resolved.with_name(f"{token}.{kind}") for kind in ("new", "old"))
    try:
        resolved.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        yield new
        if keep:
            _swap(resolved, new, old)
    except OSError as error:
        raise FileError(
            f"cannot write {directory}: {error.strerror or error}. Name a directory that you may write to."
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _swap(directory: Path, new: Path, old: Path) -> None:
    if directory.exists():
        directory.rename(old)
    try:
        new.rename(directory)
    except BaseException:
        if old.exists():
            old.rename(directory)
        raise
