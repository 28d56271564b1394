"""finalize: packed layers compute what was trained, from codes of the trained bits."""

import math

import pytest
import torch
from torch import nn

from bitsmith.errors import SiteError
from bitsmith.numerics.pack import packed_size
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.integer_layers import (
    Folded,
    IntegerConv,
    PackedWeight,
    packed_layers,
    packed_sites,
)
from bitsmith.quantization.layers import MatMul, QuantConv2d
from bitsmith.quantization.observe import calibrate
from bitsmith.quantization.prepare import prepare
from bitsmith.quantization.quantizer import sites
from bitsmith.quantization.scheme import Scheme


class Layers(nn.Module):
    """Every kind of layer, without BatchNorm."""

    def __init__(self, mode: str = "zeros") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3, padding_mode=mode)
        self.line = nn.Conv1d(6, 4, 3, dilation=2)
        self.linear = nn.Linear(12, 7)
        self.product = MatMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(self.line(self.conv(x).flatten(2)))
        result: torch.Tensor = self.product(x, x.transpose(1, 2))
        return result


def layers(
    weights: Scheme, activations: Scheme | None, mode: str = "zeros"
) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Layers(mode), torch.randn(5, 3, 8, 8) + 0.5
    prepare(model, weights, activations, first_last_bits=None)
    calibrate(model, [x])
    return model.eval(), x


WEIGHTS = [Scheme(bits=b, granularity="channel") for b in range(1, 9)] + [
    Scheme(bits=4, granularity="tensor"),
    Scheme(bits=2, granularity="tensor", range="dorefa"),
    Scheme(bits=2, granularity="channel", grid="balanced"),
    Scheme(bits=4, granularity="channel", grid="asymmetric"),
    Scheme(bits=8, granularity="channel", grid="asymmetric"),
    Scheme(bits=3, granularity="group", group_size=4),
    Scheme(bits=2, granularity="group", group_size=5),
    Scheme(bits=32),
]
ACTIVATIONS = [
    None,
    Scheme(bits=8),
    Scheme(bits=2),
    Scheme(bits=1),
    Scheme(bits=4, grid="asymmetric"),
    Scheme(bits=4, range="lsq+"),
    Scheme(bits=8, granularity="token", range="dynamic"),
    Scheme(bits=4, granularity="group", group_size=3, range="dynamic"),
    Scheme(bits=6, range="dynamic"),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_packed_equals_trained_bit_for_bit_for_every_weight_scheme(weights: Scheme) -> None:
    model, x = layers(weights, Scheme(bits=4))
    with torch.no_grad():
        assert torch.equal(finalize(model, x)(x), model(x))


@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
def test_packed_equals_trained_bit_for_bit_for_every_activation_scheme(activations: Scheme | None) -> None:
    model, x = layers(Scheme(bits=3, granularity="channel"), activations)
    with torch.no_grad():
        assert torch.equal(finalize(model, x)(x), model(x))


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_other_padding_modes_are_kept(mode: str) -> None:
    model, x = layers(Scheme(bits=4, granularity="channel"), Scheme(bits=8), mode)
    with torch.no_grad():
        assert torch.equal(finalize(model, x)(x), model(x))


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_take_their_true_width_in_memory(bits: int) -> None:
    model, x = layers(Scheme(bits=bits, granularity="channel"), None)
    for site in packed_sites(finalize(model, x)).values():
        assert isinstance(site, PackedWeight)
        assert site.codes.numel() == packed_size(math.prod(site.shape), bits)


def test_trained_ranges_are_what_is_stored() -> None:
    model, x = layers(Scheme(bits=4, granularity="channel"), Scheme(bits=4))
    for quantizer in sites(model).values():
        nn.init.normal_(quantizer.range, std=0.1)
    with torch.no_grad():
        assert torch.equal(finalize(model, x)(x), model(x))


def test_trained_zero_points_are_what_is_stored() -> None:
    model, x = layers(Scheme(bits=4, granularity="channel"), Scheme(bits=4, range="lsq+"))
    for quantizer in sites(model).values():
        if quantizer.zero_shift is not None:
            nn.init.constant_(quantizer.zero_shift, 1.4)
    with torch.no_grad():
        assert torch.equal(finalize(model, x)(x), model(x))


def test_the_trained_model_is_left_as_it_was() -> None:
    model, x = layers(Scheme(bits=4, granularity="channel"), Scheme(bits=8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    finalize(model, x)
    assert model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_packed_has_no_trainable_parameter_and_no_training_code() -> None:
    model, x = layers(Scheme(bits=4, granularity="channel"), Scheme(bits=8))
    packed = finalize(model, x)
    assert not list(packed.parameters())
    assert not sites(packed)
    assert len(packed_layers(packed)) == 4


def norm_model(granularity: str = "channel") -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        torch.randn(4, 2, 6, 6),
    )
    model[1].weight.data = torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0, 3.0])
    model[1].bias.data.normal_()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    group_size = 4 if granularity == "group" else None
    prepare(model, Scheme(bits=2, granularity=granularity, group_size=group_size), Scheme(bits=8))  # type: ignore[arg-type]
    calibrate(model, [x])
    return model.eval(), x


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_batchnorm_is_folded_into_scale_and_bias_and_codes_stay(granularity: str) -> None:
    model, x = norm_model(granularity)
    packed = finalize(model, x)
    layer, trained = packed[0], model[0]  # type: ignore[index]
    assert isinstance(layer, IntegerConv)
    assert isinstance(trained, QuantConv2d)
    assert isinstance(packed[1], Folded)  # type: ignore[index]
    codes = trained.weight_quantizer.codes(trained.weight).flatten(1)  # type: ignore[union-attr]
    assert torch.equal(layer.weight.integers().flatten(1), codes[:, : layer.weight.shape[1:].numel()])  # type: ignore[union-attr]
    signs = layer.weight.scale.view(6, -1)[:, 0].sign()  # type: ignore[union-attr]
    assert signs.tolist() == [1, -1, 1, -1, 0, 1]
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), rtol=1e-5, atol=1e-5)


def test_batchnorm_stays_behind_a_weight_with_one_scale() -> None:
    model, x = norm_model("tensor")
    packed = finalize(model, x)
    assert isinstance(packed[1], nn.BatchNorm2d)  # type: ignore[index]
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.relu(self.first(x)))
        return result


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(4, 6)
    prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=8), first_last_bits=None)
    calibrate(model, [x])
    packed = finalize(model.eval(), x)
    assert packed.first.weight is packed.second.weight  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))


def test_a_model_without_quantized_layers_is_refused() -> None:
    with pytest.raises(SiteError, match="no quantized layer"):
        finalize(nn.Linear(2, 2), torch.randn(1, 2))


def test_an_uncalibrated_site_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prepare(model, Scheme(bits=4), Scheme(bits=4))
    with pytest.raises(SiteError, match=r"0\.input: this site was never calibrated"):
        finalize(model, torch.randn(1, 4))
