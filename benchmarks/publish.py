"""What all benchmarks share: where results go, what machine and versions made them, and Markdown tables."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch

import resect

RESULTS = Path(__file__).parent / "results"


def data_folder(name: str, given: str | None = None) -> str:
    """The folder of a data set: --data, else $RESECT_DATA/name; ends the script with a sentence where there is neither."""
    root = os.environ.get("RESECT_DATA")
    if given is None and root is None:
        sys.exit(f"no data: give --data FOLDER, or set RESECT_DATA to the folder that holds {name}/")
    return given or str(Path(root or "") / name)


def publish(name: str, figures: dict[str, Any], text: str) -> None:
    """Write benchmarks/results/NAME.json and NAME.md."""
    RESULTS.mkdir(exist_ok=True)
    made = {
        "resect": resect.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"made_with": made, **figures}, indent=1, default=float) + "\n", encoding="utf-8"
    )
    (RESULTS / f"{name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def spread(values: Sequence[float], digits: int = 1, scale: float = 1.0) -> str:
    """Mean and sample standard deviation over seeds."""
    array = np.asarray(values, dtype=float) * scale
    return f"{array.mean():.{digits}f} ± {array.std(ddof=1) if len(array) > 1 else 0:.{digits}f}"
