"""Rounding a weight to its grid by what its inputs are: nearest, GPTQ, GPTAQ, Qronos.

Pure functions of one signature. A weight is (out, in); X̂ (tokens, in) are the inputs that it will be
multiplied with, X those of the float model:

    H = X̂ᵀX̂                  hessian, (in, in)
    C = X̂ᵀ(X - X̂)             cross, (in, in); zero where both streams agree
    H⁻¹ = UᵀU                 U upper triangular, of H + damping · mean(diag H) · I

All but nearest go column by column and let the columns that are still free make up for the rounding of the
ones that are done. As U's trailing part belongs to the inverse of H's trailing part, one factorization
serves all steps.

- nearest: each weight by itself.
- gptq (2210.17323): q_j = Q(w_j), then w_r -= (w_j - q_j) / U_jj · U_jr for the rest r.
- gptaq (2504.02692): and w_r += w_j P_jr with P = ((Cᵀ Uᵀ) ∘ strictly upper) U, which makes up for column
  j's share of the error in the inputs. The authors' own code takes a quarter of P (``correction``), the paper
  all of it.
- qronos (2505.11695): q_1 = Q((G_1 w - H_1r w_r) / H_11) with G = H + C, the best first column while the rest
  stays; then w_r = H_rr⁻¹(G_r w - H_r1 q_1), the best rest; from then on GPTQ.

Differences from the well-known implementations: scales are settled before and never move within a run, so
that an order of the columns goes with groups, too; Qronos is damped by adding the same multiple of I to G and
H, so that equal streams leave GPTQ's result for any damping; and an input that is always 0 keeps its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitsmith.errors import DataError
from bitsmith.numerics import affine, levels

BLOCK = 128  # columns whose updates of the rest are done at once


class Grid(NamedTuple):
    """The grid of a weight (out, in): every field is a number or broadcasts against (out, in).

    The value of a code c, an integer from low to high, is scale * (c - zero_point + half); with a table
    (levels,) it is scale * table[c].
    """

    scale: Tensor
    low: Any
    high: Any
    half: Any = 0.0
    zero_point: Any = 0.0
    table: Any = None

    def columns(self, which: Any) -> Grid:
        """The grid of some columns, by an index or a slice of them."""
        return Grid(
            *(t[:, which] if isinstance(t, Tensor) and t.ndim > 1 and t.shape[1] > 1 else t for t in self)
        )

    def nearest(self, values: Tensor) -> Tensor:
        """The values (out, in) on the grid."""
        if self.table is not None:
            return levels.dequantize(levels.quantize(values, self.scale, self.table), self.scale, self.table)
        codes = affine.quantize(values, self.scale, self.low, self.high, self.half, self.zero_point)
        return affine.dequantize(codes, self.scale, self.half, self.zero_point)


def nearest(weight: Tensor, grid: Grid, hessian: Tensor, cross: Tensor | None = None, **_: Any) -> Tensor:
    """Each weight (out, in) by itself; the inputs do not matter."""
    return grid.nearest(weight)


def gptq(
    weight: Tensor,
    grid: Grid,
    hessian: Tensor,
    cross: Tensor | None = None,
    *,
    damping: float = 0.01,
    order: bool = True,
    block: int = BLOCK,
) -> Tensor:
    """2210.17323, algorithm 1; weight (out, in) -> values on the grid, the same shape.

    order: columns of large diag(H) first. Raises DataError where H is singular and nothing is damped.
    """
    at = _order(hessian, order)
    u = upper_factor(hessian[at][:, at], damping)
    return _unordered(_sweep(weight[:, at], grid.columns(at), u, None, block), at)


def gptaq(
    weight: Tensor,
    grid: Grid,
    hessian: Tensor,
    cross: Tensor | None = None,
    *,
    damping: float = 0.01,
    order: bool = True,
    block: int = BLOCK,
    correction: float = 1.0,
) -> Tensor:
    """2504.02692, algorithm 1; as `gptq`, with the cross term and the factor ``correction`` of P."""
    if cross is None:
        return gptq(weight, grid, hessian, damping=damping, order=order, block=block)
    at = _order(hessian, order)
    u = upper_factor(hessian[at][:, at], damping)
    asymmetry = cross.T[at][:, at].to(u.dtype)
    p = correction * torch.triu(asymmetry @ u.T, diagonal=1) @ u
    return _unordered(_sweep(weight[:, at], grid.columns(at), u, p, block), at)


def qronos(
    weight: Tensor,
    grid: Grid,
    hessian: Tensor,
    cross: Tensor | None = None,
    *,
    damping: float = 0.01,
    order: bool = True,
    block: int = BLOCK,
) -> Tensor:
    """2505.11695, theorem 2 (the form that needs H and G alone); as `gptq`, with the cross term."""
    if cross is None:
        return gptq(weight, grid, hessian, damping=damping, order=order, block=block)
    at = _order(hessian, order)
    h = damped(hessian[at][:, at], damping)
    u, c = upper_factor(h, 0.0), cross[at][:, at].to(h.dtype)
    w = weight[:, at].to(h.dtype)
    moved = w @ (h + c).T  # G w
    first = (moved[:, :1] - w[:, 1:] @ h[1:, :1]) / h[0, 0]
    q = grid.columns(at[:1]).nearest(first.to(weight.dtype))
    rest = (moved[:, 1:] - q.to(h.dtype) * h[0, 1:]) @ u[1:, 1:].T @ u[1:, 1:]
    swept = _sweep(rest.to(weight.dtype), grid.columns(at[1:]), u[1:, 1:], None, block)
    return _unordered(torch.cat([q, swept], 1), at)


Rounding = Callable[..., Tensor]
ROUNDINGS: dict[str, Rounding] = {"nearest": nearest, "gptq": gptq, "gptaq": gptaq, "qronos": qronos}


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping · mean(diag H) · I, in float64; 1 on the diagonal of an input that is always 0, which keeps
    its weight out of everything."""
    h = hessian.double()
    diagonal = h.diagonal()
    extra = torch.where(diagonal > 0, damping * diagonal.mean(), 1.0)
    return h + torch.diag(extra)


def upper_factor(hessian: Tensor, damping: float) -> Tensor:
    """U (in, in), float64, upper triangular with UᵀU = (H + damping)⁻¹."""
    h = damped(hessian, damping)
    factor, failed = torch.linalg.cholesky_ex(h)
    if not failed:
        inverse = torch.cholesky_inverse(factor)
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if failed:
        raise DataError(
            "the inputs of this layer do not determine its outputs",
            where="hessian",
            got=f"a singular matrix of {len(h)} inputs",
            remedy="Give more calibration rows than the layer has inputs, or a damping above 0",
        )
    return upper


def _sweep(weight: Tensor, grid: Grid, u: Tensor, p: Tensor | None, block: int) -> Tensor:
    """Round the columns of weight (out, in) one after the other and correct those that follow."""
    w, q = weight.to(u.dtype, copy=True), torch.empty_like(weight)
    count = w.shape[1]
    for start in range(0, count, block):
        stop = min(start + block, count)
        errors = w.new_empty(len(w), stop - start)
        found = w.new_empty(len(w), stop - start)  # each column as it was when it was rounded
        for j in range(start, stop):
            found[:, j - start] = w[:, j]
            q[:, j : j + 1] = grid.columns(slice(j, j + 1)).nearest(w[:, j : j + 1].to(weight.dtype))
            errors[:, j - start] = (w[:, j] - q[:, j]) / u[j, j]
            w[:, j + 1 : stop] -= torch.outer(errors[:, j - start], u[j, j + 1 : stop])
            if p is not None:
                w[:, j + 1 : stop] += torch.outer(found[:, j - start], p[j, j + 1 : stop])
        w[:, stop:] -= errors @ u[start:stop, stop:]
        if p is not None:
            w[:, stop:] += found @ p[start:stop, stop:]
    return q


def _order(hessian: Tensor, order: bool) -> Tensor:
    diagonal = hessian.diagonal()
    if order:
        return diagonal.argsort(descending=True, stable=True)
    return torch.arange(len(diagonal), device=diagonal.device)


def _unordered(values: Tensor, at: Tensor) -> Tensor:
    return torch.empty_like(values).index_copy_(1, at, values)
