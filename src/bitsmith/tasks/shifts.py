"""Five ways in which images change between training and use, to see what quantization does to robustness.

In the spirit of ImageNet-C (Hendrycks and Dietterich 2019, 1903.12261), with two differences: strengths are
set relative to the image's side, so that they mean the same for 8x8 digits and 32x32 photographs, and every
draw comes from a generator seeded by (seed, shift, severity), so that a float and a quantized model see
identical images. Accuracies compare models here; they do not compare with ImageNet-C's tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.tasks.classification import evaluate, to_float

if TYPE_CHECKING:  # which is measured by them
    from bitsmith.tasks.dataset import Data

SEVERITIES = (1, 2, 3, 4, 5)

NOISE_STD = (0.05, 0.1, 0.15, 0.2, 0.3)  # of the full range
BLUR_SIGMA = (0.12, 0.18, 0.24, 0.32, 0.42)  # pixels, times the square root of the side
CONTRAST = (0.75, 0.55, 0.4, 0.25, 0.15)  # what is left of the difference from the image's mean
ROTATION_DEGREES = (6.0, 12.0, 18.0, 24.0, 32.0)  # to either side
TRANSLATION = (0.04, 0.08, 0.12, 0.16, 0.22)  # of the side, in a random direction


def noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise, independent per pixel and channel."""
    draws = torch.randn(images.shape, generator=generator)
    return (images + NOISE_STD[severity - 1] * draws).clamp_(0, 1)


def blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Gaussian blur; edges are replicated. Draws nothing."""
    channels, height, width = images.shape[1:]
    sigma = BLUR_SIGMA[severity - 1] * math.sqrt(min(height, width))
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(channels, 1, -1)
    images = F.pad(images, (radius,) * 4, mode="replicate")
    images = F.conv2d(images, kernel.unsqueeze(2), groups=channels)
    return F.conv2d(images, kernel.unsqueeze(3), groups=channels).clamp_(0, 1)


def contrast(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Every image pulled towards its own mean grey. Draws nothing."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + CONTRAST[severity - 1] * (images - mean)


def rotation(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Turned by the severity's angle, left or right by a coin toss; black moves in."""
    signs = 2.0 * torch.randint(0, 2, (len(images),), generator=generator) - 1
    angles = signs * math.radians(ROTATION_DEGREES[severity - 1])
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros(len(images))
    return _warp(images, torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3))


def translation(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Moved by the severity's distance in a random direction; black moves in."""
    angles = 2 * math.pi * torch.rand(len(images), generator=generator)
    distance = 2 * TRANSLATION[severity - 1]  # affine_grid's side is 2 long
    one, zero = torch.ones(len(images)), torch.zeros(len(images))
    moves = [one, zero, distance * angles.cos(), zero, one, distance * angles.sin()]
    return _warp(images, torch.stack(moves, 1).view(-1, 2, 3))


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp_(
        0, 1
    )


Shift = Callable[[Tensor, int, torch.Generator], Tensor]

SHIFTS: dict[str, Shift] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "rotation": rotation,
    "translation": translation,
}


def shifted(name: str, images: Tensor, severity: int, seed: int = 0) -> Tensor:
    """The images (N, C, H, W), float32 in 0..1 or uint8, under a named shift; the same for the same seed."""
    if name not in SHIFTS:
        raise DataError(f"unknown shift {name!r}", where="shifts", expected=", ".join(SHIFTS))
    if severity not in SEVERITIES:
        raise DataError("there is no such severity", where=f"shift {name}", got=severity, expected="1 to 5")
    # A generator of its own for each shift and severity: leaving one out does not change the others.
    generator = torch.Generator().manual_seed(seed * 100 + list(SHIFTS).index(name) * 10 + severity)
    return SHIFTS[name](to_float(images), severity, generator)


def evaluate_shifts(
    model: nn.Module,
    data: Data,
    *,
    severities: Sequence[int] = (1, 3, 5),
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Accuracy on the shifted test split: {"noise": ..., ..., "mean": ...}, each averaged over severities."""
    if not severities:
        raise DataError("no severity was chosen", where="evaluate_shifts", expected="some of 1 to 5")
    result = {}
    for name in SHIFTS:
        accuracies = [
            evaluate(model, shifted(name, data.test_x, severity, seed), data.test_y, batch_size, device)[
                "accuracy"
            ]
            for severity in severities
        ]
        result[name] = sum(accuracies) / len(accuracies)
    result["mean"] = sum(result.values()) / len(result)
    return result
