"""How far a tensor is from what it should be, and the gradient of that in closed form.

With e = a - reference and m the mean square of ``level`` over a sample,

    mse      mean e^2 / m           huber    mean h(e / sqrt(m)),  h(u) = u^2 up to |u| = 1, then 2|u| - 1
    cosine   1 - <a, reference> / (|a| |reference|)

each the mean over the samples, the first axis. Without a level m is 1. A sample's error is divided by the
sample's own m, not by the batch's: so the errors of micro-batches, weighted by their shares, sum to that of
their batch, and those of ranks likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOSSES = ("mse", "cosine", "huber")
SMALLEST = 1e-12  # mean square below which a sample counts as empty


def output_error(a: Tensor, reference: Tensor, level: Tensor | None, loss: str = "mse") -> Tensor:
    """The error of ``a`` (N, ...), a scalar; ``reference`` and ``level``, of its shape, are constants."""
    a, reference = a.float(), reference.detach().float()
    if loss == "cosine":
        dot = (a * reference).sum(_axes(a))
        return (1 - dot / (_norm(a) * _norm(reference)).view(-1)).mean()
    u = (a - reference) / _root(level, a)
    if loss == "huber":
        return torch.where(u.abs() <= 1, u.square(), 2 * u.abs() - 1).mean()
    return u.square().mean()


@torch.no_grad()
def output_error_gradient(
    a: Tensor, reference: Tensor, level: Tensor | None, loss: str = "mse", factor: Tensor | float = 1.0
) -> Tensor:
    """``factor`` (0-D) times d output_error / d a, in the shape of ``a``, float32."""
    a, reference = a.float(), reference.float()
    if loss == "cosine":
        norm, other = _norm(a), _norm(reference)
        dot = (a * reference).sum(_axes(a), keepdim=True)
        return (a * (dot / norm.square()) - reference) * (factor / (norm * other * len(norm)))
    root = _root(level, a)
    if loss == "huber":
        return ((a - reference) / root).clamp_(-1, 1) * (factor * 2 / (root * a.numel()))
    return (a - reference) * (factor * 2 / (root.square() * a.numel()))


def _axes(a: Tensor) -> tuple[int, ...]:
    """All but the first; of a single sample without a batch its only one."""
    return tuple(range(1, a.ndim)) or (0,)


def _norm(a: Tensor) -> Tensor:
    """|a| of every sample, (N, 1, ...)."""
    norm: Tensor = torch.linalg.vector_norm(a, dim=_axes(a), keepdim=True)
    return norm.clamp(min=(SMALLEST * a[:1].numel()) ** 0.5)


def _root(level: Tensor | None, a: Tensor) -> Tensor:
    """sqrt(m) of every sample, (N, 1, ...)."""
    if level is None:
        return a.new_ones(())
    per_sample = a[:1].numel() if a.ndim > 1 else a.numel()
    return _norm(level.detach().float()) / per_sample**0.5
