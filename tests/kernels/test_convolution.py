"""Convolutions of integers and their gradients, against torch's in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.kernels.choose import Backend
from bitsmith.kernels.convolution import convolve, input_gradient, pack_filters, weight_gradient
from bitsmith.kernels.operands import Activations
from bitsmith.kernels.torch_path import TorchPath
from tests.kernels.shapes import filled

few = settings(max_examples=15, deadline=None)
PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def problems(draw: st.DrawFn) -> dict:
    """Sizes of a convolution that has an output."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    found = {
        "batch": draw(st.integers(0, 3)),
        "inputs": groups * draw(st.integers(1, 5)),
        "outputs": groups * draw(st.integers(1, 9)),
        "size": draw(st.tuples(st.integers(1, 9), st.integers(1, 9))),
        "kernel": draw(PAIRS),
        "groups": groups,
        "seed": draw(st.integers(0, 999)),
    }
    numbers = {
        "stride": draw(PAIRS),
        "padding": draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
    }
    for i in (0, 1):
        reach = numbers["dilation"][i] * (found["kernel"][i] - 1) + 1
        assume(found["size"][i] + 2 * numbers["padding"][i] >= reach)
    return found | {"numbers": numbers}


def operands(p: dict, low: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = filled((p["batch"], p["inputs"], *p["size"]), low, low + 255, dtype, "random", p["seed"])
    shape = (p["outputs"], p["inputs"] // p["groups"], *p["kernel"])
    return x, filled(shape, -128, 127, torch.int8, "random", p["seed"] + 1)


@few
@given(problems(), st.booleans(), st.integers(0, 127))
def test_forward_is_torchs(backend: Backend, p: dict, unsigned: bool, zero: int) -> None:
    x, w = operands(p, 0 if unsigned else -128, torch.uint8 if unsigned else torch.int8)
    filters = pack_filters(backend, w, 8, groups=p["groups"])
    found = convolve(backend, Activations(x, zero), filters, p["kernel"], **p["numbers"])
    expected = F.conv2d(x.double() - zero, w.double(), groups=p["groups"], **p["numbers"])
    assert torch.equal(found.double(), expected)


@few
@given(problems(), st.integers(1, 8))
def test_values_have_scales_and_bias(backend: Backend, p: dict, bits: int) -> None:
    x, w = operands(p, 0, torch.uint8)
    codes = w.view(torch.uint8) & (2**bits - 1)
    scale, bias = torch.rand(p["outputs"]), torch.randn(p["outputs"])
    arguments = {"groups": p["groups"], "offset": -torch.arange(p["outputs"]), "scale": scale}
    made = [
        convolve(
            on,
            Activations(x, 3, torch.tensor([0.5])),
            pack_filters(on, codes, bits, **arguments),
            p["kernel"],
            **p["numbers"],
            bias=bias,
        )
        for on in (backend, TorchPath())
    ]
    assert torch.equal(*made)


@few
@given(problems())
def test_gradients_are_torchs(backend: Backend, p: dict) -> None:
    x, w = operands(p, -128, torch.int8)
    assume(p["batch"])
    left, right = x.double().requires_grad_(), w.double().requires_grad_()
    y = F.conv2d(left - 5, right, groups=p["groups"], **p["numbers"])
    dy = filled(tuple(y.shape), -128, 127, torch.int8, "random", p["seed"])
    y.backward(dy.double())
    numbers = p["numbers"] | {"groups": p["groups"]}
    dx = input_gradient(backend, dy, w, p["size"], **numbers)
    dw = weight_gradient(backend, dy, Activations(x, 5), p["kernel"], **numbers)
    assert torch.equal(dx.double(), left.grad)
    # torch pads with 0 what has been shifted by 5 already, as does a zero point
    assert torch.equal(dw.double(), right.grad)


def test_sums_over_many_pixels_are_taken_in_pieces(backend: Backend) -> None:
    x, dy = (filled((2, 3, 70, 70), -128, 127, torch.int8, "lowest", 0) for _ in range(2))
    found = weight_gradient(backend, dy, Activations(x), (1, 1))
    assert torch.equal(found, torch.full((3, 3, 1, 1), 2 * 70 * 70 * 128 * 128, dtype=torch.int32))


def test_sums_that_could_wrap_are_refused(backend: Backend) -> None:
    image = torch.zeros(1, 1, 512, 512, dtype=torch.int8)
    with pytest.raises(ValueError, match="131072"):
        weight_gradient(backend, image, Activations(image), (1, 1))
