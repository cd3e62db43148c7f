"""Re-estimating batch norm statistics on the cut network, kept only where held-out data say that it helps."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resect.batches import forward, select, unpack
from resect.repair.sequential import fidelity, held_out


def reestimate(dense: nn.Module, small: nn.Module, data: Iterable[Any]) -> tuple[nn.Module, bool]:
    """Batch norm means and variances measured anew on the calibrate data; returns the better network and whether it is new.

    Better is judged by the outputs' distance to the dense network's on the held-out fifth of the data. The statistics are
    averages over batches of the biased mean and unbiased variance, as training would collect them.
    """
    data = list(data)
    norms = [m for m in small.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.running_mean is not None]
    if not norms:
        return small, False
    renewed = copy.deepcopy(small)
    for module in renewed.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.reset_running_stats()
            module.momentum, module.training = None, True
    with torch.no_grad():
        for item in data:
            if unpack(item).size > 1:
                forward(renewed, unpack(item))
    for module, old in zip(renewed.modules(), small.modules()):
        if isinstance(module, _BatchNorm) and isinstance(old, _BatchNorm):
            module.momentum, module.training = old.momentum, old.training
            if module.num_batches_tracked is not None and old.num_batches_tracked is not None:
                module.num_batches_tracked.copy_(old.num_batches_tracked)
    judges = held_out(data, select)
    better = bool(judges) and fidelity(dense, renewed, judges) < fidelity(dense, small, judges)
    return (renewed, True) if better else (small, False)
