"""Input normalisation as the first module of a model, so that it travels with the model into every export.

Data stay in 0..1 everywhere (files, shifts, user code); torchvision puts this step into the data pipeline,
where a deployed model loses it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel of (N, C, H, W); the constants are buffers."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Non-persistent: float checkpoints from elsewhere have no such entries, and load all the same.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
