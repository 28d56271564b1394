"""The quantizer: values on its grid, for every scheme; codes that give them back; rows; commit."""

import itertools

import pytest
import torch
from torch import Tensor

from bitsmith.errors import SchemeError, SiteError
from bitsmith.numerics.calibrate import dorefa
from bitsmith.numerics.grid import bounds
from bitsmith.quantization import FixedBits, Scheme, check_calibrated, redraw
from bitsmith.quantization.quantizer import Quantizer
from bitsmith.quantization.rows import observe_weight
from tests.quantization.widths import Mixed, Sampled

RANGES = ("lsq", "lsq+", "pact", "dorefa", "static", "dynamic")
GRANULARITIES = (
    {"granularity": "tensor"},
    {"granularity": "channel"},
    {"granularity": "group", "group_size": 5},
)


def weight(scheme: Scheme, seed: int = 0) -> tuple[Quantizer, Tensor]:
    """A calibrated quantizer and its weight (6, 4, 3), whose rows differ in size; groups of 5 are ragged."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, 3, generator=generator) * torch.arange(1.0, 7).view(-1, 1, 1)
    groups = -(-12 // scheme.group_size) if scheme.group_size else 1
    channels, view = {
        "tensor": (1, (1,)),
        "channel": (6, (-1, 1, 1)),
        "group": (6 * groups, (-1, groups, 1)),
    }[scheme.granularity]
    quantizer = Quantizer("w.weight", "weight", scheme, channels=channels, view=view)
    quantizer.calibrate(*observe_weight(quantizer, x))
    return quantizer, x


def activation(scheme: Scheme, x: Tensor) -> Quantizer:
    """Calibrated on x (batch, features)."""
    channels = x.shape[-1] if scheme.granularity == "channel" else 1
    quantizer = Quantizer("a.input", "activation", scheme, channels=channels, view=(-1,), axis=-1)
    values = x.T.contiguous() if channels > 1 else x.reshape(1, -1)
    quantizer.calibrate(values, float(x.min()), float(x.max()))
    return quantizer


def stored(quantizer: Quantizer, x: Tensor) -> Tensor:
    """The values of the stored codes, by the formula of the file formats."""
    at = quantizer.levels()
    codes = quantizer.codes(x)
    assert at.low <= codes.min() <= codes.max() <= at.high
    values = quantizer.stored_scale(x) * (codes.float() - at.zero_point + at.half)
    return values if values.shape == x.shape else values.flatten(1)[:, : x[0].numel()].reshape(x.shape)


# ---- values and codes


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("how", GRANULARITIES, ids=lambda how: how["granularity"])
@pytest.mark.parametrize("rule", RANGES)
def test_stored_codes_give_back_what_forward_computes(bits: int, how: dict, rule: str) -> None:
    quantizer, x = weight(Scheme(bits=bits, range=rule, **how))
    with torch.no_grad():
        quantizer.range.normal_(std=0.3)
    y = quantizer(x)
    assert y.shape == x.shape
    assert torch.equal(y, stored(quantizer, x))
    assert len(y.unique()) > 1


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("offset", [-3.0, -0.5, 0.0, 3.0])
@pytest.mark.parametrize("rule", RANGES)
@pytest.mark.parametrize("calibration", ["mse", "lsq"])
def test_activations_keep_their_sign_whatever_they_are(
    bits: int, offset: float, rule: str, calibration: str
) -> None:
    x = torch.randn(64, 10, generator=torch.Generator().manual_seed(1)) + offset
    quantizer = activation(Scheme(bits=bits, range=rule, calibration=calibration), x)
    y = quantizer(x)
    assert y.isfinite().all()
    assert torch.equal(y, stored(quantizer, x))
    if bits > 1:
        error = (y - x).square().mean() / x.square().mean()
        assert error < {3: 0.3, 8: 0.01 if calibration == "mse" else 0.3}[bits]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "token"])
def test_dynamic_ranges_follow_the_tensor(granularity: str) -> None:
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(2))
    quantizer = activation(Scheme(bits=8, granularity=granularity, range="dynamic"), x)
    for factor in (1.0, 1000.0, 1e-3):
        y = quantizer(x * factor)
        axes = {"tensor": (0, 1), "channel": (0,), "token": (1,)}[granularity]
        top = (x * factor).abs().amax(axes, keepdim=True)
        assert ((y - x * factor).abs() <= top / 127).all()


def test_dorefa_maps_by_tanh_to_the_same_largest_magnitude() -> None:
    w = torch.tensor([[-2.0, 0.5], [0.0, 1.0]])
    torch.testing.assert_close(dorefa(w), w.tanh() * (2 / torch.tensor(2.0).tanh()))


def test_an_auto_grid_is_seq_at_one_and_two_bits_and_symmetric_above() -> None:
    names = [weight(Scheme(bits=bits, granularity="channel"))[0].grid_name() for bits in range(1, 9)]
    assert names == ["seq"] * 2 + ["symmetric"] * 6


@pytest.mark.parametrize(
    ("low", "high", "grid"),
    [
        (0, 1, "unsigned"),
        (-1, 1, "symmetric"),
        (-1, 1.9, "symmetric"),
        (-1, 2.1, "asymmetric"),
        (-3, -1, "asymmetric"),
    ],
)
def test_the_grid_of_an_activation_is_what_calibration_sees(low: float, high: float, grid: str) -> None:
    x = torch.linspace(low, high, 200).view(-1, 1)
    assert activation(Scheme(bits=8), x).grid_name() == grid


@pytest.mark.parametrize("grid", ["symmetric", "balanced", "seq", "unsigned", "asymmetric"])
def test_an_explicit_grid_is_kept(grid: str) -> None:
    quantizer, x = weight(Scheme(bits=3, granularity="channel", grid=grid))
    assert quantizer.grid_name() == grid
    at = quantizer.levels()
    assert (at.low, at.high, at.half) == bounds(grid, 3)
    assert torch.equal(quantizer(x), stored(quantizer, x))


def test_forward_is_float32_whatever_comes_in() -> None:
    quantizer, x = weight(Scheme(bits=4, granularity="channel"))
    assert quantizer(x.bfloat16()).dtype == torch.float32


def test_an_uncalibrated_site_is_loud_and_refused_by_name() -> None:
    quantizer = Quantizer("fc.input", "activation", Scheme(bits=4))
    assert quantizer(torch.ones(3)).isnan().all()
    with pytest.raises(SiteError, match=r"fc\.input: this site was never calibrated.*bs\.calibrate"):
        check_calibrated(torch.nn.ModuleList([quantizer]))


def test_lsq_calibrates_by_the_rule_of_its_paper() -> None:
    quantizer, x = weight(Scheme(bits=4, granularity="channel", calibration="lsq"))
    expected = 2 * x.abs().mean((1, 2)) / 7**0.5
    torch.testing.assert_close(quantizer.levels().scale.flatten(), expected)


# ---- gradients


def test_weight_decay_pulls_a_scale_to_its_calibration() -> None:
    quantizer, _ = weight(Scheme(bits=4, granularity="channel"))
    before = quantizer.levels().scale.clone()
    with torch.no_grad():
        quantizer.range.fill_(1.0)
        assert torch.equal(quantizer.levels().scale, 2 * before)
        quantizer.range.mul_(0.0)
    assert torch.equal(quantizer.levels().scale, before)


@pytest.mark.parametrize(
    ("rule", "trains"), [("lsq", 1), ("lsq+", 2), ("pact", 1), ("static", 0), ("dynamic", 0)]
)
def test_only_learned_ranges_are_trained(rule: str, trains: int) -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    quantizer = activation(Scheme(bits=2, range=rule), x)
    (quantizer(x.requires_grad_()) * x.detach().cos()).sum().backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for p in quantizer.parameters()) == trains


def test_gradient_of_the_range_is_that_of_the_scale_times_its_derivative() -> None:
    """d/dr of base * 2^r is ln 2 * scale; LSQ's gradient scale is 1 / sqrt(values per scale * high)."""
    quantizer, x = weight(Scheme(bits=4, granularity="channel"))
    g = x.sin()
    (quantizer(x) * g).sum().backward()
    scale = quantizer.levels().scale
    u = x / scale
    q = u.round().clamp(-8, 7)
    inside = (u.round() == q).float()
    d_scale = (g * (q - inside * u)).sum((1, 2)) / (12 * 7) ** 0.5
    torch.testing.assert_close(quantizer.range.grad[0], d_scale * scale.flatten() * torch.tensor(2.0).log())


# ---- rows


@pytest.mark.parametrize("how", GRANULARITIES, ids=lambda how: how["granularity"])
@pytest.mark.parametrize("rule", ["lsq", "lsq+", "dynamic"])
def test_a_row_equals_a_fixed_quantizer_of_its_width(how: dict, rule: str) -> None:
    """Values, gradients of the weight and of the range."""
    candidates = [1, 2, 3, 8]
    quantizer, x = weight(Scheme(bits=4, range=rule, **how))
    quantizer.set_bits(Sampled(candidates), x)
    for row, bits in enumerate(candidates):
        fixed, _ = weight(Scheme(bits=bits, range=rule, **how))
        quantizer.bits.rows.fill_(row)
        results = []
        for module in (fixed, quantizer):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            (y * x.cos()).sum().backward()
            at = row if module is quantizer else 0
            results.append(
                (y, leaf.grad, module.range.grad if module.range.grad is None else module.range.grad[at])
            )
            assert torch.equal(y.detach(), stored(module, x))
            assert module.levels().bits == bits
        for ours, expected in zip(*results, strict=True):
            assert (ours is None and expected is None) or torch.equal(ours, expected)
        if quantizer.range.grad is not None:
            others = torch.arange(len(candidates)) != row
            assert not quantizer.range.grad[others].any()


def test_the_logits_of_a_sampled_width_get_what_choosing_it_is_worth() -> None:
    """<g, Q(x) - x> times the derivative of log p: the baseline x leaves out what all widths share."""
    quantizer, x = weight(Scheme(bits=4, granularity="channel"))
    quantizer.set_bits(Sampled([2, 4, 8]), x)
    quantizer.bits.rows.fill_(1)
    g = x.cos()
    y = quantizer(x)
    (y * g).sum().backward()
    share = quantizer.bits.logits.detach().softmax(0)
    worth = (g * (y - x)).sum().detach()
    expected = worth * (torch.tensor([0.0, 1, 0]) - share)
    torch.testing.assert_close(quantizer.bits.logits.grad, expected)


def test_mixed_rows_are_their_weighted_sum() -> None:
    quantizer, x = weight(Scheme(bits=4, granularity="channel"))
    quantizer.set_bits(Mixed([2, 3, 8]), x)
    with torch.no_grad():
        quantizer.bits.logits.copy_(torch.tensor([0.3, -1.0, 2.0]))
    share = quantizer.bits.logits.softmax(0)
    expected = 0
    for k, bits in enumerate([2, 3, 8]):
        expected = expected + share[k] * weight(Scheme(bits=bits, granularity="channel"))[0](x)
    torch.testing.assert_close(quantizer(x), expected)


def test_activations_wait_for_calibration_and_then_have_all_rows() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    quantizer = activation(Scheme(bits=4), x)
    quantizer.set_bits(Sampled([2, 4, 8]))
    assert quantizer(x).isnan().all()
    quantizer.calibrate(x.reshape(1, -1), float(x.min()), float(x.max()))
    for row, bits in enumerate([2, 4, 8]):
        quantizer.bits.rows.fill_(row)
        assert torch.equal(quantizer(x), activation(Scheme(bits=bits), x)(x))


def test_bits_have_one_owner() -> None:
    quantizer, x = weight(Scheme(bits=4))
    quantizer.set_bits(FixedBits(4, [2, 4]), x)
    quantizer.set_bits(Sampled([2, 4]), x)
    with pytest.raises(
        SiteError, match=r"w\.weight: the bits of this site belong to another method; got Sampled"
    ):
        quantizer.set_bits(Sampled([2, 4]), x)


@pytest.mark.parametrize(
    ("grid", "bits"), [("symmetric", 1), ("balanced", 1), ("auto", 0), ("auto", 9), ("auto", 16)]
)
def test_candidates_must_be_widths_of_the_grid(grid: str, bits: int) -> None:
    quantizer, x = weight(Scheme(bits=4, grid=grid))
    with pytest.raises(SchemeError, match=r"^w\.weight\."):
        quantizer.set_bits(Sampled([4, bits]), x)
    with pytest.raises(SchemeError, match=r"^w\.weight\."):
        quantizer.commit(bits, x)
    assert torch.equal(quantizer.bits.candidates, torch.tensor([4.0]))


# ---- commit


@pytest.mark.parametrize("how", GRANULARITIES, ids=lambda how: how["granularity"])
def test_committing_a_trained_width_takes_its_row_as_trained(how: dict) -> None:
    quantizer, x = weight(Scheme(bits=4, **how))
    quantizer.set_bits(Sampled([2, 4, 8]), x)
    with torch.no_grad():
        quantizer.range.normal_(std=0.2)
    quantizer.bits.rows.fill_(2)
    expected = quantizer(x)
    quantizer.bits.rows.fill_(0)
    shapes = {name: value.shape for name, value in quantizer.state_dict().items()}
    assert quantizer.commit(8, x) is True
    assert torch.equal(quantizer(x), expected)
    assert {name: value.shape for name, value in quantizer.state_dict().items()} == shapes


@pytest.mark.parametrize("rule", ["lsq", "lsq+", "pact", "static", "dynamic", "dorefa"])
@pytest.mark.parametrize("how", GRANULARITIES, ids=lambda how: how["granularity"])
def test_committing_an_untrained_width_is_post_training_quantization(how: dict, rule: str) -> None:
    quantizer, x = weight(Scheme(bits=8, range=rule, **how))
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.fill_(0.4)
    assert quantizer.commit(3, x) is False
    fresh, _ = weight(Scheme(bits=3, range=rule, **how))
    assert torch.equal(quantizer(x), fresh(x))
    assert quantizer.levels().bits == quantizer.bits.expected() == 3


def test_an_untrained_width_among_rows_leaves_the_other_rows_alone() -> None:
    quantizer, x = weight(Scheme(bits=4))
    quantizer.set_bits(FixedBits(4, [2, 4, 8]), x)
    with torch.no_grad():
        quantizer.range.fill_(0.25)
    assert quantizer.commit(5, x) is False
    assert quantizer.bits.candidates.tolist() == [2, 5, 8]
    assert quantizer.range.flatten().tolist() == [0.25, 0.0, 0.25]
    assert torch.equal(quantizer(x), weight(Scheme(bits=5))[0](x))


@pytest.mark.parametrize("offset", [0.0, -0.7, 3.0, -3.0])
@pytest.mark.parametrize("rule", ["lsq", "lsq+"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_an_activation_keeps_its_range_when_its_width_changes(
    offset: float, rule: str, granularity: str
) -> None:
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) + offset
    quantizer = activation(Scheme(bits=4, range=rule, calibration="minmax", granularity=granularity), x)
    if rule == "lsq+":
        with torch.no_grad():
            quantizer.zero_shift.fill_(1.2)
    before = quantizer(x)
    assert quantizer.commit(8) is False
    after = quantizer(x)
    step = quantizer.levels().scale * 255 / 15
    assert ((after.amin(0) - before.amin(0)).abs() <= step).all()
    assert ((after.amax(0) - before.amax(0)).abs() <= step).all()
    assert torch.equal(after, stored(quantizer, x))


# ---- noise


def test_stochastic_noise_comes_from_the_step_alone_and_only_in_training() -> None:
    scheme = Scheme(bits=3, granularity="channel", estimator="stochastic")
    (first, x), (second, _) = weight(scheme), weight(scheme)
    model = torch.nn.ModuleList([first, second])
    second.name = "v.weight"
    draws = []
    for step in (0, 1, 0):
        redraw(model, step)
        draws.append((first(x), second(x)))
    assert torch.equal(draws[0][0], draws[2][0])
    for a, b in itertools.combinations([draws[0][0], draws[0][1], draws[1][0], draws[1][1]], 2):
        assert not torch.equal(a, b)
    model.eval()
    assert torch.equal(first(x), weight(Scheme(bits=3, granularity="channel"))[0](x))
