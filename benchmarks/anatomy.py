"""Side by side with torch-pruning: the same networks, the same machine, one judge.

    python benchmarks/anatomy.py [networks...]        (needs: pip install 'resect[compare,hf]')

Every network of the zoo is pruned by half of everything, at random, by resect and by torch-pruning, each in its own forked
process with a time limit. `peers` asks the tools, `judging` says what came out. Writes results/anatomy.json and
docs/side-by-side.md. With names only those networks are run again, and their rows replaced.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import resect
from judging import Example, judged, told_of
from peers import by_resect, by_torch_pruning, hinted
from publish import RESULTS, publish, table
from resect.anatomy.checking import outputs

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
LIMIT = 20
SLOW = f"not done in {LIMIT} s"


# the run ------------------------------------------------------------------------------------------------------------------


def one(name: str, tool: str) -> dict[str, Any]:
    """One tool on one network, in this process."""
    import hard_cases  # noqa: F401
    from zoo import WHOLE

    _quiet()
    model, given = WHOLE[name]()
    example: Example = _example(given)
    outputs(model, example)  # what is imported or cached by the first forward pass is charged to neither
    dense = copy.deepcopy(model)
    which, _, way = tool.partition(": ")
    if which == "resect":
        return judged(dense, lambda: by_resect(model, given), example)
    if way != "plain" and not hinted(model, way):
        return {"verdict": "none apply"}
    return judged(dense, lambda: by_torch_pruning(model, example, way), example)


def _quiet() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.backends.mha.set_fastpath_enabled(False)


def _example(given: Any) -> Example:
    if isinstance(given, Mapping):
        return (), dict(given)
    return (given if isinstance(given, tuple) else (given,)), {}


def apart(name: str, tool: str) -> dict[str, Any]:
    """The same in a forked process with a time limit."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def child() -> None:
        try:
            there.send(one(name, tool))
        except BaseException as error:
            there.send({"verdict": "fails", "why": told_of("network", error)})

    process = context.Process(target=child)
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(LIMIT) else {"verdict": "fails", "why": SLOW, "seconds": LIMIT}
    except EOFError:
        return {"verdict": "fails", "why": "the process died"}
    finally:
        process.kill()
        process.join()


HINTS = {
    "heads": "head counts given, whole heads pruned",
    "head dims": "head counts given, dimensions of heads pruned",
    "rules": "a pruning rule for nn.RMSNorm given",
    "attention ignored": "query, key and value layers ignored",
}


def compared(name: str) -> dict[str, Any]:
    """All runs on one network, until torch-pruning is right.

    Hints about heads are read once the groups are built: they cannot help where that does not end, and are left out there.
    """
    found = {"network": name, "resect": apart(name, "resect"), "plain": apart(name, "torch-pruning: plain")}
    tried: dict[str, Any] = {"": found["plain"]}
    for way in ("attention ignored",) if found["plain"].get("why") == SLOW else HINTS:
        if any(r["verdict"] == "right" for r in tried.values()):
            break
        result = apart(name, f"torch-pruning: {way}")
        if result["verdict"] != "none apply":
            tried[way] = result
    best = min(tried, key=lambda way: VERDICTS.index(tried[way]["verdict"]))
    return {**found, "tried": tried, "hints": {**tried[best], "hint": best}}


def warm() -> None:
    """Both tools once, so that no network is charged for what they import."""
    _quiet()
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    image = torch.randn(1, 3, 4, 4)
    by_resect(copy.deepcopy(net), image)
    by_torch_pruning(net, ((image,), {}), "plain")


# what is written ----------------------------------------------------------------------------------------------------------

VERDICTS = ("right", "not judged", "nothing", "fails", "wrong")
PAGE = """# Side by side

Made by `python benchmarks/anatomy.py`: every network of the zoo and three more (`hard_cases.py`), random weights, small
widths, same machine, each tool in its own process with {limit} seconds. Both remove half of every width they find,
at random; nothing is fine-tuned.

**The question** is only whether the network that comes out is the dense network without those channels, or another function.

How it is judged, the same for both:

- The elements of all weights are replaced by their positions before the cut. So the cut network itself tells which elements
  stayed and where they went, and the judge needs no word from the tool.
- *right*: the cut network gives what the dense network gives when every removed element is zero, to 1e-4 of the largest
  output, on the example that the tool saw and on a shuffled one. Norms of the dense network see only the channels
  that stay (removing a channel from a norm's mean is what any tool does), and where the dimensions inside a head are cut, a
  softmax scale that follows or does not follow their number is accepted either way.
- *wrong*: it runs, its outputs have the right shape, and its numbers are others. *fails*: the tool or the pruned network
  raises, or is not done in time. *nothing*: no parameter was removed. *not judged*: see the table.
- Weights are scaled to unit gain first. With the tiny weights of an untrained transformer attention is uniform, and mixed-up
  heads pass for right.

What each tool was told:

- resect: `dissect(model, example)`, a random half plan over all groups, streams included, `cut`. No hints.
- torch-pruning, no hints: `BasePruner(pruning_ratio=0.5, importance=RandomImportance())`, ignoring the layers that make the
  outputs, found by walking back from the outputs (more than its documentation asks for).
- torch-pruning with hints: its best result over no hints, `num_heads` for every attention module whose parts carry usual
  names, pruning whole heads, the same pruning dimensions of heads (the head counts and widths that the module holds are
  set afterwards, as its examples do by hand), a pruning rule for `nn.RMSNorm`, and ignoring the query, key and value layers.
  The hint that made it right is in brackets. Hints written for one architecture by someone who knows it may do better.

Looked at by hand:

- torch-pruning's wrong networks. BERT and its relatives, ViT, BART, CLIP and the like: channels of query, key and value are
  drawn across heads (in BERT 4, 5, 2 and 5 of 8 stay; uneven in all 14), and the reshape to heads that follows mixes them.
  `resnet_padded`: channels 2, 3, 4 and 6 leave on both sides of a shortcut that shifts channels by 4. `channel_shuffle`,
  `shufflenet_v1`: the same positions leave before and after the shuffle. `funnel` (FNet): channels leave from the axis of a
  Fourier transform.
- torch-pruning's failures in `attention_rotary`, `grouped_fed_by_concat`, `grouped_transposed`, `state_space`, `weight_norm`,
  `gmlp`, `lstm_tagger`, `in_place`, `cspnet_chunk` and `wavenet` come again without this script, with `MagnitudeImportance`.
  `llama` without hints was given ten minutes instead of {limit} seconds and did not end.
- The judge: in right cuts of eleven networks the columns of one weight were swapped, one weight at a time; it called all 112
  of these wrong, the smallest difference 3e-3. Norms are recognised by their class (LayerNorm, RMSNorm, GroupNorm, GRN).

Percentages are the parameters removed: a right answer that leaves attention alone removes less. Seconds are until the pruned
network exists, for resect with its verification, for both with some bookkeeping of this script; megabytes are the growth of
the peak memory of the process. What did not end is in neither.

"""


def cell(r: dict[str, Any]) -> str:
    """A verdict with the share of parameters removed."""
    share = f" {r['removed']:.0%}" if r["verdict"] == "right" else ""
    word = f"**{r['verdict']}**" if r["verdict"] == "wrong" else r["verdict"]
    return word + share + (f" ({r['hint']})" if r.get("hint") and r["verdict"] == "right" else "")


def row(r: dict[str, Any]) -> list[str]:
    """One network of the table."""
    figures = [f"{r[k].get('seconds', 0):.2f}" for k in ("resect", "plain")]
    memory = [f"{r[k]['megabytes']:.0f}" if "megabytes" in r[k] else "-" for k in ("resect", "plain")]
    whys = [(k, r[k]) for k in ("resect", "plain") if r[k]["verdict"] in ("fails", "not judged", "wrong")]
    why = "; ".join(f"{'torch-pruning' if k == 'plain' else k}: {reason(v)}" for k, v in whys)
    return [r["network"], cell(r["resect"]), cell(r["plain"]), cell(r["hints"]), *figures, *memory, why]


def reason(r: dict[str, Any]) -> str:
    """Why a run is not right, safe inside a table."""
    text = f"differs by {r['gap']:.0e}" if "gap" in r else r.get("why", "")
    return text.replace("|", "/").replace("\n", " ")[:110]


def totals(rows: list[dict[str, Any]]) -> str:
    """The table on top."""
    tools = {"resect, no hints": "resect", "torch-pruning, no hints": "plain", "torch-pruning, best of all hints": "hints"}
    lines = []
    for label, key in tools.items():
        counts = Counter(r[key]["verdict"] for r in rows)
        right = [r[key] for r in rows if r[key]["verdict"] == "right"]
        ended = [r[key] for r in rows if "megabytes" in r[key]]
        lines.append(
            [
                label,
                *(counts[v] for v in ("right", "wrong", "fails", "nothing", "not judged")),
                f"{np.mean([x['removed'] for x in right]):.0%}",
                f"{np.median([x['seconds'] for x in ended]):.2f} / {max(x['seconds'] for x in ended):.1f}",
                f"{np.median([x['megabytes'] for x in ended]):.0f} / {max(x['megabytes'] for x in ended):.0f}",
            ]
        )
    columns = [
        "",
        "right",
        "silently wrong",
        "fails",
        "nothing removed",
        "not judged",
        "removed where right",
        "seconds, median / largest",
        "MB, median / largest",
    ]
    return table(columns, lines)


def more(rows: list[dict[str, Any]]) -> str:
    """Where torch-pruning, right with or without hints, removes more than resect."""
    ahead = [
        f"{r['network']} ({r['hints']['removed']:.0%}, resect {r['resect'].get('removed', 0):.0%})"
        for r in rows
        if r["hints"]["verdict"] == "right" and r["hints"]["removed"] > r["resect"].get("removed", 0) + 0.02
    ]
    return f"torch-pruning is right and removes more than resect in {len(ahead)}: {', '.join(ahead) or 'none'}.\n\n"


def write(rows: list[dict[str, Any]], again: list[str]) -> None:
    """The JSON, and the page made from it; again: the networks whose rows are of a later run."""
    made = {name: version(name) for name in ("torch-pruning", "transformers")}
    columns = ["network", "resect", "torch-pruning", "torch-pruning, hints", "s", "s (tp)", "MB", "MB (tp)", "why not right"]
    text = f"{totals(rows)}\n\n{more(rows)}{table(columns, map(row, rows))}\n"
    publish("anatomy", {"limit_s": LIMIT, "versions": made, "again": again, "networks": rows}, text)
    with_versions = f"resect {resect.__version__}, torch-pruning {made['torch-pruning']}, torch {torch.__version__}, "
    with_versions += f"transformers {made['transformers']}; {len(rows)} networks, one thread"
    with_versions += f" ({', '.join(again)} run again by themselves).\n\n" if again else ", one run.\n\n"
    page = PAGE.format(limit=LIMIT) + with_versions + text
    (ROOT / "docs" / "side-by-side.md").write_text(page.rstrip() + "\n", encoding="utf-8")


def earlier() -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The rows that are published already, by network, and the names of those that are later than the whole run."""
    path = RESULTS / "anatomy.json"
    if not path.exists():
        return {}, []
    published = json.loads(path.read_text(encoding="utf-8"))
    return {r["network"]: r for r in published["networks"]}, published.get("again", [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks (default: all)")
    names = parser.parse_args().names
    if any(find_spec(package) is None for package in ("torch_pruning", "transformers")):
        print("skipped: torch-pruning or transformers is not installed (pip install 'resect[compare,hf]')")
        return
    import hard_cases  # noqa: F401 (registers the networks that only this comparison has)
    from zoo import WHOLE

    torch.set_num_threads(1)
    warm()
    rows, again = earlier() if names else ({}, [])
    for name in names or WHOLE:
        rows[name] = compared(name)
        print(name, *(f"{k}: {summary(rows[name][k])}" for k in ("resect", "plain", "hints")), sep=" | ", flush=True)
    write([rows[name] for name in WHOLE if name in rows], list(dict.fromkeys([*again, *names])))


def summary(r: dict[str, Any]) -> str:
    """One run in a line of the terminal."""
    numbers = f"{r.get('removed', 0):.0%} {r.get('seconds', 0):.2f} s {r.get('megabytes', 0):.0f} MB"
    gaps = " ".join(f"{way} {gap:.0e}" for way, gap in r.get("gaps", {}).items())
    effect = f"effect {r['effect']:.0e}" if "effect" in r else ""
    return " ".join(part for part in (r["verdict"], r.get("hint", ""), numbers, r.get("why", ""), gaps, effect) if part)


if __name__ == "__main__":
    main()
