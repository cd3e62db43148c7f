"""The report for programs: `result.json`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from resect.evaluation import Evaluation
from resect.reporting.report import Report, notes, verdict

RESULT_VERSION = 1


def record(report: Report) -> dict[str, Any]:
    """The report as values that JSON can hold; shares and accuracies in [0, 1], times in seconds or milliseconds."""
    return {
        "result_version": RESULT_VERSION,
        "model": report.model,
        "data": report.data,
        "promise": verdict(report).promise,
        **report.found.to_dict(),
        "cost_share": report.found.cost.share_of(report.found.dense_cost),
        "test": {"dense": _evaluation(report.dense), "small": _evaluation(report.small)},
        "latency": [entry.to_dict() for entry in report.latency],
        "settings": dict(report.settings),
        "data_fingerprints": dict(report.fingerprints),
        "notes": list(notes(report)),
    }


def record_text(report: Report) -> str:
    """`record` as the text of a file."""
    return json.dumps(record(report), indent=2, default=_plain) + "\n"


def _evaluation(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {
        "accuracy": evaluation.accuracy,
        "examples": evaluation.examples,
        "per_class": {str(label): accuracy for label, accuracy in evaluation.per_class.items()},
    }


def _plain(value: object) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no place in result.json")
