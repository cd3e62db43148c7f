"""The whole zoo, network by network: what can be removed, and whether every cut equals masking.

    python benchmarks/zoo.py [names...]

Per network: seconds to dissect (verification included), share of parameters that belong to units, groups by kind, the largest
difference between cut and masked (relative to the largest output) over every hidden group alone at half and over three random
plans of all groups at once, with other random numbers than dissection used; whether predicted MACs are the counted ones,
before and after the cut; whether the saved cut network reloads to the same outputs. Writes results/zoo.json and docs/zoo.md.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from publish import publish, table
from resect import Plan, load, save
from resect.anatomy import Anatomy, dissect
from resect.anatomy.checking import difference, half, outputs
from resect.anatomy.slicing import apply, masked_weights, replace, skeleton

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
TOLERANCE = 1e-4


def gap(model: nn.Module, anatomy: Anatomy, keep: dict[str, np.ndarray]) -> float:
    """Law 2 for one plan."""
    masked = skeleton(model)
    replace(masked, anatomy, masked_weights(model, anatomy, keep))
    small = apply(skeleton(model), anatomy, keep)
    return difference(outputs(small, anatomy.example), outputs(masked, anatomy.example))


def counted(model: nn.Module, anatomy: Anatomy) -> float:
    """MACs per example by torch's own counter; fused CPU kernels that it does not know are avoided or told to it."""

    def grouped(a: Any, b: Any, *rest: Any, **kwargs: Any) -> int:
        return 2 * a[0] * a[1] * b[2]

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped})
        with counter, sdpa_kernel(SDPBackend.MATH):
            outputs(model, anatomy.example)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    batch = next(int(t.shape[0]) for t in tree_leaves(anatomy.example) if isinstance(t, Tensor) and t.ndim)
    return counter.get_total_flops() / 2 / batch


def macs_right(model: nn.Module, anatomy: Anatomy, plan: Plan) -> bool:
    """Predicted MACs equal counted ones, dense and cut."""
    small = apply(skeleton(model), anatomy, plan.keep)
    pairs = ((Plan.all(anatomy).cost().macs, counted(model, anatomy)), (plan.cost().macs, counted(small, anatomy)))
    return all(abs(predicted - found) <= 1e-6 * max(found, 1) for predicted, found in pairs)


def reloads(make: Any, model: nn.Module, plan: Plan) -> bool:
    """The cut network, saved and loaded, gives the same outputs."""
    small = apply(skeleton(model), plan.anatomy, plan.keep)
    with tempfile.TemporaryDirectory() as folder:
        save(small, plan, Path(folder) / "small")
        again = load(Path(folder) / "small", lambda: make()[0])
    return difference(outputs(again, plan.anatomy.example), outputs(small, plan.anatomy.example)) == 0


def examine(name: str, make: Any) -> dict[str, Any]:
    """Everything about one network."""
    model, example = make()
    start = time.perf_counter()
    anatomy = dissect(model, example)
    seconds = time.perf_counter() - start
    hidden = [g for g in anatomy.groups if g.kind != "stream"]
    alone = max((gap(model, anatomy, {g.name: half(g, 1)}) for g in hidden), default=0.0)
    whole = max((gap(model, anatomy, {g.name: half(g, s) for g in hidden}) for s in (2, 3, 4)), default=0.0)
    full = Plan.all(anatomy)
    plan = Plan(anatomy=anatomy, keep={**full.keep, **{g.name: half(g, 5) for g in hidden}})
    return {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prunable": anatomy.prunable,
        "groups": dict(Counter(g.kind for g in anatomy.groups)),
        "pins": len(anatomy.pins),
        "alone": alone,
        "whole": whole,
        "macs": _tried(lambda: macs_right(model, anatomy, plan)),
        "reload": _tried(lambda: reloads(make, model, plan)),
        "seconds": seconds,
    }


def _tried(check: Any) -> Any:
    try:
        return bool(check())
    except AssertionError:
        # torch's counter gives up on some custom autograd functions
        return "not counted"
    except Exception as error:  # the table says what happened
        return f"{type(error).__name__}: {error}"[:200]


def row(r: dict[str, Any]) -> list[str]:
    groups = ", ".join(f"{n} {k}" for k, n in sorted(r["groups"].items()))
    worst = max(r["alone"], r["whole"])
    right = f"{worst:.0e}" if worst <= TOLERANCE else f"**{worst:.0e}**"
    marks = [{True: "yes", "not counted": "not counted"}.get(r[k], "**no**") for k in ("macs", "reload")]
    return [r["name"], f"{r['parameters']:,}", f"{r['prunable']:.0%}", groups or "none", right, *marks, f"{r['seconds']:.2f}"]


def main(names: list[str]) -> None:
    from zoo import WHOLE

    torch.set_num_threads(1)
    rows, failed = [], {}
    for name, make in WHOLE.items():
        if names and name not in names:
            continue
        try:
            rows.append(examine(name, make))
            print(*row(rows[-1]), sep="  ", flush=True)
        except Exception as error:  # a network that cannot be built or dissected is a row of its own
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            print(name, failed[name], flush=True)
            traceback.print_exc()
    if not names:
        write(rows, failed)


def write(rows: list[dict[str, Any]], failed: dict[str, str]) -> None:
    wrong = [r["name"] for r in rows if max(r["alone"], r["whole"]) > TOLERANCE]
    head = (
        f"{len(rows)} networks dissected without hints, random weights, small widths: **{len(wrong)} wrong cuts**"
        f"{' (' + ', '.join(wrong) + ')' if wrong else ''}, {len(failed)} not dissected, "
        f"{sum(not r['groups'] for r in rows)} with nothing to remove; "
        f"{np.mean([r['prunable'] for r in rows]):.0%} of parameters prunable on average; "
        f"median {np.median([r['seconds'] for r in rows]):.2f} s to dissect and verify."
    )
    columns = ["network", "parameters", "prunable", "groups", "cut - masked", "MACs as counted", "reloads", "seconds"]
    text = f"{head}\n\n{table(columns, map(row, rows))}\n"
    text += "".join(f"\n- {name}: not dissected: {why}" for name, why in failed.items())
    publish("zoo", {"wrong": wrong, "failed": failed, "networks": rows}, text)
    note = (
        "# The zoo\n\nMade by `python benchmarks/zoo.py`. *cut - masked*: largest difference between the cut and the "
        "masked network, relative to the largest output,\nover every hidden group alone and three random plans of all of them. "
        "Streams (units behind a layer norm) cannot be compared with a mask;\nthey are checked by permutation.\n\n"
    )
    (ROOT / "docs" / "zoo.md").write_text(note + text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
