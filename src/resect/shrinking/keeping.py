"""Rounds on disk: each a directory that `save` wrote, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resect.batches import unpack
from resect.errors import FileError
from resect.exporting import check_writable, is_saved, load, load_plan, save
from resect.plan import Cost, Plan
from resect.surgery import state_digest


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round: what it left. kept: units of the dense network per group. accuracy: on the val data before recovery, NaN
    without labels. latency_ms: measured, where the target is a latency."""

    number: int
    scorer: str
    kept: dict[str, int]
    cost: Cost
    accuracy: float
    latency_ms: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The round as JSON-able values."""
        return asdict(self) | {"accuracy": None if self.accuracy != self.accuracy else self.accuracy}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Round:
        """The round that `to_dict` wrote."""
        accuracy = float("nan") if values["accuracy"] is None else values["accuracy"]
        return cls(**{**values, "cost": Cost(**values["cost"]), "accuracy": accuracy})


class Keeper:
    """Rounds on disk, each a directory that `save` wrote, whole or not there."""

    def __init__(self, folder: Path, model: nn.Module, settings: dict[str, Any]):
        self.folder, self.model = folder, model
        identity = {"format": "resect rounds", "network": state_digest(model), **settings}
        record = folder / "run.json"
        if record.exists():
            self._compare(record, json.loads(json.dumps(identity)))
            return
        if folder.exists() and any(folder.iterdir()):
            raise FileError(f"{folder} holds files that are not rounds of resect; name an empty or new directory")
        check_writable(folder / "round-1")
        new = record.with_suffix(".new")
        new.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        new.replace(record)

    def _compare(self, record: Path, identity: dict[str, Any]) -> None:
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
            differing = [name for name in {**identity, **found} if identity.get(name) != found.get(name)]
        except (OSError, ValueError, TypeError) as error:
            raise FileError(f"{record} cannot be read ({error}); remove {self.folder} to start afresh") from error
        if differing:
            raise FileError(
                f"{self.folder} holds the rounds of another run: its {', '.join(differing)} differ from this one's. Name "
                "another directory, or remove it"
            )

    def _place(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def keep(self, small: nn.Module, plan: Plan, entry: Round) -> None:
        save(small, plan, self._place(entry.number), files={"result.json": json.dumps(entry.to_dict(), indent=1) + "\n"})

    def resume(self, small: nn.Module, plan: Plan) -> tuple[nn.Module, Plan, list[Round]]:
        done = list(self._done())
        if done:
            small = load(self._place(len(done)), self.model)
            plan = load_plan(self._place(len(done)), plan.anatomy)
        return small, plan, done

    def _done(self) -> Iterator[Round]:
        number = 1
        while is_saved(self._place(number)):
            yield Round.from_dict(json.loads((self._place(number) / "result.json").read_text(encoding="utf-8")))
            number += 1


def fingerprint(data: list[Any]) -> str:
    """SHA-256 of the inputs and labels of batches."""
    digest = hashlib.sha256()
    for item in data:
        batch = unpack(item, where="the calibrate data")
        for value in (*batch.args, *batch.kwargs.values(), batch.labels):
            if isinstance(value, torch.Tensor):
                digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
