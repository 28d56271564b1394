"""A randomised Hadamard transform over blocks of 16 tokens: it spreads what stands out in one of them.

For H = H_16 / 4, orthogonal, and random signs S: (H S D)^T (H S X) = D^T X, so that the product of two
transformed operands needs no inverse; but each is quantized with less error, because a block's largest value
becomes about its mean. Used on both operands of weight gradients (2509.25149, section 4.2; 2306.11987 has it
in the forward).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmith.numerics.rounding import hash_uniform

WIDTH = 16


def hadamard_tokens(x: Tensor, seed: int) -> Tensor:
    """x (m, k) float32, transformed along m, which is padded with zeros to blocks of 16: (m', k)."""
    m = len(x)
    signs = (hash_uniform(torch.tensor([seed]), x[:, 0]) < 0.5).to(x.dtype) * 2 - 1
    padded = torch.nn.functional.pad(x * signs[:, None], (0, 0, 0, -m % WIDTH))
    return (_matrix(x) @ padded.view(-1, WIDTH, x.shape[1])).view(-1, x.shape[1])


def _matrix(like: Tensor) -> Tensor:
    """Sylvester's H_16, its rows of length 1."""
    h = like.new_ones(1, 1)
    while len(h) < WIDTH:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / WIDTH**0.5
