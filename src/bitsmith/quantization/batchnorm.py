"""BatchNorm under quantization: re-estimate its statistics at the end of training.

Running averages lag behind weights whose codes still flip, and at two bits the lag costs half a point. A few
hundred images with cumulative averages are enough. Folding is part of finalize.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace the statistics of every BatchNorm by their plain mean over ``batches``; returns how many norms.

    Only the norms run in training mode; element noise, dropout and augmentation do not.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not norms:
        return 0
    modes = {m: m.training for m in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's spelling of a cumulative average
        norm.train()
    for batch in batches:
        model(*(batch if isinstance(batch, tuple) else (batch,)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, mode in modes.items():
        module.training = mode
    return len(norms)
