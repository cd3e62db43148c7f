"""Walking through a network reader by reader: many forward passes at once, all halted where the same weight has just read.

A repair changes weights in execution order, and what later readers read depends on it. Running the prefix again for every
reader costs a pass each; here every batch's pass stays where it is, halted in a thread of its own, until its reader is
re-fitted. Then what was computed since with the old weight is computed again, and all go on. One pass over the data per
network, however many readers there are. Only one thread runs at a time, so results do not depend on their order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resect.batches import Batch, forward, select, unpack
from resect.tracing import Reader, Reading
from resect.tracing.observing import ADDITIONS, ELEMENTWISE, NORMS, Watch, watched

# Positions of a convolution that become rows, as in tracing.
GRAM_POSITIONS = 64
# Examples that are used however little memory there is.
FEWEST = 50
IN_PLACE = {torch.Tensor.add_, torch.Tensor.__iadd__}


class _Abandoned(BaseException):
    """Raised inside a halted forward pass that nobody will let go on; not an Exception, so that no forward pass catches it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call of a forward pass, and what it returned; reading: where it is a reader's call."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    reading: Reading | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Halt:
    """A forward pass halted behind a reader, or behind the addition that its output goes into.

    output: of the reader itself. other, total: the other term and the sum, where there is an addition. tape: the calls that
    lead from the weight that feeds this reader (or from the reader) to here.
    """

    reading: Reading
    output: Tensor
    other: Tensor | None = None
    total: Tensor | None = None
    tape: tuple[Call, ...] = ()

    @property
    def bytes(self) -> int:
        tensors = [self.reading.inputs, self.output, self.other, self.total, *(call.output for call in self.tape)]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """The two networks halted at one reader on one batch. judges: (examples,) True where an example judges and does not fit."""

    was: Halt
    now: Halt
    batch: Batch
    judges: Tensor

    def counted(self, x: Tensor) -> Tensor:
        """(examples, positions) of rows x that count: all but padding."""
        if self.batch.mask is not None and self.batch.mask.shape == x.shape[:2]:
            return self.batch.mask.cpu()
        return torch.ones(x.shape[:2], dtype=torch.bool)


def remade(tape: Sequence[Call], known: Mapping[int, Tensor] | None = None) -> list[Call]:
    """All calls made again, on what the weights are now and on what the calls before made.

    known: new values, by the identity of the outputs they stand for; the calls that made those are not made again.
    """
    known = known or {}
    made: dict[int, Tensor] = dict(known)
    calls = []
    for call in tape:
        args = tuple(made.get(id(a), a) if isinstance(a, Tensor) else a for a in call.args)
        kwargs = {k: made.get(id(a), a) if isinstance(a, Tensor) else a for k, a in call.kwargs.items()}
        output = known[id(call.output)] if id(call.output) in known else call.func(*args, **kwargs)
        made[id(call.output)] = output
        reading = call.reading
        if reading is not None:
            reading = replace(reading, inputs=made.get(id(reading.inputs), reading.inputs), output=output)
        calls.append(Call(func=call.func, args=args, kwargs=kwargs, output=output, reading=reading))
    return calls


def again(tape: Sequence[Call], known: Mapping[int, Tensor] | None = None) -> Tensor:
    """The output of the last call, with all calls made again (see `remade`)."""
    return remade(tape, known)[-1].output


class _Halting(Watch):
    """Halts the forward pass at every call of a reader in `readers`, or at the addition behind it."""

    def __init__(self, walker: _Walker, model: nn.Module, readers: Mapping[str, Reader]):
        super().__init__(watched(model, readers), lambda reading: None, None, None)
        self.walker, self.readers = walker, readers
        self.tape: list[Call] = []
        self.halt: Halt | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = self.match(func, args, kwargs)
        if found is None or found[0].tensor not in self.readers:
            return self._pass_on(func, types, args, kwargs)
        seen, position, weight = found
        reader = self.readers[seen.tensor]
        inputs = args[position] if len(args) > position else kwargs["input"]
        if -id(inputs) in self.names:
            return func(*args, **kwargs)
        output = func(*args, **kwargs)
        self.tape = self._since(reader.fed_by) if self._made(inputs) else []
        reading = Reading(reader=reader, inputs=inputs, output=output, weight=weight)
        self.tape.append(Call(func=func, args=args, kwargs=kwargs, output=output, reading=reading))
        self.halt = Halt(reading=reading, output=output)
        return output if reader.residual else self._halted(output)

    def _pass_on(self, func, types, args, kwargs):
        follows = [isinstance(a, Tensor) and self._made(a) for a in args]
        if self.halt is None or not any(follows):
            return super().__torch_function__(func, types, args, kwargs)
        if func in ADDITIONS and follows in ([True, False], [False, True]) and not kwargs and self._awaits_sum:
            return self._add(func, args, args[1 if follows[0] else 0])
        output = super().__torch_function__(func, types, args, kwargs)
        if func in NORMS or func is F.dropout or func in ELEMENTWISE:
            self.tape.append(Call(func=func, args=args, kwargs=kwargs, output=output))
        return output

    def _add(self, func, args, other: Tensor):
        """The addition behind a reader. The other term is kept as it was: the addition may be in place."""
        assert self.halt is not None
        target, term = args[0], self.tape[-1].output
        other = other.clone() if func in IN_PLACE and other is target else other
        total = torch.add(term, other)
        self.tape.append(Call(func=torch.add, args=(term, other), kwargs={}, output=total))
        self.halt = replace(self.halt, other=other, total=total)
        total = self._halted(total)
        return target.copy_(total) if func in IN_PLACE else total

    def _since(self, feeder: str | None) -> list[Call]:
        """What of the tape leads from a reader's feeder on."""
        own = [number for number, call in enumerate(self.tape) if call.reading and call.reading.reader.tensor == feeder]
        return self.tape[own[-1] :] if own else []

    @property
    def _awaits_sum(self) -> bool:
        return self.halt is not None and self.halt.reading.reader.residual and self.halt.total is None

    def _made(self, tensor: Tensor) -> bool:
        return bool(self.tape) and any(call.output is tensor for call in self.tape)

    def _halted(self, output: Tensor) -> Tensor:
        """Stop here until told to go on; what was made since the tape began is made again if weights have changed."""
        assert self.halt is not None
        self.walker.arrive(replace(self.halt, tape=tuple(self.tape)))
        if self.walker.changed:
            self.tape = remade(self.tape)
            output = self.tape[-1].output
        return output


class _Walker:
    """One forward pass in a thread of its own, that goes from halt to halt when told."""

    def __init__(self, model: nn.Module, batch: Batch, readers: Mapping[str, Reader]):
        self.model, self.batch, self.readers = model, batch, readers
        self.at: Halt | None = None
        self.error: BaseException | None = None
        self.changed, self.ended, self.abandoned = False, False, False
        self._go, self._here = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self.abandoned:
                with torch.inference_mode(), _Halting(self, self.model, self.readers):
                    forward(self.model, self.batch)
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        self.at, self.ended = None, True
        self._here.release()

    def arrive(self, halt: Halt) -> None:
        """Called by the pass itself: say where it is, and wait."""
        self.at = halt
        self._here.release()
        self._go.acquire()
        if self.abandoned:
            raise _Abandoned

    def go(self, *, changed: bool = False) -> None:
        """Let the pass go on to its next halt, or to its end. Raises what the forward pass raised."""
        if self.ended:
            return
        self.changed = changed
        self._go.release()
        self._here.acquire()
        if self.error is not None:
            raise self.error

    def leave(self) -> None:
        """End the thread wherever the pass is."""
        self.abandoned = True
        self._go.release()
        self._thread.join()


@dataclass(kw_only=True, eq=False)
class Walk:
    """Both networks on all batches, going through the readers together. `changed` is to be set when a weight was changed."""

    pairs: list[tuple[_Walker, _Walker, Batch, Tensor]]
    readers: Mapping[str, Reader]
    changed: bool = False

    def __iter__(self) -> Iterator[tuple[Reader, list[Pair]]]:
        """Every reader with the pairs that are halted at it, in the order in which the first batch comes to them."""
        self._go()
        while True:
            first = next((now.at for _, now, _, _ in self.pairs if now.at is not None), None)
            if first is None:
                return
            name = first.reading.reader.tensor
            here = [p for p in self.pairs if all(w.at is not None and w.at.reading.reader.tensor == name for w in p[:2])]
            self.changed = False
            if here:
                yield self.readers[name], [Pair(was=w.at, now=n.at, batch=b, judges=j) for w, n, b, j in here]  # type: ignore[arg-type]
            self._go(name)

    def _go(self, name: str | None = None) -> None:
        for was, now, _, _ in self.pairs:
            for walker in (was, now):
                if name is None or (walker.at is not None and walker.at.reading.reader.tensor == name):
                    walker.go(changed=self.changed and walker is now)


@contextmanager
def walking(
    dense: nn.Module, small: nn.Module, readers: Mapping[str, Reader], data: Sequence[Any], *, memory: float, every: int
) -> Iterator[Walk]:
    """A walk of both networks through `readers` over as many of the first examples as `memory` bytes allow.

    Every `every`-th example judges. No thread outlives the context.
    """
    pairs: list[tuple[_Walker, _Walker, Batch, Tensor]] = []
    try:
        seen, room = 0, None
        for item in data:
            batch = unpack(item)
            room = _room(dense, readers, batch, memory) if room is None else room
            if seen >= room:
                break
            if seen + batch.size > room:
                batch = unpack(select(item, torch.arange(room - seen)))
            judges = (torch.arange(batch.size) + seen) % every == every - 1
            pairs.append((_Walker(dense, batch, readers), _Walker(small, batch, readers), batch, judges))
            seen += batch.size
        yield Walk(pairs=pairs, readers=readers)
    finally:
        for was, now, _, _ in pairs:
            was.leave()
            now.leave()


def _room(dense: nn.Module, readers: Mapping[str, Reader], batch: Batch, memory: float) -> int:
    """How many examples fit: by what a pass holds at its largest halt, for both networks, and the rows of the problem there."""
    walker, largest = _Walker(dense, batch, readers), 1.0
    try:
        walker.go()
        while walker.at is not None:
            reading = walker.at.reading
            patches = reading.reader.op == "conv" and reading.inputs.ndim > 2
            rows = GRAM_POSITIONS * batch.size * reading.weight[0].numel() if patches else reading.inputs.numel()
            largest = max(largest, 2.0 * walker.at.bytes + rows * reading.inputs.element_size())
            walker.go()
    finally:
        walker.leave()
    return max(int(memory / largest * batch.size), FEWEST)
