"""The U-Net: its form, that it learns, and that what is concatenated lies on one grid."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import DataError, RecipeError
from bitsmith.export import to_onnx
from bitsmith.quantization import Scheme, calibrate, measure, prepare
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.integer_layers import Folded
from bitsmith.tasks import build
from bitsmith.tasks.models import MODELS
from bitsmith.train import TrainConfig, train

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
UPSAMPLINGS = ("transposed", "nearest")


def prepared(upsampling: str = "transposed", target: str = "native") -> nn.Module:
    model = build("unet", seed=0, width=4, classes=3, upsampling=upsampling)
    with torch.no_grad():  # statistics of its own, so that up and skip are of one size
        for _ in range(30):
            model(X)
    prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=4), target=target)
    calibrate(model, [X])
    return model.eval()


@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
@pytest.mark.parametrize("depth", [1, 3])
def test_a_logit_for_every_class_and_pixel(upsampling: str, depth: int) -> None:
    model = build(
        "unet", classes=5, width=3, depth=depth, upsampling=upsampling, mean=(0.5,) * 3, std=(1,) * 3
    )
    assert model(torch.rand(2, 3, 16, 8)).shape == (2, 5, 16, 8)


def test_its_size_is_the_one_that_is_told() -> None:
    count = sum(parameter.numel() for parameter in build("unet").parameters())
    assert f"{count:,} parameters" in str(MODELS["unet"].__doc__)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(
        DataError, match="a U-Net of 2 poolings needs sides that 4 divides; got 10 x 12 pixels"
    ):
        build("unet")(torch.rand(1, 1, 10, 12))
    with pytest.raises(RecipeError, match="there is no such upsampling; got bilinear, expected transposed"):
        build("unet", upsampling="bilinear")
    with pytest.raises(RecipeError, match="at least one level"):
        build("unet", depth=0)


def test_a_convolution_before_doubled_pixels_is_one_behind_them() -> None:
    """The claim of "nearest": the same function at a quarter of the cost."""
    convolve, double = nn.Conv2d(4, 2, 1), nn.Upsample(scale_factor=2, mode="nearest")
    x = torch.rand(2, 4, 3, 3)
    assert torch.allclose(double(convolve(x)), convolve(double(x)), atol=1e-6)


@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
def test_every_batchnorm_is_folded_and_no_product_is_in_float(upsampling: str) -> None:
    model = prepared(upsampling)
    packed = finalize(model, X)
    assert not [m for m in packed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(isinstance(m, Folded) for m in packed.modules()) == 12
    assert measure(model, X).float_macs == 0


@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
def test_what_is_concatenated_lies_on_one_grid(upsampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded apart by the one quantizer of the site, then put side by side, it is what the layer sees."""
    packed = finalize(prepared(upsampling), X)
    parts: list[list[Tensor]] = []
    cat = torch.cat
    monkeypatch.setattr(
        torch, "cat", lambda tensors, dim=0: parts.append(list(tensors)) or cat(tensors, dim=dim)
    )
    with torch.no_grad():
        packed(X)
    assert len(parts) == 2
    for (up, skip), block in zip(parts, packed.decoder, strict=True):  # type: ignore[arg-type]
        quantizer = block[0].input
        assert quantizer.scale.numel() == 1
        codes = [torch.round(quantizer(part) / quantizer.scale) for part in (up, skip)]
        assert torch.equal(
            cat(codes, dim=1), torch.round(quantizer(cat([up, skip], dim=1)) / quantizer.scale)
        )
        assert all(len(one.unique()) > 1 for one in codes)  # both use it


def test_in_the_onnx_file_one_quantizer_follows_each_concatenation(tmp_path: Path) -> None:
    import onnx

    model = prepared(target="onnxruntime")
    path = to_onnx(finalize(model, X), tmp_path / "model.onnx", X)
    graph = onnx.load(path).graph
    joins = [node for node in graph.node if node.op_type == "Concat"]
    readers = [[n.op_type for n in graph.node if join.output[0] in n.input] for join in joins]
    assert readers == [["QuantizeLinear"]] * 2
    made = {name: node.op_type for node in graph.node for name in node.output}
    assert all(made[name] == "Relu" for join in joins for name in join.input)  # nothing is rounded before


def test_memory_holds_skips_at_the_width_of_their_grid() -> None:
    """Of the first level's skip, which lives longest, every value counts its bits, not 32."""
    model = prepared()
    cost = measure(model, X)
    sites = {"decoder.1.0.input", "encoder.1.0.input"}
    assert any(set(tensor.sites) == sites and tensor.elements == 4 * 64 for tensor in cost.live.tensors)
    assert cost.activation_bytes(cost.present) < cost.activation_bytes({}) / 3


@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
def test_it_learns_to_find_bright_pixels(upsampling: str) -> None:
    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = (images.squeeze(1) > 0.5).long()
    model = build("unet", seed=0, width=4, depth=1, classes=2, upsampling=upsampling)
    train(model, images, masks, TrainConfig(epochs=20, batch_size=8, learning_rate=1e-2, device="cpu"))
    assert ((model(images).argmax(1) == masks).float().mean()) > 0.9
