"""Seeing what readers read: a context in which every product with a watched weight is reported.

A `TorchFunctionMode` sees `F.linear`, convolutions and matrix products where Python calls them, whichever module makes the
call, and knows a reader by the identity of its weight. So nothing is attached to the network, nothing is left behind after an
error, weights used by functions (`x @ self.weight`) count like those of modules, and gradients flow through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from resect.anatomy import Anatomy
from resect.batches import Batch, device_of, forward
from resect.errors import ModelError

Op = Literal["linear", "matmul", "conv", "transposed"]
CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
TRANSPOSED = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}
PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm}
TRANSPOSES = {torch.t, torch.Tensor.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__, torch.transpose, torch.Tensor.transpose}  # type: ignore[attr-defined]
CONVOLUTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How one weight is read, as seen in the calls of one forward pass.

    axis: the contracted axis of the stored weight. offset: name of the tensor into which a constant of the reader's output can
    be folded (its bias, or the running mean of the batch norm right behind it, then with sign -1), or None. calls: how often
    the weight is read in one forward pass.
    """

    tensor: str
    op: Op
    axis: int
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    blocks: int = 1
    bias: str | None = None
    offset: str | None = None
    sign: int = 1
    calls: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """One call in which a reader read: its facts, its input and its output as they were in the call."""

    reader: Reader
    inputs: torch.Tensor
    output: torch.Tensor
    weight: torch.Tensor


class _Watch(TorchFunctionMode):
    """Reports calls whose weight is watched. `prepare` may replace the input of the call (to ask for its gradient)."""

    def __init__(
        self,
        names: dict[int, str],
        callback: Callable[[Reading], None],
        prepare: Callable[[torch.Tensor], torch.Tensor] | None,
        on_norm: Callable[[torch.Tensor, torch.Tensor], None] | None,
    ):
        super().__init__()
        self.names, self.callback, self.prepare, self.on_norm = names, callback, prepare, on_norm
        # Transposed views of weights, by identity; the views are kept so that an identity is not used twice.
        self.turned: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = self._match(func, args, kwargs)
        if found is None:
            output = func(*args, **kwargs)
            self._follow(func, args, kwargs, output)
            return output
        reader, position, weight = found
        inputs = args[position] if len(args) > position else kwargs["input"]
        if self.prepare is not None:
            inputs = self.prepare(inputs)
            if len(args) > position:
                args = (*args[:position], inputs, *args[position + 1 :])
            else:
                kwargs = {**kwargs, "input": inputs}
        output = func(*args, **kwargs)
        self.callback(Reading(reader=reader, inputs=inputs, output=output, weight=weight))
        return output

    def _name(self, tensor: Any) -> str | None:
        return self.names.get(id(tensor)) if isinstance(tensor, torch.Tensor) else None

    def _match(self, func, args, kwargs) -> tuple[Reader, int, torch.Tensor] | None:
        """The reader, the position of its input among the arguments, and the stored weight; None for any other call."""
        if func is F.linear:
            weight, bias = _argument(args, kwargs, 1, "weight"), _argument(args, kwargs, 2, "bias")
            return self._linear(weight, bias, axis=1, op="linear")
        if func in CONVOLUTIONS or func in TRANSPOSED:
            return self._convolution(func, args, kwargs)
        if func in PRODUCTS and len(args) == 2:
            found = self._linear(args[1], None, axis=0, op="matmul")
            return found
        if func is torch.addmm and len(args) == 3 and not kwargs:
            found = self._linear(args[2], args[0], axis=0, op="matmul")
            return None if found is None else (found[0], 1, found[2])
        return None

    def _linear(self, weight, bias, *, axis: int, op: Op) -> tuple[Reader, int, torch.Tensor] | None:
        if isinstance(weight, torch.Tensor) and id(weight) in self.turned:
            weight, axis = self.turned[id(weight)][1], 1 - axis
        name = self._name(weight)
        if name is None or weight.ndim != 2:
            return None
        bias = self.names.get(-id(bias)) if isinstance(bias, torch.Tensor) else None
        op = "linear" if axis == 1 else "matmul"
        return Reader(tensor=name, op=op, axis=axis, bias=bias, offset=bias), 0, weight

    def _convolution(self, func, args, kwargs) -> tuple[Reader, int, torch.Tensor] | None:
        dims = CONVOLUTIONS.get(func) or TRANSPOSED[func]
        call = dict(zip(CONVOLUTION_ARGUMENTS, args)) | kwargs
        name = self._name(call["weight"])
        if name is None:
            return None
        bias = self.names.get(-id(call["bias"])) if call.get("bias") is not None else None
        if func in TRANSPOSED:
            return Reader(tensor=name, op="transposed", axis=0, bias=bias, offset=bias), 0, call["weight"]
        padding = call.get("padding", 0)
        reader = Reader(
            tensor=name,
            op="conv",
            axis=1,
            stride=_entries(call.get("stride", 1), dims),
            padding=padding if isinstance(padding, str) else _entries(padding, dims),
            dilation=_entries(call.get("dilation", 1), dims),
            blocks=int(call.get("groups", 1)),
            bias=bias,
            offset=bias,
        )
        return reader, 0, call["weight"]

    def _follow(self, func, args, kwargs, output) -> None:
        if func in TRANSPOSES and isinstance(output, torch.Tensor) and self._name(args[0]) is not None and output.ndim == 2:
            self.turned[id(output)] = (output, args[0])
        elif self.on_norm is not None and func in (F.batch_norm, torch.batch_norm):
            mean = _argument(args, kwargs, 1 if func is F.batch_norm else 3, "running_mean")
            if isinstance(mean, torch.Tensor):
                self.on_norm(args[0], mean)


def _argument(args, kwargs, position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _entries(value: Any, dims: int) -> tuple[int, ...]:
    entries = (value,) * dims if isinstance(value, int) else tuple(value)
    return tuple(map(int, entries)) if len(entries) == dims else tuple(map(int, entries)) * dims


def watched(model: nn.Module, tensors: Iterable[str]) -> dict[int, str]:
    """Identities of the watched weights; those of all parameters and buffers, negated, so that offsets can be named too."""
    wanted, names = set(tensors), {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names[-id(tensor)] = name
        if name in wanted:
            names[id(tensor)] = name
    return names


def observing(
    model: nn.Module,
    tensors: Iterable[str],
    callback: Callable[[Reading], None],
    *,
    prepare: Callable[[torch.Tensor], torch.Tensor] | None = None,
    on_norm: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> TorchFunctionMode:
    """A context in which `callback` gets a Reading for every product with one of the weights named in `tensors`.

    The network is not touched. Weights that are computed on the way (weight norm, adapters) are not seen.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    >>> seen = []
    >>> with observing(model, ["2.weight"], lambda reading: seen.append(reading.inputs.shape)):
    ...     _ = model(torch.ones(5, 4))
    >>> seen
    [torch.Size([5, 3])]
    """
    return _Watch(watched(model, tensors), callback, prepare, on_norm)


def reader_tensors(anatomy: Anatomy) -> list[str]:
    """Names of all weights that read units of some group, each once, in execution order of the groups."""
    return list(dict.fromkeys(part.tensor for group in anatomy.groups for part in group.readers))


def survey(model: nn.Module, anatomy: Anatomy) -> dict[str, Reader]:
    """The facts of every reader that can be observed, in execution order, from one pass over the anatomy's example.

    A weight that is read in two different ways (or whose offset another call shares) keeps what is true of all its calls.
    """
    readers: dict[str, Reader] = {}
    outputs: dict[int, tuple[torch.Tensor, str]] = {}
    calls: dict[str, int] = {}

    def seen(reading: Reading) -> None:
        name = reading.reader.tensor
        calls[name] = calls.get(name, 0) + 1
        if name in readers and readers[name].op != reading.reader.op:
            raise ModelError(f"{name} is read both as {readers[name].op} and as {reading.reader.op}; add it to ignore=")
        readers[name] = reading.reader
        outputs[id(reading.output)] = (reading.output, name)

    def normed(inputs: torch.Tensor, mean: torch.Tensor) -> None:
        owner = outputs.get(id(inputs))
        buffer = names.get(-id(mean))
        if owner is not None and buffer is not None and readers[owner[1]].offset is None:
            readers[owner[1]] = replace(readers[owner[1]], offset=buffer, sign=-1)

    names = watched(model, reader_tensors(anatomy))
    args, kwargs = anatomy.example
    size = next((int(v.shape[0]) for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim), 1)
    batch = Batch(args=args, kwargs=kwargs, labels=None, mask=None, size=size)
    with torch.no_grad(), _Watch(names, seen, None, normed):
        forward(model, batch, device=device_of(model))
    return {name: replace(reader, calls=calls[name]) for name, reader in readers.items()}
