"""Specialists on MNIST and Fashion-MNIST: ten digits, ten small networks, and what else would give a network of their size.

    python benchmarks/specialists.py                       # both data sets, both shapes, 3 seeds
    python benchmarks/specialists.py --quick               # one digit of each shape on MNIST, one seed; nothing is written

Networks 784-512-256-10 and 784-128-10 are trained on 40,000 training examples; 10,000 others are the search and 10,000 the
certify split; the 10,000 test examples are opened at the end. The promise: recall at most half a point below the dense network
and false-positive rate at most half a point above it. Two networks are shown for every class:

- by search: the leanest network prepared that keeps both promises as measured on the search split, without a certificate;
- certified: what `resect.specialize` delivers, 95 % sure; where nothing could be certified, the safest one tried, which counts
  in this row too. The line below each table has the certified ones alone.

`original` is the first program's method (peak above a threshold that rises in steps, no repair, one-vs-rest accuracy), with its
accuracy measured on the search split. Class 3 is compared, with the widths of its network by search: `distilled`
is trained from scratch on the dense network's own score (Adam, 10 epochs), `pruned` is cut for all ten classes by the library's
general elimination and repair at the same share of units; both get their threshold like a specialist. Published after each
network, beside what was published of the others.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

import resect
from publish import RESULTS, data_folder, publish, spread, table
from resect import Floor, Plan, dissect, score, trace
from resect.searching.allocation import uniform
from resect.searching.finishing import finish
from resect.sources import Splits
from resect.sources.demo import mlp, train
from resect.sources.huggingface import load_images
from resect.sources.splits import shuffled
from resect.specializing import Specialists, specialists
from resect.specializing.judging import Answers, Seen, choose_threshold, rates_of
from resect.specializing.question import Question
from resect.specializing.readout import TEMPERATURE, Target
from resect.specializing.results import Specialised
from resect.specializing.specialist import Panel, Specialist

SHAPES = ((784, 512, 256, 10), (784, 128, 10))
DATA = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}
HALF_A_POINT = 0.005
GOAL = Floor(drop=HALF_A_POINT)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One trained network and its splits."""

    data: str
    shape: tuple[int, ...]
    seed: int
    model: nn.Module
    splits: Splits
    test: Seen
    search: Seen


def split(name: str) -> Splits:
    whole, test, names = load_images(data_folder(name))
    assert test is not None
    search, certify, rest = shuffled(whole, 0, (10_000, 10_000))
    return Splits(
        name=name, train=rest, calibrate=rest.take(torch.arange(10_000)), search=search, certify=certify, test=test,
        class_names=names,
    )  # fmt: skip


def specialise(case: Case, classes: list[int] | None, method: str) -> Specialists:
    """Specialists of all classes, or of some, on one trace."""
    seen = trace(case.model, case.splits.calibrate, dissect(case.model, case.splits.calibrate.inputs[:2]))
    parts = (list(case.splits.calibrate), list(case.splits.search), list(case.splits.certify))
    options: dict[str, Any] = {"floor": GOAL, "false_positives": GOAL, "method": method, "minimise": "units", "seed": case.seed}
    if classes is None:
        found, seconds = specialists(case.model, seen, *parts, each_class=True, **options)
        return Specialists(all=found, shared_seconds=seconds)
    every = [specialists(case.model, seen, *parts, classes=[label], **options)[0][0] for label in classes]
    return Specialists(all=tuple(every), shared_seconds=0.0)


def by_search(one: Specialised) -> Specialised:
    """What the search alone would have delivered."""
    model, plan = one.searched
    return replace(one, model=model, plan=plan, cost=plan.cost())


def figures(case: Case, one: Specialised, what: str) -> dict[str, Any]:
    dense, small = rates_of(one.model, case.test)
    return measured(case, one.question.own[0], what, dense, small) | {
        "certified": one.certified,
        "removed": one.removed,
        "kept": one.kept,
        "parameters": one.cost.parameters / one.dense_cost.parameters,
        "seconds": one.seconds,
    }


def measured(case: Case, label: int, what: str, dense: Any, small: Any) -> dict[str, Any]:
    return {
        "data": case.data,
        "shape": "-".join(map(str, case.shape)),
        "seed": case.seed,
        "class": label,
        "what": what,
        "recall": small.recall - dense.recall,
        "false_positives": small.false_positive_rate - dense.false_positive_rate,
        "balanced": small.balanced_accuracy,
        "auroc": small.auroc,
        "precision": small.precision,
        "dense": dense.to_dict(),
        "kept_on_test": small.recall >= dense.recall - HALF_A_POINT
        and small.false_positive_rate <= dense.false_positive_rate + HALF_A_POINT,
    }


def fair(case: Case, model: Specialist) -> Specialist:
    """Its threshold chosen like a specialist's."""
    seen, question = case.search, model.question
    floors = (replace(GOAL, label=1), replace(GOAL, label=0))
    counts = np.bincount(case.splits.certify.labels.numpy(), minlength=10)
    own = int(counts[list(question.own)].sum())
    chosen = choose_threshold(Answers.of(model, seen), seen.dense(question), floors, (own, int(counts.sum()) - own))
    model.threshold.fill_(chosen.threshold)
    return model


def distilled(case: Case, label: int, widths: list[int]) -> Specialist:
    """Trained from scratch to the dense network's softened answer."""
    question, data = Question(own=(label,), classes=10), case.splits.train
    own = Seen.of(case.model, list(data), "train")
    target = torch.from_numpy(Target.of(question, own.logits, own.own(question)).share).float()
    model = Specialist(mlp((784, *widths, 2), case.seed), question, rows=(label, question.others[0]))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    steps = 10 * -(-data.examples // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(case.seed)
    for _ in range(10):
        for rows in torch.randperm(data.examples, generator=draw).split(128):
            loss = nn.functional.binary_cross_entropy_with_logits(model(data.inputs[rows]) / TEMPERATURE, target[rows, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return fair(case, model.eval())


def pruned(case: Case, label: int, share: float) -> Specialist:
    """Cut for all ten classes at the same share of units."""
    seen = trace(case.model, case.splits.calibrate, dissect(case.model, case.splits.calibrate.inputs[:2]))
    scores = score(seen, "reconstruction")
    plan: Plan = uniform(scores, share)
    small, _ = finish(case.model, scores, plan, list(case.splits.calibrate), "least_squares")
    return fair(case, Specialist(small, Question(own=(label,), classes=10)).eval())


def run(case: Case, classes: list[int] | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    made = specialise(case, classes, "repair")
    found, alone = made.all, tuple(map(by_search, made))
    for what, group in (("certified", found), ("by search", alone)):
        rows += [figures(case, one, what) for one in group]
    rows += [figures(case, one, "original") for one in specialise(case, classes, "threshold")]
    for one in alone[:1] if classes is not None else alone[3:4]:
        label = one.question.own[0]
        for what, model in (
            ("distilled", distilled(case, label, list(one.kept.values()))),
            ("pruned", pruned(case, label, 1 - one.removed)),
        ):
            rows.append(measured(case, label, what, *rates_of(model, case.test)) | {"removed": one.removed, "kept": one.kept})
    panel = {}
    if classes is None:
        panel = {
            "data": case.data, "shape": "-".join(map(str, case.shape)), "seed": case.seed,
            "dense": resect.evaluate(case.model, case.splits.test).accuracy,
            "by search": resect.evaluate(Panel([one.model for one in alone]), case.splits.test).accuracy,
            "certified": resect.evaluate(Panel([one.model for one in found]), case.splits.test).accuracy,
            "overlap": Specialists(all=alone, shared_seconds=0.0).overlap().to_dict(),
        }  # fmt: skip
    return rows, panel


def cost_ratio(case: Case) -> dict[str, float]:
    """CPU seconds of ten specialists on one trace, beside ten separate runs (one is run, and counted ten times)."""
    options = {"floor": GOAL, "certify": case.splits.certify, "minimise": "units", "seed": case.seed}
    start = time.process_time()
    resect.specialize(case.model, case.splits.calibrate, case.splits.search, each_class=True, **options)
    together = time.process_time() - start
    start = time.process_time()
    general = resect.prune(
        case.model, case.splits.calibrate, case.splits.search, certify=case.splits.certify, floor=GOAL, minimise="units"
    )
    return {"ten specialists": together, "one prune()": time.process_time() - start, "general removed": 1 - general.plan.share}


def report(rows: list[dict[str, Any]], panels: list[dict[str, Any]], costs: dict[str, float]) -> str:
    text = ["# Specialists: one network for each class\n", (__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    columns = [
        "network", "hidden neurons removed, %: mean", "least", "most", "certified", "kept on test", "recall, points to dense",
        "false positives, points to dense", "balanced accuracy, %", "AUROC", "precision, %",
    ]  # fmt: skip
    for data in dict.fromkeys(row["data"] for row in rows):
        for shape in dict.fromkeys(row["shape"] for row in rows):
            mine = [row for row in rows if row["data"] == data and row["shape"] == shape]
            text += [f"## {DATA[data]}, {shape}\n", table(columns, lines(mine)), ""]
            text += [certified_line(mine), ""]
            text += [panel_line(p) for p in panels if p["data"] == data and p["shape"] == shape] + [""]
    if costs:
        text.append(
            f"Ten specialists of a 784-512-256-10 network took {costs['ten specialists']:.0f} CPU seconds on one trace; "
            f"one `prune()` with the same promise on accuracy {costs['one prune()']:.0f} (it removed "
            f"{100 * costs['general removed']:.0f} % of the neurons): "
            f"{costs['ten specialists'] / (10 * costs['one prune()']):.2f} of ten separate runs."
        )
    return "\n".join(text)


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    found = []
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        by_seed = [np.mean([r["removed"] for r in mine if r["seed"] == s]) for s in dict.fromkeys(r["seed"] for r in mine)]
        removed = [row["removed"] for row in mine]
        certified = f"{sum(row['certified'] for row in mine)} of {len(mine)}" if "certified" in mine[0] else ""
        found.append(
            [
                what, spread(by_seed, 1, 100), f"{100 * min(removed):.1f}", f"{100 * max(removed):.1f}",
                certified if what in ("certified", "original") else "",
                f"{sum(row['kept_on_test'] for row in mine)} of {len(mine)}",
                *(spread([row[key] for row in mine], 2, 100) for key in ("recall", "false_positives", "balanced")),
                spread([row["auroc"] for row in mine], 4),
                spread([row["precision"] for row in mine], 1, 100),
            ]
        )  # fmt: skip
    return found


def certified_line(rows: list[dict[str, Any]]) -> str:
    """What was removed from the networks that were certified, without the others."""
    delivered = [row for row in rows if row["what"] == "certified"]
    alone = [row for row in delivered if row["certified"]]
    removed = [row["removed"] for row in alone] or [0.0]
    return (
        f"Certified alone: {len(alone)} of {len(delivered)}, {100 * np.mean(removed):.1f} % removed on average, "
        f"{100 * min(removed):.1f} to {100 * max(removed):.1f} ({sum(share == 0 for share in removed)} uncut), "
        f"{sum(row['kept_on_test'] for row in alone)} kept on test."
    )


def panel_line(panel: dict[str, Any]) -> str:
    users = panel["overlap"]["units_by_users"]
    return (
        f"Seed {panel['seed']}: dense {100 * panel['dense']:.2f} % of test, panel by search {100 * panel['by search']:.2f} %, "
        f"panel certified {100 * panel['certified']:.2f} %; neurons by how many specialists keep them (none to all): "
        f"{', '.join(map(str, users))}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", default="mnist,fashion_mnist", help="folders of $RESECT_DATA, with commas")
    parser.add_argument("--quick", action="store_true", help="one digit of each shape, one seed, 3 epochs; nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, panels, costs = ([], [], {}) if arguments.quick else earlier()
    for name in ["mnist"] if arguments.quick else arguments.data.split(","):
        splits = split(name)
        for shape in SHAPES:
            for seed in range(1 if arguments.quick else arguments.seeds):
                model = train(mlp(shape, seed), splits.train, seed=seed, epochs=3 if arguments.quick else 10, batch_size=128)
                seen = {part: Seen.of(model, list(getattr(splits, part)), part) for part in ("test", "search")}
                case = Case(data=name, shape=shape, seed=seed, model=model, splits=splits, **seen)
                more, panel = run(case, [3] if arguments.quick else None)
                rows, panels = renewed(rows, more), renewed(panels, [panel] if panel else [])
                for row in lines(more):
                    print(name, shape, seed, *row, flush=True)
                if seed == 0 and len(shape) == 4 and name == "mnist" and not arguments.quick:
                    costs = cost_ratio(case)
                if not arguments.quick:
                    publish("specialists", {"runs": rows, "panels": panels, "cost": costs}, report(rows, panels, costs))
    print(report(rows, panels, costs))


def earlier() -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, float]]:
    """What was published."""
    path = RESULTS / "specialists.json"
    published = json.loads(path.read_text()) if path.exists() else {"runs": [], "panels": [], "cost": {}}
    return published["runs"], published["panels"], published["cost"]


def renewed(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Old rows and new ones; networks that run again take the place of their rows."""
    again = {(row["data"], row["shape"], row["seed"]) for row in new}
    return [row for row in old if (row["data"], row["shape"], row["seed"]) not in again] + new


if __name__ == "__main__":
    main()
