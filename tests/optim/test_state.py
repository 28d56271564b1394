"""The step that moves codes, against plain loops in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitsmith.kernels.choose import best
from bitsmith.numerics import rounding
from bitsmith.numerics.rounding import mix
from bitsmith.optim import blocks
from bitsmith.optim.estimators import ESTIMATORS, estimated
from bitsmith.optim.state import UPDATE, Rule, WeightState, refit, take_step
from bitsmith.quantization.integer_codes import grid_of, read_rows, scales_of, write_rows
from bitsmith.quantization.integer_layers import PackedWeight
from bitsmith.quantization.integer_prepare import prepare_integer

WHOLE = slice(0, 16)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(bits: int = 4, rows: int = 16, inputs: int = 40, group_size: int | None = None) -> PackedWeight:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(inputs, rows))
    prepare_integer(model, bits, first_last_bits=None, group_size=group_size)
    return model[0].weight  # type: ignore[return-value]


def rule(**changes: Any) -> Rule:
    plain = {
        "momentum": 0.9,
        "carry": "eco",
        "estimator": "pure",
        "scale_gradients": True,
        "weight_decay": 0.0,
        "block": 64,
        "scale_rate": 0.0,
    }
    return Rule(**{**plain, **changes})


def new_state(weight: PackedWeight, choices: Rule) -> WeightState:
    state, (rows, inputs) = WeightState(), weight.shape
    if choices.momentum:
        state.momentum, state.momentum_scale = blocks.zeros(rows, inputs, choices.block)
    if choices.carry == "residual":
        state.residual = torch.zeros(rows, inputs, dtype=torch.int8)
    return state


def momentum_of(state: WeightState, choices: Rule) -> Tensor:
    assert state.momentum is not None
    assert state.momentum_scale is not None
    return blocks.read(state.momentum, state.momentum_scale, choices.block).double()


@pytest.mark.parametrize("group_size", [None, 16])
def test_eco_is_the_formula_of_the_paper(group_size: int | None) -> None:
    """m~ = b m + (1 - b) g;  W~ = s q - lr m~;  q' = SR(W~/s);  e = W~ - s q';  m' = m~ + (1/lr)(1 - 1/b) e,
    in float64, with the noise of the kernel and the momentum that was stored."""
    choices, lr, b = rule(), 0.3, 0.9
    weight = packed(group_size=group_size)
    state, backend = new_state(weight, choices), best()
    _, low, high, _ = grid_of(weight)
    s = scales_of(weight).repeat_interleave(group_size or 40, 1)[:, :40].double()
    for step in range(6):
        g, q = drawn(16, 40, seed=step), read_rows(weight, backend, WHOLE).double()
        m = momentum_of(state, choices) * s / lr  # of steps in codes -> of gradients
        m_tilde = b * m + (1 - b) * g
        w = s * q - lr * m_tilde
        noise = rounding.hash_uniform(torch.tensor([mix(step, UPDATE)]), g)
        new = (w / s + noise).floor().clamp(low, high)
        error = (w / s).clamp(low, high) * s - s * new
        m_new = m_tilde + (1 / lr) * (1 - 1 / b) * error
        take_step(weight, state, WHOLE, g, lr, choices, step, backend)
        assert (read_rows(weight, backend, WHOLE) == new).float().mean() > 0.998  # float32 at a border
        same = read_rows(weight, backend, WHOLE) == new
        stored = momentum_of(state, choices)
        ulp = state.momentum_scale.double().repeat_interleave(64, 1)[:, :40]
        assert (((stored - m_new * lr / s) / ulp).abs()[same] < 1.001).all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    b=st.sampled_from([0.5, 0.9, 0.97]),
    lr=st.sampled_from([0.0, 1e-3, 0.05]),
)
def test_where_codes_come_to_rest_moves_by_plain_descent(seed: int, b: float, lr: float) -> None:
    """u = c - b m/(1 - b) moves by -lr g/s, with no rounding error of the codes in it: only the momentum's
    own rounding, which is known here."""
    choices, weight = rule(momentum=b), packed(8)
    state, backend = new_state(weight, choices), best()
    take_step(weight, state, WHOLE, drawn(16, 40, seed=seed + 1), 0.02, choices, seed + 7, backend)
    before = read_rows(weight, backend, WHOLE) - momentum_of(state, choices) * b / (1 - b)
    g = drawn(16, 40, seed=seed)
    take_step(weight, state, WHOLE, g, lr, choices, seed, backend)
    codes = read_rows(weight, backend, WHOLE)
    after = codes - momentum_of(state, choices) * b / (1 - b)
    moved = before - after
    expected = lr * g.double() / scales_of(weight)
    allowed = state.momentum_scale.double().repeat_interleave(64, 1)[:, :40] * b / (1 - b) * 1.001
    inside = (codes > -127) & (codes < 127)
    assert ((moved - expected).abs() <= allowed)[inside].all()


def test_nothing_is_lost_of_steps_far_below_a_code() -> None:
    """200 steps of a hundredth of a code each: with either carry, codes arrive where floats do; a nearest
    rounding would not have moved at all."""
    for carry in ("eco", "residual", "none"):
        choices, weight = rule(carry=carry), packed(8)
        state, backend = new_state(weight, choices), best()
        start = read_rows(weight, backend, WHOLE).double()
        steps = torch.linspace(-0.01, 0.01, 40).expand(16, 40)
        for seed in range(200):
            g = steps * scales_of(weight)
            take_step(weight, state, WHOLE, g, 1.0, choices, mix(seed), backend)
        end = read_rows(weight, backend, WHOLE).double()
        inside = (end > -126) & (end < 125)
        error = (end - (start - 200 * steps))[inside]
        assert error.mean().abs() < 0.15
        assert error.std() < {"eco": 0.8, "residual": 0.4, "none": 1.3}[carry]


def test_residual_feedback_is_exact_to_its_own_step() -> None:
    choices, weight = rule(carry="residual", momentum=0.0), packed(8)
    state, backend = new_state(weight, choices), best()
    u = read_rows(weight, backend, WHOLE).double()
    for seed in range(20):
        g = drawn(16, 40, seed=seed) * 0.1 * scales_of(weight)
        u -= (g / scales_of(weight)).double()
        take_step(weight, state, WHOLE, g, 1.0, choices, seed, backend)
    codes = read_rows(weight, backend, WHOLE).double()
    inside = (u.abs() < 126) & (codes.abs() < 126)
    carried = codes + state.residual.double() / 127
    assert ((carried - u).abs() < 20 / 127)[inside].all()
    assert (carried - u)[inside].mean().abs() < 0.005
    assert (codes - carried).abs().max() <= 0.5 + 1 / 127


def test_without_scaled_gradients_the_step_is_the_literal_one() -> None:
    """W_int - lr g_int, with g_int = s g the gradient of a code."""
    weight, backend = packed(8), best()
    choices = rule(momentum=0.0, carry="none", scale_gradients=False)
    before, s = read_rows(weight, backend, WHOLE).double(), scales_of(weight)
    g = drawn(16, 40)
    lr = float(3 / s.mean())
    take_step(weight, WeightState(), WHOLE, g, lr, choices, 5, backend)
    wanted = (before - lr * s * g).clamp(-128, 127)
    moved = read_rows(weight, backend, WHOLE) - wanted
    assert moved.abs().max() < 1.001
    assert moved.mean().abs() < 0.1


def test_what_leaves_the_range_is_counted_and_not_fed_back() -> None:
    weight, backend, choices = packed(4), best(), rule()
    state = new_state(weight, choices)
    g = -torch.ones(16, 40) * scales_of(weight) * 400  # 40 codes upwards
    take_step(weight, state, WHOLE, g, 1.0, choices, 0, backend)
    assert (read_rows(weight, backend, WHOLE) == 7).all()
    assert state.cut == 16 * 40
    torch.testing.assert_close(
        momentum_of(state, choices), torch.full((16, 40), -40.0).double(), rtol=0.02, atol=0
    )


@pytest.mark.parametrize("group_size", [None, 16])
def test_learned_scales_take_the_part_of_a_step_that_lies_along_the_weight(group_size: int | None) -> None:
    weight, backend, choices = packed(4, group_size=group_size), best(), rule(scale_rate=1.0)
    before, values = scales_of(weight).clone(), weight().clone()
    take_step(weight, new_state(weight, choices), WHOLE, values, 0.01, choices, 0, backend)
    torch.testing.assert_close(scales_of(weight), before * math.exp(-0.01))  # g = W: W shrinks by 1 %
    take_step(weight, new_state(weight, choices), WHOLE, -1e6 * values, 0.01, choices, 0, backend)
    assert (scales_of(weight) < before * math.exp(-0.01 + 2**-5) * 1.0001).all()


def test_a_refitted_scale_follows_what_weights_stand_for() -> None:
    weight, backend, choices = packed(4), best(), rule(carry="residual")
    state = new_state(weight, choices)
    scales_of(weight).mul_(3.0)  # far too coarse by now
    state.residual.random_(-60, 60, generator=torch.Generator().manual_seed(0))
    codes = read_rows(weight, backend, WHOLE) // 3
    write_rows(weight, backend, WHOLE, codes.to(torch.int8))
    stands_for = (codes + state.residual / 127) * scales_of(weight)
    worse = (weight() - stands_for).square().mean()
    refit(weight, state, WHOLE, choices, "mse", 0, backend)
    assert (weight() - stands_for).square().mean() < 0.5 * worse
    kept = weight() + state.residual / 127 * scales_of(weight)
    near = (kept - stands_for).abs() < 0.02 * scales_of(weight)
    assert near.float().mean() > 0.95  # the rest was clipped


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    inputs=st.integers(1, 150),
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1e-30, 1e-6, 1.0, 1e6]),
)
def test_block_codes_are_within_a_step_of_their_values(
    rows: int, inputs: int, seed: int, size: float
) -> None:
    values = drawn(rows, inputs, seed=seed) * size
    codes, scale = blocks.write(values, 64, seed, best())
    found = blocks.read(codes, scale, 64)
    step = scale.float().repeat_interleave(64, 1)[:, :inputs]
    assert ((found - values).abs() <= step * 1.0001).all()
    assert codes.abs().max() <= 127
    assert (scale.float().amax(1) <= values.abs().amax(1) / 127 * 1.02 + 1e-35).all()


def test_block_codes_are_right_on_average() -> None:
    values = drawn(2, 64)
    found = torch.stack([blocks.read(*blocks.write(values, 64, mix(s), best()), 64) for s in range(400)])
    assert (found.mean(0) - values).abs().max() < 4 * 0.5 * values.abs().max() / 127 / 20


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_are_what_they_are_said_to_be(name: str) -> None:
    """On a fine mesh of latents: the factor's mean is 1, and nothing but `pure` pushes a code off its end."""
    carried = (torch.arange(4096) + 0.5).div(4096).sub(0.5)[None]
    codes, d = torch.zeros(1, 4096, dtype=torch.int8), torch.full((1, 4096), 0.3)
    found = estimated(name, d, codes, carried, -4, 3, 1)
    assert found.mean() == pytest.approx(0.3, rel=0.02)
    varies = {"piecewise_linear", "smooth", "ewgs", "error_noise"}
    assert (found.std() > 1e-6) == (name in varies)
    ends = torch.tensor([[-4, -4, 3, 3]], dtype=torch.int8)
    steps, zero = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.zeros(1, 4)
    moves = estimated(name, steps, ends, zero, -4, 3, 1) != 0
    assert moves.tolist() == [[name == "pure", True, True, name == "pure"]]


@pytest.mark.parametrize("name", ["clipped", "ewgs", "smooth", "piecewise_linear"])
def test_pushes_to_and_fro_leave_codes_at_their_ends_alone(name: str) -> None:
    """Steps that cancel out: an estimator that dropped those outwards at an end would walk off it."""
    choices, weight = rule(carry="residual", momentum=0.0, estimator=name), packed(2)
    state, backend = new_state(weight, choices), best()
    before = read_rows(weight, backend, WHOLE)
    ends = (before == -2) | (before == 1)
    assert 0.1 < ends.float().mean() < 0.9
    for step in range(60):
        g = torch.full((16, 40), 0.05 * (-1) ** step) * scales_of(weight)
        take_step(weight, state, WHOLE, g, 1.0, choices, mix(step), backend)
    assert torch.equal(read_rows(weight, backend, WHOLE), before)


def test_the_end_of_a_range_is_that_of_the_latent_weight_where_it_is_known() -> None:
    """Back up from 0.3 below the highest code, but no further than to it; a cut is counted."""
    choices, weight, backend = rule(carry="residual", momentum=0.0, estimator="clipped"), packed(2), best()
    state = new_state(weight, choices)
    assert state.residual is not None
    write_rows(weight, backend, WHOLE, torch.ones(16, 40, dtype=torch.int8))
    state.residual.fill_(-38)
    for step, left in ((0.1, -0.2), (1.0, 0.0)):
        assert state.cut == 0
        take_step(weight, state, WHOLE, -step * scales_of(weight).expand(16, 40), 1.0, choices, 0, backend)
        assert (read_rows(weight, backend, WHOLE) == 1).all()
        assert (state.residual.float() / 127 - left).abs().max() < 2 / 127
    assert state.cut == 16 * 40


def test_the_smooth_factor_is_that_of_fake_quantization() -> None:
    carried = torch.linspace(-0.49, 0.49, 50)[None]
    codes, d = torch.ones(1, 50, dtype=torch.int8), torch.ones(1, 50)
    expected = rounding.smooth(d, codes + carried, -carried, torch.tensor(7.0))
    torch.testing.assert_close(estimated("smooth", d, codes, carried, -4, 3, 0), expected)


def test_the_probabilistic_estimator_draws_codes_whose_mean_is_the_latent_weight() -> None:
    choices, weight = rule(carry="residual", momentum=0.0, estimator="probabilistic"), packed(8)
    state, backend = new_state(weight, choices), best()
    start = read_rows(weight, backend, WHOLE).double()
    off = torch.full((16, 40), 0.3)
    take_step(weight, state, WHOLE, off * scales_of(weight), 1.0, choices, 3, backend)
    zero, found = torch.zeros(16, 40), []
    for seed in range(200):
        take_step(weight, state, WHOLE, zero, 1.0, choices, mix(seed), backend)
        found.append(read_rows(weight, backend, WHOLE).double())
    codes = torch.stack(found)
    inside = (start > -126) & (start < 126)
    assert (codes.mean(0) - (start - off)).mean().abs() < 0.01
    assert (codes.std(0)[inside] > 0.3).float().mean() > 0.95  # 0.46 where 0.3 and 0.7 share the draws
