"""Gradient estimators: what stands in for the derivative of rounding, and noise for stochastic rounding.

    estimator   factor on the gradient inside the grid                     source
    clipped     1 (0 outside)                                              straight-through, 1308.3432; LSQ
    pure        1 (1 outside, too)                                         straight-through without clipping
    ewgs        1 + d sign(g) (u - q)/(levels - 1), d = 1e-3               EWGS, 2104.00903, eq. 5
    smooth      slope of a tanh staircase with the same mean, sharpness 4  DSQ, 1908.05033
    stochastic  1 (0 outside); rounds up with probability frac(u)          2412.04787 and older

u = x/scale, q its level. The range's gradients do not depend on the estimator (numerics.affine).
EWGS divides by the number of steps because its x lives in [0, 1]. Its d is the paper's fixed-factor form; the
Hessian-adaptive one is not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Estimator = Literal["clipped", "pure", "ewgs", "smooth", "stochastic"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)

EWGS_FACTOR = 1e-3
SMOOTH_SHARPNESS = 4.0


def ewgs(g: Tensor, u: Tensor, error: Tensor, steps: Tensor) -> Tensor:
    """1 + d sign(g) (u - q)/steps: the farther x is from its level, the more its step is scaled."""
    return 1 - EWGS_FACTOR * torch.sign(g) * error / steps


def smooth(g: Tensor, u: Tensor, error: Tensor, steps: Tensor) -> Tensor:
    """Slope of floor + (1 + tanh(k t)/tanh(k/2))/2, t in -1/2..1/2 from level to level: its mean is 1."""
    within = u - torch.floor(u) - 0.5
    slope: Tensor = 1 - torch.tanh(SMOOTH_SHARPNESS * within).square()
    return slope * (SMOOTH_SHARPNESS / 2 / math.tanh(SMOOTH_SHARPNESS / 2))


def piecewise_linear(g: Tensor, u: Tensor, error: Tensor, steps: Tensor) -> Tensor:
    """1/2 + 2 |u - q|: a tent over each border between two levels, as Bi-Real's (1808.00278, eq. 7) over the
    one of a sign, on a floor that leaves no level dead: its mean is 1."""
    return 0.5 + 2 * error.abs()


# Estimators with a factor of their own: (g, u, error = q - u, steps = high - low) -> factor.
SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {"ewgs": ewgs, "smooth": smooth}


def hash_uniform(seed: Tensor, like: Tensor) -> Tensor:
    """Uniform noise in [0, 1) of ``like``'s shape: a hash of seed and element index.

    The same in recomputation (activation checkpointing), on any device, eager and compiled; a generator
    drawn in forward is none of these. 24 bits of murmur3's 32-bit finalizer, in wrapping int32 arithmetic.
    """
    index = torch.arange(like.numel(), dtype=torch.int32, device=like.device)
    h = index * -1640531535 + seed.to(torch.int32)
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        h = (h ^ ((h >> shift) & ((1 << (32 - shift)) - 1))) * factor
    h = h ^ ((h >> 16) & 0xFFFF)
    return ((h >> 8) & 0xFFFFFF).to(torch.float32).mul(2.0**-24).view(like.shape)


def mix(*numbers: int) -> int:
    """A seed of 31 bits from several counters (steps, layers, chunks): splitmix64's finalizer, chained."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0x7FFFFFFF
