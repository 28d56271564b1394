"""Figures in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitsmith.report import words
from bitsmith.report.metrics import Layer

S = words.SPACE


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (words.percent(0.9775), f"97.8{S}%"),
        (words.percent(0.9219, 2), f"92.19{S}%"),
        (words.percent(1.0), f"100.0{S}%"),
        (words.percent(None), "–"),
        (words.small_percent(0.0312), f"3.1{S}%"),
        (words.small_percent(0.00042), f"0.042{S}%"),
        (words.small_percent(1.0), f"100{S}%"),
        (words.small_percent(0.0), f"0{S}%"),
        (words.points(-0.0031), "−0.3"),
        (words.points(0.047), "+4.7"),
        (words.points(-0.0001), "0.0"),
        (words.size(0), f"0{S}B"),
        (words.size(999), f"999{S}B"),
        (words.size(999.7), f"1.00{S}kB"),
        (words.size(4123), f"4.12{S}kB"),
        (words.size(999_960), f"1.00{S}MB"),
        (words.count(12_345_678), f"12.3{S}M"),
        (words.count(338_000_000), f"338{S}M"),
        (words.count(12), "12"),
        (words.factor(31.2, 1), "31×"),
        (words.factor(7.31, 1), "7.3×"),
        (words.factor(None, 1), "–"),
        (words.bits(4.0), "4"),
        (words.bits(2.5), "2.5"),
        (words.bits(10), "10"),
        (words.bits(32), "float"),
        (words.seconds(0.41), f"410{S}ms"),
        (words.seconds(29.4), f"29.4{S}s"),
        (words.seconds(754), f"12{S}min 34{S}s"),
        (words.seconds(7260), f"2{S}h 1{S}min"),
        (words.listing(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_figures(written: str, expected: str) -> None:
    assert written == expected


@given(st.floats(1, 1e17))
def test_a_scaled_figure_reads_back_within_half_of_its_last_digit(value: float) -> None:
    number, _, unit = words.count(value).partition(S)
    power = 1000 ** ("", "k", "M", "G", "T", "P").index(unit)
    assert float(number) * power == pytest.approx(value, rel=0.051 if power > 1 else 0.51)
    assert len(number) <= 4


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ([3, 3, 3], "3-bit weights"),
        ([8, 3, 3, 8], "8-bit weights (2 layers at 3)"),
        ([8, 3, 3], "3-bit weights (1 layer at 8)"),
        ([8, 2, 3, 4], "2- to 8-bit weights"),
        ([8, 2, 3, 32], "2-bit to float weights"),
        ([8, 8, 32], "8-bit weights (1 layer in float)"),
        ([32, 32], "float weights"),
        ([None], ""),
    ],
)
def test_the_usual_bits(bits: list[float | None], expected: str) -> None:
    layers = tuple(Layer(f"layer{index}", "Linear", weight_bits=width) for index, width in enumerate(bits))
    assert words.usual_bits(layers, "weight_bits") == expected


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"kind": "bops", "limit": 0.03, "used": 0.0297}, f"3.0{S}% of float bit operations (3.0{S}% used)"),
        (
            {"kind": "bops", "limit": 2.13e6, "used": 2.102e6},
            f"2.10{S}M of 2.13{S}M bit operations, 98.7{S}% of the budget",
        ),
        (
            {"kind": "weight_bytes", "limit": 4000, "used": 3990},
            f"3.99{S}kB of 4.00{S}kB of weights, 99.8{S}% of the budget",
        ),
        (
            {"kind": "activation_bytes", "limit": 900, "used": 810},
            f"810{S}B of 900{S}B of activations at a time, 90.0{S}% of the budget",
        ),
        (
            {"kind": "average_weight_bits", "limit": 3, "used": 2.96},
            f"2.96 of 3.00 bits per weight on average, 98.7{S}% of the budget",
        ),
        (
            {"kind": "average_activation_bits", "limit": 1, "used": 1},
            f"1.00 of 1.00 bits per activation on average, 100.0{S}% of the budget",
        ),
        (
            {"kind": "table:energy_45nm", "limit": 12_500, "used": 12_300, "unit": "pJ"},
            f"12.3 of 12.5{S}nJ by the table energy_45nm, 98.4{S}% of the budget",
        ),
        (
            {"kind": "table:chip", "limit": 0.8, "used": 0.4, "unit": "us"},
            f"0.40 of 0.80{S}µs by the table chip, 50.0{S}% of the budget",
        ),
        (
            {"kind": "table:cycles", "limit": 12_500, "used": 12_300, "unit": "cycles"},
            f"12,300 of 12,500{S}cycles by the table cycles, 98.4{S}% of the budget",
        ),
        (
            {"kind": "table:chip", "limit": 25.0, "used": 24.0},
            f"24.0 of 25.0 by the table chip, 96.0{S}% of the budget",
        ),
        ({"kind": "average_bits", "limit": 2.8}, "2.80 average bits"),
    ],
)
def test_budgets(budget: dict[str, object], expected: str) -> None:
    assert words.budget_text(budget) == expected


def test_a_cost_is_written_alike_as_a_figure_and_as_part_of_a_budget() -> None:
    for used in (853_217, 2_104_000, 21_040_000):
        budget = {"kind": "bops", "limit": 1.1 * used, "used": used}
        assert words.budget_text(budget).startswith(f"{words.count(used)} of ")
        assert words.budget_text(budget | {"kind": "weight_bytes"}).startswith(f"{words.size(used)} of ")


def test_ticks_have_no_useless_zeros() -> None:
    shown = [words.tick(words.count(value)) for value in (500, 1e3, 2e6, 1e7, 2.5e6, 5e8)]
    assert shown == ["500", f"1{S}k", f"2{S}M", f"10{S}M", f"2.50{S}M", f"500{S}M"]
    assert words.tick(f"3.00{S}bits") == f"3{S}bits"
