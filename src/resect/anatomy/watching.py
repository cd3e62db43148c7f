"""One watched forward pass: every op that runs is followed on the labels of its tensors by the rule for that op."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from resect.anatomy.algebra import meet, source
from resect.anatomy.labels import Book, Marks, Where, axes, compress, on_axis
from resect.anatomy.weightless import is_weightless, run

Followed = Marks | Sequence[Marks | None] | None
Rule = Callable[["Call"], Followed]
RULES: dict[str, Rule] = {}

_HIDDEN = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule for ops by their qualified names ("aten::view"), all overloads and in-place forms alike.

    A rule takes a `Call` and returns the `Marks` of the op's output, or one for each output; None is a tensor without labels.
    It ties and pins through ``call.book``. A later rule for the same op replaces the earlier one.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def weight_of(*operands: Marks) -> Marks | None:
    """The operand that is a parameter; of two the larger, which says more about what remains."""
    weights = [m for m in operands if m.name is not None and m.source == "parameter"]
    return max(weights, key=lambda m: math.prod(m.shape)) if weights else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """One contraction that ran: its multiply-accumulates, weight, and the labels on each axis that the weight lacks."""

    op: str
    macs: int
    tensor: str | None
    labels: tuple[Tensor, ...]


class Call:
    """One op that ran, with its arguments by schema name (`call["dim"]`) and the marks of its tensors."""

    def __init__(self, watch: Watch, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        self.watch, self.func, self.out = watch, func, out
        self.book = watch.book
        self.name: str = func._schema.name
        self._values = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        self._values.update(zip((a.name for a in func._schema.arguments), args))
        self._values.update(kwargs)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or `default` where this overload has none of that name."""
        return self._values.get(name, default)

    def marks(self, name: str) -> Marks:
        """The marks of a tensor argument; a number is a constant of one element."""
        return self.of(self._values[name])

    def of(self, value: Any) -> Marks:
        """The marks of any tensor or number."""
        return self.watch.marks(value) if isinstance(value, Tensor) else Marks(shape=())

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        return [t for t in tree_leaves(list(self._values.values())) if isinstance(t, Tensor)]

    @property
    def operands(self) -> list[Marks]:
        """The marks of every tensor among the arguments, in order."""
        return [self.watch.marks(t) for t in self.tensors]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) output."""
        return tuple(self.out.shape if isinstance(self.out, Tensor) else self.out[0].shape)

    def dim(self, name: str = "dim", ndim: int | None = None) -> int:
        """An axis argument, counted from the front."""
        size = len(self.marks("self").shape) if ndim is None else ndim
        return int(self._values[name]) % max(size, 1)

    def product(self, macs: float, *operands: Marks, labels: Sequence[Tensor] = ()) -> None:
        """Count one contraction."""
        weight = weight_of(*operands)
        name = None if weight is None else weight.name
        self.watch.products.append(Product(op=self.name, macs=int(macs), tensor=name, labels=tuple(labels)))


@dataclass(frozen=True, kw_only=True, eq=False)
class _View:
    base: Tensor
    ops: tuple[tuple[Any, tuple[Any, ...], Mapping[str, Any]], ...]


class Watch(TorchDispatchMode):
    """Follows the labels of every tensor of one forward pass; `book` holds what was learned."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.book = Book(self.where)
        self.products: list[Product] = []
        self.touched: set[str] = set()
        self.weightless = is_weightless(model)
        self.book.lenient = not self.weightless
        self.unknown: dict[str, set[str]] = {}
        self._marks: Any = WeakTensorKeyDictionary()
        self._views: Any = WeakTensorKeyDictionary()
        self._modules = {id(m): name for name, m in model.named_modules()}
        self._stack: list[str] = []
        self._op = ""
        state = [(n, p, "parameter") for n, p in model.named_parameters()] + [
            (n, b, "buffer") for n, b in model.named_buffers()
        ]
        self._names = {id(t): name for name, t, _ in state}
        self._places = {self._place(t): name for name, t, _ in state if t.numel() and t.device.type != "meta"}

    # where we are -----------------------------------------------------------------------------------------------------

    @property
    def module(self) -> str:
        """Qualified name of the innermost module that is running."""
        return self._stack[-1] if self._stack else ""

    def where(self) -> Where:
        """Module, op and the user's source line that are running now."""
        return Where(module=self.module, op=self._op, line=_line())

    @contextmanager
    def modules_named(self) -> Iterator[None]:
        """While open, know which module runs (global hooks: the network itself is not touched)."""

        def enter(module: nn.Module, args: Any) -> None:
            if id(module) in self._modules:
                self._stack.append(self._modules[id(module)])

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            name = self._modules.get(id(module))
            if name in self._stack:
                while self._stack.pop() != name:
                    pass

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # marks ------------------------------------------------------------------------------------------------------------

    def marks(self, tensor: Tensor) -> Marks:
        """What is known about a tensor; an unseen one is a parameter, a buffer or a constant."""
        found = self._marks.get(tensor)
        if found is None:
            found = self._first_seen(tensor)
            self._marks[tensor] = found
        return found

    def _first_seen(self, tensor: Tensor) -> Marks:
        name = self._names.get(id(tensor))
        if name is None and tensor.device.type != "meta" and tensor.layout == torch.strided and tensor.numel():
            name = self._places.get(self._place(tensor))
        shape = tuple(tensor.shape)
        if name is None:
            return Marks(shape=shape)
        self.touched.add(name)
        if not tensor.is_floating_point():
            return Marks(shape=shape)
        planes = (on_axis(self.book.allocate(name, a, size), a, len(shape)) for a, size in enumerate(shape) if size > 1)
        return Marks(shape=shape, planes=tuple(planes), source="parameter", name=name)

    @staticmethod
    def _place(tensor: Tensor) -> tuple[Any, ...]:
        try:
            return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        except RuntimeError:
            return (id(tensor),)

    def put(self, tensor: Tensor, marks: Marks | None, *, inputs: Sequence[Marks] = ()) -> None:
        """Set what is known about a new tensor."""
        shape = tuple(tensor.shape)
        if marks is None:
            marks = Marks(shape=shape, source=source(inputs))  # type: ignore[arg-type]
        planes = []
        for plane in marks.planes:
            small = compress(plane)
            if small is not None:
                planes.append(small)
                if len(axes(small)) > 1:
                    self.book.fold(small)
        self._marks[tensor] = replace(marks, shape=shape, planes=tuple(planes), flat=marks.flat | _flat(tensor))

    def adopt(self, tensor: Tensor, met: Marks) -> None:
        """A constant that met units along a width of its own must follow them: the next units it meets are tied to these."""
        own = self.marks(tensor)
        if own.planes or own.source != "constant" or not met.planes or own.name is not None:
            return
        seen = own.lifted(len(met.shape))
        kept = [p for p in met.planes if all(seen.shape[a] == met.shape[a] for a in axes(p))]
        if len(own.shape) == len(met.shape) and kept:
            self._marks[tensor] = replace(own, planes=tuple(kept), flat=own.flat - {a for p in kept for a in axes(p)})

    def input(self, tensor: Tensor) -> None:
        """Mark a tensor as the network's input."""
        self._marks[tensor] = Marks(shape=tuple(tensor.shape), source="activation")

    def finish(self, results: Sequence[Tensor]) -> None:
        """Pin what the network returns."""
        self._op, self._stack = "output", []
        for tensor in results:
            marks = self.marks(tensor)
            for plane in (*marks.planes, *marks.stats):
                self.book.pin(plane, "network output")

    # ops --------------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._op = func._schema.name
        known = self._rule(func)
        if known is None:
            decomposed = self._decomposed(func, args, kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        before = [self.marks(t) for t in tree_leaves([args, kwargs]) if isinstance(t, Tensor)]
        out = run(func, args, kwargs) if self.weightless else func(*args, **kwargs)
        self._op = func._schema.name
        call = Call(self, func, args, kwargs, out)
        results = self._unknown(call) if known is None else known(call)
        self._store(call, results, before)
        return out

    @staticmethod
    def _rule(func: Any) -> Rule | None:
        name: str = func._schema.name
        if name in RULES:
            return RULES[name]
        if func._schema.is_mutable and name.endswith("_") and name[:-1] in RULES:
            return RULES[name[:-1]]
        if torch.Tag.pointwise in func.tags:
            return elementwise
        return None

    def _decomposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op without a rule as the simpler ops it is defined by."""
        if func._schema.is_mutable:
            return NotImplemented
        table = torch._decomp.decomposition_table
        try:
            with self:
                return table[func](*args, **kwargs) if func in table else func.decompose(*args, **kwargs)
        except (NotImplementedError, TypeError, RuntimeError, KeyError):
            return NotImplemented

    def _unknown(self, call: Call) -> Followed:
        """An op without a rule pins everything it touches and is remembered by name."""
        for marks in call.operands:
            for plane in (*marks.planes, *marks.stats):
                call.book.pin(plane, f"{call.name} has no rule")
        if any(m.planes for m in call.operands):
            self.unknown.setdefault(call.name, set()).add(self.module)
        return None

    def _store(self, call: Call, results: Followed, before: list[Marks]) -> None:
        outs = [call.out] if isinstance(call.out, Tensor) else [t for t in tree_leaves(call.out) if isinstance(t, Tensor)]
        each: Sequence[Marks | None] = [results] * len(outs) if isinstance(results, Marks) or results is None else results
        arguments = {id(t) for t in call.tensors}
        for tensor, marks in zip(outs, each):
            written = id(tensor) in arguments
            self.put(tensor, marks, inputs=before)
            if written and tensor in self._views:
                self._write_through(tensor)
            elif not written and _is_view(call.func) and marks is not None:
                self._remember_view(call, tensor)

    # views that are written to ----------------------------------------------------------------------------------------

    def _remember_view(self, call: Call, out: Tensor) -> None:
        base = call.tensors[0]
        arguments = tuple(call[a.name] for a in call.func._schema.arguments[1:] if not a.kwarg_only)
        if isinstance(call.out, Tensor) and self.marks(base).source != "parameter":
            earlier: _View = self._views.get(base) or _View(base=base, ops=())
            self._views[out] = _View(base=earlier.base, ops=(*earlier.ops, (call.func, arguments, {})))

    def _write_through(self, tensor: Tensor) -> None:
        """Labels written into a part of a tensor are seen by later readers of the whole."""
        view: _View = self._views[tensor]
        written, base = self.marks(tensor), self.marks(view.base)
        if len(written.planes) != 1 or len(base.planes) > 1:
            for plane in written.planes:
                self.book.pin(plane, "is written into a part of another tensor")
            return
        whole = base.planes[0].expand(base.shape).clone() if base.planes else torch.full(base.shape, -1)
        part = whole
        for op, args, kwargs in view.ops:
            part = op(part, *args, **kwargs)
        part.copy_(written.planes[0].expand(part.shape))
        self.put(view.base, replace(base, planes=(whole,), source=written.source, flat=frozenset()))


def elementwise(call: Call) -> Followed:
    """Any pointwise op: labels that meet are tied."""
    operands = call.operands
    if not operands:
        return None
    result = meet(call.book, *operands)
    for tensor in call.tensors:
        call.watch.adopt(tensor, result)
    return result if isinstance(call.out, Tensor) else [result] * len(tree_leaves(call.out))


def _flat(tensor: Tensor) -> frozenset[int]:
    if tensor.layout != torch.strided:
        return frozenset()
    return frozenset(a for a, (size, stride) in enumerate(zip(tensor.shape, tensor.stride())) if size > 1 and stride == 0)


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _line() -> str:
    """The innermost source line that is neither torch nor resect, best effort."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_HIDDEN[1]) and frame.f_code.co_name == "_forward":
            break
        if not file.startswith(_HIDDEN) and not file.startswith("<"):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
