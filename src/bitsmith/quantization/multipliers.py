"""Multipliers: what holds limits while training, an augmented Lagrangian that is a PI controller as well.

With g = log(cost / limit) the loss gets [lambda + rho g]_+ g, its bracket detached, and after each step
lambda <- [lambda + eta g]_+. The log makes the pressure a matter of ratios, equal for bits and for bytes;
rho g answers at once, where lambda alone would swing about the limit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Multipliers(nn.Module):
    """One multiplier for each of the limits ``kinds``; rate: eta, damping: rho.

    two_sided: the cost is to be *at* the limit, so that lambda and its bracket may be negative.
    """

    value: Tensor
    used: Tensor

    def __init__(self, kinds: Sequence[str], rate: float, damping: float, two_sided: bool = False) -> None:
        super().__init__()
        self.kinds, self.rate, self.damping = tuple(kinds), rate, damping
        self.floor = -float("inf") if two_sided else 0.0
        self.register_buffer("value", torch.zeros(len(self.kinds)))
        self.register_buffer("used", torch.ones(len(self.kinds)))

    @torch.no_grad()
    def pressure(self, used: Tensor) -> Tensor:
        """d penalty / d log(used), (B,), of the costs over their limits ``used`` (B,), which are kept."""
        self.used.copy_(used)
        return torch.add(self.value, self.used.log(), alpha=self.damping).clamp_(min=self.floor)

    @torch.no_grad()
    def advance(self) -> None:
        """lambda <- [lambda + eta g]_+ with the costs that `pressure` saw."""
        self.value.add_(self.used.log(), alpha=self.rate).clamp_(min=self.floor)

    def scalars(self) -> dict[str, Tensor]:
        """multiplier_KIND and used_KIND of every limit, 0-D."""
        values = {f"multiplier_{kind}": v for kind, v in zip(self.kinds, self.value, strict=True)}
        return values | {f"used_{kind}": v for kind, v in zip(self.kinds, self.used, strict=True)}
