"""Ranges that are found in each tensor as it comes, symmetric and asymmetric."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitsmith.errors import SchemeError, TargetError
from bitsmith.export import load, save
from bitsmith.export.native import stored_tensors
from bitsmith.quantization import Scheme, calibrate, commit, measure, plan_of, prepare, set_bits, sites
from bitsmith.quantization.finalize import finalize, freeze
from bitsmith.quantization.layers import MatMul
from bitsmith.quantization.quantizer import Quantizer
from tests.quantization.widths import Sampled
from tests.strategies import tensors


def site(bits: int = 8, granularity: Any = "token", **fields: Any) -> Quantizer:
    scheme = Scheme(bits=bits, granularity=granularity, range="dynamic", grid="asymmetric", **fields)
    return Quantizer("a.input", "activation", scheme)


def by_hand(x: Tensor, bits: int) -> Tensor:
    """Rows of x one by one, in float64: s = (max - min) / (2^b - 1), z = round(-min / s)."""
    rows = []
    for row in x.double().reshape(-1, x.shape[-1]):
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        scale = (high - low) / (2**bits - 1) or 1.0
        zero = min(round(-low / scale), 2**bits - 1)
        rows.append(scale * ((row / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("bits", range(1, 9))
def test_each_token_has_the_grid_between_its_own_ends(bits: int) -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(bits)) + 1.3
    torch.testing.assert_close(site(bits)(x).double(), by_hand(x, bits), rtol=1e-5, atol=1e-5)


def test_a_token_does_not_depend_on_its_batch_mates() -> None:
    x, quantizer = torch.randn(4, 8), site(4)
    assert torch.equal(quantizer(x)[:1], quantizer(x[:1]))
    whole = site(4, "tensor")
    assert not torch.equal(whole(torch.cat([x[:1], 9 * x[1:]]))[:1], whole(x[:1]))


def test_eight_bits_of_a_tensor_are_onnx_s_dynamic_quantize_linear() -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    make = onnx.helper
    kinds = onnx.TensorProto
    graph = make.make_graph(
        [
            make.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            make.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "dynamic",
        [make.make_tensor_value_info("x", kinds.FLOAT, ["n", "c"])],
        [make.make_tensor_value_info("y", kinds.FLOAT, ["n", "c"])],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 21)], ir_version=10)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for seed, offset in enumerate((0.0, 0.7, -2.0, 5.0, -9.0)):
        x = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed)) + offset
        (want,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(site(8, "tensor")(x).numpy(), want, rtol=1e-6, atol=1e-6)


@given(tensors(limit=1e3), st.integers(1, 8), st.sampled_from(["token", "tensor", "group"]))
@settings(max_examples=60, deadline=None)
def test_zero_is_exact_and_nothing_is_further_off_than_a_step(x: Tensor, bits: int, granularity: str) -> None:
    quantizer = site(bits, granularity, group_size=3 if granularity == "group" else None)
    y = quantizer(x)
    assert not y[x == 0].any()
    low, high = (x.amin().clamp(max=0), x.amax().clamp(min=0))
    step = (high - low) / (2**bits - 1) + 2.0**-27
    assert bool(((y - x).abs() <= step * (1 + 1e-5)).all())  # half by rounding, half by a zero point's
    frozen = freeze(quantizer)
    assert frozen is not None
    assert torch.equal(frozen(x), y)


def test_every_value_receives_its_gradient() -> None:
    x = (torch.randn(4, 9) + 1).requires_grad_()
    site(3)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


class Small(nn.Module):
    """A convolution, a linear layer and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.product = nn.Conv1d(6, 8, 3), nn.Linear(10, 7), MatMul()

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(torch.nn.functional.gelu(self.conv(x)))
        y: Tensor = self.product(x, x.transpose(1, 2))
        return y


X = torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(0)) + 0.5
ACTIVATIONS = {
    "token": {"granularity": "token"},
    "tensor": {"granularity": "tensor"},
    "group": {"granularity": "group", "group_size": 4},
}


@pytest.mark.parametrize("fields", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_packed_and_loaded_models_compute_what_was_trained(
    fields: dict[str, Any], bits: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Small()
    activations = Scheme(bits=bits, range="dynamic", grid="asymmetric", **fields)
    prepare(model, Scheme(bits=4, granularity="channel"), activations, first_last_bits=None)
    calibrate(model, [X])
    packed = finalize(model.eval(), X)
    assert torch.equal(packed(X), model(X))
    stored = stored_tensors(packed)
    assert not any(".input." in name for name in stored), "nothing of a dynamic range is stored"
    assert measure(model, X).report()["weight_bytes"] == sum(
        t.numel() * t.element_size() for t in stored.values()
    )
    assert torch.equal(load(save(packed, tmp_path), into=Small(), kernels=False)(X), model(X))


def test_a_plan_says_asymmetric_and_another_width_can_be_committed() -> None:
    model = Small()
    prepare(
        model,
        Scheme(bits=4, granularity="channel"),
        Scheme(bits=8, granularity="token", range="dynamic", grid="asymmetric"),
        first_last_bits=None,
    )
    planned = plan_of(model).sites["linear.input"]
    assert (planned.grid, planned.symmetric, planned.signed) == ("asymmetric", False, False)
    commit(model, dict.fromkeys(sites(model), 3))
    x = torch.randn(2, 5, 10)
    torch.testing.assert_close(model.linear.input_quantizer(x).double(), by_hand(x, 3), rtol=1e-5, atol=1e-5)


def test_a_row_in_float_among_others_is_float() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    dynamic = Scheme(bits=4, granularity="token", range="dynamic", grid="asymmetric")
    prepare(model, None, dynamic, first_last_bits=None)
    set_bits(model, {"0.input": Sampled([4, 32])})
    calibrate(model, [torch.randn(5, 6)])
    quantizer, x = sites(model)["0.input"], torch.randn(5, 6)
    torch.testing.assert_close(quantizer.at_row(x, 1), x, rtol=0, atol=2.0**-27)
    torch.testing.assert_close(quantizer.at_row(x, 0).double(), by_hand(x, 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_ranges_of_weights_may_be_found_anew_with_their_zero_points(granularity: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = 4 if granularity == "group" else None
    weights = Scheme(bits=3, granularity=granularity, group_size=size, range="dynamic", grid="asymmetric")
    model = nn.Sequential(nn.Linear(10, 7))
    with torch.no_grad():
        model[0].weight += 0.2
    prepare(model, weights, None, first_last_bits=None)
    with torch.no_grad():
        model[0].weight.mul_(3)  # whatever was seen at first
    x = torch.randn(4, 10)
    assert (model[0].weight_quantizer(model[0].weight) - model[0].weight).abs().max() < 0.5
    packed = finalize(model, x)
    assert torch.equal(packed(x), model(x))
    stored = stored_tensors(packed)
    assert measure(model, x).report()["weight_bytes"] == sum(
        t.numel() * t.element_size() for t in stored.values()
    )
    assert torch.equal(
        load(save(packed, tmp_path), into=nn.Sequential(nn.Linear(10, 7)), kernels=False)(x), model(x)
    )


def test_auto_stays_symmetric_or_unsigned_where_the_range_is_dynamic() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    prepare(model, None, Scheme(bits=8, granularity="token", range="dynamic"), first_last_bits=None)
    calibrate(model, [torch.randn(5, 6) + 1])
    assert sites(model)["0.input"].grid_name() == "symmetric"


def test_what_has_no_rule_or_no_runtime_is_refused() -> None:
    with pytest.raises(SchemeError, match="calibration lsq has no rule for a zero point"):
        Scheme(grid="asymmetric", range="dynamic", calibration="lsq")
    dynamic = Scheme(bits=8, range="dynamic", grid="asymmetric")
    with pytest.raises(TargetError, match="known before it runs"):
        prepare(nn.Sequential(nn.Linear(4, 3)), Scheme(bits=4), dynamic, target="onnxruntime")
