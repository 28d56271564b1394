"""Transposed convolutions: the float function of rounded operands, counted, packed, stored, exported."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import FormatError, SiteError
from bitsmith.export import load, save, to_onnx
from bitsmith.export.native import stored_tensors
from bitsmith.export.verify import verify
from bitsmith.quantization import Scheme, calibrate, measure, prepare, sites
from bitsmith.quantization.coverage import coverage
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.integer_layers import Folded, IntegerConvTranspose
from bitsmith.quantization.layers import QuantConvTranspose2d, weight_of
from bitsmith.quantization.sensitivity import sensitivity
from bitsmith.quantization.site_terms import float_output

X = torch.rand(6, 4, 5, 7, generator=torch.Generator().manual_seed(0))
GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": (3, 2), "stride": (2, 3), "padding": 1, "output_padding": (1, 0)},
    {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 2},
]
SCHEMES = [
    Scheme(bits=3, granularity="tensor"),
    Scheme(bits=4, granularity="channel"),
    Scheme(bits=(2, 3, 8, 4, 5), granularity="channel"),
    Scheme(bits=4, granularity="group", group_size=6, grid="asymmetric"),
    Scheme(bits=32),
]


CHANNEL = SCHEMES[1]


def small(weights: Scheme, activations: Scheme | None = None, target: str = "native", **geometry: Any) -> Any:
    """A transposed convolution with BatchNorm behind it, and a convolution; calibrated, in eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(4, 5, **(geometry or GEOMETRIES[1])),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 3, 1),
    )
    model[1].weight.data.uniform_(-1, 1)  # negative factors, too
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    prepare(
        model,
        Scheme(bits=4, granularity="channel"),
        activations,
        first_last_bits=None,
        target=target,
        overrides={"0.weight": vars(weights)},
    )
    calibrate(model, [X])
    return model.eval()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_it_is_the_float_layer_with_rounded_operands(geometry: dict[str, Any]) -> None:
    model = small(Scheme(bits=4), Scheme(bits=8), **geometry)
    layer = model[0]
    plain = nn.ConvTranspose2d(4, 5, **geometry)
    values = layer.weight_quantizer(weight_of(layer).contiguous())
    assert values.shape[:2] == (5, 4)
    plain.load_state_dict({"weight": values.transpose(0, 1), "bias": layer.bias})
    assert torch.equal(layer(X), plain(layer.input_quantizer(X)))
    assert len(values[2].unique()) <= 15  # on a grid of its own


def test_it_spreads_each_input_over_the_kernel() -> None:
    """Against the definition: a convolution of the input with zeros between its pixels, the kernel turned."""
    layer = small(Scheme(bits=8), kernel_size=3, stride=2, padding=1)[0]
    weight = weight_of(layer)
    spread = torch.zeros(6, 4, 9, 13)
    spread[:, :, ::2, ::2] = X
    wanted = F.conv2d(spread, weight.flip(2, 3), layer.bias, padding=1)
    assert torch.allclose(float_output(layer, X), wanted, atol=1e-5)


def test_its_cost_is_a_product_of_every_input_with_the_whole_kernel() -> None:
    model = small(CHANNEL, Scheme(bits=8), kernel_size=2, stride=2)
    found = measure(model, X)
    one = found.layers[0]
    assert (one.kind, one.macs, one.weight_shape) == ("ConvTranspose2d", 4 * 5 * 7 * 5 * 4, (5, 4, 2, 2))
    assert found.float_macs == 0  # PyTorch's own counter finds nothing besides
    assert (one.weight_elements, one.weight_scales, one.bias_elements) == (80, 5, 5)


@pytest.mark.parametrize("weights", SCHEMES, ids=str)
@pytest.mark.parametrize(
    "activations", [None, Scheme(bits=8), Scheme(bits=8, granularity="channel")], ids=str
)
def test_packed_and_stored_it_is_what_was_trained(
    weights: Scheme, activations: Scheme | None, tmp_path: Path
) -> None:
    if weights.is_float and activations is None:
        pytest.skip("nothing is quantized")
    model = small(weights, activations)
    packed = finalize(model, X)
    assert isinstance(packed[0], IntegerConvTranspose)
    assert isinstance(packed[1], Folded) == (weights.granularity != "tensor" or weights.is_float)
    again = load(save(packed, tmp_path), into=copy.deepcopy(model), kernels=False)
    assert torch.equal(again(X), packed(X))
    assert torch.allclose(packed(X), model(X), atol=1e-4)
    assert verify(model, packed, {"native": tmp_path}, X)["exports"]["native"]["passed"]
    payload = sum(t.numel() * t.element_size() for t in stored_tensors(packed).values())
    assert payload == measure(model, X).report()["weight_bytes"]


@pytest.mark.parametrize(
    ("weights", "geometry"), list(zip(SCHEMES[:3], GEOMETRIES[:3], strict=True)), ids=str
)
def test_onnx_runtime_computes_what_was_trained(
    weights: Scheme, geometry: dict[str, Any], tmp_path: Path
) -> None:
    model = small(weights, Scheme(bits=4), target="onnxruntime", **geometry)
    packed = finalize(model, X)
    path = to_onnx(packed, tmp_path / "model.onnx", X)
    found = verify(model, packed, {"onnx": path}, X)["exports"]["onnx"]
    assert found["passed"]
    assert found["sites"]["0"] < 1e-4
    assert found["codes_equal"]


def test_a_file_for_another_shape_or_layer_is_refused(tmp_path: Path) -> None:
    save(finalize(small(Scheme(bits=4)), X), tmp_path)
    other = nn.Sequential(nn.ConvTranspose2d(5, 4, (3, 2)), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 1))
    with pytest.raises(
        FormatError, match=r"0: this layer has another shape in the model; got \(5, 4, 3, 2\)"
    ):
        load(tmp_path, into=other)
    other[0] = nn.Conv2d(4, 5, (3, 2))
    with pytest.raises(FormatError, match="0: this layer of the file is not in the model; got Conv2d"):
        load(tmp_path, into=other)


def test_scores_and_per_channel_scores_are_those_of_its_output() -> None:
    def loss(y: Tensor, target: Tensor) -> Tensor:
        return (y - target).square().sum() / len(y)

    target = torch.zeros(())
    one = small(CHANNEL.replace("", bits=3), Scheme(bits=8))
    before = one[0].weight.clone()
    scores = sensitivity(one, [(X, target)], loss)
    assert torch.equal(one[0].weight, before)
    parts = [
        sensitivity(small(CHANNEL.replace("", bits=bits), Scheme(bits=8)), [(X, target)], loss)["0.weight"][0]
        for bits in ((3, 3, 3, 3, 4), (4, 4, 4, 4, 3))
    ]
    assert set(scores) == set(sites(one))
    by_channel = torch.cat([parts[0][:4], parts[1][4:]])  # each of 3 bits
    assert torch.allclose(by_channel.sum(), scores["0.weight"], rtol=1e-4)


def test_groups_and_an_output_size_are_no_surprise() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Conv2d(4, 2, 1))
    prepare(model, CHANNEL)
    assert set(sites(model)) == {"1.weight"}
    reasons = {left.name: left.reason for left in coverage(model).leftovers}
    assert reasons["0.weight"] == "no quantized form of ConvTranspose2d in groups"

    layer = small(Scheme(bits=4))[0]
    assert isinstance(layer, QuantConvTranspose2d)
    with pytest.raises(SiteError, match=r"0\.weight: a quantized transposed convolution has one output size"):
        layer(X, output_size=[11, 20])
