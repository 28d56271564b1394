"""Plan bytes are file bytes: what the cost model says is what the exporters write."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitsmith.export import native, to_onnx
from bitsmith.files import load_tensors
from bitsmith.quantization import Scheme, calibrate, commit, measure, plan_of, prepare, sites
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.layers import QuantTransposedLinear
from bitsmith.tasks.models import build
from tests.quantization.test_swaps import InOut


class Language(nn.Module):
    """Tokens (N, T) -> logits: a table tied to the head, positions, a layer whose weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(13, 11), nn.Embedding(5, 11)
        self.middle, self.head = InOut(11, 11), nn.Linear(11, 13, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        y: Tensor = self.head(torch.relu(self.middle(x)))
        return y


IMAGES = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 13, (8, 5), generator=torch.Generator().manual_seed(0))
MODELS = {"digits_cnn": {}, "digits_vit": {"width": 8, "depth": 1, "heads": 2, "hidden": 16}}


def inputs(name: str) -> Tensor:
    return TOKENS if name == "language" else IMAGES


def mixed(name: str, target: str, weights: Scheme, activations: Scheme | None) -> nn.Module:
    """Every width from 1 to 8 somewhere."""
    torch.manual_seed(0)
    model = Language() if name == "language" else build(name, seed=0, **MODELS[name])
    prepare(model, weights, activations, target=target, swaps={InOut: QuantTransposedLinear})
    calibrate(model, [inputs(name)])
    commit(model, {site: 1 + (3 * index) % 8 for index, site in enumerate(sites(model))})
    return model.eval()


@pytest.mark.parametrize("name", [*MODELS, "language"])
@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        (Scheme(granularity="channel"), Scheme()),
        (Scheme(granularity="tensor"), Scheme(range="lsq+")),
        (Scheme(granularity="group", group_size=5), Scheme(range="dynamic", granularity="token")),
        (Scheme(granularity="channel", grid="asymmetric"), None),
        (
            Scheme(granularity="group", group_size=4, grid="asymmetric"),
            Scheme(range="dynamic", granularity="token", grid="asymmetric"),
        ),
    ],
    ids=["channel", "tensor", "group", "weight-only", "asymmetric groups"],
)
def test_native_payload_is_the_plans_bytes(
    name: str, weights: Scheme, activations: Scheme | None, tmp_path: Path
) -> None:
    model = mixed(name, "native", weights, activations)
    native.save(finalize(model, inputs(name)), tmp_path)
    tensors, _ = load_tensors(tmp_path / "model.safetensors")
    payload = sum(t.numel() * t.element_size() for t in tensors.values())
    report = measure(model, inputs(name)).report()
    assert report["weight_bytes"] == payload
    assert report["weight_bytes_float"] > payload


@pytest.mark.parametrize("name", ["digits_cnn", pytest.param("digits_vit", marks=pytest.mark.slow)])
def test_codes_of_onnx_are_the_plans_bytes(name: str, tmp_path: Path) -> None:
    """Weight by weight; scales, and the zero points and constants that ONNX adds, are not compared."""
    onnx = pytest.importorskip("onnx")
    model = mixed(name, "onnxruntime", Scheme(granularity="channel"), Scheme())
    to_onnx(finalize(model, IMAGES), tmp_path / "model.onnx", IMAGES)
    file = onnx.load(tmp_path / "model.onnx")
    held = {"UINT2": 2, "INT2": 2, "UINT4": 4, "INT4": 4, "UINT8": 8, "INT8": 8}
    dequantized = {node.input[0] for node in file.graph.node if node.op_type == "DequantizeLinear"}
    codes = []
    for tensor in file.graph.initializer:
        if tensor.name in dequantized:
            width = held[onnx.TensorProto.DataType.Name(tensor.data_type)]
            assert len(tensor.raw_data) == math.ceil(math.prod(tensor.dims) * width / 8)
            codes.append(len(tensor.raw_data))
    cost = measure(model, IMAGES)
    bits = plan_of(model).bits
    expected = [
        math.ceil(layer.weight_elements * cost.target.weight_containers[bits[layer.operands[0]]] / 8)
        for layer in cost.layers
        if layer.weight_elements
    ]
    assert sorted(codes) == sorted(expected)
