"""The same integers by torch, where the library cannot be built; the twin that the tests hold it against.

A weight is kept as one byte a code. What multiplies bytes is handed in (torch_products.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitsmith.kernels.geometry import Geometry
from bitsmith.kernels.operands import (
    MOST_INPUTS,
    Activations,
    Codes,
    Step,
    Weight,
    by_panel,
    pack_nibbles,
    unpack_nibbles,
    weight_parameters,
)
from bitsmith.kernels.torch_products import ByteProduct, by_float_blocks
from bitsmith.numerics.affine import quantize
from bitsmith.numerics.blocks import to_groups
from bitsmith.numerics.calibrate import SMALLEST_STEP, range_of
from bitsmith.numerics.pack import pack_bytes, unpack_at
from bitsmith.numerics.pack import unpack as unpack_stream
from bitsmith.numerics.rounding import hash_uniform


def _float_blocks(bits: int) -> ByteProduct:
    return by_float_blocks


class TorchPath:
    """Products of integers from torch's operators. ``product_for``: bits -> an exact product of bytes."""

    name = "torch"

    def __init__(self, product_for: Callable[[int], ByteProduct] = _float_blocks, reason: str = "") -> None:
        """``reason``: why no library runs instead, for the user."""
        self.product_for, self.reason = product_for, reason

    def pack(
        self,
        codes: Tensor,
        bits: int,
        *,
        group_size: int | None = None,
        offset: Tensor | int = 0,
        half: bool = False,
        scale: Tensor | None = None,
    ) -> Weight:
        """As `Native.pack`; codes stay a byte each, those of 8 bits moved by 128."""
        if codes.dtype == torch.int8:
            codes, offset = codes.view(torch.uint8) ^ 128, offset - 128
        size = max(1, min(group_size or codes.shape[1], codes.shape[1]))
        data = (codes ^ (128 if bits == 8 else 0)).contiguous().view(torch.int8)
        parameters = weight_parameters(codes, size, offset, half)
        scales = None if scale is None else by_panel(scale.float() * (0.5 if half else 1.0))
        return Weight((codes.shape[0], codes.shape[1]), bits, size, data, *parameters, scale=scales)

    def unpack(self, weight: Weight) -> Tensor:
        """The codes from 0: uint8 (n, k)."""
        return weight.data.view(torch.uint8) ^ (128 if weight.bits == 8 else 0)

    def decode(self, stream: Tensor, bits: int, count: int, start: int = 0) -> Tensor:
        """As `Native.decode`."""
        if not 0 <= start + bits * count <= 8 * stream.numel():
            raise ValueError(f"{count} codes of {bits} bits from bit {start} leave {stream.numel()} bytes")
        first, skipped = divmod(start, 8 * bits)
        skipped, rest = divmod(skipped, bits)
        if rest:  # behind codes of another width
            return unpack_at(stream, start + bits * torch.arange(count), bits, 0).to(torch.uint8)
        here = stream[first * bits :][: (bits * (skipped + count) + 7) // 8]
        return unpack_stream(here, bits, skipped + count, 0)[skipped:].to(torch.uint8)

    def encode(self, codes: Tensor, bits: int) -> Tensor:
        """As `Native.encode`."""
        return pack_bytes(codes, bits)

    def sums(self, x: Activations, weight: Weight, out: Tensor | None = None) -> Tensor:
        """As `Native.sums`."""
        assert weight.groups == 1
        found = self._integers(x, weight, 0)
        return found if out is None else out.add_(found)

    def values(self, x: Activations, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """As `Native.values`, in the same order of roundings."""
        if weight.scale is None:
            raise ValueError("this weight has no scale")
        scale = weight.by_channel(weight.scale)
        total = torch.zeros(x.shape[0], weight.shape[0])
        for group in range(weight.groups):
            total += self._integers(x, weight, group).float() * scale[:, group]
        if x.row_scale is not None:
            total *= x.row_scale.reshape(-1, 1)
        return total if bias is None else total + bias

    def codes(self, x: Activations, weight: Weight, to: Codes, bias: Tensor | None = None) -> Tensor:
        """As `Native.codes`."""
        return encode(self.values(x, weight, bias), to)

    def _integers(self, x: Activations, weight: Weight, group: int) -> Tensor:
        n, k = weight.shape
        if x.shape[1] != k:
            raise ValueError(f"activations {x.shape} do not meet a weight {weight.shape}")
        if k > MOST_INPUTS:
            raise ValueError(f"{k} inputs could overflow a sum of 32 bits; at most {MOST_INPUTS}")
        at = slice(group * weight.group_size, (group + 1) * weight.group_size)
        zero, a = x.zero_point, x.codes
        if x.packed:
            a = unpack_nibbles(a, *x.packed)
        elif a.dtype == torch.uint8:
            zero, a = zero - 128, (a ^ 128).view(torch.int8)
        a = a[:, at]
        row_sum = a.sum(1, dtype=torch.int32, keepdim=True)
        moved = 128 if weight.bits == 8 else 0
        sums = (
            self.product_for(weight.bits)(a, weight.data[:, at]) if n and k else row_sum.new_zeros(len(a), n)
        )
        offset = weight.low if weight.offset is None else weight.by_channel(weight.offset)[:, group]
        sums = (sums + moved * row_sum) * weight.factor + offset * row_sum
        if isinstance(zero, Tensor):
            zero = zero.reshape(-1, 1)
        return (sums - zero * weight.by_channel(weight.column_sum)[:, group]).to(torch.int32)

    def convolve(
        self, x: Activations, weight: Weight, geometry: Geometry, bias: Tensor | None = None
    ) -> Tensor:
        """As `Native.convolve`."""
        rows = self.rows(x.codes, geometry, 0, geometry.row_count(x.codes))
        operand = Activations(rows, x.zero_point, x.row_scale)
        return self.sums(operand, weight) if weight.scale is None else self.values(operand, weight, bias)

    def rows(self, image: Tensor, geometry: Geometry, first: int, count: int) -> Tensor:
        """As `Native.rows`, by indices."""
        g = geometry
        row = torch.arange(first, first + count)[:, None]
        x, y, b = row % g.columns, row // g.columns % g.rows, row // (g.columns * g.rows)
        tap = torch.arange(g.taps_y * g.taps_x)
        v = y * g.up_y + tap // g.taps_x * g.tap_y + g.shift_y
        u = x * g.up_x + tap % g.taps_x * g.tap_x + g.shift_x
        inside = (v % g.down_y == 0) & (u % g.down_x == 0) & (v >= 0) & (u >= 0)
        v, u = v // g.down_y, u // g.down_x
        inside &= (v < g.height) & (u < g.width)
        if not image.numel():
            return torch.full((count, g.inputs), g.empty, dtype=image.dtype)
        found = image[b, v.clamp(0, g.height - 1), u.clamp(0, g.width - 1)]
        empty = torch.tensor(g.empty, dtype=image.dtype)
        return torch.where(inside[..., None], found, empty).reshape(count, g.inputs)

    def quantize(
        self,
        x: Tensor,
        low: int,
        high: int,
        *,
        scale: Tensor | None = None,
        zero_point: int = 0,
        half: float = 0.0,
        asymmetric: bool = False,
    ) -> Activations:
        """As `Native.quantize`."""
        values, zero = x.float(), zero_point
        dtype = torch.uint8 if low >= 0 else torch.int8
        if scale is not None:
            made = quantize(values, scale.reshape(1), low, high, half, zero)
            return Activations(made.to(dtype), zero, scale.float().reshape(1))
        if not x.numel():
            none: Tensor | int = torch.zeros(len(x), dtype=torch.int32) if asymmetric else zero
            return Activations(torch.empty(x.shape, dtype=dtype), none, torch.full((len(x),), SMALLEST_STEP))
        found, zeros = range_of(values, [1], low, high, half, asymmetric)
        made = quantize(values, found, low, high, half, 0.0 if zeros is None else zeros)
        point = zero if zeros is None else zeros.to(torch.int32).reshape(-1)
        return Activations(made.to(dtype), point, found.reshape(-1))

    def update(self, codes: Tensor, step: Tensor, seed: int, low: int, high: int) -> None:
        """As `Native.update`."""
        noise = hash_uniform(torch.tensor([seed]), codes)
        codes.copy_(torch.floor(codes.float() - step + noise).clamp(low, high))

    def move(
        self,
        codes: Tensor,
        d: Tensor,
        step: Step,
        momentum: tuple[Tensor, Tensor] | None = None,
        residual: Tensor | None = None,
    ) -> tuple[int, int]:
        """As `Native.move`."""
        seed, momentum_seed, residual_seed = (torch.tensor([number]) for number in step.seeds)
        before = codes.float()
        if step.clip:
            d = d.masked_fill(((codes >= step.high) & (d < 0)) | ((codes <= step.low) & (d > 0)), 0.0)
        if momentum is not None:
            d = _momentum(*momentum, step.block) * step.keep + d * (1 - step.keep)
        wanted = before - (d if residual is None else d - residual.float() / 127)
        kept = wanted.clamp(step.low, step.high)
        noisy = torch.floor(wanted + hash_uniform(seed, d)).clamp(step.low, step.high)
        rounded = kept.round() if step.nearest else noisy
        error = kept - rounded
        codes.copy_(rounded)
        if residual is not None:
            left = torch.floor(error * 127 + hash_uniform(residual_seed, d))
            residual.copy_(left.clamp(-127, 127))
        if momentum is not None:
            _set_momentum(*momentum, d + error * step.carry, step.block, momentum_seed)
        return int((kept != wanted).sum()), int((rounded != before).sum())


def _momentum(codes: Tensor, scale: Tensor, block: int) -> Tensor:
    return (to_groups(codes.float(), block, False) * scale.float()[..., None]).flatten(1)[:, : codes.shape[1]]


def _set_momentum(codes: Tensor, scale: Tensor, values: Tensor, block: int, seed: Tensor) -> None:
    """Scales are rounded, so a block's largest value has some room below 127 of them."""
    blocks = to_groups(values, block, False)
    scale.copy_((blocks.abs().amax(2) * ((1 + 2.0**-7) / 127)).clamp(min=2.0**-120))
    steps = (blocks / scale.float()[..., None]).flatten(1)[:, : codes.shape[1]]
    codes.copy_(torch.floor(steps + hash_uniform(seed, values)).clamp(-127, 127))


def encode(values: Tensor, to: Codes) -> Tensor:
    """Values as codes of the grid ``to``."""
    made = quantize(values, torch.tensor(to.scale), to.low, to.high, to.half, to.zero_point)
    return pack_nibbles(made, to.low) if to.packed else made.to(to.dtype)
