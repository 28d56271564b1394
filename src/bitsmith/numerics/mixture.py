"""A mixture of fake-quantized values: y = sum over k of share_k Q_k(x), each with a grid of its own.

The same as calling `affine.fake_quantize` for each grid, in one node of autograd: <g, Q_k>, which the shares
receive, is one of the sums that the scales need anyway, and x receives one gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bitsmith.numerics.affine import EDGE, inner, levels


def fake_quantize_mixture(
    x: Tensor,
    share: Tensor,
    scale: Tensor,
    exponent: Tensor,
    low: Tensor,
    high: Tensor,
    half: Tensor | None,
    *,
    clip_only: bool = False,
    count: int = 1,
) -> Tensor:
    """sum over k of share[k] Q_k(x), float32; all but x stacked over the K grids, each entry broadcasts
    against x. Gradients as in `fake_quantize` (estimator "clipped"); share[k] receives <g, Q_k(x)>."""
    return _Mixture.apply(x, share, scale, exponent, low, high, half, clip_only, count)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        share: Tensor,
        scale: Tensor,
        exponent: Tensor,
        low: Tensor,
        high: Tensor,
        half: Tensor | None,
        clip_only: bool,
        count: int,
    ) -> Tensor:
        s = scale * torch.exp2(exponent)
        parts = []
        for k in range(len(s)):
            own = None if half is None else half[k]
            parts.append(levels(x / s[k], low[k], high[k], own, None, None).mul_(s[k]))
        y = parts[0] * share[0]
        for k in range(1, len(s)):
            y.addcmul_(parts[k], share[k])
        ctx.save_for_backward(x, share, s, high, *parts)
        ctx.clip_only, ctx.count = clip_only, count
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, share, s, high, *parts = ctx.saved_tensors
        d_share, d_exponent, d_x = [], [], None
        for k, y in enumerate(parts):
            error = (y - x).div_(s[k])
            gm = torch.ops.aten.hardtanh_backward.default(g, error, -0.5 - EDGE, 0.5 + EDGE)
            on_y = inner(g, y, share[k])
            d_share.append(on_y)
            if ctx.needs_input_grad[3]:
                whole = on_y if share[k].shape == s[k].shape else inner(g, y, s[k])
                d_exponent.append((whole - inner(gm, y if ctx.clip_only else x, s[k])) * share[k])
            d_x = gm.mul_(share[k]) if d_x is None else d_x.addcmul_(gm, share[k])
        d_range = None
        if d_exponent:
            d_range = torch.stack(d_exponent) * (
                high.clamp(min=1).rsqrt() * (math.log(2) / math.sqrt(ctx.count))
            )
        return d_x, torch.stack(d_share), None, d_range, None, None, None, None, None
