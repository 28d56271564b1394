"""Fractional widths: what a forward makes of a real b, what b receives, and what a decision leaves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitsmith.numerics.grid import bounds
from bitsmith.quantization import Scheme, prepare, set_bits, sites
from bitsmith.quantization.fractional import MODES, Fractional, Stepped, move, real
from bitsmith.quantization.quantizer import Quantizer

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def site_of(width: Fractional | Stepped, **scheme: object) -> Quantizer:
    """The weight of a layer of 5 channels with this width."""
    net = nn.Linear(6, 5)
    net.weight.data = X.clone()
    prepare(net, Scheme(bits=4, granularity="channel", **scheme), None, first_last_bits=None)
    set_bits(net, {"weight": width})
    return sites(net)["weight"]


def width_of(b: float, mode: str, **options: object) -> Fractional:
    return Fractional(range(2, 9), b, mode=mode, **options)


# ---- forward


@pytest.mark.parametrize("b", [2.0, 3.3, 5.0, 7.5, 8.0])
def test_mixed_is_the_mean_of_the_neighbours(b: float) -> None:
    quantizer = site_of(width_of(b, "mixed"))
    n = max(math.ceil(b) - 1, 2)
    f = b - n
    expected = (1 - f) * quantizer.at_row(X, n - 2) + f * quantizer.at_row(X, n - 1)
    torch.testing.assert_close(quantizer(X), expected)


def test_sampled_is_the_upper_neighbour_as_often_as_the_fraction_says() -> None:
    width = width_of(3.3, "sampled")
    quantizer, generator = site_of(width), torch.Generator().manual_seed(0)
    upper = 0
    for _ in range(2000):
        move([width], torch.rand(1, generator=generator))
        upper += int(width.rows) == 2
    assert upper / 2000 == pytest.approx(0.3, abs=3 * math.sqrt(0.21 / 2000))
    assert torch.equal(quantizer(X), quantizer.at_row(X, int(width.rows)))


@pytest.mark.parametrize(("b", "nearest"), [(3.3, 3), (3.5, 4), (3.7, 4), (4.0, 4)])
def test_argmax_is_the_nearest_width(b: float, nearest: int) -> None:
    quantizer = site_of(width_of(b, "argmax"))
    assert torch.equal(quantizer(X), quantizer.at_row(X, nearest - 2))


@pytest.mark.parametrize("b", [3.0, 4.0, 8.0])
def test_a_real_grid_at_a_whole_width_is_its_row(b: float) -> None:
    quantizer = site_of(width_of(b, "real"))
    torch.testing.assert_close(quantizer(X), quantizer.at_row(X, int(b) - 2))


@settings(max_examples=25)  # 7 seconds otherwise
@given(st.floats(3.01, 7.99))
def test_a_real_grid_has_two_to_the_b_levels_in_a_range_between_its_rows(b: float) -> None:
    width = width_of(b, "real")
    quantizer = site_of(width)
    share, rows = width.share, width.rows
    low, high = (float((share * bound[rows, 0]).sum().detach()) for bound in (quantizer.low, quantizer.high))
    assert high - low + 1 == pytest.approx(2**b, rel=1e-4)
    for far in (torch.full_like(X, 1e3), torch.full_like(X, -1e3)):
        end = quantizer(far).detach()
        rows_end = torch.stack([quantizer.at_row(far, int(row)) for row in rows])
        assert bool((end <= rows_end.amax(0) + 1e-4).all())
        assert bool((end >= rows_end.amin(0) - 1e-4).all())


@pytest.mark.parametrize("mode", MODES)
def test_channels_and_groups_are_at_widths_of_their_own(mode: str) -> None:
    each = torch.tensor([2.0, 3.0, 5.0, 7.0, 8.0])
    channels = site_of(Fractional(range(2, 9), each, sizes=(1,) * 5, mode=mode))
    groups = site_of(Fractional(range(2, 9), each[[0, 3]], sizes=(2, 3), mode=mode))
    whole = {b: site_of(width_of(b, mode)) for b in each.tolist()}
    for c, b in enumerate(each.tolist()):
        torch.testing.assert_close(channels(X)[c], whole[b](X)[c])
        torch.testing.assert_close(groups(X)[c], whole[2.0 if c < 2 else 7.0](X)[c])


# ---- backward


def gradient(width: Fractional, g: Tensor) -> Tensor:
    quantizer = site_of(width)
    quantizer(X).backward(g)
    assert width.offset.grad is not None
    return width.offset.grad / width.rate


@pytest.mark.parametrize("b", [3.3, 4.0])
def test_mixed_receives_what_one_more_bit_changes_at_whole_widths_too(b: float) -> None:
    width, g = width_of(b, "mixed"), torch.randn(5, 6)
    found, quantizer = gradient(width, g), site_of(width_of(b, "mixed"))
    n = math.ceil(b) - 1
    between = quantizer.at_row(X, n - 1) - quantizer.at_row(X, n - 2)
    torch.testing.assert_close(found, (g * between).sum().view(1))


@pytest.mark.parametrize("mode", ["sampled", "argmax"])
def test_one_grid_in_play_receives_the_slope_of_an_error_that_halves_with_each_bit(mode: str) -> None:
    width, g = width_of(3.3, mode), torch.randn(5, 6)
    quantizer = site_of(width)
    quantizer(X).backward(g)
    error = quantizer(X).detach() - X
    expected = -math.log(2) * (g * error).sum() * width.rate
    torch.testing.assert_close(width.offset.grad, expected.view(1), rtol=1e-4, atol=1e-5)


def test_its_expectation_is_the_slope_of_the_loss_for_errors_like_noise() -> None:
    """L = |Q(x) - x|^2 / 2 falls as 4^-b on a fine grid, and -ln 2 <Q - x, Q - x> is its derivative."""
    x = torch.rand(5, 4000, generator=torch.Generator().manual_seed(1))
    net = nn.Linear(4000, 5)
    net.weight.data = x
    prepare(net, Scheme(bits=4, granularity="channel", calibration="minmax"), None, first_last_bits=None)
    width = width_of(5.0, "argmax")
    set_bits(net, {"weight": width})
    quantizer = sites(net)["weight"]
    loss = (quantizer(x) - x).square().sum() / 2
    loss.backward()
    at = [float((quantizer.at_row(x, row) - x).square().sum() / 2) for row in (2, 4)]
    assert width.offset.grad is not None
    measured = float(loss.detach()) * math.log(at[1] / at[0]) / 2
    assert float(width.offset.grad) / width.rate == pytest.approx(measured, rel=0.08)


def test_a_real_grid_receives_the_derivative_by_its_number_of_steps() -> None:
    """Outside of the grid the value is scale * high: smooth in b, so that finite differences hold."""
    x = torch.full((5, 6), 50.0)

    def value(b: float) -> float:
        return float(site_of(width_of(b, "real"))(x).detach().sum())

    width = width_of(4.4, "real")
    site_of(width)(x).sum().backward()
    assert width.offset.grad is not None
    finite = (value(4.41) - value(4.39)) / 0.02
    assert float(width.offset.grad) / width.rate == pytest.approx(finite, rel=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_moves_the_width(mode: str) -> None:
    assert bool(gradient(width_of(3.4, mode), torch.randn(5, 6)).any())


# ---- moving and deciding


@given(st.floats(-3.0, 3.0), st.sampled_from(MODES))
def test_a_width_stays_within_its_ends_and_beside_its_rows(offset: float, mode: str) -> None:
    width = width_of(5.0, mode)
    width.offset.data.fill_(offset)
    move([width], torch.rand(1))
    b = float(real([width]).detach())
    assert 2 - 1e-5 <= b <= 8 + 1e-5
    assert b == pytest.approx(min(max(5.0 + 20.0 * offset, 2), 8), abs=1e-4)
    rows = width.candidates[width.rows]
    assert bool(((rows - b).abs() <= 1 + 1e-5).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [(), (2, 3)])
def test_committed_it_is_a_fixed_width_and_keeps_every_shape(mode: str, sizes: tuple[int, ...]) -> None:
    width = Fractional(range(2, 9), 5.4, sizes=sizes, mode=mode)
    quantizer = site_of(width)
    before = {name: t.shape for name, t in quantizer.state_dict().items()}
    quantizer.commit((3, 3, 6, 6, 6) if sizes else 3)
    assert {name: t.shape for name, t in quantizer.state_dict().items()} == before
    assert width.share is None
    assert quantizer.bits.whole() == ((3, 3, 6, 6, 6) if sizes else 3)
    torch.testing.assert_close(quantizer(X)[0], quantizer.at_row(X, 1)[0])
    move([width], torch.rand(len(width.offset)))  # changes nothing any more
    assert quantizer.bits.whole() == ((3, 3, 6, 6, 6) if sizes else 3)
    fresh = Fractional(range(2, 9), 5.4, sizes=sizes, mode=mode)
    fresh.load_state_dict(width.state_dict())
    assert fresh.share is None


# ---- a width that a schedule moves


@pytest.mark.parametrize(
    ("bits", "low", "high"), [(6, -32, 31), (5.5, -22, 21), (5, -16, 15), (4.75, -13, 12), (4.25, -9, 8)]
)
def test_fractional_grids_are_the_papers(bits: float, low: int, high: int) -> None:
    """FraQAT, section 3: INT6 = [-32, 31], INT5.5 = [-22, 21], INT5 = [-16, 15]."""
    assert bounds("symmetric", bits) == (low, high, 0.0)
    assert bounds("unsigned", bits)[:2] == (0, int(2**bits + 1e-9) - 1)


def test_a_step_down_keeps_the_range_with_what_was_learned() -> None:
    quantizer = site_of(Stepped([8, 5.5, 4.25, 4, 2]))
    quantizer.range.data[0] = 0.3
    wide = quantizer.levels().scale * 127
    for row in range(1, 5):
        quantizer.hand_over(row - 1, row, keep_range=True)
        quantizer.bits.rows.fill_(row)
        at = quantizer.levels()
        torch.testing.assert_close(at.scale * (at.high + at.half), wide)
        assert len(torch.unique(quantizer(X)[0])) <= at.high - at.low + 1
    assert quantizer.bits.whole() == 2


def test_a_step_down_may_keep_the_learned_factor_on_the_calibration_instead() -> None:
    quantizer = site_of(Stepped([8, 4]))
    calibrated = quantizer.levels(1).scale
    quantizer.range.data[0] = 0.3
    quantizer.hand_over(0, 1, keep_range=False)
    torch.testing.assert_close(quantizer.levels(1).scale, calibrated * 2**0.3)
