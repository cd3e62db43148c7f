"""Which scorer finds the units that can go: every scorer, on five networks, before and after one recovery.

    python benchmarks/scorers.py                                        # part `before`, everything: about an hour
    python benchmarks/scorers.py --parts iterative --networks mnist,stories
    python benchmarks/scorers.py --parts after,scratch --networks resnet20 --removed 0.5 --scorers spectral,isolation,magnitude
    python benchmarks/scorers.py --quick                                # one seed, tiny data, one size; writes nothing

Rows that were made before stay in benchmarks/results/scorers.json; the same row is replaced, and docs/scorers.md made anew.

Shares removed are of the parameters that belong to units. Every group keeps the same share of its units, so that at one size
all scorers leave the same widths and only the choice of units differs. Parts:

- before: one trace and one cut, without repair and with least squares from the trace; no gradient step.
- iterative: `resect.shrink` in 1 and in 5 rounds, with its final repair (reader by reader).
- after: the networks of `before`, then `resect.recover` (cross-entropy and distillation, swept learning rate, fixed steps).
- scratch: fresh weights in the same widths, the same steps and data, no dense network to learn from.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from cases import CASES, Case, fresh
from publish import RESULTS, publish, spread, table
from resect import SCORERS, Budget, Plan, Scores, cut, dissect, recover, repair, score, scoring, shrink, trace
from resect.searching.allocation import against
from resect.searching.landing import by_share

PARTS = ("before", "iterative", "after", "scratch")
REMOVED = (0.3, 0.5, 0.7)
REPAIRS = ("none", "least_squares")
ROUNDS = (1, 5)
KEY = ("network", "part", "seed", "scorer", "removed", "repair", "rounds")
NAMES = (
    "spectral", "spectral(mode=eig)", "spectral(mode=jl)", "spectral(mode=proxy)", "spectral(spade)",
    "spectral(direction=contraction)", "isolation", "input_only", "magnitude", "activation_weight", "taylor", "firing_rate",
    "fluctuation", "reconstruction", "random",
)  # fmt: skip
DOCS = Path(__file__).parent.parent / "docs" / "scorers.md"
Row = dict[str, Any]


def named(name: str) -> Any:
    """A scorer by its name in the registry, or spectral with a preset or options: spectral(spade), spectral(mode=jl)."""
    family, _, inside = name.partition("(")
    if not inside:
        return name
    inside = inside.rstrip(")")
    if "=" not in inside:
        return scoring.PRESETS[inside]
    options = dict(option.split("=") for option in inside.split(","))
    return getattr(scoring, family.capitalize())(**{n: int(v) if v.isdigit() else v for n, v in options.items()})


def scored(case: Case, names: list[str], seed: int) -> Iterator[tuple[str, Scores, float]]:
    """Scores of every scorer from one trace, and the CPU seconds of each."""
    scorers = {name: named(name) for name in names}
    wanted = getattr(scoring, "needs", lambda *some: {"gradients": "taylor" in some})(*scorers.values())
    gradients = wanted.pop("gradients", False)
    plain = case.answering is not None
    seen = trace(case.model, case.calib, case.anatomy, gradients=gradients and not plain, **wanted, **case.trace)
    for name, function in scorers.items():
        start = time.process_time()
        if name == "taylor" and case.answering is not None:
            scores = replace(score(seen, "random"), scorer="taylor", values=_by_last_token(case))
        else:
            scores = score(seen, function, seed=seed)
        yield name, scores, time.process_time() - start


def _by_last_token(case: Case) -> dict[str, np.ndarray]:
    """`taylor` of a language model's loss on single next tokens."""
    assert case.answering is not None
    model, data = case.answering
    anatomy = dissect(model, {"input_ids": data[0]["input_ids"]})
    values = score(trace(model, data, anatomy, grams=False, gradients=True), "taylor", reduce="mean").values
    return {group.name: values[f"lm.{group.name}"] for group in case.anatomy.groups}


def budget(case: Case, removed: float) -> Budget:
    return Budget(parameters=1 - removed * case.anatomy.prunable)


def plan_of(case: Case, scores: Scores, removed: float) -> Plan:
    return by_share(scores, against(scores.anatomy, budget(case, removed)), 1.0)


def one_seed(network: str, seed: int, arguments: argparse.Namespace) -> Iterator[Row]:
    """Every row of one network and seed."""
    case = CASES[network][1](seed, arguments.quick)
    base = {"network": network, "seed": seed, "rounds": 1}
    yield {
        **base,
        "part": "dense",
        "scorer": "",
        "removed": 0.0,
        "repair": "",
        "value": case.judge(case.model),
        "test": case.test,
    }
    if {"before", "after", "scratch"} & set(arguments.parts):
        for name, scores, seconds in scored(case, arguments.scorers, seed):
            for removed in arguments.removed:
                plan = plan_of(case, scores, removed)
                point = {**base, "scorer": name, "removed": removed, "parameters": plan.cost().parameters, "seconds": seconds}
                if "scratch" in arguments.parts and name == arguments.scorers[0]:
                    small = cut(case.model, plan, verify=False)
                    yield from recovered(case, fresh(small, seed), {**point, "part": "scratch", "scorer": "", "repair": ""})
                for method in arguments.repairs:
                    small = cut(case.model, plan, weights=repair(scores.trace, plan, method).weights, verify=False)
                    row = {**point, "repair": method, "value": case.judge(small)}
                    if "before" in arguments.parts:
                        yield {**row, "part": "before"}
                    if "after" in arguments.parts:
                        yield from recovered(case, small, {**row, "part": "after"})
    if "iterative" in arguments.parts:
        yield from iterative(case, base, arguments)


def recovered(case: Case, small: torch.nn.Module, row: Row) -> Iterator[Row]:
    start = time.process_time()
    dense = None if row["part"] == "scratch" else case.model
    result = recover(dense, small, case.train, case.recovery, val=case.val)
    yield {
        **row,
        "value": case.judge(result.model),
        "steps": result.steps,
        "learning_rate": result.learning_rate,
        "diverged": result.diverged,
        "seconds": time.process_time() - start,
    }


def iterative(case: Case, base: Row, arguments: argparse.Namespace) -> Iterator[Row]:
    names = [name for name in arguments.scorers if not (name == "taylor" and case.answering is not None)]
    for name in names:
        for removed in arguments.removed:
            for method in arguments.repairs:
                for rounds in ROUNDS:
                    start = time.process_time()
                    options = {"rounds": rounds, "scorer": named(name), "repair": method, "allocation": "uniform"}
                    small = shrink(case.model, case.calib, to=budget(case, removed), seed=base["seed"], **case.trace, **options)
                    row = {**base, "part": "iterative", "scorer": name, "removed": removed, "repair": method, "rounds": rounds}
                    seconds = time.process_time() - start
                    parameters = small.cost.parameters
                    yield {**row, "value": case.judge(small.model), "parameters": parameters, "seconds": seconds}


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows, new ones in the place of old ones with the same key."""
    rows = {tuple(row[name] for name in KEY): row for row in (*old, *new)}
    return [rows[key] for key in sorted(rows)]


def report(rows: list[Row]) -> str:
    head = __doc__.partition("\n\n")[2] if __doc__ else ""
    text = ["# Scorers compared\n", "Made by benchmarks/scorers.py. Mean ± standard deviation over seeds.\n"]
    text.append(head[head.index("Shares removed") :].strip() + "\n")
    text.append(_verdict(rows))
    for network, (title, _) in CASES.items():
        mine = [row for row in rows if row["network"] == network]
        if mine:
            text += [f"\n## {title}\n", _caption(mine, network), *_tables(mine, network)]
    return "\n".join(text)


def _caption(rows: list[Row], network: str) -> str:
    dense = [row for row in rows if row["part"] == "dense"]
    steps = sorted({row["steps"] for row in rows if row["part"] == "after"})
    after = f" Recovery: {', '.join(map(str, steps))} steps." if steps else ""
    return f"Dense: {_shown([row['value'] for row in dense], network)} ({dense[0]['test']}, {len(dense)} seeds).{after}\n"


def _tables(rows: list[Row], network: str) -> Iterator[str]:
    """One table per part: scorers down, sizes and treatments across."""
    scratch = {row["removed"]: [] for row in rows if row["part"] == "scratch"}
    for row in rows:
        if row["part"] == "scratch":
            scratch[row["removed"]].append(row["value"])
    for part, title in (("before", "One cut"), ("iterative", "In rounds"), ("after", "Recovered")):
        found: dict[tuple[Any, ...], list[float]] = {}
        for row in rows:
            if row["part"] == part:
                found.setdefault((row["scorer"], row["removed"], row["repair"], row["rounds"]), []).append(row["value"])
        columns = sorted({key[1:] for key in found}, key=lambda c: (c[0], REPAIRS.index(c[1]), c[2]))
        names = sorted({key[0] for key in found}, key=lambda name: NAMES.index(name) if name in NAMES else len(NAMES))
        lines = [[n, *(_shown(found[n, *c], network) if (n, *c) in found else "" for c in columns)] for n in names]
        if part == "after" and scratch:
            lines.append(["from scratch", *(_shown(scratch[c[0]], network) if c[0] in scratch else "" for c in columns)])
        if lines:
            yield f"{title}:\n\n" + table(["scorer", *(_column(part, *column) for column in columns)], lines) + "\n"


def _column(part: str, removed: float, method: str, rounds: int) -> str:
    times = f", {rounds} round{'s' if rounds > 1 else ''}" if part == "iterative" else ""
    return f"-{100 * removed:.0f} %{', repaired' if method != 'none' else ''}{times}"


def _shown(values: list[float], network: str) -> str:
    return spread(values, 2) if network == "stories" else spread(values, 1, 100)


def _verdict(rows: list[Row]) -> str:
    """Does comparing the two graphs beat not comparing them: pairs of the same network, size, seed and treatment."""
    values = {tuple(row[name] for name in KEY): row["value"] * (-1 if row["network"] == "stories" else 1) for row in rows}
    lines = []
    for part in ("before", "after", "iterative"):
        for control in ("isolation", "input_only", "magnitude", "reconstruction", "random"):
            won, lost = Counter[str](), Counter[str]()
            for key, value in values.items():
                other = values.get((*key[:3], control, *key[4:]))
                if key[1] == part and key[3] == "spectral" and other is not None:
                    won[key[0]] += value > other
                    lost[key[0]] += value < other
            if won:
                better, worse = won.total(), lost.total()
                p = binomtest(better, max(better + worse, 1)).pvalue
                each = [f"{won[name]} / {lost[name]}" if name in won else "" for name in CASES]
                lines.append([part, control, better, worse, f"{p:.2g}", *each])
    if not lines:
        return ""
    columns = ["part", "spectral against", "better", "worse", "sign test, p", *CASES]
    head = "## Does comparing the two graphs beat not comparing them?\n\nPairs of the same network, size, seed and treatment; "
    caveat = "those of one network share its data, so p is a guide.\n\n"
    return head + caveat + table(columns, lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name in NAMES if name.partition("(")[0] in SCORERS]
    parser.add_argument("--networks", default=",".join(CASES))
    parser.add_argument("--scorers", default=",".join(known))
    parser.add_argument("--parts", default="before", help=", ".join(PARTS))
    parser.add_argument("--removed", default=",".join(map(str, REMOVED)))
    parser.add_argument("--repairs", default=",".join(REPAIRS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one seed, tiny data, half of the parameters; writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.scorers = re.split(r",(?![^(]*\))", arguments.scorers)
    arguments.parts, arguments.repairs = arguments.parts.split(","), arguments.repairs.split(",")
    arguments.removed = [0.5] if arguments.quick else [float(share) for share in arguments.removed.split(",")]
    file = RESULTS / "scorers.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() and not arguments.quick else []
    for network in arguments.networks.split(","):
        for seed in range(arguments.first_seed, arguments.first_seed + (1 if arguments.quick else arguments.seeds)):
            start, fresh_rows = time.process_time(), []
            for row in one_seed(network, seed, arguments):
                fresh_rows.append(row)
                print({name: row[name] for name in (*KEY, "value")}, flush=True)
            rows = merged(rows, fresh_rows)
            print(f"{network}, seed {seed}: {time.process_time() - start:.0f} CPU seconds", flush=True)
            if not arguments.quick:
                publish("scorers", {"rows": rows}, report(rows))
                DOCS.write_text(report(rows) + "\n", encoding="utf-8")
    if arguments.quick:
        print(report(rows))


if __name__ == "__main__":
    main()
