"""Quantized layers are the layers they replace, with their operands on grids."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bitsmith.quantization import MatMul, Scheme, calibrate, prepare, set_bits, sites
from bitsmith.quantization.layers import in_eval_mode, weights_of
from tests.quantization.widths import Sampled

W8 = Scheme(bits=8, granularity="channel")
LAYERS = {
    "linear": (nn.Linear(6, 5), (4, 6)),
    "tokens": (nn.Linear(6, 5, bias=False), (4, 3, 6)),
    "no batch": (nn.Linear(6, 5), (6,)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (1, 3), padding=(0, 1), padding_mode="circular"), (2, 4, 5, 5)),
    "same": (nn.Conv2d(2, 3, 3, padding="same"), (2, 2, 5, 5)),
}


def data(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("rows", [False, True], ids=["fixed", "rows"])
@pytest.mark.parametrize("case", LAYERS)
def test_eight_bits_are_close_to_float_and_gradients_arrive(case: str, rows: bool, granularity: str) -> None:
    plain, shape = LAYERS[case]
    layer, x = copy.deepcopy(plain), data(shape)
    expected = plain(x)
    prepare(layer, W8, Scheme(bits=8, granularity=granularity), first_last_bits=None)
    if rows:
        set_bits(layer, {name: Sampled([4, 8]) for name in sites(layer)})
    calibrate(layer, [x])
    y = layer(x)
    assert y.shape == expected.shape
    assert 0 < (y - expected).abs().max() < 0.05 * expected.abs().max()
    layer.zero_grad()
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_a_matmul_is_the_product_and_its_quantized_form_that_of_the_quantized_operands() -> None:
    left, right = data((2, 3, 4)), data((2, 4, 5)).abs()
    product = MatMul()
    assert torch.equal(product(left, right), left @ right)
    prepare(product, None, Scheme(bits=4))
    calibrate(product, [(left, right)])
    assert product.left_quantizer.grid_name() == "symmetric"
    assert product.right_quantizer.grid_name() == "unsigned"
    assert torch.equal(product(left, right), product.left_quantizer(left) @ product.right_quantizer(right))


def test_weights_are_found_by_their_sites() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), MatMul())
    prepare(model, W8, Scheme(bits=8), overrides={"1.weight": {"bits": 32}})
    assert list(weights_of(model)) == ["0.weight"]
    assert weights_of(model)["0.weight"] is model[0].weight


def test_every_module_gets_its_own_mode_back_whatever_happens() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    with in_eval_mode(model):
        assert not any(m.training for m in model.modules())
    with pytest.raises(KeyError), in_eval_mode(model):
        raise KeyError
    assert [m.training for m in model.modules()] == [True, True, False]
