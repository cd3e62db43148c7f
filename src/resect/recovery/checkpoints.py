"""What a recovery needs to go on after it was killed: written under a temporary name, renamed, and read without pickle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from resect.errors import FileError


def write(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and texts; what was there stays whole until the new file is."""
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, new)
        os.replace(new, path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}. Name a directory that you may write to.") from error
    finally:
        new.unlink(missing_ok=True)


def read(path: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """The state in `path`, None where there is no file; FileError where it cannot be read or belongs to another run.

    run: what makes a run what it is (networks, data, settings); it must equal that of the file.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        recorded = state["run"]
    except Exception as error:
        raise FileError(f"{path} is truncated or was edited ({type(error).__name__}). Remove it to start afresh.") from error
    if recorded != run:
        other = next(name for name in (*run, *recorded) if run.get(name) != recorded.get(name))
        raise FileError(
            f"{path} belongs to another run: its {other} differs from this one's. Name another directory, or remove it."
        )
    return state
