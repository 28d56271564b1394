"""Optimizer state of one byte a value: int8 codes with a scale for each block of a row.

Blocks do not cross rows, so that some rows can be read and written alone. Scales are bfloat16, rounded up, as
a block's largest value must stay within 127 of them; values are rounded stochastically, as a momentum that
changes by less than a step would stand still otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmith.kernels.choose import Backend
from bitsmith.numerics.blocks import to_groups

HIGH = 127
ROOM = 1 + 2.0**-7  # bfloat16 rounds by 2^-9 of a value, float32 on the way here by less
TINY = 2.0**-120


def zeros(rows: int, inputs: int, block: int) -> tuple[Tensor, Tensor]:
    """Codes int8 (rows, inputs) and scales bfloat16 (rows, blocks) of nothing."""
    return torch.zeros(rows, inputs, dtype=torch.int8), torch.zeros(
        rows, -(-inputs // block), dtype=torch.bfloat16
    )


def read(codes: Tensor, scale: Tensor, block: int) -> Tensor:
    """Codes (r, inputs), scales (r, blocks) -> float32 (r, inputs)."""
    inputs = codes.shape[1]
    values = to_groups(codes.float(), block, False) * scale.float()[..., None]
    return values.flatten(1)[:, :inputs]


def write(values: Tensor, block: int, seed: int, backend: Backend) -> tuple[Tensor, Tensor]:
    """The inverse, in expectation over seeds."""
    r, inputs = values.shape
    blocks = to_groups(values, block, False)
    scale = (blocks.abs().amax(2) * (ROOM / HIGH)).clamp(min=TINY).to(torch.bfloat16)
    step = (blocks / -scale.float()[..., None]).flatten(1)[:, :inputs].contiguous()
    codes = torch.zeros(r, inputs, dtype=torch.int8)
    backend.update(codes, step, seed, -HIGH, HIGH)
    return codes, scale
