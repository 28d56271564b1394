"""Non-uniform quantization as pure functions: a small table of levels, and a scale that multiplies them.

    Q(x) = s * table[c],   c the index of the level nearest to x / s;   the table ascends, its ends reach to 1

    powers_of_two    0 and +-2^-k, k = 0 .. 2^(b-1) - 2         2 bits -1 0 1; 3 bits 0 +-1/4 +-1/2 +-1
    levels           2^b numbers that start where Lloyd-Max puts them and train with the weights

Powers of two are those of APoT (1909.13144) as its code has them (one term): 0 and as many
magnitudes as fit b bits with a sign, 2^b - 1 levels. Its equation counts one magnitude more, 2^b + 1 levels,
which fit no b bits; INQ (1702.03044) spends one bit on zero and has half as many. A weight times an
input is a shift; but more bits only add levels near 0 (the paper's "rigid resolution"), which is why the
widths end at 4. Learned levels are LQ-Nets' (1807.10029) and LCQ's aim; here they are free numbers, not sums
of a basis or a compressing curve, and follow the loss by their gradient.

The nearest level is exact: values are sorted among the midpoints of neighbours; one on a midpoint goes down.
Gradients are those of `affine.fake_quantize`, whose formulas hold for any levels: on an evenly spaced table
both functions agree. "Inside" reaches half the outermost gap beyond the outermost level. Nothing here is for
speed: weights alone have such grids, and a table has 16 entries at most.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bitsmith.numerics.affine import inner
from bitsmith.numerics.calibrate import EMPTY, SMALLEST
from bitsmith.numerics.calibrate import calibrate as calibrate_uniform
from bitsmith.numerics.grid import TABLE_BITS, bounds

MOST = 2 ** TABLE_BITS[-1]  # entries of a table
SAMPLE = 2**20  # values of a weight that its levels are fitted to
ROUNDS = 24  # of Lloyd-Max
EXPONENTS = [
    i / 8 for i in range(-4, 33)
]  # scales tried: from 1.4 times the largest magnitude to a sixteenth


def powers_of_two(bits: int) -> Tensor:
    """The table (2^bits - 1,), ascending: 0 and +-2^-k for k = 0 .. 2^(bits-1) - 2."""
    magnitudes = torch.exp2(-torch.arange(2 ** (bits - 1) - 1, dtype=torch.float32))
    return torch.cat([-magnitudes, torch.zeros(1), magnitudes.flip(0)])


def quantize(x: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """Codes, int64: the index in ``table`` (n,), ascending, of the level nearest to x / scale."""
    return torch.bucketize(x / scale, (table[1:] + table[:-1]) / 2)


def dequantize(codes: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """Values ``scale * table[codes]`` in float32."""
    return scale * table[codes.long()]


def ordered(table: Tensor, high: Tensor) -> Tensor:
    """The levels 0 .. high of a table (n,) in ascending order, those behind as infinity: no value is near
    them. Levels that pass each other while they train change places."""
    behind = torch.arange(len(table), device=table.device) > high
    return table.masked_fill(behind, torch.inf).sort().values


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    table: Tensor,
    high: Tensor,
    *,
    exponent: Tensor | None = None,
    estimator: str = "clipped",
    count: int = 1,
    share: Tensor | None = None,
) -> Tensor:
    """``dequantize(quantize(x))`` in float32 with gradients; scale broadcasts against x. table (n,):
    `ordered` up to the index ``high`` (1,).

    Gradients, with g the incoming one, u = x/scale, q its level, m = 1 where x is inside, else 0:
    - x: g * m; "pure": g;
    - scale: sum of g * (q - m u), times 1/sqrt(count), LSQ's gradient scale (1902.08153, section 2.2) of
      levels that end at 1; to ``exponent`` in its stead where the scale is ``scale * 2^exponent``;
    - a level: sum of g * scale over the values that are nearest to it, times 1/sqrt(values);
    - share: as in `affine.fake_quantize`.
    """
    return _FakeQuantize.apply(x, scale, exponent, table, high.long(), estimator, count, share)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        exponent: Tensor | None,
        table: Tensor,
        high: Tensor,
        estimator: str,
        count: int,
        share: Tensor | None,
    ) -> Tensor:
        s = scale if exponent is None else scale * torch.exp2(exponent)
        ctx.save_for_backward(x, scale, exponent, table, high, share)
        ctx.rule = (estimator, count)
        return dequantize(quantize(x, s, table), s, table)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, exponent, table, high, share = ctx.saved_tensors
        estimator, count = ctx.rule
        s = scale if exponent is None else scale * torch.exp2(exponent)
        u = x / s
        code = quantize(x, s, table)
        q = table[code]
        below = table[0] - (table[1] - table[0]) / 2
        top, next_to_top = table.index_select(0, high), table.index_select(0, high - 1)
        inside = (u >= below) & (u <= top + (top - next_to_top) / 2)
        gm = torch.where(inside, g, 0.0)

        d_scale = d_exponent = d_table = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            slope = inner(g, torch.where(inside, q - u.detach(), q), s) / math.sqrt(count)
            d_scale, d_exponent = (slope, None) if exponent is None else (None, slope * s * math.log(2))
        if ctx.needs_input_grad[3]:
            of_values = (g * s).reshape(-1) / math.sqrt(max(x.numel(), 1))
            d_table = torch.zeros_like(table).index_add(0, code.reshape(-1), of_values)
        d_share = None if share is None else inner(g, q * s - x, share)
        return g if estimator == "pure" else gm, d_scale, d_exponent, d_table, None, None, None, d_share


@torch.no_grad()
def fit(values: Tensor, grid: str, bits: int, calibration: str) -> tuple[Tensor, Tensor]:
    """Where a site starts: values (channels, n), finite -> scale (channels,) > 0 and the table (levels,).

    Powers of two, "minmax": the largest magnitude of a channel is the outermost level; "mse": the best of
    some scales by squared error. Levels: Lloyd-Max from the uniform grid of that calibration on, so that the
    squared error is never above that one's, and from quantiles, as levels may be empty there; the better one.
    With "mse" scales move as well.
    """
    x = values.float()
    if grid == "powers_of_two":
        table = powers_of_two(bits).to(x.device)
        largest = x.abs().amax(1)
        return (_usable(largest) if calibration == "minmax" else best_scale(x, table)), table
    low, high, _ = bounds("symmetric", bits)
    scale, _ = calibrate_uniform(calibration, x, low, high)
    even = torch.arange(low, high + 1, dtype=torch.float32, device=x.device)
    spread = (_sampled(x) / scale[:, None]).flatten().sort().values
    middles = (2 * torch.arange(len(even), device=x.device) + 1) * len(spread) // (2 * len(even))
    found = [lloyd_max(x, scale, t, scales=calibration == "mse") for t in (even, spread[middles])]
    table, scale = min(found, key=lambda one: float(_errors(x, one[1], one[0]).sum()))
    reach = table.abs().max().clamp(min=SMALLEST)
    return _usable(scale * reach), table / reach


def best_scale(x: Tensor, table: Tensor) -> Tensor:
    """x (channels, n): of each channel the scale of least squared error for this table among EXPONENTS and
    what least squares makes of each."""
    largest = _usable(x.abs().amax(1) / table.abs().max())
    best, least = largest, torch.full_like(largest, torch.inf)
    for exponent in EXPONENTS:
        scale = largest * 2**-exponent
        for trial in (scale, refitted(x, scale, table)):
            error = _errors(x, trial, table)
            best, least = torch.where(error < least, trial, best), torch.minimum(error, least)
    return best


def refitted(x: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """The scales (channels,) of least squared error for the codes that x (channels, n) has at ``scale``:
    sum of x l over sum of l^2; where that is no positive number, as it was."""
    level = table[quantize(x, scale[:, None], table)]
    found = torch.linalg.vecdot(x, level) / torch.linalg.vecdot(level, level)
    return torch.where((found > SMALLEST) & found.isfinite(), found, scale)


def lloyd_max(x: Tensor, scale: Tensor, table: Tensor, *, scales: bool = True) -> tuple[Tensor, Tensor]:
    """(table, scale) from those given on: codes, levels and scales in turn, each the best for the other two,
    so that the squared error falls. x (channels, n); of a level: sum of s x over sum of s^2 of its values.
    """
    at = _sampled(x)
    for _ in range(ROUNDS):
        codes = quantize(at, scale[:, None], table).reshape(-1)
        s = scale[:, None].expand_as(at)
        weight, total = (torch.zeros_like(table, dtype=torch.float64) for _ in range(2))
        weight.index_add_(0, codes, s.reshape(-1).double().square())
        total.index_add_(0, codes, (s * at).reshape(-1).double())
        table = torch.where(weight > 0, total / weight, table.double()).float()  # an empty one stays
        table = table.sort().values  # equal levels may have been rounded apart
        if scales:
            scale = refitted(x, scale, table)
    return table, scale


def _errors(x: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """Squared error of each channel of x (channels, n): (channels,)."""
    return (dequantize(quantize(x, scale[:, None], table), scale[:, None], table) - x).square().sum(1)


def _sampled(x: Tensor) -> Tensor:
    """Of each channel every n-th value, about SAMPLE in all."""
    return x[:, :: max(1, math.ceil(x.numel() / SAMPLE))]


def _usable(scale: Tensor) -> Tensor:
    return torch.where(scale > SMALLEST, scale, EMPTY)
