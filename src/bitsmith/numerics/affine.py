"""Uniform quantization as pure functions: codes, values, and the one fake quantizer that everything calls.

Three affine forms are in use in the field; they differ at ties and in the gradient at the clip edges:

    (i)    s * (clamp(round(x/s) + z, low, high) - z)          z integer: ONNX's QuantizeLinear, and ours
    (ii)   s * (round(clamp(x/s + z, low, high)) - z)          z real: codes stay integers
    (iii)  s * clamp(round((x - b)/s), low, high) + b          b real: LSQ+ as printed

Ours is (i), with a constant ``half`` for grids without zero (numerics.grid): level = clamp(round(x/s - half),
low - z, high - z) + half, value = s * level, stored code = level - half + z. A learned z is rounded in
forward, so that what is trained is what a runtime computes.

Differences from the well-known implementations. (1) x is divided by the scale, never multiplied by its
inverse (17 % of the codes differ for inputs that lie on a grid; runtimes divide). (2) The result is the
value itself, not x + (Q - x), which misses Q in a third of the cases. (3) "Inside the grid" means that x
lies within half a step of a level (torch's fake_quantize, but for the very edge), where LSQ as printed uses
-Qn < x/s < Qp: half a step narrower, and wrong for `seq`. (4) Backward keeps x and the value, which the layer
that takes it keeps anyway: no further copy of an activation. Eager, everything else follows from their
difference in five passes over memory (an allocation costs four more, hence the in-place arithmetic); under
torch.compile and for second derivatives the same formulas stand as expressions of x.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bitsmith.numerics.rounding import SURROGATES, Estimator, hash_uniform

EDGE = 1e-4  # steps: half a step away is still inside, though 255 * s - x is off by 255 roundings of 2^-24


def quantize(
    x: Tensor,
    scale: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    half: Tensor | float = 0.0,
    zero_point: Tensor | float = 0.0,
) -> Tensor:
    """Stored codes ``clamp(round(x/scale - half) + zero_point, low, high)``: integers in a float tensor."""
    low, high = (torch.as_tensor(b, dtype=torch.float32, device=x.device) for b in (low, high))
    return torch.clamp(torch.round(x / scale - half) + zero_point, low, high)


def dequantize(
    codes: Tensor, scale: Tensor, half: Tensor | float = 0.0, zero_point: Tensor | float = 0.0
) -> Tensor:
    """Values ``scale * (codes - zero_point + half)`` of stored codes, in float32."""
    return scale * (codes.to(scale.dtype) - zero_point + half)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    half: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    exponent: Tensor | None = None,
    estimator: Estimator = "clipped",
    clip_only: bool = False,
    count: int = 1,
    seed: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """``dequantize(quantize(x))`` in float32 with gradients; every tensor broadcasts against x.

    Gradients, with g the incoming one, u = x/scale, q the level, m = 1 where x is inside the grid, else 0:
    - x: g * m times the estimator's factor (numerics.rounding);
    - scale: sum of g * (q - m u), LSQ (1902.08153, eq. 3); ``clip_only`` keeps its part outside the grid
      (PACT, 1805.06085, eq. 3); both times 1/sqrt(count * high), LSQ's gradient scale (``count`` = values per
      scale, of one sample for activations);
    - zero_point: -scale * sum of g * (1 - m), LSQ+ (2004.09576) in units of codes. It is rounded here,
      straight-through, so that what is trained is an integer that a runtime holds.

    ``exponent`` makes the scale ``scale * 2^exponent`` and takes the gradient in its stead: the learned form,
    whose chain rule is cheaper here than as operators of autograd's.

    ``seed`` (an int64 tensor of one element) turns on stochastic rounding: up with the probability that
    makes the expectation exact.

    ``share`` (ones that broadcast against x) is the weight of a grid that was drawn from several: it changes
    no value and receives <g, Q(x) - x>, the gradient of choosing this grid. The baseline x matters: without
    it the estimate carries <g, x>, which is the same for every grid.
    """
    return _FakeQuantize.apply(
        x, scale, exponent, low, high, half, zero_point, estimator, clip_only, count, seed, share
    )


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        exponent: Tensor | None,
        low: Tensor,
        high: Tensor,
        half: Tensor | None,
        zero_point: Tensor | None,
        estimator: Estimator,
        clip_only: bool,
        count: int,
        seed: Tensor | None,
        share: Tensor | None,
    ) -> Tensor:
        s = scale if exponent is None else scale * torch.exp2(exponent)
        if exponent is not None and torch.compiler.is_compiling():
            s = _materialized(s)
        y = levels(x / s, low, high, half, zero_point, seed).mul_(s)
        ctx.save_for_backward(x, scale, exponent, low, high, half, zero_point, seed, share, s, y)
        ctx.rule = (estimator, clip_only, count)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, exponent, low, high, half, zero_point, seed, share, s, y = ctx.saved_tensors
        estimator, clip_only, count = ctx.rule
        reach = 0.5 if seed is None else 1.0
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            if exponent is not None and not torch.compiler.is_compiling():
                s = scale * torch.exp2(exponent)  # with its history, for second derivatives
            u = x / s
            q = levels(u, low, high, half, zero_point, seed, keep=True)
            error = q - u
            d_share = None if share is None else inner(g, error * s, share)
            inside = error.abs() <= reach
            gm = torch.where(inside, g, 0.0)
            slope = torch.where(inside, 0.0 if clip_only else error.detach(), q)  # of the value by the scale
            d_exponent = _sum_by_parts(g * slope, s) * s if learned else None
        else:
            error = y - x
            d_share = None if share is None else inner(g, error, share)
            error.div_(s)
            # hardtanh's backward is the one operator that masks by a range in one pass
            gm = torch.ops.aten.hardtanh_backward.default(g, error, -reach - EDGE, reach + EDGE)
            d_exponent = _difference(g, y, gm, y if clip_only else x, s) if learned else None

        d_scale = d_zero_point = None
        if d_exponent is not None:
            factor = (1.0 if exponent is None else math.log(2)) / math.sqrt(count)
            d_exponent = d_exponent * (high.clamp(min=1).rsqrt() * factor)
            if exponent is None:
                d_scale, d_exponent = d_exponent / s, None
        if zero_point is not None and ctx.needs_input_grad[6]:
            d_zero_point = -s * inner(g - gm, None, s)
        d_x = g if estimator == "pure" else gm
        if estimator in SURROGATES:
            u = x / s
            d_x = d_x * SURROGATES[estimator](g, u if half is None else u - half, error, high - low)
        return d_x, d_scale, d_exponent, None, None, None, d_zero_point, None, None, None, None, d_share


def _materialized(s: Tensor) -> Tensor:
    """s, as a tensor that a compiler keeps: Inductor fuses a pointwise s into all loops that use it, forward
    and backward, and computes it anew there for each vector of x, exp2 included; what a reduction made is
    stored once."""
    return s.expand(32, *s.shape).amax(0)  # of equal numbers; fewer than 9 would be unrolled


def levels(
    u: Tensor,
    low: Tensor,
    high: Tensor,
    half: Tensor | None,
    zero_point: Tensor | None,
    seed: Tensor | None,
    *,
    keep: bool = False,
) -> Tensor:
    """Levels of u = x/scale: clamp(round(u - half), low - z, high - z) + half; in place, unless ``keep``."""
    if zero_point is not None:
        z = zero_point.round()
        low, high = low - z, high - z
    q = u.clone() if keep and (half is not None or seed is not None) else u
    if half is not None:
        q.sub_(half)
    if seed is not None:
        q.add_(hash_uniform(seed, q)).floor_()
    else:
        q = q.round() if q is u and keep else q.round_()
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        q = q.clamp(low, high)
    else:
        q = torch.minimum(torch.maximum(q, low, out=q), high, out=q)
    return q if half is None else q.add_(half)


def inner(a: Tensor, b: Tensor | None, like: Tensor) -> Tensor:
    """sum of a * b over the axes along which ``like`` is broadcast."""
    if b is not None and like.numel() == 1 and a.dtype == b.dtype and not torch.is_grad_enabled():
        if a.is_contiguous() and b.is_contiguous():
            return torch.dot(a.view(-1), b.view(-1)).view(like.shape)
        if a.ndim == 4 and a.stride() == b.stride() and a.is_contiguous(memory_format=torch.channels_last):
            count = a.numel()  # in the order of memory
            return torch.dot(a.as_strided((count,), (1,)), b.as_strided((count,), (1,))).view(like.shape)
    return (a if b is None else a * b).sum_to_size(like.shape)


def _difference(a: Tensor, b: Tensor, c: Tensor, d: Tensor, like: Tensor) -> Tensor:
    """sum of a * b - c * d over the axes along which ``like`` is broadcast."""
    if like.numel() > 1 and a.dtype == d.dtype:
        return (a * b).addcmul_(c, d, value=-1).sum_to_size(like.shape)
    return inner(a, b, like) - inner(c, d, like)


def _sum_by_parts(a: Tensor, like: Tensor) -> Tensor:
    """sum of a over the axes along which ``like`` is broadcast: where that is all of them, first over those
    that a normalization reduces (images by channel, tokens by feature), so that a compiler makes one loop of
    this sum and the normalization's two."""
    if like.numel() > 1:
        return a.sum_to_size(like.shape)
    return (a.sum((0, 2, 3)) if a.ndim == 4 else a.sum(-1)).sum().view(like.shape)
