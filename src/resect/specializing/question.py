"""What a specialist is asked: which classes are its own, and whether it may answer "none of them"."""

from __future__ import annotations

import difflib
import numbers
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from resect.errors import GoalError

Other = Literal["none", "reject"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """The classes a specialist answers for.

    own: class indices, in the order of its outputs. classes: how many the dense network tells apart. names: of all classes, or
    empty. other: "reject" where a background score stands for all other classes, "none" where only own classes will come. One
    class alone always rejects: its question is yes or no.
    """

    own: tuple[int, ...]
    classes: int
    names: tuple[str, ...] = ()
    other: Other = "none"

    @property
    def one(self) -> bool:
        """Whether the question is yes or no."""
        return len(self.own) == 1

    @property
    def rejects(self) -> bool:
        """Whether examples of other classes are part of the question."""
        return self.one or self.other == "reject"

    @property
    def others(self) -> tuple[int, ...]:
        return tuple(c for c in range(self.classes) if c not in self.own)

    @property
    def name(self) -> str:
        """The own classes by name, such as "cat" or "cat-dog"."""
        return "-".join(self.class_name(c) for c in self.own)

    def class_name(self, label: int) -> str:
        return self.names[label] if label < len(self.names) else str(label)


def asked(
    classes: Sequence[int | str] | None,
    each_class: bool,
    *,
    count: int,
    names: Sequence[str] = (),
    other: Other = "none",
) -> tuple[Question, ...]:
    """The questions that the arguments of `specialize` describe.

    Raises GoalError for both or neither of `classes` and `each_class`, unknown classes (naming the nearest), duplicates, all
    classes at once, and names that are not one for each class.
    """
    if (classes is None) == (not each_class):
        raise GoalError("say which classes: specialize(..., classes=[3]), classes=['cat', 'dog'], or each_class=True")
    if other not in get_args(Other):
        raise GoalError(f'other={other!r} is not a way to treat other classes; write "none" or "reject"')
    named = _checked(names, count)
    if classes is None:
        return tuple(Question(own=(c,), classes=count, names=named) for c in range(count))
    if isinstance(classes, str | int) or not len(classes):
        raise GoalError(f"classes={classes!r} is not a list of classes; write classes=[3] or classes=['cat', 'dog']")
    own = tuple(_index(c, count, named) for c in classes)
    twice = [c for c, times in Counter(own).items() if times > 1]
    if twice:
        raise GoalError(
            f"class {named[twice[0]] if named else twice[0]} is named twice in classes={list(classes)!r}; name it once"
        )
    if len(own) == count:
        raise GoalError(
            f"classes={list(classes)!r} are all {count} classes: nothing is left to leave out. Use prune() for the whole "
            "question, or each_class=True for one specialist a class"
        )
    return (Question(own=own, classes=count, names=named, other=other),)


def _checked(names: Sequence[str], count: int) -> tuple[str, ...]:
    named = tuple(names)
    if named and len(named) != count:
        raise GoalError(f"{len(named)} class names were given and the network has {count} outputs; give one name for each")
    twice = [name for name, times in Counter(named).items() if times > 1]
    if twice:
        places = ", ".join(str(i) for i, name in enumerate(named) if name == twice[0])
        raise GoalError(f"the name {twice[0]!r} stands for the classes {places}; give every class a name of its own")
    return named


def _index(wanted: int | str, count: int, names: tuple[str, ...]) -> int:
    if isinstance(wanted, str) and wanted in names:
        return names.index(wanted)
    if isinstance(wanted, str) and wanted.isdecimal():
        wanted = int(wanted)
    if isinstance(wanted, numbers.Integral) and not isinstance(wanted, bool):
        if 0 <= wanted < count:
            return int(wanted)
        raise GoalError(f"there is no class {wanted}; the network has {count} outputs, so classes go from 0 to {count - 1}")
    if not names:
        raise GoalError(f"there is no class {wanted!r}: the classes have no names here; write indices from 0 to {count - 1}")
    near = difflib.get_close_matches(str(wanted), names, 1, cutoff=0.0)
    raise GoalError(f"there is no class {wanted!r}; did you mean {near[0]!r}? Known: {', '.join(names)}")
