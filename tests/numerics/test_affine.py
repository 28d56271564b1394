"""Codes and values against ONNX, by properties, and at the edges (gradients: test_affine_gradients.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.numerics.affine import dequantize, fake_quantize, quantize
from bitsmith.numerics.grid import bounds
from tests import strategies


def level_tensors(grid: str, bits: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    low, high, half = bounds(grid, bits)
    return tuple(torch.tensor([bound], dtype=dtype) for bound in (low, high, half))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("INT8", -128, 127),
        ("UINT8", 0, 255),
        ("INT4", -8, 7),
        ("UINT4", 0, 15),
        ("INT2", -2, 1),
        ("UINT2", 0, 3),
    ],
)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_codes_and_values_are_those_of_onnx(name: str, low: int, high: int, axis: int | None) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    generator = torch.Generator().manual_seed(high)
    x = 20 * torch.randn(6, 50, generator=generator)
    x[:, :8] = torch.tensor(
        [0.0, 0.125, 0.375, -0.125, -0.375, 0.625, 1e4, -1e4]
    )  # ties at scale 1/4, and far out
    channels = 1 if axis is None else x.shape[axis]
    scale = 0.25 + torch.rand(channels, generator=generator).mul(4).round() / 4
    zero_point = torch.randint(low, high + 1, (channels,), generator=generator)
    view = [-1 if i == axis else 1 for i in range(2)]

    element, float32 = getattr(onnx.TensorProto, name), onnx.TensorProto.FLOAT
    node, value, constant = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.helper.make_tensor
    where = {} if axis is None else {"axis": axis}
    sizes = [] if axis is None else [channels]
    graph = onnx.helper.make_graph(
        [
            node("QuantizeLinear", ["x", "s", "z"], ["q"], **where),
            node("DequantizeLinear", ["q", "s", "z"], ["y"], **where),
        ],
        "reference",
        [value("x", float32, x.shape)],
        [value("q", element, x.shape), value("y", float32, x.shape)],
        [constant("s", float32, sizes, scale.tolist()), constant("z", element, sizes, zero_point.tolist())],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 25)], ir_version=11)
    reference_codes, reference_values = ReferenceEvaluator(model).run(None, {"x": x.numpy()})

    s, z = scale.view(view), zero_point.float().view(view)
    codes = quantize(x, s, low, high, zero_point=z)
    assert codes.tolist() == np.asarray(reference_codes).astype(np.int64).tolist()
    assert dequantize(codes, s, zero_point=z).tolist() == reference_values.tolist()

    if name in ("INT8", "UINT8", "INT4", "UINT4"):
        runtime = pytest.importorskip("onnxruntime")
        options = runtime.SessionOptions()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (values,) = session.run(["y"], {"x": x.numpy()})
        assert dequantize(codes, s, zero_point=z).tolist() == values.tolist()


@given(
    x=strategies.tensors(),
    grid=strategies.grids(),
    scale=st.floats(1e-3, 1e3),
    zero_point=st.integers(0, 255),
)
def test_fake_quantize_is_quantize_then_dequantize(
    x: Tensor, grid: tuple[int, int, float], scale: float, zero_point: int
) -> None:
    low, high, half = grid
    z = torch.tensor([float(min(zero_point, high))])
    s = torch.tensor([scale])
    codes = quantize(x, s, low, high, half, z)
    assert torch.equal(codes, codes.round())
    assert low <= codes.min() <= codes.max() <= high
    values = fake_quantize(
        x, s, torch.tensor([float(low)]), torch.tensor([float(high)]), torch.tensor([half]), z
    )
    assert torch.equal(values, dequantize(codes, s, half, z))


@given(grid=strategies.grids(), scale=st.floats(2.0**-100, 2.0**100, width=32))
def test_representable_values_are_fixed_points(grid: tuple[int, int, float], scale: float) -> None:
    low, high, half = grid
    codes = torch.arange(low, high + 1.0)
    s = torch.tensor([scale])
    values = dequantize(codes, s, half)
    assert torch.equal(quantize(values, s, low, high, half), codes)
    assert torch.equal(fake_quantize(values, s, codes[:1], codes[-1:], torch.tensor([half])), values)


def test_values_on_a_finer_grid_round_as_division_rounds() -> None:
    """A product with the reciprocal moves ties: 17 % of these codes would differ."""
    s = torch.tensor([0.0123])
    x = torch.arange(-250, 251).float() * s / 2
    exact = torch.from_numpy(np.rint(x.numpy() / s.numpy())).clamp(-128, 127)
    assert torch.equal(quantize(x, s, -128, 127), exact)
    assert not torch.equal((x * (1 / s)).round().clamp(-128, 127), exact)


@given(x=strategies.tensors((1, 60)), grid=strategies.grids(), scale=st.floats(1e-3, 1e3))
def test_quantization_is_monotone(x: Tensor, grid: tuple[int, int, float], scale: float) -> None:
    codes = quantize(x.sort().values, torch.tensor([scale]), *grid)
    assert (codes.diff() >= 0).all()


@given(x=strategies.tensors(limit=100.0), grid=strategies.grids())
def test_error_inside_the_grid_is_at_most_half_a_step(x: Tensor, grid: tuple[int, int, float]) -> None:
    low, high, half = grid
    s = torch.tensor([0.75])
    u = x / s
    inside = (u >= low + half - 0.5) & (u <= high + half + 0.5)
    error = (dequantize(quantize(x, s, low, high, half), s, half) - x).abs()
    assert (error[inside] <= s / 2 * 1.00001).all()


def test_infinite_values_take_the_outermost_levels() -> None:
    x = torch.tensor([float("inf"), float("-inf"), 3e38])
    assert quantize(x, torch.tensor([1e-3]), -8, 7).tolist() == [7, -8, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_quantized_in_float32(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 101).to(dtype).requires_grad_()
    s = torch.tensor([0.013], requires_grad=True)
    low, high, _ = level_tensors("symmetric", 8)
    y = fake_quantize(x, s, low, high)
    assert y.dtype == torch.float32
    assert torch.equal(y, fake_quantize(x.float(), s, low, high))
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert s.grad.dtype == torch.float32
