"""Specialists of one network side by side in a directory, each a saved network of its own, loaded as far as they are needed.

panel/
    panel.json            which directory answers for which class
    3/, 5-sandal/, ...    one saved specialist each
    result.json, report.html
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resect.errors import FileError, GoalError
from resect.exporting.loading import MakeModel, load
from resect.exporting.plan_file import is_saved
from resect.exporting.saving import renamed_into, save
from resect.specializing.specialist import Panel, Specialist

if TYPE_CHECKING:
    from resect.specializing import Specialised, Specialists

INDEX, FORMAT, FORMAT_VERSION = "panel.json", "resect panel", 1
_FILES = frozenset({INDEX, "result.json", "report.html"})


def save_panel(
    specialists: Specialists,
    directory: str | os.PathLike[str],
    *,
    files: Mapping[str, str] | None = None,
    **origin: Any,
) -> Path:
    """Write every specialist and an index of them to `directory`, in one rename, and return its path.

    files: further text files by name. origin: architecture, arguments, data and seed, as for `save`, whose errors it raises.
    """
    directory = Path(directory)
    check_panel_writable(directory)
    index = {str(one.question.own[0]): folder_name(one) for one in specialists}
    with renamed_into(directory) as folder:
        for one in specialists:
            save(one.model, one.plan, folder / folder_name(one), found=one, **origin)
        record = {"format": FORMAT, "format_version": FORMAT_VERSION, "specialists": index}
        for name, text in {**(files or {}), INDEX: json.dumps(record, indent=2) + "\n"}.items():
            (folder / name).write_text(text, encoding="utf-8")
    return directory


def check_panel_writable(directory: str | os.PathLike[str]) -> None:
    """FileError where `save_panel` would destroy something that resect did not write, or could not write."""
    directory = Path(directory)
    if Path.cwd().is_relative_to(directory.resolve()):
        raise FileError(f"{directory} is, or holds, the working directory, which cannot be replaced; name one inside it.")
    if directory.exists() and not directory.is_dir():
        raise FileError(f"{directory} is a file; name a directory to write the specialists to.")
    for path in sorted(directory.iterdir()) if directory.exists() else ():
        if not (path.name in _FILES or (path.is_dir() and is_saved(path))):
            raise FileError(
                f"{directory} holds {path.name}, which is not part of a panel saved by resect; it was left as it is. "
                "Name an empty or new directory."
            )
    with renamed_into(directory, keep=False):
        pass


def folder_name(one: Specialised) -> str:
    """The directory of a specialist inside a panel: its class, and its name where that is another."""
    label, name = str(one.question.own[0]), re.sub(r"[^\w.-]+", "_", one.question.name)
    return label if name == label else f"{label}-{name}"


def load_panel(
    directory: str | os.PathLike[str],
    make_model: MakeModel | None = None,
    *,
    classes: Iterable[int] | None = None,
    device: str = "cpu",
) -> Panel:
    """The specialists of a saved panel, or only those of some `classes`; the others are not read.

    make_model as in `load`. FileError for a missing or damaged index; GoalError for a class that the panel lacks.
    """
    directory = Path(directory)
    try:
        record = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        known = {int(label): str(folder) for label, folder in record["specialists"].items()}
    except FileNotFoundError:
        raise FileError(f"{directory / INDEX} is missing: {directory} is not a panel that resect wrote.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(
            f"{directory / INDEX} cannot be read ({error}): it is truncated or was edited. Save it again."
        ) from None
    wanted = list(known) if classes is None else list(classes)
    lacking = next((c for c in wanted if c not in known), None)
    if lacking is not None:
        raise GoalError(f"the panel in {directory} has no specialist for class {lacking}; it has {', '.join(map(str, known))}")
    if any(Path(known[c]).name != known[c] for c in wanted):
        raise FileError(f"{directory / INDEX} names a directory outside of the panel: it was edited. Save it again.")
    loaded = [load(directory / known[c], make_model, device=device) for c in wanted]
    strange = next((known[c] for c, one in zip(wanted, loaded) if not isinstance(one, Specialist)), None)
    if strange is not None:
        raise FileError(f"{directory / strange} holds a network that is no specialist; save the panel again.")
    return Panel([one for one in loaded if isinstance(one, Specialist)])
