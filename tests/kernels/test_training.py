"""One pass over a gradient: its stochastic codes, and the step in codes that it asks for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.kernels.choose import Backend
from bitsmith.kernels.torch_path import TorchPath
from bitsmith.kernels.training import aim, stochastic

few = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 2**16)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@few
@given(st.integers(0, 20), st.integers(1, 300), st.booleans(), st.booleans(), SEEDS)
def test_stochastic_codes_are_those_of_torch(backend: Backend, m, k, by_column, with_factor, seed) -> None:
    x = drawn(m, k, seed=seed)
    factor = drawn(m if by_column else k, seed=seed + 1) if with_factor else None
    for high in (127, 7):
        found = stochastic(backend, x, high, seed, factor, by_column=by_column)
        expected = stochastic(TorchPath(), x, high, seed, factor, by_column=by_column)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("by_column", [False, True])
def test_stochastic_codes_are_within_a_step_and_right_on_average(backend: Backend, by_column: bool) -> None:
    x, factor = drawn(24, 24, seed=0), torch.linspace(0.1, 3, 24)
    values = x * (factor[:, None] if by_column else factor)
    total = torch.zeros(24, 24)
    for seed in range(200):
        codes, scale = stochastic(backend, x, 127, seed, factor, by_column=by_column)
        codes, step = (codes.t(), scale) if by_column else (codes, scale[:, None])
        assert ((codes * step - values).abs() <= step * 1.0001).all()
        total += codes * step - values
    assert ((total / 200).abs() < 5 * 0.5 * step / 200**0.5).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_scale(backend: Backend, bad: float) -> None:
    x = drawn(4, 70, seed=0)
    x[2, 65] = bad
    assert stochastic(backend, x, 127, 0)[1].isfinite().tolist() == [True, True, False, True]
    finite = stochastic(backend, x, 127, 0, by_column=True)[1].isfinite()
    assert (~finite).nonzero().flatten().tolist() == [65]


@few
@given(
    st.integers(1, 12),
    st.integers(1, 700),
    st.sampled_from([None, 8, 100]),
    st.tuples(*[st.booleans()] * 4),
    SEEDS,
)
def test_a_step_in_codes_is_its_formula(backend: Backend, r, k, group_size, flags, seed) -> None:
    with_column, with_residual, with_half, with_decay = flags
    size = group_size or k
    g, row, column = drawn(r, k, seed=seed), drawn(r, -(-k // size), seed=seed + 1), drawn(k, seed=seed + 2)
    codes, residual = ((drawn(r, k, seed=seed + i) * 40).clamp(-127, 127).to(torch.int8) for i in (3, 4))
    half, decay = 0.5 * with_half, 0.01 * with_decay
    options = {"group_size": group_size, "half": half, "decay": decay}
    column, residual = column if with_column else None, residual if with_residual else None
    d, dots, squares = aim(backend, g, codes, row, column, residual=residual, **options)
    twin = aim(TorchPath(), g, codes, row, column, residual=residual, **options)
    assert torch.equal(d, twin[0])
    torch.testing.assert_close(dots, twin[1])
    assert torch.equal(squares, twin[2])

    wide = torch.stack([row[:, i // size] for i in range(k)], 1).double()
    step, level = g.double() * wide * (1 if column is None else column.double()), codes.double() + half
    torch.testing.assert_close(dots[:, 0].double(), (step * level)[:, :size].sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(squares.sum(1).double(), (level * level).sum(1))
    expected = step + level * decay
    if residual is not None:
        expected = expected * (0.5 + 2 * (residual.double() / 127).abs().clamp(max=0.5))
    torch.testing.assert_close(d.double(), expected, rtol=1e-5, atol=1e-5)


def test_shapes_that_do_not_meet_are_refused(backend: Backend) -> None:
    g, codes = torch.ones(2, 8), torch.ones(2, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="one shape"):
        aim(backend, g, codes, torch.ones(2, 2))
    with pytest.raises(ValueError, match="one shape"):
        aim(backend, g, codes[:, :4], torch.ones(2, 1))
    with pytest.raises(ValueError, match="7 factors for columns of 2 x 8"):
        stochastic(backend, g, 127, 0, torch.ones(7))
