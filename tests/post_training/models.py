"""Small models with what real ones have: residual streams, norms, shared inputs, convolutions."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.tasks.normalize import Normalize
from bitsmith.tasks.resnet import ResNet
from bitsmith.tasks.vit import VisionTransformer


class Block(nn.Module):
    """x + down(ReLU(up(norm x))), with a second reader of the norm's output."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.gate = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(self.gate(h).relu() * self.up(h))


class Residual(nn.Module):
    """(N, T, 6) -> (N, T, 4)."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block(8, 12) for _ in range(depth))
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Residual().eval()


def resnet(seed: int = 0) -> nn.Module:
    """With statistics and gains as training leaves them: none is 0 or 1. Two stages are enough."""
    torch.manual_seed(seed)
    model = ResNet(Normalize([0.5], [0.25]), blocks=1, classes=4).eval()
    model.layer3, model.fc = nn.Sequential(), nn.Linear(32, 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return VisionTransformer(
        Normalize([0.5], [0.25]), classes=4, size=8, patch=4, width=8, depth=1, heads=2, hidden=12
    ).eval()


def tokens(count: int = 4, seed: int = 0) -> list[Tensor]:
    """Batches of inputs of `residual`: 8 samples of 5 tokens."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 5, 6, generator=draw) for _ in range(count)]


def images(count: int = 4, seed: int = 0) -> list[Tensor]:
    """Batches of inputs of `vit` and `resnet`: 24 images."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.rand(24, 1, 8, 8, generator=draw) for _ in range(count)]


def prepared(model: nn.Module, batches: Any = None, bits: int = 3, **scheme: Any) -> Any:
    """A prepared copy; with ``batches`` activations have 4 bits."""
    model = copy.deepcopy(model)
    weights = bs.Scheme(bits=bits, **{"granularity": "channel", **scheme})
    activations = None if batches is None else bs.Scheme(bits=4)
    bs.prepare(model, weights, activations, first_last_bits=None)
    if batches is not None:
        bs.calibrate(model, batches)
    return model
