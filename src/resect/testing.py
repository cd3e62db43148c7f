"""Checks for what users add: does a network cut cleanly, does a scorer keep the laws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from resect.anatomy import Anatomy, dissect
from resect.errors import ScoreError, SurgeryError
from resect.plan import Plan
from resect.surgery import TOLERANCE, cut, verify
from resect.tracing import Evidence, States
from resect.tracing.trace import ReaderEvidence


def check_cut(model: nn.Module, example: Any, *, anatomy: Anatomy | None = None, seed: int = 0) -> bool:
    """True when every group alone and a random whole plan give the same outputs cut as masked.

    Raises SurgeryError that names the group that differs and by how much. Groups of kind "stream" are left out: there, masking
    and cutting differ by nature.

    >>> check_cut(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), __import__("torch").ones(3, 4))
    True
    """
    anatomy = anatomy or dissect(model, example, verify=False)
    half = Plan.random(anatomy, ratio=0.5, seed=seed)
    everything = Plan.all(anatomy)
    hidden = [group.name for group in anatomy.groups if group.kind != "stream"]
    plans = {f"group {name!r}": Plan(anatomy=anatomy, keep={**everything.keep, name: half.keep[name]}) for name in hidden}
    plans["a random plan over all groups"] = Plan(
        anatomy=anatomy, keep={**everything.keep, **{name: half.keep[name] for name in hidden}}
    )
    for what, plan in plans.items():
        try:
            error = verify(model, cut(model, plan, verify=False), plan)
        except Exception as cause:
            raise SurgeryError(f"the network cut by {what} does not run: {cause}") from cause
        if not error <= TOLERANCE:
            raise SurgeryError(f"the network cut by {what} differs from the masked one by {error:.2g} (limit {TOLERANCE:g})")
    return True


def check_scorer(function: Callable[[Evidence], np.ndarray], *, seed: int = 0) -> bool:
    """True when a scorer keeps the laws: right shape, finite, pure, repeatable, and permutation equivariant.

    Raises ScoreError that names the law that is broken. Scorers that draw at random are not equivariant and do not pass.
    """
    evidence = example_evidence(seed)
    before = [array.copy() for array in _arrays(evidence)]
    first, second = np.asarray(function(evidence)), np.asarray(function(evidence))
    expected = (evidence.units,), (len(evidence.examples), evidence.units)
    if first.shape not in expected:
        raise ScoreError(f"the scorer returned shape {first.shape}; return {expected[0]} or {expected[1]}")
    if not np.isfinite(first).all():
        raise ScoreError("the scorer returned values that are not finite")
    if not np.array_equal(first, second):
        raise ScoreError("the scorer gave two different answers for the same evidence; draw only from evidence.seed")
    if not all(np.array_equal(old, new) for old, new in zip(before, _arrays(evidence))):
        raise ScoreError("the scorer changed the evidence; work on copies")
    order = np.random.default_rng(seed).permutation(evidence.units)
    if not np.allclose(np.asarray(function(permuted(evidence, order))), first[..., order], rtol=1e-6, atol=1e-9):
        raise ScoreError("permuting the units did not permute the scores; a score may not depend on a unit's place")
    return True


def example_evidence(seed: int = 0, *, units: int = 12, classes: int = 4, outputs: int = 4) -> Evidence:
    """Seeded evidence of one group with one reader, for checks of scorers."""
    draw = np.random.default_rng(seed)
    before = (draw.normal(size=(500, units)) + draw.normal(size=units)) * draw.uniform(0.2, 2, units)
    values = np.maximum(before, 0)
    labels = draw.integers(0, classes, 500)
    weight = draw.normal(size=(outputs, units))
    member = np.eye(classes)[labels]
    share = member / member.sum(0)
    rows = np.concatenate([values, np.ones((500, 1))], axis=1)
    reader = ReaderEvidence(
        tensor="reader.weight",
        rate=share.T @ (values > 0),
        mean=share.T @ values,
        mean_square=share.T @ values**2,
        peak=np.stack([values[labels == c].max(0) for c in range(classes)]),
        variance=values.var(0),
        column_norm=np.linalg.norm(weight, axis=0),
        slope=share.T @ np.abs(values * draw.normal(size=values.shape)),
        readout=weight,
    )
    return Evidence(
        group="group",
        kind="hidden",
        units=units,
        examples=member.sum(0).astype(np.int64),
        writer_norm=draw.uniform(0.5, 2, units),
        readers=(reader,),
        systems=((weight, rows.T @ rows, np.arange(units)[:, None]),),
        states=States(
            keys=np.arange(500, dtype=np.uint64),
            pre=before[:, :, None].astype(np.float32),
            post=values[:, :, None].astype(np.float32),
            most=500,
        ),
        seed=seed,
    )


def permuted(evidence: Evidence, order: np.ndarray) -> Evidence:
    """The same evidence with its units in another order."""
    readers = tuple(
        replace(
            reader,
            **{
                name: getattr(reader, name)[..., order]
                for name in ("rate", "mean", "mean_square", "peak", "variance", "column_norm", "slope", "readout")
                if getattr(reader, name) is not None
            },
        )
        for reader in evidence.readers
    )
    systems = tuple((weight, moments, columns[order]) for weight, moments, columns in evidence.systems)
    states = evidence.states
    if states is not None:
        states = replace(states, pre=states.pre[:, order], post=states.post[:, order])
    return replace(evidence, writer_norm=evidence.writer_norm[order], readers=readers, systems=systems, states=states)


def _arrays(evidence: Evidence) -> list[np.ndarray]:
    arrays = [evidence.examples, evidence.writer_norm]
    if evidence.states is not None:
        arrays += [evidence.states.pre, evidence.states.post]
    for reader in evidence.readers:
        arrays += [value for value in vars(reader).values() if isinstance(value, np.ndarray)]
    return arrays + [array for system in evidence.systems for array in system]
