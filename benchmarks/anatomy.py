"""Side by side with torch-pruning: the same networks, the same machine, one judge.

    python benchmarks/anatomy.py [networks...]        (needs: pip install 'resect[compare,hf]')

With names only those networks are run again, and their rows replaced.

Every network of the zoo is pruned by half of everything, at random, by resect and by torch-pruning, each in its own forked
process with a time limit, and `judging` says what came out. Writes results/anatomy.json and docs/side-by-side.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import resect
from judging import Cut, Example, fill, judged, number, read, told_of
from publish import RESULTS, publish, table
from resect.anatomy.checking import outputs

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
LIMIT = 20
SLOW = f"not done in {LIMIT} s"


# the two tools ------------------------------------------------------------------------------------------------------------


def by_resect(model: nn.Module, given: Any) -> Cut:
    """Dissect (which verifies) and cut by a random half plan over all groups; no hints."""
    anatomy = resect.dissect(model, given)
    plan = resect.Plan.random(anatomy, ratio=0.5)
    small = resect.cut(model, plan, verify=False)
    numbers = copy.deepcopy(model)
    number(numbers)
    return Cut(small=small, kept=read(resect.cut(numbers, plan, verify=False), model))


def output_layers(model: nn.Module, example: Example) -> list[Any]:
    """The layers and bare parameters that make what the network returns: those met first on the way back from its outputs."""
    made: dict[Any, nn.Module] = {}

    def note(module: nn.Module, _: Any, result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                made[tensor.grad_fn] = module

    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, kinds):
                hooks.callback(module.register_forward_hook(note).remove)
        result = model(*example[0], **example[1])
    stack = [t.grad_fn for t in tree_leaves(_plain(result)) if isinstance(t, Tensor) and t.grad_fn is not None]
    seen, found = set(stack), list[Any]()
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if node in made:
            found.append(made[node])
        elif variable is not None:
            found += [variable, *(m for m in model.modules() if isinstance(m, kinds) and variable in set(m.parameters(False)))]
        else:
            product = any(word in node.name() for word in ("mmBackward", "MmBackward", "Bmm", "Convolution", "ScaledDot"))
            fresh = {n for n, _ in node.next_functions if n is not None and n not in seen}
            stack += [n for n in fresh if not product or "AccumulateGrad" in n.name() or n.name() == "TBackward0"]
            seen |= fresh
    return list(dict.fromkeys(found))


def _plain(result: Any) -> Any:
    if isinstance(result, Mapping):
        return {k: v for k, v in result.items() if "cache" not in type(v).__name__.lower()}
    return result


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention module: its query, key and value layers (or the fused one), and its heads (0 where nothing tells)."""

    module: nn.Module
    layers: tuple[nn.Module, ...]
    heads: int
    kv: int


_QUERY, _KEY = ("q", "query", "q_proj", "q_lin", "query_proj"), ("k", "key", "k_proj", "k_lin", "key_proj")
_VALUE = ("v", "value", "v_proj", "v_lin", "value_proj")
_FUSED = ("qkv", "query_key_value", "qkv_proj", "Wqkv", "c_attn", "in_proj")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_KV = ("num_key_value_heads", "num_kv_heads", "kv")
_SIZE = ("head_dim", "attention_head_size", "head_size", "size", "key_value_proj_dim")
_WIDTH = ("all_head_size", "inner_dim", "embed_dim", "split_size", "hidden_size", "dim", "n_embd", "d_model")


def attentions(model: nn.Module) -> list[Attention]:
    """The attention modules as their names tell them, with the head counts their attributes or configurations give."""
    found = []
    for module in model.modules():
        child = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
        parts = [next((child[n] for n in names if n in child), None) for names in (_QUERY, _KEY, _VALUE)]
        fused = next((child[n] for n in _FUSED if n in child), None)
        heads = next((getattr(module, n) for n in _HEADS if isinstance(getattr(module, n, None), int)), None)
        heads = heads or getattr(getattr(module, "config", None), "num_attention_heads", None) or 0
        if isinstance(module, nn.MultiheadAttention):
            found.append(Attention(module=module, layers=(module,), heads=module.num_heads, kv=module.num_heads))
        elif all(p is not None for p in parts):
            kv = parts[1].out_features * heads // parts[0].out_features  # type: ignore[union-attr]
            found.append(Attention(module=module, layers=tuple(parts), heads=heads, kv=kv))  # type: ignore[arg-type]
        elif fused is not None:
            found.append(Attention(module=module, layers=(fused,), heads=heads, kv=heads))
        elif parts[0] is not None and "kv" in child:
            found.append(Attention(module=module, layers=(parts[0], child["kv"]), heads=0, kv=0))
    return found


def follow(attention: Attention, heads: int, width: int) -> None:
    """Set the attributes of an attention module after pruning, as the examples of torch-pruning do by hand."""
    module, layers = attention.module, attention.layers
    now = layers[0].out_features // (3 if len(layers) == 1 else 1)
    size = now // heads
    kv = layers[1].out_features // size if len(layers) == 3 else heads
    values = {**dict.fromkeys(_HEADS, heads), **dict.fromkeys(_KV, kv), **dict.fromkeys(_SIZE, size)}
    values |= {"num_key_value_groups": max(heads // max(kv, 1), 1)}
    for name, value in values.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)
    for name in _WIDTH:
        if getattr(module, name, None) == width:
            setattr(module, name, now)


def by_torch_pruning(model: nn.Module, example: Example, way: str) -> Cut:
    """Half of every width at random; only the output layers are ignored. way: "plain", or a hint about attention."""
    import torch_pruning as tp

    dense, found = copy.deepcopy(model), attentions(model) if way != "plain" else []
    if way in ("heads", "head dims"):
        found = [a for a in found if a.heads]
    widths = [getattr(a.layers[0], "out_features", 0) // (3 if len(a.layers) == 1 else 1) for a in found]
    hints: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
    ignored = output_layers(model, example)
    if way == "attention ignored":
        ignored += [layer for a in found for layer in a.layers]
    else:
        for a in found:
            hints["num_heads"] |= dict(zip(a.layers, (a.heads, a.kv, a.kv)))
    if way != "plain":
        hints["customized_pruners"] = {nn.RMSNorm: _rms_pruner()}
    if way == "heads":
        hints |= {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
    inputs = example[1] or example[0]
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.RandomImportance(),
        global_pruning=False,
        pruning_ratio=0.5,
        ignored_layers=ignored,
        **hints,
    )
    computed = any("parametrizations" in name for name, _ in model.named_modules())
    if not computed:
        number(model)
    torch.manual_seed(0)
    pruner.step()
    kept = None if computed else read(model, dense)
    if kept is not None:
        fill(model, dense, kept)
    scale: dict[str, Tensor] = {}
    if way in ("heads", "head dims"):
        for a, width in zip(found, widths):
            if isinstance(a.module, nn.MultiheadAttention):
                continue
            heads = pruner.num_heads[a.layers[0]]
            follow(a, heads, width)
            scale |= _rescaled(dense, model, a, heads, width)
    return Cut(small=model, kept=kept, scale=scale)


def hinted(model: nn.Module, way: str) -> bool:
    """Whether a hint applies to a network."""
    if way == "rules":
        return any(isinstance(m, nn.RMSNorm) for m in model.modules())
    return any(a.heads or way == "attention ignored" for a in attentions(model))


def _rms_pruner() -> Any:
    """The rule for nn.RMSNorm that torch-pruning lacks, written as its documentation says."""
    import torch_pruning as tp

    class RMSNormPruner(tp.pruner.function.BasePruningFunc):
        def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
            kept = sorted(set(range(layer.weight.numel())) - set(idxs))
            layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 0)
            layer.normalized_shape = (len(kept),)
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return layer.weight.numel()

        prune_in_channels, get_in_channels = prune_out_channels, get_out_channels

    return RMSNormPruner()


def _rescaled(dense: nn.Module, small: nn.Module, a: Attention, heads: int, width: int) -> dict[str, Tensor]:
    """Softmax scales taken from the size of a head change where its dimensions are cut: as factors of the dense query rows."""
    layer = a.layers[0]
    now = layer.out_features // (3 if len(a.layers) == 1 else 1)
    factor = math.sqrt((width / a.heads) / max(now / max(heads, 1), 1))
    if abs(factor - 1) < 1e-9:
        return {}
    name = next(n for n, m in small.named_modules() if m is layer)
    rows = torch.ones(dense.get_submodule(name).out_features)  # type: ignore[arg-type]
    rows[:width] = factor
    full = dense.get_submodule(name)
    return {f"{name}.{leaf}": rows.view(-1, *[1] * (t.ndim - 1)) for leaf, t in full._parameters.items() if t is not None}


# the run ------------------------------------------------------------------------------------------------------------------


def lively(model: nn.Module) -> None:
    """Weights of at least unit gain: with the small ones of an untrained transformer a wrong attention head hardly shows."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            size = float(weight.double().square().mean().sqrt()) if weight.numel() and weight.is_floating_point() else 1e9
            fan = 1 if id(weight) in embedded else 16 if weight.ndim < 2 else weight.numel() / weight.shape[0]
            if size < 1e-3 * fan**-0.5:
                weight.copy_(torch.randn(weight.shape, generator=draw) * fan**-0.5)
            elif size < fan**-0.5:
                weight.mul_(fan**-0.5 / size)


def one(name: str, tool: str) -> dict[str, Any]:
    """One tool on one network, in this process."""
    import hard_cases  # noqa: F401
    from zoo import WHOLE

    _quiet()
    model, given = WHOLE[name]()
    lively(model)
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
widths, same machine, one run, each tool in its own process with {limit} seconds. Both remove half of every width they find,
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
  drawn across heads, and the reshape to heads that follows mixes them. `resnet_padded`: channels 2, 3, 4 and 6 leave on both
  sides of a shortcut that shifts channels by 4. `channel_shuffle`, `shufflenet_v1`: the same positions leave before and after
  the shuffle. `funnel` (FNet): channels leave from the axis of a Fourier transform.
- torch-pruning's failures in `attention_rotary`, `grouped_fed_by_concat`, `grouped_transposed`, `state_space`, `weight_norm`,
  `gmlp`, `lstm_tagger`, `in_place`, `cspnet_chunk` and `wavenet` come again without this script, with `MagnitudeImportance`.
  `llama` without hints was given ten minutes instead of {limit} seconds and did not end.
- The judge: in right cuts of eleven networks the columns of one weight were swapped, one weight at a time; it called all 112
  of these wrong, the smallest difference 3e-3. Norms are recognised by their class (LayerNorm, RMSNorm, GroupNorm, GRN).

Percentages are the parameters removed: a right answer that leaves attention alone removes less. Seconds are until the pruned
network exists (resect: with its verification); megabytes are the growth of the peak memory of the process.

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


def write(rows: list[dict[str, Any]]) -> None:
    """The JSON, and the page made from it."""
    made = {name: version(name) for name in ("torch-pruning", "transformers")}
    columns = ["network", "resect", "torch-pruning", "torch-pruning, hints", "s", "s (tp)", "MB", "MB (tp)", "why not right"]
    text = f"{totals(rows)}\n\n{table(columns, map(row, rows))}\n"
    publish("anatomy", {"limit_s": LIMIT, "versions": made, "networks": rows}, text)
    with_versions = f"resect {resect.__version__}, torch-pruning {made['torch-pruning']}, torch {torch.__version__}, "
    with_versions += f"transformers {made['transformers']}; {len(rows)} networks, one thread.\n\n"
    page = PAGE.format(limit=LIMIT) + with_versions + text
    (ROOT / "docs" / "side-by-side.md").write_text(page.rstrip() + "\n", encoding="utf-8")


def earlier() -> dict[str, dict[str, Any]]:
    """The rows that are published already, by network."""
    path = RESULTS / "anatomy.json"
    return {r["network"]: r for r in json.loads(path.read_text(encoding="utf-8"))["networks"]} if path.exists() else {}


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
    rows = earlier() if names else {}
    for name in names or WHOLE:
        rows[name] = compared(name)
        print(name, *(f"{k}: {summary(rows[name][k])}" for k in ("resect", "plain", "hints")), sep=" | ", flush=True)
    write([rows[name] for name in WHOLE if name in rows])


def summary(r: dict[str, Any]) -> str:
    """One run in a line of the terminal."""
    numbers = f"{r.get('removed', 0):.0%} {r.get('seconds', 0):.2f} s {r.get('megabytes', 0):.0f} MB"
    gaps = " ".join(f"{way} {gap:.0e}" for way, gap in r.get("gaps", {}).items())
    effect = f"effect {r['effect']:.0e}" if "effect" in r else ""
    return " ".join(part for part in (r["verdict"], r.get("hint", ""), numbers, r.get("why", ""), gaps, effect) if part)


if __name__ == "__main__":
    main()
