"""The grids: which integers a code may be, and what value a code stands for.

A code c is an integer in [low, high]; its value is ``scale * (c - zero_point + half)``. One table covers all:

    grid         low           high          half  zero point   values in units of scale, b = 2
    symmetric    -2^(b-1)      2^(b-1) - 1   0     0            -2 -1 0 1
    balanced     -(2^(b-1)-1)  2^(b-1) - 1   0     0            -1 0 1                (ternary)
    seq          -2^(b-1)      2^(b-1) - 1   1/2   0            -3/2 -1/2 1/2 3/2     (b = 1: -1/2 1/2)
    unsigned     0             2^b - 1       0     0            0 1 2 3
    asymmetric   0             2^b - 1       0     integer      -z .. 3 - z

`seq` is ParetoQ's stretched elastic quantizer (2502.02631): balanced, without zero, the better grid at one
and two bits. With half = 1/2 its codes stay ordinary integers, so that packing knows nothing of it; ParetoQ
prints the same levels as multiples of a = 2^(b-1) * scale. Symmetric grids of one bit would be {-1, 0}: use
`seq`, whose one-bit form is sign(w) * scale / 2.

Two grids are not affine: their codes index a table of levels (numerics.levels), from 2 to 4 bits:

    powers_of_two  0            2^b - 2        value: scale * table[c], the table 0 and +-2^-k
    levels         0            2^b - 1        value: scale * table[c], the table learned

A fractional b (FraQAT, 2510.14823) puts the whole number below 2^(b-1), or 2^b, in their places: symmetric
5.5 bits are -22 .. 21. The paper divides max|W| by 2^(b-1) - 1 even where that is no integer; here the range
ends on a level.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

ROUNDING = 1e-9  # 2 ** log2(n) may come out below n

Affine = Literal["symmetric", "balanced", "seq", "unsigned", "asymmetric"]
Table = Literal["powers_of_two", "levels"]
Grid = Affine | Table
GRIDS: tuple[str, ...] = get_args(Affine)
TABLES: tuple[str, ...] = get_args(Table)
TABLE_BITS = (2, 3, 4)  # at 5 bits powers of two end at 2^-14, and a uniform grid has 32 levels to place


def bounds(grid: Grid, bits: float) -> tuple[int, int, float]:
    """(low, high, half) of ``grid`` at ``bits`` from 1 to 8; of a table from 2 to 4."""
    positive = int(2 ** (bits - 1) + ROUNDING) - 1
    match grid:
        case "symmetric":
            return -positive - 1, positive, 0.0
        case "balanced":
            return -positive, positive, 0.0
        case "seq":
            return -positive - 1, positive, 0.5
        case "unsigned" | "asymmetric":
            return 0, int(2**bits + ROUNDING) - 1, 0.0
        case "powers_of_two" | "levels" if bits in TABLE_BITS:
            return 0, int(level_count(grid, bits)) - 1, 0.0
    raise ValueError(f"grid {grid!r} is not one of {(*GRIDS, *TABLES)}, or has no width of {bits} bits")


def level_count(grid: str, bits: Any) -> Any:
    """Entries of the table of a grid in TABLES; a tensor for a tensor of expected bits."""
    return 2**bits - (grid == "powers_of_two")
