"""Output matching: the weight that gives the float model's outputs from the inputs that really come.

LoaQ (2509.06297) in its residual form. X (tokens, in) are a layer's inputs in the float model, X̂ those in the
partly quantized one; R and R̂ (tokens, out) what its output is added to. With W as (in, out), as papers write
it, min over Q of |R̂ + X̂Q - R - XW|² has, before rounding, the solution

    W* = W + (H + μI)⁻¹ (α C W + β G)      H = X̂ᵀX̂,  C = X̂ᵀ(X - X̂),  G = X̂ᵀ(R - R̂)

at α = β = 1, μ = 0; β = 0 for a layer whose output is no summand of a residual stream. Any rounding follows,
with the Hessian H. Here W is (out, in), as torch stores it.

Three things differ from the plain solution. μ, a share of mean(diag H), shrinks the correction and not the
weight: equal streams change nothing. α and β in [0, 1] are found on rows that were held out. And where the
sum goes through a norm, each token counts by 1/rms² of the float model's sum: the norm with its factor frozen
on both sides. (With the factor of each side's own the sums would need a third stream: the paper is not clear
which of the two it means.)

All are sums over tokens: activations are never kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmith.post_training.rounding import damped


@dataclass
class Moments:
    """Sums over tokens: H (in, in), C (in, in), G (in, out) and the energy of what is to be matched,
    |XW + R - R̂|², with the number of rows; float64. C and G are None where nobody looked."""

    hessian: Tensor
    cross: Tensor | None
    residual: Tensor | None
    energy: float
    rows: int

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.hessian + other.hessian,
            None if self.cross is None or other.cross is None else self.cross + other.cross,
            None if self.residual is None or other.residual is None else self.residual + other.residual,
            self.energy + other.energy,
            self.rows + other.rows,
        )


def moments(
    inputs: Tensor,
    difference: Tensor | None = None,
    residual: Tensor | None = None,
    weights: Tensor | None = None,
    energy: float = 0.0,
) -> Moments:
    """Of X̂ (tokens, in), X - X̂ (tokens, in), R - R̂ (tokens, out), and a weight of each token (tokens,)."""
    left = (inputs if weights is None else inputs * weights[:, None]).T
    return Moments(
        (left @ inputs).double(),
        None if difference is None else (left @ difference).double(),
        None if residual is None else (left @ residual).double(),
        energy,
        len(inputs),
    )


def correction(weight: Tensor, of: Moments, damping: float) -> tuple[Tensor, Tensor]:
    """(A, B), both (out, in), float64, with W* = W + αA + βB: the answers to C W and to G."""
    w, h = weight.double(), damped(of.hessian, damping)
    zero = torch.zeros_like(w)
    sides = [zero.T if of.cross is None else of.cross @ w.T, zero.T if of.residual is None else of.residual]
    factor = torch.linalg.cholesky(h)
    a, b = (torch.cholesky_solve(side, factor).T if bool(side.any()) else zero for side in sides)
    return a, b


def relative_error(values: Tensor, weight: Tensor, of: Moments) -> float:
    """|X̂Q - (XW + R - R̂)|² of values Q (out, in) as a share of the energy of what is to be matched."""
    q, w = values.double(), weight.double()
    target = w @ of.hessian if of.cross is None else w @ (of.hessian + of.cross).T
    if of.residual is not None:
        target = target + of.residual.T
    squares = (q @ of.hessian * q).sum() - 2 * (q * target).sum() + of.energy
    return max(float(squares), 0.0) / max(of.energy, torch.finfo(torch.float64).tiny)


def choose(weight: Tensor, directions: tuple[Tensor, Tensor], held: Moments) -> tuple[float, float]:
    """The (α, β) in [0, 1]² of least error on held-out rows, before rounding; exact.

    The error is a quadratic in (α, β), so that its least value on the square is inside, on an edge or in a
    corner. A direction that changes nothing there keeps 1/2.
    """
    a, b = directions
    ha, hb = a @ held.hessian, b @ held.hessian
    aa, ab, bb = (float((x * y).sum()) for x, y in ((ha, a), (ha, b), (hb, b)))
    w = weight.double()
    wanted = torch.zeros_like(w) if held.cross is None else w @ held.cross.T
    if held.residual is not None:
        wanted = wanted + held.residual.T
    ca, cb = float((a * wanted).sum()), float((b * wanted).sum())

    def loss(alpha: float, beta: float) -> float:
        quadratic = aa * alpha**2 + 2 * ab * alpha * beta + bb * beta**2
        return quadratic - 2 * (ca * alpha + cb * beta)

    def least(slope: float, curvature: float) -> float:
        return min(max(slope / curvature, 0.0), 1.0) if curvature > 0 else 0.5

    points = [(least(ca - ab * beta, aa), beta) for beta in (0.0, 1.0)]
    points += [(alpha, least(cb - ab * alpha, bb)) for alpha in (0.0, 1.0)]
    determinant = aa * bb - ab * ab
    if determinant > 1e-12 * aa * bb:
        inside = ((ca * bb - cb * ab) / determinant, (cb * aa - ca * ab) / determinant)
        if all(0 <= x <= 1 for x in inside):
            points.append(inside)
    alpha, beta = min(points, key=lambda point: loss(*point))
    return (alpha if aa > 0 else 0.5), (beta if bb > 0 else 0.5)


def matched(weight: Tensor, of: Moments, alpha: float, beta: float, damping: float) -> Tensor:
    """W* (out, in) of weight W (out, in), in W's dtype."""
    a, b = correction(weight, of, damping)
    return (weight.double() + alpha * a + beta * b).to(weight.dtype)
