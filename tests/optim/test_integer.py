"""Integer optimizers: their formulas against plain loops, their memory counted, their state resumed."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitsmith.errors import FormatError, SchemeError, SiteError
from bitsmith.kernels.choose import best
from bitsmith.numerics import rounding
from bitsmith.numerics.rounding import mix
from bitsmith.optim import IntegerAdam, IntegerOptimizer, IntegerSGD, IntegerSign, blocks, state_bytes
from bitsmith.optim.estimators import ESTIMATORS, estimated
from bitsmith.optim.state import UPDATE, Rule, WeightState, refit, take_step
from bitsmith.quantization.integer_codes import grid_of, read_rows, scales_of, write_rows
from bitsmith.quantization.integer_gradients import WeightGradient
from bitsmith.quantization.integer_layers import PackedWeight
from bitsmith.quantization.integer_prepare import prepare_integer
from bitsmith.quantization.integer_training import int_layers

OPTIMIZERS = [IntegerSGD, IntegerSign, IntegerAdam]
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


# ---- whole optimizers


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.LayerNorm(96), nn.Linear(96, 10))


def prepared(*widths: int) -> nn.Module:
    model = network()
    prepare_integer(model, *widths)
    return model


def train(model: nn.Module, optimizer: IntegerOptimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(drawn(32, 64, seed=step)), torch.arange(32) % 10)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("scales", ["learned", "refit"])
def test_resuming_is_exact_to_the_bit(kind: type[IntegerOptimizer], scales: str) -> None:
    def made() -> tuple[nn.Module, IntegerOptimizer]:
        model = prepared(4, 4, 4)
        return model, kind(model, lr=0.01, scales=scales, refit_every=3)

    model, optimizer = made()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, 0, 4)
    schedule.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, 4, 8)

    again, other = made()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert other.lr == pytest.approx(0.005)
    assert train(again, other, 4, 8) == expected
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(t, other.tensors()[name]) for name, t in optimizer.tensors().items())


def test_the_state_of_another_optimizer_is_refused() -> None:
    state = IntegerSGD(prepared(), lr=0.1).state_dict()
    with pytest.raises(FormatError, match="kind: this is the state of another optimizer"):
        IntegerAdam(prepared(), lr=0.1).load_state_dict(state)
    with pytest.raises(FormatError, match="residual"):
        IntegerSGD(prepared(), lr=0.1, carry="residual").load_state_dict(state)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (IntegerSGD, {}),
        (IntegerAdam, {}),
        (IntegerSign, {"carry": "none"}),
        (IntegerSGD, {"momentum": 0.0, "carry": "residual"}),
    ],
)
@pytest.mark.parametrize("group_size", [None, 64])
def test_all_state_is_within_1_6_bytes_a_weight_at_4_bits(
    kind: type[IntegerOptimizer], options: dict[str, Any], group_size: int | None
) -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    prepare_integer(model, 4, first_last_bits=None, group_size=group_size)
    optimizer = kind(model, lr=1e-3, **options)
    F.mse_loss(model(drawn(8, 512)), drawn(8, 512)).backward()
    optimizer.step()
    counted = state_bytes(model, optimizer)
    assert counted.weights == 2 * 512 * 512
    assert 1.5 <= counted.per_weight <= 1.6
    held = {id(t): t for t in (*model.buffers(), *optimizer.tensors().values())}.values()
    held_bytes = sum(t.numel() * t.element_size() for t in held)
    assert counted.codes + counted.scales + counted.optimizer == held_bytes
    assert counted.float_parameters == 2 * 512 * 4


def test_the_float_leftovers_train_here_or_with_the_user() -> None:
    model = prepared()
    floats = [p.detach().clone() for p in model.parameters()]
    optimizer = IntegerSGD(model, lr=0.1)
    train(model, optimizer, 0, 1)
    assert all(not torch.equal(a, b) for a, b in zip(floats, model.parameters(), strict=True))

    model = prepared()
    optimizer = IntegerSGD(model, lr=0.1, float_optimizer=False)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 0, 1)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert {"0.weight.codes", "0.weight.scale"} <= changed
    assert not changed & {name for name, _ in model.named_parameters()}


def test_two_gradients_in_one_step_are_refused() -> None:
    model = prepared()
    optimizer = IntegerSGD(model, lr=0.1)
    x = drawn(4, 64)
    model(x).sum().backward()
    with pytest.raises(SiteError, match="4: this layer's codes were updated already in this step"):
        model(x).sum().backward()
    optimizer.step()
    model(x).sum().backward()


def test_closures_early_steps_clipping_and_second_optimizers_are_refused() -> None:
    model = prepared()
    optimizer = IntegerSGD(model, lr=0.1)
    with pytest.raises(SiteError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(SiteError, match="no gradient has arrived"):
        optimizer.step()
    with pytest.raises(SiteError, match="clipping by a norm"):
        optimizer.check_loop(clip=1.0)
    with pytest.raises(SiteError, match="accumulation needs all gradients"):
        optimizer.check_loop(accumulation=2)
    with pytest.raises(SiteError, match="a second pass"):
        optimizer.check_loop(second_pass=True)
    optimizer.check_loop()
    with pytest.raises(SiteError, match="another integer optimizer has this layer"):
        IntegerAdam(model, lr=0.1)
    optimizer.detach()
    IntegerAdam(model, lr=0.1)
    with pytest.raises(SiteError, match="no layer that trains on integers"):
        IntegerSGD(network(), lr=0.1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (IntegerSGD, {"lr": -1.0}, "IntegerSGD.lr"),
        (IntegerSGD, {"carry": "byte"}, "no such carry"),
        (IntegerSGD, {"momentum": 0.0}, "residual or none without momentum"),
        (IntegerSign, {"carry": "eco"}, "no such carry"),
        (IntegerSGD, {"estimator": "through"}, "no such estimator"),
        (IntegerSGD, {"scales": "free"}, "no such scales"),
        (IntegerAdam, {"second": 1.0}, "IntegerAdam.second"),
        (IntegerSGD, {"block": 3}, "IntegerSGD.block"),
    ],
)
def test_choices_that_there_are_not_are_refused(
    kind: type[IntegerOptimizer], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SchemeError, match=message):
        kind(prepared(), **{"lr": 0.1, **options})


def test_rows_that_were_not_looked_up_do_not_change() -> None:
    model = nn.Sequential(nn.Embedding(20, 7), nn.Linear(7, 5))
    prepare_integer(model, 4)
    for kind in OPTIMIZERS:
        optimizer = kind(model, lr=0.5)
        table = model[0].weight
        before = table.integers()
        rows = torch.tensor([3, 17, 3])
        F.cross_entropy(model(rows), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
        optimizer.detach()
        changed = (table.integers() != before).any(1).nonzero().flatten()
        assert set(changed.tolist()) <= {3, 17}
        assert len(changed)


def test_second_moments_are_factored_and_steps_do_not_depend_on_the_size_of_gradients() -> None:
    for size in (1e-4, 1e4):
        model = prepared(8)
        optimizer = IntegerAdam(model, lr=0.01, scales="fixed", momentum=0.0, carry="none")
        layer = int_layers(model)["2"]
        state = optimizer._states["2.weight"]
        before = layer.weight()
        g = torch.outer(torch.logspace(-2, 2, 96), torch.logspace(2, -2, 96)) * size  # v of rank one
        for _ in range(3):
            optimizer._arrived.clear()
            layer.sink(WeightGradient(lambda start, stop, g=g: g[start:stop]))
        torch.testing.assert_close(state.row_squares, g.square().mean(1))
        torch.testing.assert_close(state.column_squares, g.square().mean(0))
        moved = (before - layer.weight()) / 0.01
        assert 1.9 < moved[:, :48].mean() + moved[:, 48:].mean() < 6.1  # of two or three steps of 0.01


DIGITS = {
    "sgd": (IntegerSGD, {"lr": 1.0}),
    "sign": (IntegerSign, {"lr": 3e-3}),
    "adam": (IntegerAdam, {"lr": 5e-3}),
    "adam, 4 4 4": (IntegerAdam, {"lr": 5e-3}),
}


@pytest.mark.parametrize("name", DIGITS)
def test_digits_are_learned(name: str) -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    model = network()
    prepare_integer(model, *((4, 4, 4) if "4 4 4" in name else (4, 8, 8)), example=x[:8])
    kind, options = DIGITS[name]
    optimizer = kind(model, **options)
    for batch in torch.arange(1400).repeat(3).split(50):
        optimizer.param_groups[0]["lr"] = options["lr"] * (1 - optimizer.steps / 84)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (model.eval()(x[1400:]).argmax(1) == y[1400:]).float().mean()
    assert accuracy > 0.9
    assert 0 <= optimizer.saturated < 0.2
    assert 0 < optimizer.moved < 0.5
