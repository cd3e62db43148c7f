"""Side by side with torch-pruning: the same networks, the same machine, one judge.

    python benchmarks/anatomy.py [--only NAME ...] [--budget SECONDS]        (needs: pip install 'resect[compare]')

Every network of the zoo is pruned by half of everything, at random, by resect and by torch-pruning, each in its own forked
process with a time limit. The judge knows neither tool. It numbers the elements of every tensor before the cut, reads from the
cut network which elements stayed and where they went, and compares the cut network with the dense one in which every removed
element is zero and every norm counts only the channels that stay. Writes results/anatomy.json and docs/side-by-side.md.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import multiprocessing
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import resect
from publish import publish, table
from resect.anatomy.checking import difference, outputs

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
TOLERANCE, LIMIT = 1e-4, 20
SLOW = f"not done in {LIMIT} s"
Example = tuple[tuple[Any, ...], dict[str, Any]]


# the record of a cut ------------------------------------------------------------------------------------------------------


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every float parameter and buffer under each of its names."""
    found = (
        (f"{path}.{leaf}" if path else leaf, tensor)
        for path, module in model.named_modules()
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    return {name: tensor for name, tensor in found if tensor is not None and tensor.is_floating_point()}


def number(model: nn.Module) -> None:
    """Replace the elements of every tensor by their positions (exact in float32: these networks are small)."""
    for tensor in tensors(model).values():
        tensor.data = torch.arange(tensor.numel(), dtype=torch.float32).view(tensor.shape).to(tensor.dtype)


def read(numbered: nn.Module, dense: nn.Module) -> dict[str, Tensor]:
    """From a cut network of numbers: for every tensor, the flat position in the dense tensor that each element came from."""
    return {name: tensor.detach().round().long() for name, tensor in tensors(numbered).items() if name in tensors(dense)}


def fill(numbered: nn.Module, dense: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Give a cut network of numbers its weights back."""
    old, new = tensors(dense), tensors(numbered)
    for name, positions in kept.items():
        new[name].data = old[name].detach().flatten()[positions]


# the judge ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A cut network; kept: what `read` found (None where weights are computed from others); scale: factors of the masked rows."""

    small: nn.Module
    kept: Mapping[str, Tensor] | None
    scale: Mapping[str, Tensor] = field(default_factory=dict)
    fixes: int = 0


def masked(dense: nn.Module, kept: Mapping[str, Tensor], *, readers_only: bool) -> nn.Module:
    """The dense network with what was removed zeroed: everything, or only where a row of the weight stays (its readers)."""
    model = copy.deepcopy(dense)
    for name, tensor in tensors(dense).items():
        if name not in kept or kept[name].numel() == tensor.numel():
            continue
        stays = torch.zeros(tensor.numel(), dtype=torch.bool)
        stays[kept[name].flatten()] = True
        stays = stays.view(tensor.shape)
        if readers_only:
            gone = ~stays.flatten(1).any(1) if stays.ndim > 1 else slice(None)
            stays[gone] = True
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        zeroed = torch.where(stays, tensor.detach(), 0)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(zeroed, requires_grad=False)
        else:
            owner._buffers[leaf] = zeroed
    return model


class Narrowed(TorchFunctionMode):
    """Layer and group norms of a masked network count only the channels that the cut network has; removed ones are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int | None] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = self.counts[-1] if self.counts else None
        if count is not None and func is F.layer_norm:
            return _layer_norm(count, *args, **(kwargs or {}))
        if count is not None and func is F.group_norm:
            return _group_norm(count, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _standard(x: Tensor, axes: Sequence[int], count: int, eps: float) -> Tensor:
    mean = x.sum(axes, keepdim=True) / count
    spread = (x**2).sum(axes, keepdim=True) / count - mean**2
    return (x - mean) / (spread + eps).sqrt()


def _layer_norm(count: int, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    y = _standard(x, list(range(-len(shape), 0)), count, eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _group_norm(count: int, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    parts = x.unflatten(1, (groups, -1)).flatten(2)
    y = _standard(parts, [2], count * math.prod(x.shape[2:]), eps).view_as(x)
    y = y if weight is None else y * weight.view(-1, *[1] * (x.ndim - 2))
    return y if bias is None else y + bias.view(-1, *[1] * (x.ndim - 2))


def _norm_counts(full: nn.Module, small: nn.Module) -> tuple[int, int] | None:
    """(channels a norm counts in the dense network, in the cut one), None for other modules."""
    if isinstance(full, nn.GroupNorm):
        return full.num_channels // full.num_groups, small.num_channels // small.num_groups  # type: ignore[operator]
    if isinstance(getattr(full, "normalized_shape", None), (tuple, list)) and not isinstance(full, nn.RMSNorm):
        return math.prod(full.normalized_shape), math.prod(small.normalized_shape)  # type: ignore[arg-type]
    return None


@contextmanager
def narrowed(masked: nn.Module, small: nn.Module) -> Iterator[None]:
    """For the time of the context the norms of `masked` divide by the number of channels that `small` has."""
    with Narrowed() as mode, ExitStack() as hooks:
        others = dict(small.named_modules())
        for path, module in masked.named_modules():
            other = others.get(path)
            counts = None if other is None else _norm_counts(module, other)
            if counts is not None:
                count = None if counts[0] == counts[1] else counts[1]
                hooks.callback(module.register_forward_pre_hook(lambda m, a, c=count: mode.counts.append(c)).remove)  # type: ignore[misc]
                hooks.callback(module.register_forward_hook(lambda m, a, y: mode.counts.pop() and None).remove)
            elif other is not None and ("RMSNorm" in type(module).__name__ or type(module).__name__ == "T5LayerNorm"):
                full, now = (getattr(m, "weight", None) for m in (module, other))
                if isinstance(full, Tensor) and isinstance(now, Tensor) and full.numel() != now.numel():
                    root = math.sqrt(full.numel() / now.numel())
                    hooks.callback(module.register_forward_pre_hook(lambda m, a, r=root: (a[0] * r, *a[1:])).remove)  # type: ignore[misc]
                    hooks.callback(module.register_forward_hook(lambda m, a, y, r=root: y / r).remove)  # type: ignore[misc]
        yield


def shuffled(example: Example) -> Example:
    """Other inputs of the same shapes and values in other places: not the ones that the tools were shown."""
    draw = torch.Generator().manual_seed(1)

    def mix(x: Any) -> Any:
        return x.flatten()[torch.randperm(x.numel(), generator=draw)].view(x.shape) if isinstance(x, Tensor) else x

    return tree_map(mix, example)


def gaps(dense: nn.Module, cut: Cut, example: Example) -> dict[str, float]:
    """Difference of the cut network from each of the networks that it may equal, over two inputs, relative to the output."""
    assert cut.kept is not None
    both = (example, shuffled(example))
    got = [outputs(cut.small, inputs) for inputs in both]
    found = {}
    for way in ("all", "readers", *(["scaled"] if cut.scale else [])):
        full = masked(dense, cut.kept, readers_only=way == "readers")
        for name, factor in cut.scale.items() if way == "scaled" else ():
            tensors(full)[name].data.mul_(factor)
        with ExitStack() as stack:
            if way != "readers":
                stack.enter_context(narrowed(full, cut.small))
            found[way] = max(difference(mine, outputs(full, inputs)) for mine, inputs in zip(got, both))
    return found


def judged(dense: nn.Module, work: Callable[[], Cut], example: Example) -> dict[str, Any]:
    """Verdict, seconds and megabytes of one tool on one network."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        cut = work()
    except Exception as error:
        return {"verdict": "fails", "why": _told("pruning", error), "seconds": time.perf_counter() - start}
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    full, now = (sum(p.numel() for p in m.parameters()) for m in (dense, cut.small))
    result = {"seconds": seconds, "megabytes": (peak - before) / 1024, "removed": 1 - now / max(full, 1)}
    if full == now:
        return {**result, "verdict": "nothing"}
    try:
        shapes = [[tuple(y.shape) for y in outputs(m, example)] for m in (cut.small, dense)]
    except Exception as error:
        return {**result, "verdict": "fails", "why": _told("forward pass of the pruned network", error)}
    if shapes[0] != shapes[1]:
        return {**result, "verdict": "fails", "why": f"outputs of other shapes: {shapes[0]} for {shapes[1]}"[:200]}
    if cut.kept is None:
        return {**result, "verdict": "not judged", "why": "weights are computed from other weights"}
    try:
        found = gaps(dense, cut, example)
    except Exception as error:
        return {**result, "verdict": "not judged", "why": _told("reference", error)}
    gap = min(found.values())
    return {**result, "verdict": "right" if gap <= TOLERANCE else "wrong", "gap": gap, "gaps": found}


def _told(where: str, error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{where}: {type(error).__name__}: {lines[0]}"[:200]


# the two tools ------------------------------------------------------------------------------------------------------------


def by_resect(model: nn.Module, given: Any, kinds: str) -> Cut:
    """Dissect (which verifies) and cut by a random half plan over all groups; no hints. kinds: "all" or "hidden"."""
    anatomy = resect.dissect(model, given)
    plan = resect.Plan.random(anatomy, ratio=0.5)
    if kinds == "hidden":
        stay = resect.Plan.all(anatomy).keep
        streams = {g.name for g in anatomy.groups if g.kind == "stream"}
        plan = resect.Plan(anatomy=anatomy, keep={n: stay[n] if n in streams else k for n, k in plan.keep.items()})
    small = resect.cut(model, plan, verify=False)
    numbers = copy.deepcopy(model)
    number(numbers)
    return Cut(small=small, kept=read(resect.cut(numbers, plan, verify=False), model))


def output_layers(model: nn.Module, example: Example) -> list[nn.Module]:
    """The layers that make what the network returns: those met first on the way back from its outputs."""
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
    seen, found = set(stack), []
    while stack:
        node = stack.pop()
        if node in made:
            found.append(made[node])
        elif not any(word in node.name() for word in ("mmBackward", "MmBackward", "bmm", "Bmm", "Convolution", "ScaledDot")):
            fresh = [n for n, _ in node.next_functions if n is not None and n not in seen]
            seen.update(fresh)
            stack += fresh
    return list(dict.fromkeys(found))


def _plain(result: Any) -> Any:
    if isinstance(result, Mapping):
        return {k: v for k, v in result.items() if "cache" not in type(v).__name__.lower()}
    return result


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention module: its query, key and value layers (or the fused one), and its heads."""

    module: nn.Module
    path: str
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
    for path, module in model.named_modules():
        child = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
        parts = [next((child[n] for n in names if n in child), None) for names in (_QUERY, _KEY, _VALUE)]
        fused = next((child[n] for n in _FUSED if n in child), None)
        heads = next((getattr(module, n) for n in _HEADS if isinstance(getattr(module, n, None), int)), None)
        heads = heads or getattr(getattr(module, "config", None), "num_attention_heads", None)
        if isinstance(module, nn.MultiheadAttention):
            found.append(Attention(module=module, path=path, layers=(module,), heads=module.num_heads, kv=module.num_heads))
        elif heads and all(p is not None for p in parts):
            kv = parts[1].out_features * heads // parts[0].out_features  # type: ignore[union-attr]
            found.append(Attention(module=module, path=path, layers=tuple(parts), heads=heads, kv=kv))  # type: ignore[arg-type]
        elif heads and fused is not None:
            found.append(Attention(module=module, path=path, layers=(fused,), heads=heads, kv=heads))
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


def hinted(model: nn.Module) -> bool:
    """Whether any hint applies."""
    return bool(attentions(model)) or any(isinstance(m, nn.RMSNorm) for m in model.modules())


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
    from zoo import WHOLE

    _quiet()
    model, given = WHOLE[name]()
    lively(model)
    example: Example = _example(given)
    outputs(model, example)  # what is imported or cached by the first forward pass is charged to neither
    dense = copy.deepcopy(model)
    which, _, way = tool.partition(": ")
    if which == "resect":
        return judged(dense, lambda: by_resect(model, given, way), example)
    if way not in ("plain", "ignored") and not hinted(model):
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
            there.send({"verdict": "fails", "why": _told("network", error)})

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


def compared(name: str) -> dict[str, Any]:
    """All runs on one network. Hints about heads are only read once all groups are built: no use where that does not end."""
    found = {"network": name, "resect": apart(name, "resect: all"), "plain": apart(name, "torch-pruning: plain")}
    if found["resect"]["verdict"] == "wrong":
        found["resect hidden only"] = apart(name, "resect: hidden")
    slow = found["plain"].get("why") == SLOW
    tried: dict[str, Any] = {}
    for way in ("attention ignored",) if slow else ("heads", "head dims", "attention ignored"):
        tried[way] = apart(name, f"torch-pruning: {way}")
        if tried[way]["verdict"] in ("right", "none apply"):
            break
    order = ("right", "none apply", "wrong", "not judged", "nothing", "fails")
    best = min(tried, key=lambda way: order.index(tried[way]["verdict"]))
    hints = found["plain"] if tried[best]["verdict"] == "none apply" else {**tried[best], "hint": best}
    return {**found, "tried": tried, "hints": hints}


def warm() -> None:
    """Both tools once, so that no network is charged for what they import."""
    _quiet()
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    image = torch.randn(1, 3, 4, 4)
    by_resect(copy.deepcopy(net), image, "all")
    by_torch_pruning(net, ((image,), {}), "plain")


VERDICTS = ("right", "wrong", "fails", "nothing", "not judged")


def write(rows: list[dict[str, Any]]) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks (default: the whole zoo, and the results are published)")
    names = parser.parse_args().names
    from zoo import WHOLE

    torch.set_num_threads(1)
    warm()
    rows = []
    for name in names or WHOLE:
        rows.append(compared(name))
        print(name, *(f"{k}: {told(rows[-1][k])}" for k in ("resect", "plain", "hints")), sep=" | ", flush=True)
    if not names:
        write(rows)


def told(r: dict[str, Any]) -> str:
    numbers = f"{r.get('removed', 0):.0%} {r.get('seconds', 0):.2f}s {r.get('megabytes', 0):.0f}MB"
    return " ".join(
        [r["verdict"], r.get("hint", ""), numbers, r.get("why", ""), str({k: f"{v:.0e}" for k, v in r.get("gaps", {}).items()})]
    )


if __name__ == "__main__":
    main()
