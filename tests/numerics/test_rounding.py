"""Gradient estimators against their papers' formulas, and the noise of stochastic rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsmith.numerics.affine import fake_quantize
from bitsmith.numerics.rounding import EWGS_FACTOR, hash_uniform

LOW, HIGH = torch.tensor([-8.0]), torch.tensor([7.0])
SCALE = torch.tensor([0.25])
HALF = torch.tensor([0.5])


def samples() -> tuple[Tensor, Tensor, Tensor]:
    """(x, incoming gradient, where x is inside the grid)"""
    generator = torch.Generator().manual_seed(11)
    x = 1.5 * torch.randn(4000, generator=generator)
    code = (x / SCALE).round()
    return x, torch.randn(4000, generator=generator), (code >= LOW) & (code <= HIGH)


def gradient(x: Tensor, g: Tensor, half: Tensor | None = None, **how: object) -> Tensor:
    x = x.clone().requires_grad_()
    fake_quantize(x, SCALE, LOW, HIGH, half, **how).backward(g)
    assert x.grad is not None
    return x.grad


def test_clipped_passes_the_gradient_inside_the_grid_only() -> None:
    x, g, inside = samples()
    assert 0 < (~inside).sum() < len(x)
    assert torch.equal(gradient(x, g, estimator="clipped"), torch.where(inside, g, 0.0))


def test_pure_passes_the_gradient_everywhere() -> None:
    x, g, _ = samples()
    assert torch.equal(gradient(x, g, estimator="pure"), g)


def test_ewgs_scales_the_gradient_as_in_its_paper() -> None:
    """2104.00903, eq. 5: g_n = g_q * (1 + d * sign(g_q) * (x_n - x_q)), with x_n in 0..1."""
    x, g, inside = samples()
    x_n = (x / SCALE - LOW) / (HIGH - LOW)
    x_q = (x_n * 15).round() / 15
    expected = torch.where(inside, g * (1 + EWGS_FACTOR * g.sign() * (x_n - x_q)), 0.0)
    ours = gradient(x, g, estimator="ewgs")
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(ours, gradient(x, g, estimator="clipped"))


@pytest.mark.parametrize("half", [None, HALF])
def test_smooth_slopes_are_those_of_a_staircase_through_the_levels(half: Tensor | None) -> None:
    """Between two levels the slopes add up to one step, are symmetric, and are steepest at the threshold."""
    offset = 0.0 if half is None else 0.5
    within = (torch.arange(1000) + 0.5) / 1000  # 0 at a level, 1 at the next
    slope = gradient(SCALE * (within + 2 + offset), torch.ones(1000), half, estimator="smooth")
    assert slope.mean().item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(slope, slope.flip(0), rtol=1e-3, atol=1e-3)
    assert slope.argmax() in (499, 500)
    assert (slope[:500].diff() >= -1e-4).all()
    assert slope.min() > 0


def test_smooth_is_zero_outside_the_grid() -> None:
    x, g, inside = samples()
    assert (gradient(x, g, estimator="smooth")[~inside] == 0).all()


@pytest.mark.parametrize("half", [None, HALF])
def test_stochastic_rounding_is_unbiased_between_the_two_neighbours(half: Tensor | None) -> None:
    x = torch.linspace(-1.6, 1.6, 97)
    draws = torch.stack(
        [
            fake_quantize(x, SCALE, LOW, HIGH, half, estimator="stochastic", seed=torch.tensor([s]))
            for s in range(2000)
        ]
    )
    offset = 0.0 if half is None else 0.5
    u = x / SCALE - offset
    below, above = ((u.floor() + d + offset) * SCALE for d in (0, 1))
    near = torch.minimum((draws - below).abs(), (draws - above).abs())
    assert near.max() < 1e-6
    up = u - u.floor()
    standard_error = SCALE * (up * (1 - up) / len(draws)).sqrt()
    assert ((draws.mean(0) - x).abs() <= 4 * standard_error + 1e-6).all()


def test_stochastic_rounding_keeps_levels_and_clips() -> None:
    levels = torch.arange(-8.0, 8.0) * SCALE
    for seed in range(20):
        x = torch.cat([levels, torch.tensor([-9.0, 9.0])])
        y = fake_quantize(x, SCALE, LOW, HIGH, estimator="stochastic", seed=torch.tensor([seed]))
        assert torch.equal(y, torch.cat([levels, levels[[0, -1]]]))


def test_stochastic_rounding_passes_the_gradient_inside_only() -> None:
    x, g, _ = samples()
    u = x / SCALE
    ours = gradient(x, g, estimator="stochastic", seed=torch.tensor([3]))
    inside, outside = (u >= LOW) & (u <= HIGH), (u < LOW - 1) | (u > HIGH + 1)
    assert torch.equal(ours[inside], g[inside])
    assert (ours[outside] == 0).all()


def test_backward_sees_the_noise_of_forward() -> None:
    """The gradient of the scale is g * (q - u): it tells which neighbour backward took."""
    x = torch.full((50,), 0.3)
    for seed in range(5):
        s = SCALE.clone().requires_grad_()
        y = fake_quantize(x, s, LOW, HIGH, estimator="stochastic", seed=torch.tensor([seed]))
        y.sum().backward()
        expected = (y.detach() / SCALE - x / SCALE).sum() / HIGH.sqrt()
        torch.testing.assert_close(s.grad, expected)


# ---- the hash


def test_noise_is_reproducible_and_changes_with_seed() -> None:
    like = torch.empty(3, 1000)
    first, again, other = (hash_uniform(torch.tensor([seed]), like) for seed in (4, 4, 5))
    assert first.shape == like.shape
    assert torch.equal(first, again)
    assert (first == other).float().mean() < 0.01


def test_noise_depends_on_the_index_alone_not_on_the_shape() -> None:
    seed = torch.tensor([9])
    assert torch.equal(hash_uniform(seed, torch.empty(6, 7)).view(-1), hash_uniform(seed, torch.empty(42)))


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 2])
def test_noise_is_uniform_on_0_to_1(seed: int) -> None:
    n, cells = 2**18, 256
    noise = hash_uniform(torch.tensor([seed]), torch.empty(n))
    assert 0 <= noise.min() <= noise.max() < 1
    counts = noise.histc(cells, 0, 1)
    chi_square = ((counts - n / cells) ** 2 / (n / cells)).sum().item()
    assert abs(chi_square - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 64, 1024])
def test_noise_of_neighbours_is_uncorrelated(lag: int) -> None:
    noise = hash_uniform(torch.tensor([2]), torch.empty(2**18)) - 0.5
    correlation = (noise[lag:] * noise[:-lag]).mean() * 12
    assert abs(correlation.item()) < 5 / 2**9


@pytest.mark.parametrize("other", [1, 2, 3, 2**16])
def test_noise_of_two_seeds_is_uncorrelated(other: int) -> None:
    first, second = (hash_uniform(torch.tensor([seed]), torch.empty(2**18)) - 0.5 for seed in (0, other))
    assert abs((first * second).mean().item() * 12) < 5 / 2**9
