"""`plan.json`: what it is called, how it is sealed against edits, and how it is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resect.errors import FileError

FORMAT = "resect plan"
FORMAT_VERSION = 1
PLAN = "plan.json"


def read_plan(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of ``plan.json`` in `directory`, its checksum verified; FileError where that fails."""
    path = Path(directory) / PLAN
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path} is missing: {directory} is not a directory that resect wrote.") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read ({error}): it is truncated or was edited. Save the network again.") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise FileError(f'{path} is not a plan of resect: it does not say "format": "{FORMAT}".')
    if record.get("format_version") != FORMAT_VERSION:
        found = record.get("format_version")
        raise FileError(
            f"{path} has format version {found}, this resect reads version {FORMAT_VERSION}. "
            f"Use the resect that wrote it ({record.get('versions', {}).get('resect', 'unknown')}), or save the network again."
        )
    if record.pop("checksum", None) != checksum(record):
        raise FileError(f"{path} was edited: its checksum does not match its content. Save the network again.")
    return record


def is_saved(directory: str | os.PathLike[str]) -> bool:
    """Whether `directory` looks like one that `save` wrote (its content is not verified)."""
    return (Path(directory) / PLAN).is_file()


def sealed(record: Mapping[str, Any]) -> str:
    """`record` as text, one top-level entry a line, with its own checksum."""
    entries = {**record, "checksum": checksum(record)}
    lines = (f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in entries.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, allow_nan=False).encode()).hexdigest()
