"""Ways in which images move between training and use: turned, moved, slanted, warped.

Signature and randomness as in corruptions.py. What moves in from outside is black, except in `elastic`, where
it is the edge.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bitsmith.tasks.corruptions import gaussian_blur

ROTATION_DEGREES = (6.0, 12.0, 18.0, 24.0, 32.0)  # to either side
TRANSLATION = (0.04, 0.08, 0.12, 0.16, 0.22)  # of the side, in a random direction
SHEAR = (0.1, 0.2, 0.3, 0.4, 0.55)  # pixels to a side per pixel down
ELASTIC = (0.01, 0.02, 0.03, 0.045, 0.06)  # of the side, root mean square of the way
ELASTIC_SIGMA = 0.1  # of the side: how far neighbours move together


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


def shear(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Slanted about the middle row, (x, y) from (x ± k·y, y), the sign by a coin toss; black moves in."""
    signs = 2.0 * torch.randint(0, 2, (len(images),), generator=generator) - 1
    slant = signs * SHEAR[severity - 1] * images.shape[2] / images.shape[3]  # both sides are 2 long
    one, zero = torch.ones(len(images)), torch.zeros(len(images))
    return _warp(images, torch.stack([one, slant, zero, zero, one, zero], 1).view(-1, 2, 3))


def elastic(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Warped by a smooth random field, as handwriting varies (Simard et al. 2003)."""
    return elastically(images, ELASTIC[severity - 1], generator)


def elastically(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Every pixel from ``strength`` sides away, root mean square, and its neighbours from nearly as far."""
    count, _, height, width = images.shape
    sigma = ELASTIC_SIGMA * min(height, width)
    rim = math.ceil(3 * sigma)  # drawn and blurred beyond the image, or its edges would move further
    field = 2 * torch.rand((count, 2, height + 2 * rim, width + 2 * rim), generator=generator) - 1
    field = gaussian_blur(field, sigma)[..., rim : rim + height, rim : rim + width]
    field = field / field.square().sum(1, keepdim=True).mean((2, 3), keepdim=True).sqrt()
    identity = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(count, 2, 3)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False)
    grid = grid + 2 * strength * field.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp_(0, 1)


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp_(
        0, 1
    )
