"""What integer training does to whole matrices of floats: in one pass by the library, else by torch's
operators.

Codes and steps are equal on every backend, bit for bit. Sums of a step are made in double precision, in an
order that the library fixes and torch does not: as float32 they differ in about one of 10^8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmith.kernels.choose import Backend
from bitsmith.kernels.native import Native, pointer
from bitsmith.numerics.rounding import hash_uniform, piecewise_linear

TINY = torch.finfo(torch.float32).tiny


def stochastic(
    backend: Backend,
    x: Tensor,
    high: int,
    seed: int,
    factor: Tensor | None = None,
    *,
    by_column: bool = False,
) -> tuple[Tensor, Tensor]:
    """x (m, k) as int8 codes of -high .. high and their scales, rounded so that the expectation over seeds
    is x: a scale for each row, x times ``factor`` (k,) before. ``by_column``: a scale for each column,
    factor (m,), and codes (k, m). Where x is not finite, a scale is not."""
    m, k = x.shape
    values = x.float().contiguous()
    factor = None if factor is None else factor.float().contiguous()
    if factor is not None and len(factor) != (m if by_column else k):
        raise ValueError(f"{len(factor)} factors for {'rows' if by_column else 'columns'} of {m} x {k}")
    if isinstance(backend, Native):
        shape = (k, m) if by_column else (m, k)
        codes, scale = torch.empty(shape, dtype=torch.int8), torch.empty(shape[0])
        backend.function("stochastic")(
            pointer(values),
            None if factor is None else pointer(factor),
            m,
            k,
            by_column,
            seed,
            high,
            TINY,
            pointer(scale),
            pointer(codes),
            torch.get_num_threads(),
        )
        return codes, scale
    if factor is not None:
        values = values * (factor[:, None] if by_column else factor)
    axis = 0 if by_column else 1
    largest = values.abs().amax(axis, keepdim=True) if values.numel() else values.sum(axis, keepdim=True)
    scale = (largest / high).clamp(min=TINY)
    drawn = torch.floor(values / scale + hash_uniform(torch.tensor([seed]), values))
    codes = drawn.clamp(-high, high).nan_to_num(-high).to(torch.int8)
    return codes.t().contiguous() if by_column else codes, scale.flatten()


def aim(
    backend: Backend,
    g: Tensor,
    codes: Tensor,
    row: Tensor,
    column: Tensor | None = None,
    *,
    group_size: int | None = None,
    half: float = 0.0,
    decay: float = 0.0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a gradient g (r, k) asks of codes (r, k), int8, in codes:

        d = g row column;   d' = (d + level decay) (1/2 + 2 min(|residual| / 127, 1/2))      level = code +
        half

    row (r, groups), column (k,); the last factor, that of `piecewise_linear`, where a residual is given. d',
    float32, and the sums over groups of level d and of level^2: float32 (r, groups).
    """
    g = g.float().contiguous()
    (r, k), groups = g.shape, row.shape[1]
    size = k if group_size is None else group_size
    given = [t for t in (g, codes, residual) if t is not None]
    wrong = any(t.shape != (r, k) or not t.is_contiguous() for t in given) or len(row) != r
    if wrong or groups != max(1, -(-k // max(size, 1))) or (column is not None and len(column) != k):
        raise ValueError("gradient, codes, residual and factors do not have one shape")
    if isinstance(backend, Native):
        made, sums = torch.empty(r, k), torch.zeros(2, r, groups, dtype=torch.float64)
        rows, columns = row.float().contiguous(), None if column is None else column.float().contiguous()
        backend.function("aim")(
            pointer(g),
            pointer(made),
            pointer(codes, torch.int8),
            None if residual is None else pointer(residual, torch.int8),
            pointer(rows),
            None if columns is None else pointer(columns),
            r,
            k,
            size,
            half,
            decay,
            pointer(sums[0]),
            pointer(sums[1]),
            torch.get_num_threads(),
        )
        dots, squares = sums.float()
        return made, dots, squares
    levels = codes.float() + half
    d = g * row.repeat_interleave(size, 1)[:, :k]
    if column is not None:
        d = d * column
    dots, squares = (_sums((levels * x).double(), size, groups) for x in (d, levels))
    d = d + levels * decay
    if residual is not None:
        carried = (residual.float() / 127).clamp(-0.5, 0.5)
        d = d * piecewise_linear(d, d, carried, d)
    return d, dots, squares


def _sums(values: Tensor, size: int, groups: int) -> Tensor:
    padded = torch.nn.functional.pad(values, (0, groups * size - values.shape[1]))
    return padded.view(len(values), groups, size).sum(2).float()
