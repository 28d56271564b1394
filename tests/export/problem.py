"""A model with every operator that is exported, prepared and calibrated on random inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.quantization.layers import MatMul
from bitsmith.quantization.observe import calibrate
from bitsmith.quantization.prepare import prepare
from bitsmith.quantization.scheme import Scheme


class Small(nn.Module):
    """Strided, grouped and depthwise convolutions with BatchNorm, attention on tokens, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, (1, 3), padding=(0, 1), groups=2)
        self.query, self.key = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.scores, self.context = MatMul(), MatMul()
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = torch.relu(self.depthwise_norm(self.depthwise(x)))
        tokens = torch.nn.functional.gelu(self.grouped(x)).flatten(2).transpose(1, 2)
        attention = self.scores(self.query(tokens), self.key(tokens).transpose(1, 2)).softmax(-1)
        logits: Tensor = self.head(self.context(attention, tokens).mean(1))
        return logits


EACH = {  # widths per channel, of odd sizes too: a depthwise channel has nine values
    "stem.weight": {"bits": [1, 2, 3, 4, 5, 6, 7, 8]},
    "depthwise.weight": {"bits": [3, 3, 2, 5, 2, 3, 3, 2]},
    "head.weight": {"bits": [2, 4, 2, 3, 2]},
}


def inputs(count: int = 64) -> Tensor:
    """(count, 2, 8, 8)."""
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def prepared(
    bits: int = 2,
    granularity: Any = "channel",
    grid: Any = "auto",
    group_size: int | None = None,
    activations: Scheme | None = None,
    **arguments: Any,
) -> nn.Module:
    """``Small`` with random BatchNorm statistics (negative factors among them), calibrated, in eval mode."""
    torch.manual_seed(0)
    model = Small()
    for norm in (model.stem_norm, model.depthwise_norm):
        norm.weight.data.uniform_(-1.5, 1.5)
        norm.bias.data.normal_()
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    weights = Scheme(bits=bits, granularity=granularity, grid=grid, group_size=group_size)
    prepare(model, weights, activations or Scheme(bits=bits), **arguments)
    calibrate(model, [inputs()])
    return model.eval()
