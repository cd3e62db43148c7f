"""export_onnx(): a network as an ONNX file, delivered only when onnxruntime gives the same answers as torch."""

from __future__ import annotations

import inspect
import io
import logging
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from resect.batches import device_of, main_output
from resect.errors import DataError, FileError, ModelError
from resect.evaluation import inputs_of
from resect.tracing.trace import check_ready

TOLERANCE = 1e-4
LARGEST = 2**31
OUTPUT = "output"


def export_onnx(model: nn.Module, example: Any, path: str | os.PathLike[str], *, quiet: bool = True) -> Path:
    """Write a network to an ONNX file and return its path, checked to answer as the network does in onnxruntime.

    example: inputs as `dissect` takes them: a tensor, a tuple of positional inputs, or a dict of keyword inputs. The inputs of
    the file have the names that the network's forward has for them; its one output, "output", is the tensor that resect judges
    (logits). The first axis of the example's tensors is the batch and may have any length in the file; so may the second axis
    of matrices of whole numbers (token ids, masks), the sequence, unless the network itself fixes it. Weights are inside the
    file, which holds at most 2 GB.

    The file is compared on the example and on another batch (and sequence) length, to 1e-4 of the largest output, and takes its
    name only then: a file of that name is replaced in one rename.

    Raises ModelError where the network is in training mode, too large, cannot be exported, fixes a length that should be free,
    or answers differently; DataError where the packages are missing or the example has no batch axis; FileError where the path
    cannot be written.

    Source: torch.onnx.export(dynamo=True), onnxruntime.
    """
    _check_packages()
    check_ready(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if size >= LARGEST:
        raise ModelError(f"the network holds {size / 1e9:.1f} GB, and one ONNX file at most 2; cut it further, or use save()")
    path = Path(path)
    call = _Call.of(model, example)
    with Console(stderr=True, quiet=quiet).status("exporting to ONNX"), _renamed_to(path) as new:
        program, call = _exported(model, call)
        program.save(new)
        _check_equal(model, call, new)
    return path


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as missing:
        raise DataError(f"ONNX files need the package {missing.name!r}: pip install 'resect[onnx]'.") from None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """How the network is called: its tensors by input name, in order, and what never changes.

    places: position or keyword of every tensor. sequences: whether sequences may have any length.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    places: dict[str, int | str]
    sequences: bool = True

    @classmethod
    def of(cls, model: nn.Module, example: Any) -> _Call:
        # Two examples at least: torch takes an axis of length 1 for one that always has it.
        args, kwargs = inputs_of(example, 2, device_of(model))
        names = list(inspect.signature(model.forward).parameters)
        fixed = [names[i] if i < len(names) and names[i] not in kwargs else f"input_{i}" for i in range(len(args))]
        places: dict[str, int | str] = {fixed[i]: i for i, value in enumerate(args) if isinstance(value, Tensor)}
        places |= {name: name for name, value in kwargs.items() if isinstance(value, Tensor)}
        return cls(args=args, kwargs=kwargs, places=places)

    def tensors(self) -> dict[str, Tensor]:
        """The example's tensors by input name."""
        return {name: self.args[at] if isinstance(at, int) else self.kwargs[at] for name, at in self.places.items()}

    def axes(self) -> dict[str, dict[int, str]]:
        """The axes of every input that may have any length, by name."""
        tensors = self.tensors()
        batch = next(len(t) for t in tensors.values() if t.ndim)
        lengths = list(dict.fromkeys(t.shape[1] for t in tensors.values() if _is_sequence(t)))
        axes: dict[str, dict[int, str]] = {name: {} for name in tensors}
        for name, t in tensors.items():
            if t.ndim and len(t) == batch:
                axes[name][0] = "batch"
            if self.sequences and _is_sequence(t):
                number = lengths.index(t.shape[1])
                axes[name][1] = f"sequence_{number + 1}" if number else "sequence"
        return axes

    def with_tensors(self, tensors: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword inputs with other tensors."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, at in self.places.items():
            if isinstance(at, int):
                args[at] = tensors[name]
            else:
                kwargs[at] = tensors[name]
        return tuple(args), kwargs

    def other(self) -> dict[str, Tensor]:
        """Tensors of three examples, with the last position of a sequence left out."""
        tensors = {}
        for name, axes in self.axes().items():
            tensor = self.tensors()[name]
            if 0 in axes:
                tensor = torch.cat([tensor, tensor[:1]])
            tensors[name] = tensor[:, :-1] if 1 in axes else tensor
        return tensors


def _is_sequence(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not tensor.is_floating_point() and tensor.shape[1] > 2


class _Tensors(nn.Module):
    """The network as a function of its tensors alone that returns one tensor."""

    def __init__(self, model: nn.Module, call: _Call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *tensors: Tensor) -> Tensor:
        args, kwargs = self.call.with_tensors(dict(zip(self.call.places, tensors)))
        return main_output(self.model(*args, **kwargs), type(self.model).__name__)


def _exported(model: nn.Module, call: _Call) -> tuple[Any, _Call]:
    """The exported program and the call it is for: with sequences of one length where the network fixes it."""
    names, axes = list(call.places), call.axes()
    wrapped = _Tensors(model, call).eval()
    try:
        with _silent():
            program = torch.onnx.export(
                wrapped,
                tuple(call.tensors().values()),
                dynamo=True,
                input_names=names,
                output_names=[OUTPUT],
                dynamic_shapes={"tensors": tuple(axes[name] for name in names)},
                external_data=False,
                verbose=False,
            )
        return program, call
    except Exception as error:
        if any(1 in free for free in axes.values()):
            return _exported(model, replace(call, sequences=False))
        cause = error.__cause__ or error
        cause = cause.__cause__ or cause
        reason = " ".join(line.strip() for line in str(cause).splitlines()[:2]) or type(cause).__name__
        raise ModelError(
            f"{type(model).__name__} cannot be exported to ONNX: {reason}; its forward must be one that torch.export can follow"
        ) from error


def _check_equal(model: nn.Module, call: _Call, path: Path) -> None:
    session = session_of(path)
    for tensors in (call.tensors(), call.other()):
        args, kwargs = call.with_tensors(tensors)
        with torch.no_grad():
            expected = main_output(model(*args, **kwargs)).detach().double().cpu()
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        try:
            values = {entry.name: tensors[entry.name].cpu().numpy() for entry in session.get_inputs()}
            got = torch.as_tensor(session.run([OUTPUT], values)[0]).double()
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"onnxruntime cannot run the exported network on {shapes}: {reason}; nothing was written"
            ) from error
        if got.shape != expected.shape:
            raise ModelError(
                f"on {shapes} the exported network returns {tuple(got.shape)}, the network {tuple(expected.shape)}: "
                "its forward fixes a length; nothing was written"
            )
        apart = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        if not apart <= TOLERANCE:
            raise ModelError(
                f"on {shapes} the exported network differs from the network by {apart:.2g} of the largest output (limit "
                f"{TOLERANCE:g}); nothing was written"
            )


def session_of(path: str | os.PathLike[str]) -> Any:
    """An onnxruntime session of a file on the CPU, with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def _renamed_to(path: Path) -> Iterator[Path]:
    """A new name beside `path` for a file that takes its place when the block ends well, and vanishes when it does not."""
    if path.is_dir():
        raise FileError(f"{path} is a directory; name a file, such as {path / 'model.onnx'}")
    new = path.resolve().with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield new
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise FileError(f"cannot write {path}: {reason}. Name a file in a directory that you may write to.") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Without the exporter's own progress and advice; errors are raised all the same."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
