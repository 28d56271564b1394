"""Gradients against torch's own fake_quantize, a plain twin, finite differences and papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitsmith.numerics.affine import fake_quantize
from bitsmith.numerics.grid import bounds

GRIDS_AND_BITS = [
    ("symmetric", 8),
    ("symmetric", 3),
    ("balanced", 2),
    ("seq", 1),
    ("seq", 2),
    ("unsigned", 4),
]


def level_tensors(grid: str, bits: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    low, high, half = bounds(grid, bits)
    return tuple(torch.tensor([bound], dtype=dtype) for bound in (low, high, half))


class Round(torch.autograd.Function):
    """Rounding whose derivative is 1: the straight-through estimator as it is defined."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def twin(
    x: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    half: Tensor,
    zero_point: Tensor | None = None,
    count: int = 1,
) -> Tensor:
    """The definition in plain autograd, with LSQ's gradient scale."""
    share = (high.clamp(min=1) * count).rsqrt()
    s = scale * share + (scale - scale * share).detach()
    s = s + (scale - s).detach()  # undo the rounding of the line above
    z = torch.zeros_like(scale) if zero_point is None else zero_point
    return s * (torch.clamp(Round.apply(x / s - half), low - z, high - z) + half)


def away_from_ties(u: Tensor) -> Tensor:
    return ((u - u.floor()) - 0.5).abs() > 1e-3


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize(
    ("low", "high", "zero_point"), [(-128, 127, 0), (0, 255, 3), (-8, 7, 0), (0, 3, 2), (0, 15, 15)]
)
def test_forward_and_backward_are_those_of_torch(
    axis: int | None, low: int, high: int, zero_point: int
) -> None:
    x = 3 * torch.randn(5, 400, generator=torch.Generator().manual_seed(1))
    channels = 1 if axis is None else x.shape[axis]
    scale = (
        2.0 ** torch.arange(channels).remainder(4).sub(3).float()
    )  # torch multiplies by 1/s: exact for 2^k
    z = torch.full((channels,), zero_point)
    view = [-1 if i == axis else 1 for i in range(2)]
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    if axis is None:
        expected = torch.fake_quantize_per_tensor_affine(theirs, scale.item(), zero_point, low, high)
    else:
        expected = torch.fake_quantize_per_channel_affine(theirs, scale, z.int(), axis, low, high)
    y = fake_quantize(
        ours,
        scale.view(view),
        torch.tensor([float(low)]),
        torch.tensor([float(high)]),
        None,
        z.float().view(view),
    )
    assert torch.equal(y, expected)
    g = torch.randn_like(x)
    expected.backward(g)
    y.backward(g)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(("grid", "bits"), GRIDS_AND_BITS)
@pytest.mark.parametrize("view", [(1,), (4, 1, 1), (1, 3, 1), (2, 1, 5)])
@pytest.mark.parametrize("count", [1, 30])
def test_gradients_are_those_of_the_plain_twin(
    grid: str, bits: int, view: tuple[int, ...], count: int
) -> None:
    generator = torch.Generator().manual_seed(bits)
    shape = (2, 8, 5) if view == (2, 1, 5) else (4, 3, 40)
    low, high, half = level_tensors(grid, bits, torch.float64)
    x = (high + 1) * torch.randn(shape, dtype=torch.float64, generator=generator)
    scale = 0.5 + torch.rand(view, dtype=torch.float64, generator=generator)
    assert away_from_ties(x / scale - half).float().mean() > 0.9
    g = torch.randn(shape, dtype=torch.float64, generator=generator)
    results = []
    for function in (twin, fake_quantize):
        leaves = [t.clone().requires_grad_() for t in (x, scale)]
        y = function(*leaves, low, high, half, count=count)
        results.append((y, *torch.autograd.grad(y, leaves, g)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_gradient_of_a_learned_zero_point_is_that_of_the_plain_twin() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(3, 50, dtype=torch.float64, generator=generator)
    low, high, half = level_tensors("asymmetric", 3, torch.float64)
    leaves = [
        x,
        torch.rand(3, 1, dtype=torch.float64, generator=generator),
        torch.tensor([[0.0], [3.0], [6.0]]).double(),
    ]
    g = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    results = []
    for function in (twin, fake_quantize):
        x, scale, zero_point = (t.clone().requires_grad_() for t in leaves)
        y = function(x, scale, low, high, half, zero_point)
        results.append(torch.autograd.grad(y, (x, scale, zero_point), g))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_ends_half_a_step_beyond_the_outermost_levels() -> None:
    """On both sides alike: a tie beyond the grid is still inside, where torch's rounding decides."""
    u = torch.tensor([-8.51, -8.5, -8.0, 7.0, 7.5, 7.51], requires_grad=True)
    fake_quantize(u, torch.ones(1), *level_tensors("symmetric", 4)).sum().backward()
    assert u.grad.tolist() == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(("grid", "bits"), GRIDS_AND_BITS)
def test_gradient_of_the_scale_is_a_finite_difference(grid: str, bits: int) -> None:
    """Of y(s) with the residue of rounding, and who is clipped, held: the surrogate that is descended."""
    generator = torch.Generator().manual_seed(7)
    low, high, half = level_tensors(grid, bits, torch.float64)
    x = (high + 1) * torch.randn(200, dtype=torch.float64, generator=generator)
    g = torch.randn(200, dtype=torch.float64, generator=generator)
    s0 = torch.tensor([0.8], dtype=torch.float64)
    code = (x / s0 - half).round()
    inside = (code >= low) & (code <= high)
    residue = code + half - x / s0

    def loss(s: Tensor) -> Tensor:
        return (g * torch.where(inside, s * (x / s + residue), s * (code.clamp(low, high) + half))).sum()

    step = 1e-6
    difference = (loss(s0 + step) - loss(s0 - step)) / (2 * step)
    s = s0.clone().requires_grad_()
    (fake_quantize(x, s, low, high, half) * g).sum().backward()
    share = high.clamp(min=1).rsqrt()
    torch.testing.assert_close(s.grad, share * difference, rtol=1e-7, atol=1e-7)


def test_gradient_of_the_scale_is_equation_3_of_lsq() -> None:
    """1902.08153: -v/s + round(v/s) inside, -Qn or Qp outside, times 1/sqrt(N Qp)."""
    v = torch.tensor([0.3, -0.9, 2.6, 40.0, -40.0, 0.0])
    s, qn, qp = torch.tensor([0.5], requires_grad=True), 8, 7
    each = [-0.6 + 1, 1.8 - 2, -5.2 + 5, qp, -qn, 0]
    fake_quantize(v, s, torch.tensor([-8.0]), torch.tensor([7.0]), count=len(v)).sum().backward()
    torch.testing.assert_close(s.grad, torch.tensor([sum(each) / (len(v) * qp) ** 0.5]))


def test_gradient_of_the_clipping_bound_is_that_of_pact() -> None:
    """1805.06085, eq. 3: dy/dalpha = 1 where x >= alpha, else 0; here alpha = scale * (2^k - 1)."""
    x = torch.tensor([-1.0, 0.2, 0.77, 2.9, 3.6, 9.0])
    g = torch.tensor([5.0, 7.0, 11.0, 13.0, 17.0, 19.0])
    s = torch.tensor([0.2], requires_grad=True)  # 4 bits: alpha = 3
    y = fake_quantize(x, s, torch.tensor([0.0]), torch.tensor([15.0]), clip_only=True)
    (y * g).sum().backward()
    d_alpha = s.grad * 15**0.5 / 15  # without LSQ's gradient scale; ds = dalpha / 15
    torch.testing.assert_close(d_alpha, torch.tensor([17.0 + 19.0]))


@pytest.mark.parametrize("estimator", ["clipped", "pure", "ewgs", "smooth"])
def test_the_estimator_leaves_value_and_range_gradients_alone(estimator: str) -> None:
    x = 3 * torch.randn(500, generator=torch.Generator().manual_seed(3))
    low, high, half = level_tensors("asymmetric", 2)
    results = []
    for name in ("clipped", estimator):
        s, z = torch.tensor([0.7], requires_grad=True), torch.tensor([1.0], requires_grad=True)
        y = fake_quantize(x.clone().requires_grad_(), s, low, high, half, z, estimator=name)
        results.append((y, *torch.autograd.grad(y, (s, z), x.cos())))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_leaving_half_out_is_the_same_as_zero() -> None:
    x, s = torch.randn(99), torch.tensor([0.2])
    low, high, half = level_tensors("symmetric", 4)
    assert torch.equal(fake_quantize(x, s, low, high), fake_quantize(x, s, low, high, half))


@pytest.mark.parametrize("estimator", ["clipped", "pure", "ewgs", "smooth", "stochastic"])
def test_differentiable_backward_gives_the_gradients_of_the_plain_one(estimator: str) -> None:
    """The in-place arithmetic of the fast backward and the expressions of the other agree."""
    x = 3 * torch.randn(4, 60, generator=torch.Generator().manual_seed(3))
    low, high, half = level_tensors("seq", 2)
    seed = torch.tensor([5]) if estimator == "stochastic" else None
    results = []
    for create_graph in (False, True):
        leaves = [x.clone().requires_grad_(), torch.full((4, 1), 0.9, requires_grad=True)]
        y = fake_quantize(*leaves, low, high, half, estimator=estimator, seed=seed)
        results.append(torch.autograd.grad(y, leaves, x.cos(), create_graph=create_graph))
    for plain, differentiable in zip(*results, strict=True):
        torch.testing.assert_close(plain, differentiable.detach())
    sum(t.square().sum() for t in results[1]).backward()
    assert leaves[1].grad.isfinite().all()


@pytest.mark.parametrize(("grid", "bits"), GRIDS_AND_BITS)
def test_second_derivatives_are_those_of_the_plain_twin(grid: str, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    low, high, half = level_tensors(grid, bits, torch.float64)
    x = (high + 1) * torch.randn(3, 40, dtype=torch.float64, generator=generator)
    scale = 0.5 + torch.rand(3, 1, dtype=torch.float64, generator=generator)
    results = []
    for function in (twin, fake_quantize):
        leaves = [t.clone().requires_grad_() for t in (x, scale)]
        d_x, d_scale = torch.autograd.grad(
            function(*leaves, low, high, half).pow(3).sum(), leaves, create_graph=True
        )
        results.append(torch.autograd.grad((d_x * x.cos()).sum() + d_scale.sin().sum(), leaves))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_inputs_are_left_untouched() -> None:
    x, s, g = torch.randn(40, requires_grad=True), torch.tensor([0.3], requires_grad=True), torch.randn(40)
    before = [t.detach().clone() for t in (x, s, g)]
    fake_quantize(x, s, *level_tensors("seq", 2)).backward(g)
    assert all(torch.equal(t.detach(), copy) for t, copy in zip((x, s, g), before, strict=True))


@pytest.mark.parametrize("estimator", ["clipped", "stochastic"])
def test_compiled_is_equal_to_eager_bit_for_bit_up_to_the_order_of_a_sum(estimator: str) -> None:
    torch.compiler.reset()
    x, g = torch.randn(2, 4, 60, generator=torch.Generator().manual_seed(3))
    low, high, half = level_tensors("seq", 2)
    seed = torch.tensor([5]) if estimator == "stochastic" else None

    def run(x: Tensor, s: Tensor) -> Tensor:
        return fake_quantize(x, s, low, high, half, estimator=estimator, seed=seed)

    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_(), torch.full((4, 1), 0.9, requires_grad=True)]
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, g)))
    (y, d_x, d_s), (compiled_y, compiled_d_x, compiled_d_s) = results
    assert torch.equal(y, compiled_y)
    assert torch.equal(d_x, compiled_d_x)
    torch.testing.assert_close(d_s, compiled_d_s, rtol=1e-5, atol=1e-5)  # a sum, in another order


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("shape", [(1,), (1, 4, 1)], ids=["of all values", "of each channel"])
def test_a_share_receives_the_error_against_the_input_and_changes_no_value(
    shape: tuple[int, ...], backend: str | None
) -> None:
    torch.compiler.reset()
    x, g = torch.randn(2, 2, 4, 60, generator=torch.Generator().manual_seed(3))
    low, high, half = level_tensors("seq", 2)
    scale, share = torch.full((4, 1), 0.9), torch.ones(shape, requires_grad=True)

    def run(x: Tensor, share: Tensor) -> Tensor:
        return fake_quantize(x, scale, low, high, half, share=share)

    y = (torch.compile(run, backend=backend, fullgraph=True) if backend else run)(x, share)
    y.backward(g)
    plain = fake_quantize(x, scale, low, high, half)
    assert torch.equal(y.detach(), plain)
    torch.testing.assert_close(share.grad, (g * (plain - x)).sum_to_size(shape))
