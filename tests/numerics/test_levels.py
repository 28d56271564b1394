"""Tables of levels: what they hold, the nearest of them, and gradients against formulas written otherwise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.numerics import affine
from bitsmith.numerics import calibrate as uniform
from bitsmith.numerics.grid import TABLES, bounds, level_count
from bitsmith.numerics.levels import (
    MOST,
    best_scale,
    dequantize,
    fake_quantize,
    fit,
    lloyd_max,
    ordered,
    powers_of_two,
    quantize,
)
from tests.strategies import tensors

POWERS = {
    2: [-1.0, 0.0, 1.0],
    3: [-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0],
    4: [-1.0, -1 / 2, -1 / 4, -1 / 8, -1 / 16, -1 / 32, -1 / 64]
    + [0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0],
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def tables(draw: st.DrawFn) -> Tensor:
    """2 to 16 levels, ascending, equal ones among them."""
    levels = draw(st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=MOST))
    return torch.tensor(sorted(levels))


# ---- tables


@pytest.mark.parametrize("bits", POWERS)
def test_powers_of_two_are_those_of_the_list(bits: int) -> None:
    assert powers_of_two(bits).tolist() == POWERS[bits]
    assert bounds("powers_of_two", bits) == (0, len(POWERS[bits]) - 1, 0.0)


@pytest.mark.parametrize("grid", TABLES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_fit_their_bits(grid: str, bits: int) -> None:
    low, high, _ = bounds(grid, bits)
    assert 0 == low < high < 2**bits
    assert level_count(grid, bits) == high + 1


@pytest.mark.parametrize("grid", TABLES)
@pytest.mark.parametrize("bits", [1, 5, 8])
def test_other_widths_have_no_table(grid: str, bits: int) -> None:
    with pytest.raises(ValueError, match=f"no width of {bits}"):
        bounds(grid, bits)


@given(st.permutations(range(5)), st.integers(1, 4))
def test_levels_are_put_in_order_and_those_behind_the_last_are_out_of_reach(
    order: list[int], high: int
) -> None:
    table = torch.tensor([float(n) for n in order], requires_grad=True)
    found = ordered(table, torch.tensor([float(high)]))
    assert found[: high + 1].tolist() == sorted(float(n) for n in order[: high + 1])
    assert found[high + 1 :].isinf().all()
    (found[: high + 1] * torch.arange(high + 1)).sum().backward()  # each level gets its own gradient back
    ranks = {n: float(rank) for rank, n in enumerate(sorted(order[: high + 1]))}
    assert table.grad is not None
    assert table.grad.tolist() == [ranks.get(n, 0.0) if i <= high else 0.0 for i, n in enumerate(order)]


# ---- the nearest level


@given(tensors(limit=10), tables())
def test_no_other_level_is_nearer(x: Tensor, table: Tensor) -> None:
    scale = torch.tensor(0.75)
    found = dequantize(quantize(x, scale, table), scale, table)
    every = (x.double()[..., None] / 0.75 - table.double()).abs()
    error = (x.double() / 0.75 - found.double() / 0.75).abs()
    assert bool((error <= every.amin(-1) + 1e-6 * (1 + x.abs())).all())


def test_half_way_goes_down_and_the_ends_take_all_beyond_them() -> None:
    x = torch.tensor([-9.0, -0.75, -0.125, 0.125, 0.75, 9.0])
    found = dequantize(quantize(x, torch.ones(()), powers_of_two(3)), torch.ones(()), powers_of_two(3))
    assert found.tolist() == [-1.0, -1.0, -0.25, 0.0, 0.5, 1.0]


# ---- training


@pytest.mark.parametrize("estimator", ["clipped", "pure"])
def test_on_even_levels_it_is_the_affine_quantizer(estimator: str) -> None:
    x, g = noise(6, 40) * 2, noise(6, 40, seed=1)
    scale = torch.linspace(0.2, 0.9, 6)[:, None]
    results = []
    for even in (True, False):
        v, exponent = x.clone().requires_grad_(), torch.zeros(6, 1, requires_grad=True)
        low, high = torch.tensor([-4.0]), torch.tensor([3.0])
        if even:
            y = affine.fake_quantize(
                v,
                scale,
                low,
                high,
                exponent=exponent,
                estimator=estimator,
                count=40,  # type: ignore[arg-type]
            )
        else:
            table, last = torch.arange(-4.0, 4.0), torch.tensor([7.0])
            y = fake_quantize(v, scale, table, last, exponent=exponent, estimator=estimator, count=40)
        y.backward(g)
        assert v.grad is not None
        assert exponent.grad is not None
        # LSQ's factor has the highest level in it, which is 1 in a table.
        results.append((y.detach(), v.grad, exponent.grad * (math.sqrt(3) if even else 1)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-5, atol=1e-6)


TABLE = torch.tensor([-1.0, -0.35, -0.1, 0.05, 0.2, 0.7, 0.9, 1.0])


def twin(x: Tensor, scale: Tensor, exponent: Tensor, table: Tensor) -> Tensor:
    """The same function as plain autograd: inside, x passes by the straight-through identity."""
    s = scale * torch.exp2(exponent)
    u = x / s
    distance = (u.detach()[..., None] - table.detach()).abs()
    level = table[distance.argmin(-1)]
    ends = (table[0] * 1.5 - table[1] * 0.5, table[-1] * 1.5 - table[-2] * 0.5)
    inside = ((u >= ends[0]) & (u <= ends[1])).detach()
    return s * (level + torch.where(inside, u - u.detach(), 0.0))


def test_gradients_of_first_and_second_order_are_those_of_the_plain_formula() -> None:
    x, g = noise(5, 30).double(), noise(5, 30, seed=1).double()
    factors = {"x": 1.0, "exponent": 1 / math.sqrt(30), "table": 1 / math.sqrt(150)}
    found = []
    for plain in (True, False):
        v, table = x.clone().requires_grad_(), TABLE.double().requires_grad_()
        exponent = torch.linspace(-1, 0.5, 5).double()[:, None].requires_grad_()
        scale, last = torch.full((5, 1), 0.8, dtype=torch.float64), torch.tensor([7.0])
        if plain:
            y = twin(v, scale, exponent, table)
        else:
            y = fake_quantize(v, scale, table, last, exponent=exponent, count=30)
        first = torch.autograd.grad(y, (v, exponent, table), g, create_graph=True)
        scaled = [d * f if plain else d for d, f in zip(first, factors.values(), strict=True)]
        second = torch.autograd.grad(scaled[1].square().sum() + scaled[2].square().sum(), (exponent, table))
        found.append([y, *scaled, *second])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_level_and_outer_scale_gradients_are_finite_differences() -> None:
    """Where no value changes its level, the loss is linear in every level; beyond the ends in the scale."""
    x, g, step = noise(4, 50).double(), noise(4, 50, seed=1).double(), 1e-6
    scale, last = torch.full((4, 1), 0.7, dtype=torch.float64), torch.tensor([7.0])
    table = TABLE.double().requires_grad_()

    def loss(levels: Tensor, s: Tensor, values: Tensor = x) -> float:
        return float((fake_quantize(values, s, levels, last) * g).sum())

    (fake_quantize(x, scale, table, last) * g).sum().backward()
    assert table.grad is not None
    for j in range(len(TABLE)):
        moved = torch.eye(8, dtype=torch.float64)[j] * step
        difference = (loss(table.detach() + moved, scale) - loss(table.detach() - moved, scale)) / (2 * step)
        assert float(table.grad[j]) * math.sqrt(200) == pytest.approx(difference, abs=1e-5)

    far, s = x.sign() * 5, scale.clone().requires_grad_()
    (fake_quantize(far, s, table.detach(), last, count=50) * g).sum().backward()
    moved = torch.tensor([[step], [0], [0], [0]], dtype=torch.float64)
    difference = (loss(TABLE.double(), scale + moved, far) - loss(TABLE.double(), scale - moved, far)) / (
        2 * step
    )
    assert s.grad is not None
    assert float(s.grad[0]) * math.sqrt(50) == pytest.approx(difference, abs=1e-5)


def test_the_share_of_a_drawn_grid_receives_its_error() -> None:
    x, g, share = noise(3, 8), noise(3, 8, seed=1), torch.ones(1, requires_grad=True)
    y = fake_quantize(x, torch.full((1,), 0.5), TABLE, torch.tensor([7.0]), share=share)
    y.backward(g)
    assert share.grad is not None
    torch.testing.assert_close(share.grad, ((y.detach() - x) * g).sum().view(1))


# ---- where a site starts


def squared_error(x: Tensor, scale: Tensor, table: Tensor) -> float:
    values = dequantize(quantize(x, scale[:, None], table), scale[:, None], table)
    return float((values.double() - x.double()).square().sum())


@given(tensors(), st.sampled_from([2, 3, 4]))
def test_learned_levels_start_with_no_more_error_than_even_ones(x: Tensor, bits: int) -> None:
    low, high, _ = bounds("symmetric", bits)
    scale, _ = uniform.calibrate("mse", x, low, high)
    even = squared_error(x, scale, torch.arange(low, high + 1, dtype=torch.float32))
    found, table = fit(x, "levels", bits, "mse")
    assert squared_error(x, found, table) <= even * (1 + 1e-4) + 1e-9 * float(x.square().sum())
    assert float(table.abs().max()) == 1.0
    assert table.diff().min() >= 0


def test_every_round_of_lloyd_max_lowers_the_error() -> None:
    x, scale, table = noise(4, 300), torch.full((4,), 0.4), torch.arange(-4.0, 4.0)
    errors = []
    for _ in range(3):
        errors.append(squared_error(x, scale, table))
        table, scale = lloyd_max(x, scale, table)
    assert errors[0] > errors[1] >= errors[2]


def test_levels_that_are_there_are_found() -> None:
    """Weights on four levels with a scale for each channel: nothing is lost."""
    table, scale = torch.tensor([-1.0, -0.3, 0.4, 0.8]), torch.tensor([[0.5], [2.0]])
    codes = torch.randint(0, 4, (2, 200), generator=torch.Generator().manual_seed(0))
    x = table[codes] * scale
    found, levels = fit(x, "levels", 2, "mse")
    assert squared_error(x, found, levels) < 1e-9 * float(x.square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_scale_of_powers_of_two_is_about_the_best_there_is(bits: int) -> None:
    x = noise(3, 200, seed=bits)
    table = powers_of_two(bits)
    found = best_scale(x, table)
    for channel in range(3):
        row = x[channel : channel + 1]
        every = [squared_error(row, torch.tensor([s]), table) for s in torch.linspace(0.05, 6, 800).tolist()]
        assert squared_error(row, found[channel : channel + 1], table) <= 1.02 * min(every)


@pytest.mark.parametrize("grid", TABLES)
@pytest.mark.parametrize("calibration", ["mse", "minmax"])
def test_a_channel_of_zeros_has_a_scale(grid: str, calibration: str) -> None:
    scale, table = fit(torch.stack([torch.zeros(9), torch.arange(9.0)]), grid, 3, calibration)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert table.isfinite().all()
    assert float(scale[0]) < 1e-6 < float(scale[1])


def test_minmax_takes_the_largest_magnitude_to_the_outermost_power() -> None:
    scale, _ = fit(torch.tensor([[0.1, -3.0], [2.0, 1.0]]), "powers_of_two", 3, "minmax")
    assert scale.tolist() == [3.0, 2.0]
