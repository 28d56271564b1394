"""Rounding against brute force over all grid points, on problems of a few weights."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.errors import DataError
from bitsmith.post_training.rounding import ROUNDINGS, Grid, gptaq, gptq, nearest, qronos, upper_factor
from tests.strategies import grids

COLUMN_BY_COLUMN = {name: function for name, function in ROUNDINGS.items() if name != "nearest"}


def problem(
    seed: int, out: int = 3, inputs: int = 4, rows: int = 24, moved: float = 0.4
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, X, X̂) with correlated inputs; X̂ is X and something else."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=draw)
    x = torch.randn(rows, inputs, generator=draw) @ mix
    x_hat = x + moved * torch.randn(rows, inputs, generator=draw) @ mix.abs()
    return torch.randn(out, inputs, generator=draw), x, x_hat


def two_bits(scale: float = 0.7) -> Grid:
    return Grid(torch.full((1, 1), scale), -2, 1, 0.5)


def values_of(grid: Grid, row: int = 0) -> Tensor:
    scale = grid.scale.expand(row + 1, -1)[row, 0]
    return scale * (torch.arange(grid.low, grid.high + 1) - grid.zero_point + grid.half)


def error(q: Tensor, w: Tensor, x: Tensor, x_hat: Tensor) -> Tensor:
    """|X̂q - Xw|² of each row of q, w (out, in)."""
    return (x_hat.double() @ q.double().T - x.double() @ w.double().T).square().sum(0)


def rest_solved(done: Tensor, target: Tensor, x_hat: Tensor) -> float:
    """The least |X̂q - target|² where the first columns of q are ``done`` and the others are free."""
    left = target - x_hat[:, : len(done)] @ done
    free = x_hat[:, len(done) :]
    if free.shape[1]:
        left = left - free @ torch.linalg.lstsq(free, left[:, None]).solution[:, 0]
    return float(left.square().sum())


def sequential(w: Tensor, x: Tensor, x_hat: Tensor, levels: Tensor, first_holds_rest: bool = False) -> Tensor:
    """One row, column by column: the level of least error over all values of the columns behind it."""
    x, x_hat, w, levels = x.double(), x_hat.double(), w.double(), levels.double()
    target, q = x @ w, torch.zeros(0, dtype=torch.float64)
    for j in range(len(w)):
        trials = [torch.cat([q, level[None]]) for level in levels]
        if j == 0 and first_holds_rest:
            losses = [float((x_hat @ torch.cat([trial, w[1:]]) - target).square().sum()) for trial in trials]
        else:
            losses = [rest_solved(trial, target, x_hat) for trial in trials]
        q = trials[min(range(len(trials)), key=losses.__getitem__)]
    return q


@pytest.mark.parametrize("seed", range(5))
def test_nearest_is_the_best_of_all_levels_of_each_weight(seed: int) -> None:
    weight, _, _ = problem(seed)
    found = nearest(weight, two_bits(), torch.eye(4))
    distance = (weight[..., None] - values_of(two_bits())).abs()
    assert torch.equal(found, values_of(two_bits())[distance.argmin(-1)])


@pytest.mark.parametrize("seed", range(5))
def test_gptq_is_the_sequential_optimum_given_the_columns_before(seed: int) -> None:
    weight, x, _ = problem(seed)
    found = gptq(weight, two_bits(), x.T @ x, damping=0, order=False)
    for row, w in zip(found, weight, strict=True):
        torch.testing.assert_close(row.double(), sequential(w, x, x, values_of(two_bits()).double()))


@pytest.mark.parametrize("seed", range(5))
def test_qronos_is_the_sequential_optimum_with_the_rest_held_for_the_first_column(seed: int) -> None:
    weight, x, x_hat = problem(seed)
    cross = x_hat.T @ (x - x_hat)
    found = qronos(weight, two_bits(), x_hat.T @ x_hat, cross, damping=0, order=False)
    for row, w in zip(found, weight, strict=True):
        expected = sequential(w, x, x_hat, values_of(two_bits()).double(), first_holds_rest=True)
        torch.testing.assert_close(row.double(), expected)


@pytest.mark.parametrize("seed", range(5))
def test_gptaq_lets_the_rest_make_up_for_the_error_in_a_columns_input(seed: int) -> None:
    """The slow twin: before column j is rounded, the columns behind column i < j were moved by the least
    squares answer to w_i (x_i - x̂_i), and by GPTQ's to the rounding."""
    weight, x, x_hat = (t.double() for t in problem(seed))
    grid = two_bits()
    found = gptaq(weight, grid, x_hat.T @ x_hat, x_hat.T @ (x - x_hat), damping=0, order=False)
    w, q = weight.clone(), torch.zeros_like(weight)
    for j in range(4):
        q[:, j : j + 1] = grid.nearest(w[:, j : j + 1])
        wrong = torch.outer(x_hat[:, j], w[:, j] - q[:, j]) + torch.outer((x - x_hat)[:, j], w[:, j])
        if j < 3:
            w[:, j + 1 :] += torch.linalg.lstsq(x_hat[:, j + 1 :], wrong).solution.T
    torch.testing.assert_close(found, q)


@pytest.mark.parametrize("name", ROUNDINGS)
@settings(max_examples=25, deadline=None)
@given(bounds=grids(), seed=st.integers(0, 999), order=st.booleans())
def test_the_result_lies_on_the_grid(
    name: str, bounds: tuple[int, int, float], seed: int, order: bool
) -> None:
    weight, x, x_hat = problem(seed)
    low, high, half = bounds
    grid = Grid(torch.rand(3, 1) + 0.1, low, high, half, torch.tensor([[low], [high], [(low + high) // 2]]))
    options = {} if name == "nearest" else {"order": order}
    found = ROUNDINGS[name](weight, grid, x_hat.T @ x_hat, x_hat.T @ (x - x_hat), **options)
    assert torch.equal(found, grid.nearest(found))


@pytest.mark.parametrize("name", COLUMN_BY_COLUMN)
def test_with_uncorrelated_inputs_all_round_to_nearest(name: str) -> None:
    weight, _, _ = problem(3)
    hessian = torch.diag(torch.tensor([1.0, 3.0, 0.5, 2.0]))
    found = ROUNDINGS[name](weight, two_bits(), hessian, torch.zeros(4, 4))
    assert torch.equal(found, nearest(weight, two_bits(), hessian))


@pytest.mark.parametrize("function", [gptaq, qronos])
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("order", [False, True])
def test_with_equal_streams_gptaq_and_qronos_are_gptq_for_any_damping(
    function: Callable[..., Tensor], damping: float, order: bool
) -> None:
    weight, x, _ = problem(7, out=8, inputs=12, rows=50)
    hessian = x.T @ x
    found = function(weight, two_bits(), hessian, torch.zeros(12, 12), damping=damping, order=order)
    assert torch.equal(found, gptq(weight, two_bits(), hessian, damping=damping, order=order))


def test_on_average_gptq_is_better_than_nearest_and_not_better_than_the_best_of_all() -> None:
    rows = []
    points = torch.tensor(list(itertools.product(values_of(two_bits()).tolist(), repeat=4)))
    for seed in range(40):
        weight, x, _ = problem(seed)
        hessian = x.T @ x
        best = torch.stack([error(points, w.expand(len(points), -1), x, x).min() for w in weight])
        rows.append(
            [error(function(weight, two_bits(), hessian), weight, x, x) for function in (nearest, gptq)]
            + [best]
        )
    by_nearest, by_gptq, best = (torch.cat(column) for column in zip(*rows, strict=True))
    assert (best <= by_gptq * (1 + 1e-9)).all()
    assert by_gptq.mean() < by_nearest.mean()
    assert by_gptq.mean() < 1.5 * best.mean() < by_nearest.mean()


def test_on_average_the_ones_that_know_of_the_float_inputs_are_better_than_gptq() -> None:
    totals = dict.fromkeys(COLUMN_BY_COLUMN, 0.0)
    for seed in range(40):
        weight, x, x_hat = problem(seed, out=16, inputs=12, rows=60, moved=0.3)
        for name, function in COLUMN_BY_COLUMN.items():
            found = function(weight, two_bits(0.5), x_hat.T @ x_hat, x_hat.T @ (x - x_hat))
            totals[name] += float(error(found, weight, x, x_hat).sum())
    assert totals["qronos"] < totals["gptaq"] < totals["gptq"]


@pytest.mark.parametrize("name", COLUMN_BY_COLUMN)
@pytest.mark.parametrize("order", [False, True])
def test_blocks_of_columns_change_nothing(name: str, order: bool) -> None:
    weight, x, x_hat = problem(1, out=5, inputs=20, rows=60)
    grid = Grid(torch.rand(5, 4).repeat_interleave(5, 1) + 0.3, -4, 3)
    arguments = (weight, grid, x_hat.T @ x_hat, x_hat.T @ (x - x_hat))
    whole, parts = (COLUMN_BY_COLUMN[name](*arguments, block=block, order=order) for block in (64, 3))
    assert torch.equal(whole, parts)


def test_the_trailing_part_of_the_factor_belongs_to_the_inverse_of_the_trailing_part() -> None:
    _, x, _ = problem(2, inputs=6)
    hessian = x.T @ x
    u = upper_factor(hessian, 0.0)
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u[2:, 2:].T @ u[2:, 2:], hessian[2:, 2:].double().inverse())


@pytest.mark.parametrize("name", COLUMN_BY_COLUMN)
def test_an_input_that_is_always_zero_is_rounded_to_nearest_and_disturbs_nobody(name: str) -> None:
    weight, x, x_hat = problem(4)
    x, x_hat = x.clone(), x_hat.clone()
    x[:, 1] = x_hat[:, 1] = 0
    keep = torch.tensor([0, 2, 3])

    def round_(of: Tensor) -> Tensor:
        cross = x_hat.T @ (x - x_hat)
        return COLUMN_BY_COLUMN[name](
            weight[:, of], two_bits(), (x_hat.T @ x_hat)[of][:, of], cross[of][:, of], damping=0
        )

    whole = round_(torch.arange(4))
    assert torch.equal(whole[:, 1:2], two_bits().nearest(weight[:, 1:2]))
    assert torch.equal(whole[:, keep], round_(keep))


@pytest.mark.parametrize("name", COLUMN_BY_COLUMN)
def test_a_singular_hessian_without_damping_is_refused(name: str) -> None:
    weight, x, _ = problem(0, rows=2)
    with pytest.raises(DataError, match=r"singular matrix of 4 inputs\. .*damping above 0"):
        COLUMN_BY_COLUMN[name](weight, two_bits(), (x.T @ x).double(), torch.zeros(4, 4), damping=0)
