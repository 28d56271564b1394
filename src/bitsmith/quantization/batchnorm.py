"""BatchNorm under quantization: re-estimate its statistics at the end of training.

Running averages lag behind weights whose codes still flip. A cumulative average over a few thousand samples
replaces them. The samples must look as they did in training, augmentation included: statistics of plain
images cost a two-bit ResNet-20 three points (docs/findings.md). Folding is part of finalize.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bitsmith.errors import DataError
from bitsmith.quantization.layers import in_eval_mode


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace the statistics of every BatchNorm by their plain mean over ``batches``; returns how many norms.

    ``batches``: model inputs as training sees them, augmented where training augments. Only the norms run in
    training mode; element noise and dropout do not. A mean over batches,
    so give batches of one size. Raises DataError where there is none.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    count = 0
    with in_eval_mode(model):
        try:
            for count, batch in enumerate(batches, start=1):
                if count == 1:  # not before there is a batch to replace the statistics by
                    for norm in norms:
                        norm.reset_running_stats()
                        norm.momentum = None  # PyTorch's spelling of a cumulative average
                        norm.train()
                model(*(batch if isinstance(batch, tuple) else (batch,)))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not count:
        raise DataError("there is no batch to take statistics from", where="reestimate_batchnorm")
    return len(norms)
