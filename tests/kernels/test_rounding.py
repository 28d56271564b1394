"""Floats to codes, on every backend: the codes of numerics.affine, and a stochastic step that is unbiased."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.kernels.choose import Backend
from bitsmith.kernels.torch_path import TorchPath
from bitsmith.numerics.affine import quantize
from bitsmith.numerics.rounding import hash_uniform

few = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**16)
GRIDS = st.sampled_from(
    [(-128, 127, 0.0), (-127, 127, 0.0), (-8, 7, 0.0), (-2, 1, 0.5), (0, 255, 0.0), (0, 15, 0.0)]
)


def values(m: int, k: int, seed: int) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * 3


@few
@given(st.integers(0, 20), st.integers(0, 300), GRIDS, SEEDS)
def test_a_row_gets_its_own_range(backend: Backend, m, k, grid, seed) -> None:
    low, high, half = grid
    x = values(m, k, seed)
    found = backend.quantize(x, low, high, half=half, asymmetric=low == 0)
    expected = TorchPath().quantize(x, low, high, half=half, asymmetric=low == 0)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.row_scale, expected.row_scale)
    assert torch.equal(torch.as_tensor(found.zero_point), torch.as_tensor(expected.zero_point))


@few
@given(st.integers(0, 20), st.integers(0, 300), GRIDS, st.integers(-3, 3), SEEDS)
def test_a_static_grid_gives_the_codes_of_numerics(backend: Backend, m, k, grid, zero, seed) -> None:
    low, high, half = grid
    x, scale = values(m, k, seed), torch.tensor([0.37])
    found = backend.quantize(x, low, high, scale=scale, zero_point=zero, half=half)
    assert torch.equal(found.codes.float(), quantize(x, scale, low, high, half, zero))


@few
@given(st.integers(0, 40000), st.integers(-(2**31), 2**31 - 1), st.sampled_from([(-128, 127), (-2, 1)]))
def test_a_step_of_codes_rounds_by_the_hash_of_numerics(backend: Backend, count, seed, bounds) -> None:
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(bounds[0], bounds[1] + 1, (count,), generator=generator).to(torch.int8)
    step = torch.randn(count, generator=generator)
    noise = hash_uniform(torch.tensor([seed]), codes)
    expected = torch.floor(codes.float() - step + noise).clamp(*bounds)
    backend.update(codes, step, seed, *bounds)
    assert torch.equal(codes.float(), expected)


def test_small_steps_move_codes_as_far_on_average(backend: Backend) -> None:
    codes, step = torch.zeros(100_000, dtype=torch.int8), torch.full((100_000,), 0.01)
    for seed in range(20):
        backend.update(codes, step, seed * 7919, -128, 127)
    assert float(codes.float().mean()) == pytest.approx(-0.2, abs=0.01)  # six standard errors


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(4, 2).t()])
def test_steps_of_another_shape_are_refused(backend: Backend, wrong: torch.Tensor) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        backend.update(torch.zeros(4, dtype=torch.int8), wrong, 0, -128, 127)
