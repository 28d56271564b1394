"""Gradient estimators of weights that have no latent value: what becomes of a step before it is taken.

Straight-through training has a latent weight u and a code q = round(u), and the gradient at q moves u, by a
factor that depends on where u lies. Here u is the code and what is carried besides it, in units of codes
(optim.integer: the residual, or where the momentum would bring the code if no gradient came any more). With
d the step that the gradient asks for, e = q - u:

    pure              d                                    straight-through
    clipped           d, but 0 where it would lead u off an end of the range      1308.3432, LSQ
    piecewise_linear  clipped, times 1/2 + 2 |e|           numerics.rounding.piecewise_linear
    smooth            clipped, times a tanh's slope        numerics.rounding.smooth (DSQ, 1908.05033)
    ewgs              clipped, times 1 - 1e-3 sign(d) e / steps   numerics.rounding.ewgs (2104.00903, eq. 5)
    error_noise       clipped, plus |e| rms(d) times uniform noise of variance 1: it explores where rounding
                      errs most, and its mean is d
    probabilistic     clipped; the code is drawn anew in each step from the two beside u, so that its
                      expectation is u, and a gradient at the code is one of that expectation (2412.04787).
                      Of carries it changes `residual`, whose codes are else the nearest; the others round
                      stochastically anyway

An end is one of u where a residual says what u is: the step is kept within by a clamp, `pure` is `clipped`.
Zeroing what pushes a *code* at its end outwards would leave u below it with the steps inwards alone, which
noise then walks off the end (docs/findings.md). Without a residual there is no u, and the code decides.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from bitsmith.numerics import rounding
from bitsmith.numerics.rounding import hash_uniform

Estimator = Literal["pure", "clipped", "piecewise_linear", "smooth", "ewgs", "error_noise", "probabilistic"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
FACTORS = {
    "piecewise_linear": rounding.piecewise_linear,
    "smooth": rounding.smooth,
    "ewgs": rounding.ewgs,
}
NEEDS_LATENT = (*FACTORS, "error_noise")
NOISE = 12**0.5  # times a uniform number in -1/2 .. 1/2: variance 1


def estimated(
    name: str,
    d: Tensor,
    codes: Tensor,
    carried: Tensor | None,
    low: int,
    high: int,
    seed: int,
    exact: bool = False,
) -> Tensor:
    """The step in codes that is taken for the step ``d`` (r, k), which is subtracted from int8 ``codes``;
    ``carried`` = u - q, within half a code; ``exact`` where it is a residual, and what is returned is clamped
    where u ends."""
    if name == "pure":
        return d
    if not exact:
        d = d.masked_fill(((codes == high) & (d < 0)) | ((codes == low) & (d > 0)), 0.0)
    if carried is None or name not in NEEDS_LATENT:
        return d
    if name == "error_noise":
        size = d.square().mean(1, keepdim=True).sqrt()
        return d + carried.abs() * size * (hash_uniform(torch.tensor([seed]), d) - 0.5) * NOISE
    u, steps = codes + carried, torch.tensor(float(high - low))
    return d * FACTORS[name](d, u, -carried, steps)
