"""What goes into a product of integers and what comes out, for every backend.

    integer (m, n) = sum over k of (activation (m, k) - zero_point (m)) * (code (n, k) * factor + offset (n))
    value   (m, n) = (sum over groups of integer * scale (n, group)) * row_scale (m) + bias (n)

Codes of weights count from 0. ``factor`` is 2 where a grid has no zero (numerics.grid, `seq`): then levels
are halves, and scales half as large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_INPUTS = 32768  # 2 * 255 * 128 * 32768 < 2^31: no sum wraps
MOST_BLOCK = 1024  # values of a momentum that share a scale


@dataclass(frozen=True)
class Activations:
    """Codes (m, k), int8 or uint8 with any strides, and what they stand for. ``packed``: (k, low) of codes of
    four bits, two in a byte (uint8 (m, (k + 1) // 2), the even one low), each less ``low``."""

    codes: Tensor
    zero_point: Tensor | int = 0  # int32 (m,), or one for all
    row_scale: Tensor | None = None  # float32 (m,) or (1,); None is 1
    packed: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, k)."""
        return self.codes.shape[0], self.packed[0] if self.packed else self.codes.shape[1]


@dataclass(frozen=True)
class Weight:
    """Codes (n, k) in the layout of the backend that packed them; parameters as (panels, groups, 16), where a
    panel is 16 channels, padded with zeros."""

    shape: tuple[int, int]
    bits: int
    group_size: int
    data: Tensor
    factor: int
    low: int  # the offset of all, where ``offset`` is None
    offset: Tensor | None  # int32
    column_sum: Tensor  # int32: sums of code * factor + offset
    scale: Tensor | None  # float32

    @property
    def groups(self) -> int:
        """Scales of a channel."""
        return max(1, -(-self.shape[1] // self.group_size))

    def by_channel(self, values: Tensor) -> Tensor:
        """A parameter as (n, groups)."""
        return values.permute(0, 2, 1).reshape(-1, values.shape[1])[: self.shape[0]]


@dataclass(frozen=True)
class Codes:
    """Results as codes: clamp(round(value / scale - half) + zero_point, low, high), int8, or uint8 where
    low is 0; ``packed``: 4-bit ones two in a byte, as `Activations.packed`."""

    scale: float
    low: int
    high: int
    zero_point: int = 0
    half: float = 0.0
    packed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes, or of the bytes that hold them."""
        return torch.uint8 if self.low >= 0 or self.packed else torch.int8


@dataclass(frozen=True)
class Step:
    """How `move` takes a step of an integer optimizer: m~ = keep m + (1 - keep) d, m' = m~ + carry e. clip:
    no step off an end of the range; nearest: rounding, else stochastic. seeds: of codes, momentum,
    residual."""

    low: int
    high: int
    keep: float = 0.0
    carry: float = 0.0
    block: int = 128
    clip: bool = False
    nearest: bool = False
    seeds: tuple[int, int, int] = (0, 0, 0)


def by_panel(values: Tensor) -> Tensor:
    """(n, groups) as (panels, groups, 16), what is missing of the last panel as zeros."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % 16))
    return padded.view(-1, 16, values.shape[1]).permute(0, 2, 1).contiguous()


def pack_nibbles(codes: Tensor, low: int) -> Tensor:
    """Codes (m, k) of four bits from ``low``: uint8 (m, (k + 1) // 2)."""
    counted = torch.nn.functional.pad((codes.to(torch.int16) - low).to(torch.uint8), (0, codes.shape[1] % 2))
    return counted[:, ::2] | (counted[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, k: int, low: int) -> Tensor:
    """The inverse: int8 (m, k)."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=2)
    return pairs.flatten(1)[:, :k].to(torch.int8) + low


def weight_parameters(
    codes: Tensor, group_size: int, offset: Tensor | int, half: bool, sums: Tensor | None = None
) -> tuple[int, int, Tensor | None, Tensor]:
    """(factor, low, offset, column_sum) of `Weight` for codes (n, k) from 0, of which ``offset`` (one for
    all or (n, groups)) and ``half`` a step make levels. sums: of the codes by channel and group, where
    known."""
    (n, k), factor = codes.shape, 2 if half else 1
    starts = range(0, max(k, 1), group_size)
    if sums is None:
        sums = torch.stack(
            [codes[:, s : s + group_size].sum(1, dtype=torch.int32) for s in starts], dim=1
        ).view(n, len(starts))
    lengths = torch.tensor([min(group_size, k - s) for s in starts], dtype=torch.int32)
    if isinstance(offset, int):
        low = factor * offset + half
        return factor, low, None, by_panel(factor * sums + low * lengths)
    offsets = (factor * offset.to(torch.int32) + int(half)).expand(n, len(starts))
    return factor, 0, by_panel(offsets), by_panel(factor * sums + offsets * lengths)
