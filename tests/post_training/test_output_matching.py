"""The closed form against least squares, and its sums against all tokens at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.post_training.output_matching import (
    Moments,
    choose,
    correction,
    matched,
    moments,
    relative_error,
)


def problem(seed: int, rows: int = 60, inputs: int = 5, out: int = 3) -> tuple[Tensor, ...]:
    """(weight, X, X̂, R, R̂), float64."""
    draw = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    x, r = noise(rows, inputs) @ noise(inputs, inputs), noise(rows, out)
    return noise(out, inputs), x, x + 0.3 * noise(rows, inputs), r, r + 0.5 * noise(rows, out)


def of(weight: Tensor, x: Tensor, x_hat: Tensor, r: Tensor, r_hat: Tensor) -> Moments:
    energy = float((x @ weight.T + r - r_hat).square().sum())
    return moments(x_hat, x - x_hat, r - r_hat, energy=energy)


def squares(q: Tensor, weight: Tensor, x: Tensor, x_hat: Tensor, r: Tensor, r_hat: Tensor) -> Tensor:
    return (r_hat + x_hat @ q.T - r - x @ weight.T).square().sum()


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    damping=st.floats(0, 1e3),
    alpha=st.floats(0, 1),
    beta=st.floats(0, 1),
    rows=st.integers(20, 80),
)
def test_equal_streams_change_nothing_for_any_damping(
    seed: int, damping: float, alpha: float, beta: float, rows: int
) -> None:
    weight, x, _, r, _ = problem(seed, rows)
    same = moments(x, x - x, r - r)
    assert torch.equal(matched(weight.float(), same, alpha, beta, damping), weight.float())


def test_without_damping_and_rounding_it_is_the_least_squares_solution() -> None:
    weight, x, x_hat, r, r_hat = problem(0)
    expected = torch.linalg.lstsq(x_hat, x @ weight.T + r - r_hat).solution.T
    torch.testing.assert_close(matched(weight, of(weight, x, x_hat, r, r_hat), 1, 1, 0), expected)


def test_without_a_residual_stream_it_is_the_least_squares_solution_for_the_output() -> None:
    weight, x, x_hat, _, _ = problem(1)
    expected = torch.linalg.lstsq(x_hat, x @ weight.T).solution.T
    torch.testing.assert_close(matched(weight, moments(x_hat, x - x_hat), 1, 0.5, 0), expected)


def test_alpha_and_beta_of_zero_change_nothing() -> None:
    weight, *streams = problem(2)
    assert torch.equal(matched(weight, of(weight, *streams), 0, 0, 0.01), weight)


def test_damping_shrinks_the_correction_and_not_the_weight() -> None:
    weight, *streams = problem(3)
    moved = [(matched(weight, of(weight, *streams), 1, 1, d) - weight).norm() for d in (0, 0.1, 10, 1e6)]
    assert moved[0] > moved[1] > moved[2] > moved[3]
    assert moved[3] < 1e-4


def test_with_tokens_weighted_it_is_the_weighted_least_squares_solution() -> None:
    weight, x, x_hat, r, r_hat = problem(4)
    t = torch.rand(len(x), dtype=torch.float64) + 0.1
    root = t.sqrt()[:, None]
    expected = torch.linalg.lstsq(root * x_hat, root * (x @ weight.T + r - r_hat)).solution.T
    found = moments(x_hat, x - x_hat, r - r_hat, t)
    torch.testing.assert_close(matched(weight, found, 1, 1, 0), expected)


def test_with_all_tokens_alike_the_norm_changes_nothing() -> None:
    _, x, x_hat, r, r_hat = problem(5)
    plain, normed = (moments(x_hat, x - x_hat, r - r_hat, t) for t in (None, torch.ones(len(x))))
    for name in ("hessian", "cross", "residual"):
        torch.testing.assert_close(getattr(plain, name), getattr(normed, name))


def test_sums_over_batches_are_those_over_all_tokens_at_once() -> None:
    _, x, x_hat, r, r_hat = problem(6)
    whole = moments(x_hat, x - x_hat, r - r_hat, energy=3.0)
    parts = [
        moments(x_hat[rows], (x - x_hat)[rows], (r - r_hat)[rows], energy=energy)
        for rows, energy in ((slice(0, 13), 1.0), (slice(13, 40), 0.5), (slice(40, 60), 1.5))
    ]
    total = parts[0] + parts[1] + parts[2]
    for name in ("hessian", "cross", "residual", "energy", "rows"):
        torch.testing.assert_close(getattr(total, name), getattr(whole, name))


def test_an_input_that_is_always_zero_keeps_its_weight() -> None:
    weight, x, x_hat, r, r_hat = problem(7)
    x[:, 2] = x_hat[:, 2] = 0
    found = matched(weight, of(weight, x, x_hat, r, r_hat), 1, 1, 0)
    assert torch.equal(found[:, 2], weight[:, 2])
    assert not torch.isclose(found, weight).any(0)[[0, 1, 3, 4]].any()


def test_the_error_of_any_values_follows_from_the_sums() -> None:
    weight, *streams = problem(8)
    sums, q = of(weight, *streams), torch.randn(3, 5, dtype=torch.float64)
    loss = squares(q, weight, *streams)
    assert relative_error(q, weight, sums) == pytest.approx(float(loss) / sums.energy)


@pytest.mark.parametrize("seed", range(20))
def test_alpha_and_beta_are_the_best_on_held_out_rows(seed: int) -> None:
    weight, *fitted = problem(seed)
    _, *held = problem(seed + 1000)
    directions = correction(weight, of(weight, *fitted), 0.01)
    alpha, beta = choose(weight, directions, of(weight, *held))

    def loss(alpha: float, beta: float) -> float:
        return float(squares(weight + alpha * directions[0] + beta * directions[1], weight, *held))

    assert 0 <= alpha <= 1
    assert 0 <= beta <= 1
    grid = torch.linspace(0, 1, 21).tolist()
    assert loss(alpha, beta) <= min(loss(a, b) for a in grid for b in grid) + 1e-9


def test_where_a_direction_changes_nothing_its_share_stays_one_half() -> None:
    weight, x, x_hat, r, _ = problem(9)
    nothing = of(weight, x, x, r, r)
    assert choose(weight, correction(weight, nothing, 0.01), nothing) == (0.5, 0.5)
    no_residual = moments(x_hat, x - x_hat)
    assert choose(weight, correction(weight, no_residual, 0.01), no_residual)[1] == 0.5
