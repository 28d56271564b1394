"""The grids, against a table written out by hand."""

from __future__ import annotations

import pytest

from bitsmith.numerics.grid import GRIDS, bounds

TABLE = {  # lowest and highest code at 1 .. 8 bits
    "symmetric": ([-1, -2, -4, -8, -16, -32, -64, -128], [0, 1, 3, 7, 15, 31, 63, 127]),
    "balanced": ([0, -1, -3, -7, -15, -31, -63, -127], [0, 1, 3, 7, 15, 31, 63, 127]),
    "seq": ([-1, -2, -4, -8, -16, -32, -64, -128], [0, 1, 3, 7, 15, 31, 63, 127]),
    "unsigned": ([0] * 8, [1, 3, 7, 15, 31, 63, 127, 255]),
    "asymmetric": ([0] * 8, [1, 3, 7, 15, 31, 63, 127, 255]),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_bounds_are_those_of_the_table(grid: str, bits: int) -> None:
    lowest, highest = TABLE[grid]
    assert bounds(grid, bits) == (lowest[bits - 1], highest[bits - 1], 0.5 if grid == "seq" else 0.0)


@pytest.mark.parametrize("bits", range(1, 9))
def test_seq_is_balanced_without_zero(bits: int) -> None:
    low, high, half = bounds("seq", bits)
    levels = [code + half for code in range(low, high + 1)]
    assert levels == [-level for level in reversed(levels)]
    assert 0 not in levels
    assert len(levels) == 2**bits


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_fit_their_bits(grid: str, bits: int) -> None:
    low, high, _ = bounds(grid, bits)
    assert high - low < 2**bits


def test_an_unknown_grid_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'round' is not one of .*symmetric.*seq"):
        bounds("round", 4)
