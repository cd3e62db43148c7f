"""The peers of the side by side of accuracies: torch-pruning and FastNAS, with all the settings they are tried with.

`peers_accuracy.py` says what each is told and why.
"""

from __future__ import annotations

import contextlib
import copy
import io
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

from peers import attentions, follow
from resect import evaluate
from resect.batches import forward, unpack
from resect.pipeline import example_of

STEPS = 100
BISECTIONS = 8
LARGEST_RATIO = 0.95
ANEW = "Taylor, gradients anew"
DIVISORS = {"ResNet-20": (16, 8, 4), "ResNet-56": (16, 8)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A trained network and its data: labelled batches; outputs, stream: patterns of the layers that make the answer, and of
    those that write the residual stream. choose: training examples that settings are chosen on."""

    name: str
    model: nn.Module
    shares: tuple[float, ...]
    calib: list[Any]
    choose: list[Any]
    test: list[Any]
    outputs: str
    stream: str | None = None

    @property
    def example(self) -> Any:
        given = example_of(self.calib)
        return given if isinstance(given, dict) else given[0]

    @property
    def normed(self) -> bool:
        return any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules())

    def layers(self, pattern: str | None) -> list[nn.Module]:
        return [m for n, m in self.model.named_modules() if pattern is not None and re.fullmatch(pattern, n)]


def unlabelled(batch: Any) -> Any:
    return {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, dict) else batch[0]


def macs(model: nn.Module, example: Any) -> float:
    """Multiply-accumulates of one forward pass on the example."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**example) if isinstance(example, dict) else model(example)
    return counter.get_total_flops() / 2


# torch-pruning ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Setting:
    kind: str
    importance: str
    across: bool
    stream: bool

    def __str__(self) -> str:
        where = "inner channels only" if not self.stream else "all channels"
        return f"{self.importance}, {'global' if self.across else 'local'}, {where}"


def importances(kind: str) -> dict[str, Callable[[], Any]]:
    import torch_pruning as tp

    if kind == "taylor":
        return {
            "Taylor": lambda: tp.importance.GroupTaylorImportance(),
            "Taylor within units": lambda: tp.importance.GroupTaylorImportance(multivariable=True),
            ANEW: lambda: tp.importance.GroupTaylorImportance(),
        }
    plain = {"normalizer": None, "group_reduction": "first"}
    return {
        "group L2 norm": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "group L1 norm": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "L1 norm of the first layer": lambda: tp.importance.GroupMagnitudeImportance(p=1, **plain),
    }


def settings(case: Case, kind: str) -> list[Setting]:
    """All combinations to choose from."""
    streams = (False, True) if case.stream else (True,)
    return [
        Setting(kind=kind, importance=name, across=across, stream=stream)
        for name in importances(kind)
        if name != ANEW or not attentions(case.model)
        for across in (False, True)
        for stream in streams
    ]


def pruner_of(case: Case, model: nn.Module, setting: Setting, ratio: float, steps: int = 1) -> Any:
    """torch-pruning's pruner for a copy of the case's network."""
    import torch_pruning as tp

    own, heads = replace(case, model=model), attentions(model)
    return tp.pruner.BasePruner(
        model,
        case.example,
        importance=importances(setting.kind)[setting.importance](),
        global_pruning=setting.across,
        pruning_ratio=ratio,
        iterative_steps=steps,
        ignored_layers=own.layers(case.outputs) + ([] if setting.stream else own.layers(case.stream)),
        num_heads={layer: a.heads for a in heads for layer in a.layers},
        prune_num_heads=bool(heads),
        prune_head_dims=not heads,
        head_pruning_ratio=ratio if heads else 0.0,
    )


def by_torch_pruning(case: Case, setting: Setting) -> dict[float, nn.Module]:
    """The largest network that keeps to each share."""
    if attentions(case.model):
        # Its steps remove the whole share of the heads each time, so the ratio is bisected, each in one shot.
        return {share: bisected(case, setting, share) for share in case.shares}
    model, dense, reached = copy.deepcopy(case.model), macs(case.model, case.example), dict[float, nn.Module]()
    accumulate_gradients(model, case.calib if setting.kind == "taylor" else [])
    pruner = pruner_of(case, model, setting, LARGEST_RATIO, STEPS)
    for step in range(STEPS):
        if setting.importance == ANEW and step and step % 20 == 0:
            accumulate_gradients(model, case.calib)
        pruner.step()
        share = macs(model, case.example) / dense
        for goal in set(case.shares) - set(reached):
            if share <= goal:
                reached[goal] = without_gradients(model)
        if len(reached) == len(case.shares):
            break
    return reached


def bisected(case: Case, setting: Setting, share: float) -> nn.Module:
    """The network of the smallest ratio that keeps to a share, heads and channels at the same ratio."""
    dense = copy.deepcopy(case.model)
    accumulate_gradients(dense, case.calib if setting.kind == "taylor" else [])
    gradients = [None if p.grad is None else p.grad.clone() for p in dense.parameters()]
    low, high, found = 0.0, LARGEST_RATIO, None
    for _ in range(BISECTIONS):
        ratio, model = (low + high) / 2, copy.deepcopy(case.model)
        for parameter, gradient in zip(model.parameters(), gradients):
            parameter.grad = gradient
        pruner, heads = pruner_of(case, model, setting, ratio), attentions(model)
        pruner.step()
        for a, before in zip(heads, attentions(case.model)):
            follow(a, pruner.num_heads[a.layers[0]], before.layers[0].out_features)
        fits = macs(model, case.example) <= share * macs(case.model, case.example)
        low, high, found = (low, ratio, model) if fits else (ratio, high, found)
    if found is None:
        raise ValueError(f"no ratio up to {LARGEST_RATIO} keeps to {share:.1%} of the MACs")
    return without_gradients(found)


def accumulate_gradients(model: nn.Module, data: list[Any]) -> None:
    model.zero_grad()
    for item in data:
        batch = unpack(item)
        F.cross_entropy(forward(model, batch), batch.labels, reduction="sum").backward()


def without_gradients(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    copied.zero_grad(set_to_none=True)
    return copied


# the choice of settings ---------------------------------------------------------------------------------------------------

Key = tuple[float, bool]  # share of the MACs; batch norm statistics renewed
Tries = dict[str, Callable[[], dict[float, nn.Module]]]  # per setting, what gives the networks by share
Cuts = dict[Key, tuple[str, nn.Module]]  # the setting, and the network it gave


def renewed(model: nn.Module, case: Case) -> nn.Module:
    """With batch norm statistics re-estimated on the calibration examples."""
    model = copy.deepcopy(model)
    update_bn([unlabelled(batch) for batch in case.calib], model)
    return model.eval()


def best(case: Case, tries: Tries, kept: dict[Key, str], failed: list[str]) -> Cuts:
    """Per share, the network of the best setting by the accuracy on the examples to choose on, or of the setting in `kept`."""
    found: dict[Key, tuple[float, str, nn.Module]] = {}
    for setting, attempt in tries.items():
        if kept and setting not in kept.values():
            continue
        try:
            reached = attempt()
        except Exception as error:
            failed.append(f"{case.name}, {setting}: {type(error).__name__}: {str(error).strip()[:100]}")
            continue
        variants = {(share, False): network for share, network in reached.items()}
        if case.normed:
            variants |= {(share, True): renewed(network, case) for share, network in reached.items()}
        for key, network in variants.items():
            if kept.get(key, setting) != setting:
                continue
            accuracy = evaluate(network, case.choose).accuracy
            if key not in found or accuracy > found[key][0]:
                found[key] = accuracy, setting, network
    return {key: (setting, network) for key, (_, setting, network) in found.items()}


def torch_pruning_tries(case: Case, kind: str, quick: bool) -> Tries:
    chosen = settings(case, kind)[:: 5 if quick else 1]
    return {str(setting): lambda setting=setting: by_torch_pruning(case, setting) for setting in chosen}


def fastnas_tries(case: Case, quick: bool) -> Tries:
    divisors = DIVISORS.get(case.name, ())[: 1 if quick else None]
    return {f"multiples of {divisor}": lambda divisor=divisor: by_fastnas(case, divisor) for divisor in divisors}


def by_fastnas(case: Case, divisor: int) -> dict[float, nn.Module]:
    """One network per share; what it measured of the layers is kept from one share to the next."""
    import modelopt.torch.prune as mtp

    config = mtp.fastnas.FastNASConfig()
    config["nn.Conv2d"]["*"]["channel_divisor"] = divisor
    config["nn.BatchNorm2d"]["*"]["feature_divisor"] = divisor
    images, reached = torch.cat([unlabelled(batch) for batch in case.calib]), {}
    quiet = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        options = {
            # Fifty batches are what its calibration of batch norm waits for.
            "data_loader": list(images.chunk(50)),
            "collect_func": lambda batch: batch,
            "score_func": lambda network: 100 * evaluate(network, case.choose).accuracy,
            "checkpoint": str(Path(folder) / "search.pth"),
        }
        for share in case.shares:
            model, goal = copy.deepcopy(case.model), {"flops": f"{100 * share:.4f}%"}
            small, _ = mtp.prune(model, [("fastnas", config)], goal, images[:1], options)
            reached[share] = small.eval()
    return reached
