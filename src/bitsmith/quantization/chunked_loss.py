"""Cross-entropy of a head's logits that never exist at once.

    loss = mean over tokens of  logsumexp_v(h W_v) - h W_y

Of a layer that trains on integers the vocabulary is cut: forward goes through W in chunks of rows and keeps
h as codes and one logsumexp a token; backward makes a chunk's logits again, and of them dX and the rows'
dW, which the optimizer takes at once. No gradient of W is there as a whole, and the layer runs once, as
integer optimizers want it: five products instead of three. Any other head, float or prepared, is called on
chunks of tokens and called again in backward (checkpointing, 1604.06174): four products, and its weight's
gradient is where it always is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from bitsmith.errors import DataError
from bitsmith.kernels.choose import best
from bitsmith.numerics.rounding import mix
from bitsmith.quantization.integer_codes import matrix_shape, operand, rows_at_once
from bitsmith.quantization.integer_gradients import (
    WeightGradient,
    linear_input_gradient,
    linear_weight_gradient,
)
from bitsmith.quantization.integer_training import (
    IntLinear,
    codes_of,
    inside,
    keep,
    kept_codes,
    range_of,
)

IGNORED = -100
LOGITS = 2**20  # at one moment, of a head that is called


def chunked_cross_entropy(hidden: Tensor, head: nn.Module, targets: Tensor, ignored: int = IGNORED) -> Tensor:
    """The mean cross-entropy of ``head(hidden)``, hidden (..., width), and targets (...), of which
    ``ignored`` ones do not count. Raises DataError where shapes differ or nothing counts."""
    if hidden.shape[:-1] != targets.shape or not bool((targets != ignored).any()):
        raise DataError(
            "there is nothing to predict",
            where="chunked_cross_entropy",
            got=f"targets {tuple(targets.shape)} of hidden {tuple(hidden.shape)}",
            expected="a target for each token, one of which is not ignored",
        )
    rows, y = hidden.flatten(0, -2), targets.flatten()
    if isinstance(head, IntLinear):
        loss: Tensor = _IntHead.apply(rows, head.bias, head._anchor(), head, y, ignored)
        return loss
    size = max(LOGITS // max(int(getattr(head, "out_features", 1)), 1), 1)
    total = rows.new_zeros(())
    for part, wanted in zip(rows.split(size), y.split(size), strict=True):
        total = total + checkpoint(_summed, head, part, wanted, ignored, use_reentrant=False)
    return total / (y != ignored).sum()


def _summed(head: nn.Module, hidden: Tensor, y: Tensor, ignored: int) -> Tensor:
    return F.cross_entropy(head(hidden), y, ignore_index=ignored, reduction="sum")


class _IntHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        anchor: Tensor | None,
        layer: IntLinear,
        y: Tensor,
        ignored: int,
    ) -> Tensor:
        codes, kept = codes_of(x, layer.input, best())
        total, own = x.new_full((len(x),), float("-inf")), x.new_zeros(len(x))
        for start, stop in _chunks(layer):
            logits = best().values(
                codes, operand(layer.weight, best(), start, stop), _part(bias, start, stop)
            )
            total = torch.logaddexp(total, logits.logsumexp(1))
            here = ((y >= start) & (y < stop)).nonzero().flatten()
            own[here] = logits[here, y[here] - start]
        counts = y != ignored
        ctx.layer, ctx.shape = layer, x.shape
        keep(ctx, codes, kept, total, y, counts / counts.sum(), torch.empty(0) if bias is None else bias)
        return torch.where(counts, total - own, 0.0).sum() / counts.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        layer, backend = ctx.layer, best()
        x = kept_codes(ctx, layer.input, ctx.shape)
        total, y, share, bias = ctx.saved_tensors[3:]
        dx, dbias = torch.zeros(ctx.shape), torch.zeros_like(bias)
        share = share * dloss

        def block(start: int, stop: int) -> Tensor:
            """dW of these rows, still as they were in forward; what they give to dX is added there."""
            at, settings = (
                _part(bias, start, stop),
                (layer.gradients, mix(layer.seed, start), backend, layer.name),
            )
            g = backend.values(x, operand(layer.weight, backend, start, stop), at)
            g.sub_(total[:, None]).exp_()
            here = ((y >= start) & (y < stop)).nonzero().flatten()
            g[here, y[here] - start] -= 1
            g.mul_(share[:, None])
            if ctx.needs_input_grad[0]:
                dx.add_(linear_input_gradient(g, layer.weight, *settings, start))
            if ctx.needs_input_grad[1]:
                dbias[start:stop] = g.sum(0)
            if not layer.trainable:
                return g
            grid = range_of(layer.input)[:2]
            made = linear_weight_gradient(g, x, grid, settings[0], layer.hadamard, *settings[1:])
            return made.block(0, stop - start)

        if layer.trainable:
            layer._give(WeightGradient(block))
        else:
            for start, stop in _chunks(layer):
                block(start, stop)
        dx = inside(dx, x.codes, layer.input)
        return dx, dbias if ctx.needs_input_grad[1] else None, None, None, None, None


def _chunks(layer: IntLinear) -> list[tuple[int, int]]:
    rows, inputs = matrix_shape(layer.weight)
    size = rows_at_once(inputs)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _part(bias: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if bias is None or not len(bias) else bias[start:stop]
