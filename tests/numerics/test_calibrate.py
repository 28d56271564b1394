"""Calibrated ranges against brute force, ONNX's dynamic quantization and their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.numerics.affine import dequantize, quantize
from bitsmith.numerics.calibrate import EMPTY, METHODS, calibrate, percentile
from bitsmith.numerics.grid import bounds
from tests import strategies

LOW_BIT = [("seq", 1), ("unsigned", 1), ("symmetric", 2), ("balanced", 2), ("seq", 2), ("unsigned", 2)]
HIGHER_BIT = [
    ("symmetric", 3),
    ("seq", 3),
    ("balanced", 4),
    ("symmetric", 4),
    ("unsigned", 6),
    ("symmetric", 8),
]


def squared_error(
    x: Tensor, scale: Tensor, low: float, high: float, half: float, zero_point: Tensor
) -> Tensor:
    """float64 (channels,)"""
    x, scale, z = x.double(), scale.double()[:, None], zero_point.double()[:, None]
    codes = torch.clamp(torch.round(x / scale - half) + z, low, high)
    return (scale * (codes - z + half) - x).square().sum(1)


def brute_force(x: Tensor, grid: str, bits: int, finest: int = 1000) -> Tensor:
    """The least squared error over a fine grid of scales (and all zero points)."""
    low, high, half = bounds(grid, bits)
    reach = x.abs().amax(1).double() / max(0.5, min(high + half, -low - half) if low else high)
    best = torch.full_like(reach, float("inf"))
    zero_points = range(low, high + 1) if grid == "asymmetric" else [0]
    for z, step in itertools.product(zero_points, range(1, finest + 1)):
        z_row = torch.full_like(reach, float(z))
        best = torch.minimum(best, squared_error(x, 1.3 * reach * step / finest, low, high, half, z_row))
    return best


def shapes_of_data() -> Tensor:
    """(8, 60): normal, skewed, uniform, heavy-tailed, sparse, with outliers, few distinct, one-sided"""
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(8, 60, generator=generator)
    outlier = normal[5].clone()
    outlier[0] = 60.0
    rows = [
        normal[0], normal[1].exp() - 0.5, torch.rand(60, generator=generator) - 0.4, normal[3] ** 5,
        normal[4] * (normal[2] > 1.2), outlier, normal[6].round(), normal[7].abs(),
    ]  # fmt: skip
    return torch.stack(rows)


def error_of(method: str, x: Tensor, grid: str, bits: int) -> Tensor:
    low, high, half = bounds(grid, bits)
    scale, zero_point = calibrate(method, x, low, high, half, asymmetric=grid == "asymmetric")
    return squared_error(x, scale, low, high, half, zero_point)


# ---- every method


@settings(max_examples=60)
@given(
    method=st.sampled_from(sorted(METHODS)),
    x=strategies.tensors(),
    magnitude=strategies.magnitudes,
    grid=strategies.grids(("symmetric", "balanced", "seq", "unsigned")),
)
def test_scales_are_positive_and_finite(
    method: str, x: Tensor, magnitude: float, grid: tuple[int, int, float]
) -> None:
    scale, zero_point = calibrate(method, x * magnitude, *grid)
    assert scale.shape == zero_point.shape == x.shape[:1]
    assert scale.dtype == torch.float32
    assert ((scale > 0) & scale.isfinite()).all()
    assert (zero_point == 0).all()


@settings(max_examples=60)
@given(
    method=st.sampled_from(sorted(METHODS)),
    x=strategies.tensors(),
    magnitude=strategies.magnitudes,
    shift=st.sampled_from([0.0, -50.0, 50.0]),
    bits=strategies.bit_widths,
)
def test_asymmetric_grids_hold_zero_exactly(
    method: str, x: Tensor, magnitude: float, shift: float, bits: int
) -> None:
    low, high, half = bounds("asymmetric", bits)
    scale, zero_point = calibrate(method, (x + shift) * magnitude, low, high, half, asymmetric=True)
    assert ((scale > 0) & scale.isfinite()).all()
    assert torch.equal(zero_point, zero_point.round())
    assert ((zero_point >= low) & (zero_point <= high)).all()
    zeros = torch.zeros(len(scale))
    assert (
        dequantize(quantize(zeros, scale, low, high, half, zero_point), scale, half, zero_point) == 0
    ).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", ["symmetric", "seq", "unsigned", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 8])
def test_odd_channels_are_survived(method: str, grid: str, bits: int) -> None:
    rows = [
        torch.zeros(5), torch.full((5,), 3.0), torch.full((5,), -3.0), torch.full((5,), 3e38),
        torch.full((5,), 1e-40), torch.tensor([0, 0, 0, 0, 1e-20]), torch.tensor([3.4e38, -3.4e38, 0, 1, 2]),
    ]  # fmt: skip
    low, high, half = bounds(grid, bits)
    asymmetric = grid == "asymmetric"
    x = torch.stack(rows)
    scale, zero_point = calibrate(method, x, low, high, half, asymmetric=asymmetric)
    assert ((scale > 0) & scale.isfinite()).all()
    assert ((zero_point >= low) & (zero_point <= high)).all()
    assert scale[0] == EMPTY


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", ["symmetric", "seq", "unsigned", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 8])
def test_a_single_value_is_held_exactly(method: str, grid: str, bits: int) -> None:
    assert error_of(method, torch.tensor([[0.7]]), grid, bits).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", ["symmetric", "seq", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 4])
def test_powers_of_two_scale_the_result_exactly(method: str, grid: str, bits: int) -> None:
    x, asymmetric = shapes_of_data(), grid == "asymmetric"
    scale, zero_point = calibrate(method, x, *bounds(grid, bits), asymmetric=asymmetric)
    for exponent in (-60, 40):
        other, other_zero_point = calibrate(
            method, x * 2.0**exponent, *bounds(grid, bits), asymmetric=asymmetric
        )
        assert torch.equal(other, scale * 2.0**exponent)
        assert torch.equal(other_zero_point, zero_point)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", ["symmetric", "asymmetric"])
def test_channels_do_not_influence_each_other(method: str, grid: str) -> None:
    x, (low, high, half), asymmetric = shapes_of_data(), bounds(grid, 3), grid == "asymmetric"
    together = calibrate(method, x, low, high, half, asymmetric)
    alone = [calibrate(method, row[None], low, high, half, asymmetric) for row in x]
    torch.testing.assert_close(together[0], torch.cat([scale for scale, _ in alone]))
    assert torch.equal(together[1], torch.cat([zero_point for _, zero_point in alone]))


def test_values_are_neither_changed_nor_tracked() -> None:
    x = torch.randn(3, 40, requires_grad=True)
    before = x.detach().clone()
    for method in METHODS:
        assert not calibrate(method, x, -8, 7)[0].requires_grad
    assert torch.equal(x.detach(), before)


def test_an_unknown_method_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'entropy' is not one of .*minmax.*kl"):
        calibrate("entropy", torch.ones(1, 3), -8, 7)


# ---- min-max and percentile


@pytest.mark.parametrize(("grid", "bits"), LOW_BIT + HIGHER_BIT)
def test_minmax_is_the_smallest_scale_that_clips_nothing(grid: str, bits: int) -> None:
    x = shapes_of_data().abs() if grid == "unsigned" else shapes_of_data()
    low, high, half = bounds(grid, bits)
    scale, _ = calibrate("minmax", x, low, high, half)
    top, bottom = (x.amax(1), x.amin(1))
    held = (scale * (high + half) >= top * (1 - 1e-6)) & (scale * (low + half) <= bottom * (1 - 1e-6))
    assert held.all()
    tighter = scale * 0.999
    assert ((tighter * (high + half) < top) | (tighter * (low + half) > bottom)).all()


def test_asymmetric_minmax_is_the_dynamic_quantization_of_onnx() -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    names = ["y", "scale", "zero_point"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("DynamicQuantizeLinear", ["x"], names)],
        "dynamic",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [60])],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in names],
    )
    evaluator = ReferenceEvaluator(onnx.helper.make_model(graph))
    x = shapes_of_data()
    scale, zero_point = calibrate("minmax", x, 0, 255, asymmetric=True)
    for i, row in enumerate(x):
        _, expected_scale, expected_zero_point = evaluator.run(None, {"x": row.numpy()})
        assert scale[i].item() == pytest.approx(float(np.asarray(expected_scale).item()), rel=1e-6)
        assert zero_point[i].item() == np.asarray(expected_zero_point).item()


@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99])
def test_percentile_leaves_out_its_share_of_the_values(percent: float) -> None:
    x = torch.randn(2, 20000, generator=torch.Generator().manual_seed(0))
    scale, _ = percentile(x, -7, 7, percent=percent)
    clipped = (x.abs() > scale[:, None] * 7 * (1 + 1e-6)).sum(1)
    assert clipped.tolist() == [round(20000 * (1 - percent / 100))] * 2


def test_asymmetric_percentile_cuts_both_tails() -> None:
    x = torch.arange(-1000.0, 9000.0)[None]
    scale, zero_point = percentile(x, 0, 255, asymmetric=True, percent=99.0)
    assert scale.item() == pytest.approx((8949 + 950) / 255, rel=1e-3)
    assert zero_point.item() == round(950 / scale.item())


def test_percentile_of_a_sparse_channel_falls_back_to_its_largest_value() -> None:
    x = torch.zeros(1, 100_000)
    x[0, 7] = 14.0
    for asymmetric, low, high in ((False, -7, 7), (True, 0, 7)):
        assert calibrate("percentile", x, low, high, asymmetric=asymmetric)[0].item() == 2.0


# ---- squared error


@pytest.mark.parametrize(("grid", "bits"), LOW_BIT)
def test_mse_is_the_true_optimum_at_one_and_two_bits(grid: str, bits: int) -> None:
    x = shapes_of_data()
    assert (error_of("mse", x, grid, bits) <= brute_force(x, grid, bits) * (1 + 1e-5) + 1e-9).all()


@pytest.mark.parametrize("bits", [1, 2])
def test_asymmetric_mse_is_the_true_optimum_at_one_and_two_bits(bits: int) -> None:
    x = shapes_of_data()
    assert (error_of("mse", x, "asymmetric", bits) <= brute_force(x, "asymmetric", bits) * (1 + 1e-5)).all()


@settings(max_examples=40)
@given(x=strategies.tensors((2, 5), limit=10.0), case=st.sampled_from(LOW_BIT))
def test_no_random_scale_beats_mse_at_one_and_two_bits(x: Tensor, case: tuple[str, int]) -> None:
    low, high, half = bounds(*case)
    error, zero = error_of("mse", x, *case), torch.zeros(2)
    for factor in np.geomspace(1e-2, 4, 100):
        scale = x.abs().amax(1).clamp(min=1e-6) * float(factor)
        assert (error <= squared_error(x, scale, low, high, half, zero) * (1 + 1e-4) + 1e-9).all()


def test_one_bit_mse_is_the_mean_magnitude() -> None:
    """sign(w) * mean|w|: the classical optimum."""
    x = shapes_of_data()
    scale, _ = calibrate("mse", x, *bounds("seq", 1))
    torch.testing.assert_close(scale / 2, x.abs().mean(1))


@pytest.mark.parametrize(("grid", "bits"), HIGHER_BIT)
def test_mse_is_close_to_the_optimum_at_more_bits(grid: str, bits: int) -> None:
    x = shapes_of_data()
    assert (error_of("mse", x, grid, bits) <= brute_force(x, grid, bits) * 1.15 + 1e-9).all()


@pytest.mark.parametrize(("grid", "bits"), [("symmetric", 3), ("seq", 4), ("symmetric", 8)])
def test_mse_is_within_half_a_percent_on_many_normal_values(grid: str, bits: int) -> None:
    """Where the error is smooth in the scale the search has no excuse."""
    x = torch.randn(2, 20000, generator=torch.Generator().manual_seed(1))
    assert (error_of("mse", x, grid, bits) <= brute_force(x, grid, bits, 300) * 1.005).all(), brute_force(
        x, grid, bits, 300
    )


@pytest.mark.parametrize("other", ["minmax", "percentile"])
@pytest.mark.parametrize("grid", ["symmetric", "seq", "unsigned", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_has_no_larger_error_than_other_methods(other: str, grid: str, bits: int) -> None:
    x = shapes_of_data()
    assert (error_of("mse", x, grid, bits) <= error_of(other, x, grid, bits) * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_asymmetric_mse_shrugs_off_an_outlier_on_either_side(bits: int) -> None:
    x = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(2)) + 1
    x[0, 0], x[1, 0] = 100.0, -100.0
    ratio = error_of("mse", x, "asymmetric", bits) / error_of("minmax", x, "asymmetric", bits)
    assert (ratio < 0.8).all()


@settings(max_examples=40)
@given(grid=strategies.grids(), scale=st.sampled_from([0.3, 1.0, 1e-3]))
def test_mse_finds_the_grid_on_which_values_lie(grid: tuple[int, int, float], scale: float) -> None:
    low, high, half = grid
    x = (torch.arange(low, high + 1.0)[None] + half) * scale
    found, zero_point = calibrate("mse", x, low, high, half)
    assert (
        squared_error(x, found, low, high, half, zero_point).item()
        <= 1e-10 * scale**2 * x.numel() * high**2 + 1e-30
    )


def test_large_inputs_are_searched_in_chunks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x = shapes_of_data()
    for grid, bits in (("seq", 2), ("symmetric", 4), ("asymmetric", 2), ("asymmetric", 5)):
        whole = calibrate("mse", x, *bounds(grid, bits), asymmetric=grid == "asymmetric")
        monkeypatch.setattr("bitsmith.numerics.calibrate.AT_ONCE", 130)
        pieces = calibrate("mse", x, *bounds(grid, bits), asymmetric=grid == "asymmetric")
        monkeypatch.undo()
        assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


# ---- divergence


def test_kl_cuts_a_lone_outlier_and_keeps_a_uniform_range() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(2, 100_000, generator=generator) * 2 - 1
    x[0, 0] = 4.0
    scale, _ = calibrate("kl", x, *bounds("symmetric", 8))
    assert scale[0] * 127 < 2
    assert scale[1] * 127 > 0.95


@pytest.mark.parametrize("bits", [4, 8])
def test_kl_ignores_how_many_zeros_a_relu_left(bits: int) -> None:
    """Zero costs nothing on a grid that holds it."""
    x = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(4)).abs()
    padded = torch.cat([x, torch.zeros_like(x)], 1)
    for grid in ("unsigned", "symmetric"):
        assert torch.equal(
            calibrate("kl", x, *bounds(grid, bits))[0], calibrate("kl", padded, *bounds(grid, bits))[0]
        )


@pytest.mark.parametrize("grid", ["symmetric", "unsigned", "asymmetric"])
def test_kl_at_four_bits_clips_between_the_bulk_and_the_largest_value(grid: str) -> None:
    x = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(4))
    x = x.abs() if grid == "unsigned" else x
    low, high, half = bounds(grid, 4)
    scale, _ = calibrate("kl", x, low, high, half, asymmetric=grid == "asymmetric")
    largest, _ = calibrate("minmax", x, low, high, half, asymmetric=grid == "asymmetric")
    assert 0.3 < (scale / largest).item() < 1


def test_kl_divergence_agrees_with_a_loop_over_bins() -> None:
    """The slow reading of TensorRT's recipe, on the same bins and candidates."""
    import bitsmith.numerics.calibrate as module

    x = torch.randn(3000, generator=torch.Generator().manual_seed(8)) ** 3
    low, high, half = bounds("symmetric", 4)
    bins, candidates = module.HISTOGRAM_BINS, module.KL_CANDIDATES
    start, stop = x.min().item(), x.max().item()
    histogram, edges = np.histogram(x.numpy(), bins, (start, stop))
    centres = (edges[:-1] + edges[1:]) / 2
    whole = max(stop / 7, -start / 8)
    best, best_divergence = 0.0, float("inf")
    for scale in whole * np.linspace(1, 16 / bins, candidates):
        codes = np.rint(centres / scale)
        inside = np.flatnonzero((codes >= low) & (codes <= high))
        first, last = inside[0], inside[-1]
        reference = histogram.astype(float)[first : last + 1]
        kept = reference.copy()
        reference[0] += histogram[:first].sum()
        reference[-1] += histogram[last + 1 :].sum()
        quantized = np.zeros_like(reference)
        for code in range(low, high + 1):
            members = np.flatnonzero((codes[first : last + 1] == code) & (reference > 0))
            if len(members):
                quantized[members] = kept[codes[first : last + 1] == code].sum() / len(members)
        p, q = reference / reference.sum(), quantized / max(quantized.sum(), 1)
        some = p > 0
        divergence = (p[some] * np.log(p[some] / q[some].clip(1e-9))).sum()
        if divergence < best_divergence:
            best, best_divergence = scale, divergence
    assert calibrate("kl", x[None], low, high, half)[0].item() == pytest.approx(best, rel=1e-4)
