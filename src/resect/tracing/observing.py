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
from resect.batches import example_batch, forward
from resect.errors import ModelError

Op = Literal["linear", "matmul", "conv", "transposed"]
CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
TRANSPOSED = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}
PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm}
TRANSPOSES = {torch.t, torch.Tensor.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__, torch.transpose, torch.Tensor.transpose}  # type: ignore[attr-defined]
ADDITIONS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
}
NORMS = {F.batch_norm: 1, torch.batch_norm: 3}
RECTIFIERS = {F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_}
ELEMENTWISE = RECTIFIERS | {
    F.gelu, F.silu, F.sigmoid, F.tanh, F.elu, F.leaky_relu, F.hardswish, F.mish, F.softplus, F.relu6,
    torch.sigmoid, torch.tanh, torch.Tensor.sigmoid, torch.Tensor.tanh, torch._C._nn.gelu, torch._C._nn.silu,
}  # fmt: skip
CONVOLUTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


Follow = Callable[[Any, tuple[Any, ...], dict[str, Any], torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How one weight is read, as seen in the calls of one forward pass.

    axis: the contracted axis of the stored weight. offset: name of the tensor into which a constant of the reader's output can
    be folded (its bias, or the running mean of the batch norm right behind it, then with sign -1), or None. calls: how often
    the weight is read in one forward pass. norm: the batch norm module right behind it. residual: its output (behind the norm)
    is added to another activation, which is there before it. rectified: nothing looks at its output (behind norm and sum) but a
    rectifier, so that values below zero need not be met, only stay below. fed_by: the weight whose output, through a norm and
    elementwise functions only, is all that this reader reads, and which nothing else reads.
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
    norm: str | None = None
    residual: bool = False
    rectified: bool = False
    fed_by: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """One call in which a reader read: its facts, its input and its output as they were in the call."""

    reader: Reader
    inputs: torch.Tensor
    output: torch.Tensor
    weight: torch.Tensor


class Watch(TorchFunctionMode):
    """Reports calls whose weight is watched. `prepare` may replace the input of the call (to ask for its gradient); `follow`
    is told of every other call that returns a tensor."""

    def __init__(
        self,
        names: dict[int, str],
        callback: Callable[[Reading], None],
        prepare: Callable[[torch.Tensor], torch.Tensor] | None,
        follow: Follow | None,
    ):
        super().__init__()
        self.names, self.callback, self.prepare, self.follow = names, callback, prepare, follow
        # Transposed views of weights, by identity; the views are kept so that an identity is not used twice.
        self.turned: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = self.match(func, args, kwargs)
        if found is None:
            output = func(*args, **kwargs)
            if func in TRANSPOSES and isinstance(output, torch.Tensor) and self._name(args[0]) is not None and output.ndim == 2:
                self.turned[id(output)] = (output, args[0])
            elif self.follow is not None and isinstance(output, torch.Tensor):
                self.follow(func, args, kwargs, output)
            return output
        reader, position, weight = found
        inputs = args[position] if len(args) > position else kwargs["input"]
        if -id(inputs) in self.names:
            # A weight times a weight (an adapter being merged) is not a unit being read.
            return func(*args, **kwargs)
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

    def match(self, func, args, kwargs) -> tuple[Reader, int, torch.Tensor] | None:
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
    follow: Follow | None = None,
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
    return Watch(watched(model, tensors), callback, prepare, follow)


def reader_tensors(anatomy: Anatomy) -> list[str]:
    """Names of all weights that read units of some group, each once, in execution order of the groups."""
    return list(dict.fromkeys(part.tensor for group in anatomy.groups for part in group.readers))


def survey(model: nn.Module, anatomy: Anatomy, tensors: Iterable[str] | None = None) -> dict[str, Reader]:
    """The facts of every reader that can be observed, in execution order, from one pass over the anatomy's example.

    tensors: names of weights to look for (default: those that read units of some group). Raises ModelError for a weight that
    is read in two different ways.
    """
    looking = _Survey(names=watched(model, reader_tensors(anatomy) if tensors is None else tensors))
    with torch.no_grad(), Watch(looking.names, looking.see, None, looking.follow):
        forward(model, example_batch(anatomy.example))
    return looking.done()


class _Survey:
    """Follows what readers make: through a batch norm, through dropouts that do nothing, into a sum; and who looks at it."""

    def __init__(self, names: dict[int, str]):
        self.names = names
        self.readers: dict[str, Reader] = {}
        # What a reader made, before ("made") and behind ("bent") elementwise functions; kept, so that identities stay.
        self.tensors: dict[int, tuple[torch.Tensor, str, str]] = {}
        self.uses: dict[tuple[str, str], list[str]] = {}

    def see(self, reading: Reading) -> None:
        name = reading.reader.tensor
        known = self.readers.get(name)
        if known is not None and known.op != reading.reader.op:
            raise ModelError(f"{name} is read both as {known.op} and as {reading.reader.op}; add it to ignore=")
        self.readers[name] = replace(reading.reader, calls=known.calls + 1 if known else 1)
        if (source := self._use(reading.inputs, f"read by {name}")) is not None and source[1] == "bent":
            self.readers[name] = replace(self.readers[name], fed_by=source[0])
        self._add(reading.output, name, "made")

    def follow(self, func, args, kwargs, output: torch.Tensor) -> None:
        if func in NORMS:
            self._norm(args, _argument(args, kwargs, NORMS[func], "running_mean"), output)
        elif func is F.dropout and self._known(args[0]):
            self._add(output, *self.tensors[id(args[0])][1:])
        elif func in ADDITIONS and len(args) == 2 and all(isinstance(a, torch.Tensor) for a in args):
            self._sum(args, output)
        elif func in ELEMENTWISE and self._known(args[0]):
            name, stage = self.tensors[id(args[0])][1:]
            if stage == "made":
                self._use(args[0], "rectifier" if func in RECTIFIERS else "function")
            self._add(output, name, "bent")
        else:
            for value in (*args, *kwargs.values()):
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    self._use(tensor, "other")

    def done(self) -> dict[str, Reader]:
        """The readers, with what can only be said once everybody who looks at an output is known."""
        for name, reader in self.readers.items():
            feeder = reader.fed_by
            if feeder is not None:
                alone = len(self.uses[feeder, "made"]) == 1 and self.uses[feeder, "bent"] == [f"read by {name}"]
                plain = self.readers[feeder].calls == reader.calls == 1 and not self.readers[feeder].residual
                feeder = feeder if alone and plain else None
            rectified = self.uses.get((name, "made")) == ["rectifier"] and reader.calls == 1
            self.readers[name] = replace(reader, rectified=rectified, fed_by=feeder)
        return self.readers

    def _known(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and id(value) in self.tensors

    def _add(self, tensor: torch.Tensor, name: str, stage: str) -> None:
        self.tensors[id(tensor)] = (tensor, name, stage)

    def _use(self, tensor: Any, how: str) -> tuple[str, str] | None:
        if not self._known(tensor):
            return None
        _, name, stage = self.tensors[id(tensor)]
        self.uses.setdefault((name, stage), []).append(how)
        return name, stage

    def _sum(self, args, output: torch.Tensor) -> None:
        terms = [self.tensors[id(a)][1] for a in args if self._known(a) and self.tensors[id(a)][2] == "made"]
        if not terms or args[0].shape != args[1].shape:
            for value in args:
                self._use(value, "other")
            return
        # Where both terms were read just now, the later reader finds the other term ready.
        order = list(self.readers)
        last = max(terms, key=order.index)
        for value in args:
            if self._known(value) and self.tensors[id(value)][1:] != (last, "made"):
                self._use(value, "other")
        if self.readers[last].calls == 1 and not self.readers[last].residual:
            self.readers[last] = replace(self.readers[last], residual=True)
            self._add(output, last, "made")
        else:
            self.uses.setdefault((last, "made"), []).append("other")

    def _norm(self, args, mean: Any, output: torch.Tensor) -> None:
        buffer = self.names.get(-id(mean)) if isinstance(mean, torch.Tensor) else None
        if buffer is None or not self._known(args[0]) or self.tensors[id(args[0])][2] != "made":
            self._use(args[0], "other")
            return
        name = self.tensors[id(args[0])][1]
        if self.readers[name].residual or self.readers[name].norm is not None:
            self._use(args[0], "other")
            return
        if self.readers[name].offset is None:
            self.readers[name] = replace(self.readers[name], offset=buffer, sign=-1)
        self.readers[name] = replace(self.readers[name], norm=buffer.rpartition(".")[0])
        self._add(output, name, "made")


def norm_line(model: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(shift, scale) of a batch norm in evaluation mode: it makes shift + scale * x."""
    norm: Any = model.get_submodule(name)
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    scale = (1 / deviation) if norm.weight is None else norm.weight.detach().double() / deviation
    shift = -norm.running_mean.double() * scale
    return (shift if norm.bias is None else shift + norm.bias.detach().double()), scale
