"""levels: the grid of one row as numbers, and the stand-in that a row of 32 bits is.

A candidate of 32 bits has a row like any other, a *stand-in*: a grid so fine and wide that float32 values
lie on it. As its step is a power of two, x/step and back is exact: Q(x) = x to the last bit from 2^-37 to
2^60 (nearer to 0 it is off by 2^-61 at most). So nothing is clipped, no range needs to be known, and the
gradients that belong to rounding errors, the range's and the logits', are 0. 2^23 calibrated steps would not
do: x/step is then off by up to half a step, and x loses its gradient as if it were outside the grid. Where a
range is found while it runs, the step is numerics.calibrate's SMALLEST_STEP.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from bitsmith.numerics import grid as grids
from bitsmith.quantization.bits import Width
from bitsmith.quantization.scheme import FLOAT

STAND_IN_STEP, STAND_IN_HIGH = 2.0**-60, 2**120


class Levels(NamedTuple):
    """The row in play, ready to be stored: tensors broadcast against the blocks of x.

    A stored code c (low <= c <= high, integer) has the value scale * (c - zero_point + half). Where
    channels have widths of their own, low, high and half are tensors. With a table (levels,), ascending, the
    value is scale * table[c].
    """

    bits: Width
    scale: Tensor
    zero_point: Tensor
    low: Any
    high: Any
    half: Any
    table: Tensor | None = None


def bounds(grid: str, bits: float) -> tuple[int, int, float]:
    """(low, high, half) of a row of this width; of 32 bits the stand-in's."""
    if bits == FLOAT:
        return -STAND_IN_HIGH, STAND_IN_HIGH, 0.0
    if grid == "symmetric" and bits == 1:
        return 0, 1, 0.0  # an activation of one bit is on or off: {-1, 0} would hold negatives only
    return grids.bounds(grid, bits)  # type: ignore[arg-type]


def grid_name(low: Any, high: Any, half: Any, zero_point: Tensor) -> str:
    """The name of a grid of codes ``low`` .. ``high``; zero_point: of all channels."""
    if half:
        return "seq"
    if low < 0:
        return "symmetric" if -low > high else "balanced"
    return "asymmetric" if bool(zero_point.any()) else "unsigned"
