"""How often a certified floor is broken, and what the certificate costs: 500 redraws of the splits on real pruned networks.

    python benchmarks/certificate.py --data FOLDER        # MNIST; default: $RESECT_DATA/mnist; 10 minutes of one core

A 784-512-256-10 network is trained on 30,000 digits, and several hundred pruned and repaired versions of it are judged once
on the other 40,000: the pool. Every draw then takes a search and a certify split of n digits each from the pool, without
replacement, and leaves the rest as fresh data. On the same draws:

- certificate: `ladder` on the search split, `walk` on the certify split, delta .05; the dense network where nothing passes.
- one guess, every rung: the same with a list of one network, and of every network that no other beats in cost and estimate.
- flattered: the certificate after a search on estimates that hide half of all errors, as training data may.
- naive: the cheapest network whose accuracy (or drop) meets the floor on both splits together, which is all the data there is.
- bound each: the cheapest whose own Clopper-Pearson bound on both splits meets the floor, with no correction for how many
  were tried (accuracy floors only).
- oracle: the cheapest that meets the floor on the whole pool.

"broken" counts delivered networks that break the floor on the whole pool, which is the distribution the draws come from; this
is what delta speaks of. "broken on the rest" judges them on the fresh digits only, whose own sampling error (and, for large n,
their dependence on the splits taken out of the same pool) then counts as well.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from publish import data_folder, publish, table
from resect import Floor, Plan, cut, dissect, evaluate, repair, score, trace
from resect.evaluation import Evaluation
from resect.searching.certificate import walk
from resect.searching.evidence import lower_bound
from resect.searching.ladder import RUNGS, ladder
from resect.searching.racing import race
from resect.sources.demo import mlp, train
from resect.sources.huggingface import load_images
from resect.sources.splits import ArrayData, shuffled

TRAINED_ON = 30_000
WIDTHS = (784, 512, 256, 10)
FLOORS = (Floor(accuracy=0.92), Floor(accuracy=0.95), Floor(accuracy=0.96), Floor(drop=0.01), Floor(drop=0.02))
SIZES = (1000, 2000, 5000, 10_000)
RULES = ("certificate", "one guess", "every rung", "flattered", "naive", "bound each")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """Networks judged on one large set of examples.

    correct: (candidates, examples) bool. costs: (candidates,) shares of the dense network's MACs. dense: (examples,) bool.
    """

    correct: np.ndarray
    costs: np.ndarray
    dense: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """One redraw: counts of right answers per candidate on the search split and on the rest, and rows of the splits."""

    n: int
    seed: int
    certify: np.ndarray
    search_right: np.ndarray
    certify_right: np.ndarray
    search_dense: int
    certify_dense: int
    deviation: np.ndarray


def candidates(data: ArrayData, *, count: int, seed: int) -> Pool:
    """Train the network, cut and repair `count` versions of it, and judge all of them on the examples it was not trained on.

    Widths of both hidden layers are drawn log-uniformly and almost independently; scorer and repair are drawn as well, so that
    accuracy is far from monotone in cost.
    """
    trained, pool = shuffled(data, seed, (TRAINED_ON,))
    dense = train(mlp(WIDTHS, seed), trained, epochs=6, batch_size=128, learning_rate=1e-3, seed=seed)
    anatomy = dissect(dense, trained.inputs[:4])
    seen = trace(dense, trained.take(torch.arange(10_000)), anatomy)
    scored = {name: score(seen, name).values for name in ("activation_weight", "firing_rate", "magnitude")}
    whole = Plan.all(anatomy).cost().macs
    rng = np.random.default_rng(seed)
    correct, costs = [], []
    for number in range(count):
        share = np.exp(rng.uniform(np.log(0.02), 0))
        counts = {g.name: max(4, round(g.units * min(1.0, share * np.exp(rng.normal(0, 0.4))))) for g in anatomy.groups}
        scorer = rng.choice(list(scored), p=[0.6, 0.2, 0.2])
        method = rng.choice(["least_squares", "mean", "none"], p=[0.8, 0.1, 0.1])
        plan = Plan.top(anatomy, scored[scorer], counts)
        small = cut(dense, plan, weights=repair(seen, plan, method).weights, verify=False)
        correct.append(evaluate(small, pool).correct)
        costs.append(plan.cost().macs / whole)
        if number % 50 == 0:
            print(f"  {number} of {count} networks judged", file=sys.stderr)
    return Pool(correct=np.array(correct), costs=np.array(costs), dense=evaluate(dense, pool).correct)


def redraw(pool: Pool, n: int, seed: int) -> Draw:
    """A search and a certify split of `n` examples each."""
    rows = np.random.default_rng([seed, n]).permutation(pool.correct.shape[1])
    search, certify = rows[:n], rows[n : 2 * n]
    on_search = pool.correct[:, search]
    lost = pool.dense[search].mean() - on_search.mean(axis=1)
    differ = (on_search != pool.dense[search]).mean(axis=1)
    return Draw(
        n=n,
        seed=seed,
        certify=certify,
        search_right=on_search.sum(axis=1),
        certify_right=pool.correct[:, certify].sum(axis=1),
        search_dense=int(pool.dense[search].sum()),
        certify_dense=int(pool.dense[certify].sum()),
        deviation=np.sqrt(np.maximum(differ - lost**2, 0)),
    )


def certified(pool: Pool, draw: Draw, floor: Floor, *, rungs: int = RUNGS, seen: float = 1.0) -> int | None:
    """The place of the network that the certificate delivers, None for none. seen: share of errors that the search sees."""
    search, dense = (1 - seen * (1 - right / draw.n) for right in (draw.search_right, draw.search_dense))
    frozen = ladder(
        pool.costs,
        search if floor.accuracy is not None else dense - search,
        floor,
        n_search=draw.n,
        n_certify=draw.n,
        deviation=draw.deviation,
        rungs=rungs,
    )
    walked = (_evaluation(pool.correct[place][draw.certify]) for place in frozen)
    index, _ = walk(floor, _evaluation(pool.dense[draw.certify]), walked, seed=draw.seed)
    return None if index is None else frozen[index]


def naive(pool: Pool, draw: Draw, floor: Floor) -> int | None:
    """The cheapest network whose empirical accuracy on both splits meets the floor."""
    threshold = floor.threshold((draw.search_dense + draw.certify_dense) / (2 * draw.n))
    return _cheapest(pool, (draw.search_right + draw.certify_right) / (2 * draw.n) >= threshold - 1e-12)


def bound_each(pool: Pool, draw: Draw, floor: Floor) -> int | None:
    """The cheapest network whose own lower bound on both splits meets the floor."""
    right = draw.search_right + draw.certify_right
    # The bound rises with the count, so the smallest count that meets the floor decides for all networks.
    counts = range(int(2 * draw.n * floor.threshold(0)), 2 * draw.n + 1)
    enough = next((k for k in counts if lower_bound(k, 2 * draw.n, floor.delta) >= floor.threshold(0)), 2 * draw.n + 1)
    return _cheapest(pool, right >= enough)


def study(
    pool: Pool, *, floors: tuple[Floor, ...] = FLOORS, sizes: tuple[int, ...] = SIZES, draws: int = 500
) -> list[dict[str, Any]]:
    """One row per floor, n and rule: how often the floor was broken, and the share of MACs kept.

    Sizes that would leave less than a quarter of the pool as fresh data are left out.
    """
    usable = [n for n in sizes if 2 * n <= 0.75 * pool.correct.shape[1]]
    tallies: dict[tuple[Floor, int, str], list[tuple[bool, bool, bool, float]]] = {}
    for n in usable:
        for seed in range(draws):
            draw = redraw(pool, n, seed)
            for floor in floors:
                for rule, place in _delivered(pool, draw, floor).items():
                    tallies.setdefault((floor, n, rule), []).append(_verdict(pool, draw, floor, place))
        print(f"  {draws} draws of n = {n} done", file=sys.stderr)
    return [
        _row(pool, floor, n, rule, np.array(tally, dtype=np.float64))
        for (floor, n, rule), tally in sorted(
            tallies.items(), key=lambda item: (floors.index(item[0][0]), item[0][1], RULES.index(item[0][2]))
        )
    ]


def _delivered(pool: Pool, draw: Draw, floor: Floor) -> dict[str, int | None]:
    chosen = {
        "certificate": certified(pool, draw, floor),
        "one guess": certified(pool, draw, floor, rungs=1),
        "every rung": certified(pool, draw, floor, rungs=len(pool.costs)),
        "flattered": certified(pool, draw, floor, seen=0.5),
        "naive": naive(pool, draw, floor),
    }
    return chosen if floor.accuracy is None else chosen | {"bound each": bound_each(pool, draw, floor)}


def _verdict(pool: Pool, draw: Draw, floor: Floor, place: int | None) -> tuple[bool, bool, bool, float]:
    """(delivered, broken on the pool, broken on the rest, share of MACs kept)."""
    if place is None:
        return False, False, False, 1.0
    total, right, dense = pool.correct.shape[1], int(pool.correct[place].sum()), int(pool.dense.sum())
    rest = total - 2 * draw.n
    left = right - int(draw.search_right[place] + draw.certify_right[place])
    dense_left = dense - draw.search_dense - draw.certify_dense
    broken = right / total < floor.threshold(dense / total) - 1e-12
    return True, broken, left / rest < floor.threshold(dense_left / rest) - 1e-12, float(pool.costs[place])


def _row(pool: Pool, floor: Floor, n: int, rule: str, tally: np.ndarray) -> dict[str, Any]:
    draws, broken = len(tally), int(tally[:, 1].sum())
    low, high = binomtest(broken, draws).proportion_ci(method="exact")
    return {
        "floor": str(floor),
        "n": n,
        "rule": rule,
        "draws": draws,
        "broken": broken / draws,
        "broken_interval": [round(float(low), 4), round(float(high), 4)],
        "broken_on_the_rest": float(tally[:, 2].mean()),
        "nothing_delivered": float(1 - tally[:, 0].mean()),
        "macs_kept": round(float(tally[:, 3].mean()), 4),
        "macs_spread": round(float(tally[:, 3].std()), 4),
        "oracle_macs": round(oracle(pool, floor), 4),
    }


def races(
    pool: Pool, *, floors: tuple[Floor, ...] = FLOORS, sizes: tuple[int, ...] = SIZES, draws: int = 5, batch: int = 100
) -> list[dict[str, Any]]:
    """One row per floor and n: how much of the search split races take, and how often they contradict all of it."""
    rows = []
    for floor in floors:
        for n in sizes:
            used, contradicted = [], 0
            for seed in range(draws):
                split = np.random.default_rng([seed, n]).permutation(pool.correct.shape[1])[:n]
                dense = pool.dense[split]
                for correct in pool.correct[:, split]:
                    outcomes = zip(np.split(correct, range(batch, n, batch)), np.split(dense, range(batch, n, batch)))
                    found = race(floor, outcomes, n)
                    used.append(found.examples / n)
                    contradicted += found.above != (correct.mean() >= floor.threshold(float(dense.mean())) - 1e-12)
            rows.append(
                {
                    "floor": str(floor),
                    "n": n,
                    "races": len(used),
                    "used": round(float(np.mean(used)), 4),
                    "median": round(float(np.median(used)), 4),
                    "contradicted": int(contradicted),
                }
            )
    return rows


def oracle(pool: Pool, floor: Floor) -> float:
    """The least share of MACs that meets the floor on the whole pool."""
    place = _cheapest(pool, pool.correct.mean(axis=1) >= floor.threshold(float(pool.dense.mean())) - 1e-12)
    return 1.0 if place is None else float(pool.costs[place])


def _cheapest(pool: Pool, meets: np.ndarray) -> int | None:
    places = np.flatnonzero(meets)
    return int(places[pool.costs[places].argmin()]) if len(places) else None


def _evaluation(correct: np.ndarray) -> Evaluation:
    labels = np.zeros(len(correct), dtype=np.int64)
    return Evaluation(correct=correct, labels=labels, predictions=np.where(correct, labels, 1))


def report(rows: list[dict[str, Any]], raced: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The rows as Markdown: how often floors are broken, what the delivered networks cost, and how long races take."""
    cases: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["floor"], row["n"]), {})[row["rule"]] = row
    return "\n".join(
        [
            "# Certificate against naive rules",
            "",
            f"{settings['candidates']} pruned versions of a {settings['network']} network on MNIST (seed {settings['seed']}), "
            f"dense accuracy {settings['dense_accuracy']:.2%} on the pool of {settings['pool']:,} digits; "
            f"{settings['draws']} redraws per row; delta .05. `benchmarks/certificate.py`, which wrote this file, says what "
            "the columns mean.",
            "",
            "## Share of draws in which the delivered network breaks the floor",
            "",
            table(
                ("floor", "n", "certificate", "95 % interval", "on the rest", "naive", "bound each", "nothing passed"),
                [_broken(floor, n, found) for (floor, n), found in cases.items()],
            ),
            "",
            "## Share of MACs kept (mean ± standard deviation over draws, 1 where nothing passed)",
            "",
            table(
                ("floor", "n", "certificate", "one guess", "every rung", "flattered", "naive", "oracle"),
                [_kept(floor, n, found) for (floor, n), found in cases.items()],
            ),
            "",
            "## Races on the search split (level .001, a look every 100 digits; all networks, 5 redraws)",
            "",
            table(
                ("floor", "n", "races", "share of the split seen, mean", "median", "contradicted by the whole split"),
                [
                    (r["floor"], f"{r['n']:,}", r["races"], f"{r['used']:.3f}", f"{r['median']:.3f}", r["contradicted"])
                    for r in raced
                ],
            ),
        ]
    )


def _broken(floor: str, n: int, found: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    main = found["certificate"]
    low, high = main["broken_interval"]
    each = f"{found['bound each']['broken']:.1%}" if "bound each" in found else "-"
    naive_share, nothing = found["naive"]["broken"], main["nothing_delivered"]
    interval, rest = f"{low:.1%} - {high:.1%}", f"{main['broken_on_the_rest']:.1%}"
    return floor, f"{n:,}", f"**{main['broken']:.1%}**", interval, rest, f"{naive_share:.1%}", each, f"{nothing:.1%}"


def _kept(floor: str, n: int, found: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    main = found["certificate"]
    others = [f"{found[rule]['macs_kept']:.3f}" for rule in ("one guess", "every rung", "flattered", "naive")]
    return floor, f"{n:,}", f"**{main['macs_kept']:.3f}** ± {main['macs_spread']:.3f}", *others, f"{main['oracle_macs']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="MNIST folder or hub id; default: $RESECT_DATA/mnist")
    parser.add_argument("--candidates", type=int, default=800)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    first, second, _ = load_images(data_folder("mnist", options.data))
    parts = [part for part in (first, second) if part is not None]
    inputs, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "labels"))
    digits = ArrayData(inputs=inputs, labels=labels, batch_size=2000)
    pool = candidates(digits, count=options.candidates, seed=options.seed)
    settings = {
        "network": "-".join(map(str, WIDTHS)),
        "candidates": options.candidates,
        "pool": pool.correct.shape[1],
        "dense_accuracy": float(pool.dense.mean()),
        "draws": options.draws,
        "seed": options.seed,
    }
    rows, raced = study(pool, draws=options.draws), races(pool)
    publish("certificate", {"settings": settings, "rows": rows, "races": raced}, report(rows, raced, settings))


if __name__ == "__main__":
    main()
