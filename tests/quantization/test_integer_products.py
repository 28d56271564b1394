"""Packed layers by integers give what they give by floats, and fall back to floats where integers cannot."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitsmith.export import load, save, to_onnx
from bitsmith.export.onnx import run as run_onnx
from bitsmith.export.onnx import session
from bitsmith.kernels import choose
from bitsmith.kernels.native import Native
from bitsmith.quantization import integer_products
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.integer_layers import IntegerConv, IntegerLinear
from bitsmith.quantization.integer_products import (
    KernelConv,
    KernelLinear,
    activation_codes,
    run_on_kernels,
)
from bitsmith.quantization.observe import calibrate
from bitsmith.quantization.prepare import prepare
from bitsmith.quantization.scheme import Scheme
from bitsmith.tasks.models import build
from tests.export.problem import EACH, Small, inputs, prepared

INPUTS = {
    "static": {},
    "asymmetric": {"grid": "asymmetric"},
    "per token": {"granularity": "token", "range": "dynamic"},
    "per token, asymmetric": {"granularity": "token", "range": "dynamic", "grid": "asymmetric"},
    "dynamic": {"granularity": "tensor", "range": "dynamic"},
}
WEIGHTS = ("symmetric", "balanced", "seq", "asymmetric")


def packed(model: nn.Module, x: Tensor, weights: Scheme, activations: Scheme, **more: Any) -> nn.Module:
    prepare(model.eval(), weights, activations, first_last_bits=None, **more)
    calibrate(model, [x])
    return finalize(model, x)


def close(got: Tensor, want: Tensor) -> bool:
    """Within the rounding of an epilogue: of the largest value, as small ones may be differences of large."""
    return got.shape == want.shape and bool((got - want).abs().max() <= 4e-6 * want.abs().max() + 1e-30)


@pytest.fixture(scope="module")
def native() -> None:
    """Convolutions run by integers only where the library is built."""
    if not isinstance(choose.best(), Native):
        pytest.skip("there is no library of kernels here")


@settings(max_examples=20)
@given(
    rows=st.integers(1, 20),
    features=st.sampled_from([1, 3, 31, 32, 33, 64, 100]),
    outputs=st.sampled_from([1, 2, 15, 16, 17, 40]),
    widths=st.tuples(st.integers(1, 8), st.integers(2, 8)),
    grid=st.sampled_from(WEIGHTS),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    how=st.sampled_from(sorted(INPUTS)),
    bias=st.booleans(),
    axes=st.integers(1, 3),
)
def test_a_linear_layer_gives_what_floats_give(
    rows: int,
    features: int,
    outputs: int,
    widths: tuple[int, int],
    grid: Any,
    granularity: Any,
    how: str,
    bias: bool,
    axes: int,
) -> None:
    torch.manual_seed(rows)
    x = torch.randn(*[1] * (axes - 1), rows, features)
    size = 8 if granularity == "group" else None
    grid = "seq" if widths[0] == 1 else grid
    weights = Scheme(bits=widths[0], grid=grid, granularity=granularity, group_size=size)
    activations = Scheme(bits=widths[1], **INPUTS[how])
    present = packed(nn.Sequential(nn.Linear(features, outputs, bias=bias)), x, weights, activations)
    integer = copy.deepcopy(present)
    assert run_on_kernels(integer) == ["0"]
    assert close(integer(x), present(x))
    assert integer[0]._operands is not None


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch pads uneven ones by a copy
@settings(max_examples=20)
@given(
    channels=st.sampled_from([1, 3, 8, 33]),
    filters=st.sampled_from([1, 8, 17]),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, (2, 1), "same", "valid"]),
    dilation=st.integers(1, 2),
    widths=st.tuples(st.integers(1, 8), st.integers(2, 8)),
    grid=st.sampled_from(WEIGHTS),
    granularity=st.sampled_from(["tensor", "channel"]),
    how=st.sampled_from(["static", "asymmetric", "dynamic"]),
    last=st.booleans(),
)
def test_a_convolution_gives_what_floats_give(
    native: None,
    channels: int,
    filters: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    padding: Any,
    dilation: int,
    widths: tuple[int, int],
    grid: Any,
    granularity: Any,
    how: str,
    last: bool,
) -> None:
    stride = 1 if padding == "same" else stride
    dilation = 1 if padding in (0, "valid") else dilation
    torch.manual_seed(channels)
    x = torch.randn(2, channels, *size) + 0.5
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    layer = nn.Conv2d(channels, filters, kernel, stride, padding, dilation)
    weights = Scheme(bits=widths[0], grid="seq" if widths[0] == 1 else grid, granularity=granularity)
    present = packed(nn.Sequential(layer), x, weights, Scheme(bits=widths[1], **INPUTS[how]))
    integer = copy.deepcopy(present)
    uneven = padding == "same" and any(dilation * (taps - 1) % 2 for taps in kernel)
    assert run_on_kernels(integer) == ([] if uneven else ["0"])
    got, want = integer(x), present(x)
    assert close(got, want)
    assert uneven or integer[0]._operands is not None
    if channels > 1 and filters > 1 and not last:
        assert got.is_contiguous()


@pytest.mark.parametrize(
    ("how", "bits"), [("static", 1), *((how, bits) for how in INPUTS for bits in (4, 8))]
)
def test_the_codes_of_activations_are_equal(how: str, bits: int) -> None:
    x = 3 * torch.randn(50, 40)
    x[0, :4] = torch.tensor([0.0, -1e6, 1e6, 1e-30])
    model = packed(nn.Sequential(nn.Linear(40, 3)), x, Scheme(bits=4), Scheme(bits=bits, **INPUTS[how]))
    run_on_kernels(model)
    quantizer = model[0].input
    found = activation_codes(quantizer, x, choose.best())
    zero = found.zero_point if isinstance(found.zero_point, int) else found.zero_point[:, None]
    assert torch.equal((found.codes.int() - zero).float() * found.row_scale.view(-1, 1), quantizer(x))


@pytest.mark.parametrize("overrides", [{}, EACH])
@pytest.mark.parametrize("grid", ["auto", "asymmetric"])
def test_a_network_gives_what_floats_give(native: None, overrides: dict, grid: str) -> None:
    model = finalize(prepared(bits=4, grid=grid, overrides=overrides, activations=Scheme(bits=8)), inputs())
    integer = copy.deepcopy(model)
    assert run_on_kernels(integer) == ["stem", "query", "key", "head"]  # not the grouped convolutions
    seen = []
    for layer in (integer.stem, integer.query, integer.key, integer.head):
        layer.register_forward_hook(
            lambda one, x, y: seen.append(close(y, type(one).__mro__[2].forward(one, *x)))
        )
    assert (integer(inputs()).argmax(1) == model(inputs()).argmax(1)).all()
    assert seen == [True] * 4


@pytest.mark.parametrize("name", ["digits_cnn", "digits_vit", "byte_llama"])
def test_a_loaded_model_answers_alike_with_and_without_kernels(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    words = name == "byte_llama"
    x = torch.randint(0, 256, (6, 16)) if words else torch.rand(32, 1, 8, 8)
    model = build(name, seed=0, **({"context": 16} if words else {})).eval()
    token = Scheme(bits=8, granularity="token", range="dynamic")
    prepare(model, Scheme(bits=4, granularity="channel"), token if words else Scheme(bits=8))
    calibrate(model, [x])
    save(finalize(model, x), tmp_path)
    plain, integer = load(tmp_path, kernels=False), load(tmp_path)
    layers = [one for one in integer.modules() if isinstance(one, KernelLinear | KernelConv)]
    assert layers
    assert not any(isinstance(one, KernelLinear | KernelConv) for one in plain.modules())
    assert all(one._operands is None for one in layers)  # nothing was packed by loading
    got, want = integer(x), plain(x)
    apart = (got - want).abs()
    assert apart.median() < 1e-5 * want.std()
    apart = apart.amax()
    assert apart < 0.2 * want.std()  # a tie of rounding moves an activation by a step, and what follows it
    first, second = want.topk(2).values.unbind(-1)
    assert ((got.argmax(-1) == want.argmax(-1)) | (first - second < 2 * apart)).all()
    assert any(one._operands is not None for one in layers)
    again = load(save(integer, tmp_path / "again"), kernels=False)
    assert torch.equal(again(x), want)


def test_without_a_library_torch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = finalize(prepared(bits=4, activations=Scheme(bits=8)), inputs())
    native, fallback = copy.deepcopy(model), copy.deepcopy(model)
    run_on_kernels(native), run_on_kernels(fallback)
    x = torch.randn(7, 5, 12)
    want = native.query(x)
    monkeypatch.setattr(integer_products, "best", choose.torch_path)
    assert torch.equal(fallback.query(x), want)  # bit for bit
    assert torch.equal(fallback.stem(inputs()), model.stem(inputs()))  # floats: torch reads no images
    assert fallback.stem._operands is None


def linear(**activations: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """(by integers, by floats, an input)."""
    torch.manual_seed(0)
    x = torch.randn(9, 40)
    scheme = Scheme(**{"bits": 8, **activations})
    present = packed(nn.Sequential(nn.Linear(40, 6)), x, Scheme(bits=3, granularity="channel"), scheme)
    integer = copy.deepcopy(present)
    run_on_kernels(integer)
    return integer, present, x


@pytest.mark.parametrize(
    "activations",
    [{"bits": 32}, {"grid": "seq", "bits": 2}, {"granularity": "group", "group_size": 8, "range": "dynamic"}],
)
def test_grids_that_no_product_knows_stay_floats(activations: dict) -> None:
    integer, present, x = linear(**activations)
    assert type(integer[0]) is IntegerLinear
    assert torch.equal(integer(x), present(x))


@pytest.mark.parametrize("grid", ["powers_of_two", "levels"])
def test_tables_of_levels_stay_floats(grid: Any) -> None:
    x = torch.randn(9, 40)
    model = packed(nn.Sequential(nn.Linear(40, 6)), x, Scheme(bits=3, grid=grid), Scheme(bits=8))
    assert run_on_kernels(model) == []


def test_forwards_that_integers_cannot_do_are_floats() -> None:
    integer, present, x = linear()
    assert not torch.equal(integer(x), present(x))  # or nothing here is shown
    differentiable = x.clone().requires_grad_()
    assert torch.equal(integer(differentiable), present(differentiable))
    assert integer(differentiable).requires_grad == present(differentiable).requires_grad
    assert torch.equal(integer.train()(x), present.train()(x))
    integer.eval(), present.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(integer(x), present(x))
    assert torch.equal(torch.compile(integer, backend="eager")(x), present(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit
        assert torch.equal(torch.jit.trace(integer, x)(x), present(x))
    assert integer(x[:0]).shape == (0, 6)
    with pytest.raises(RuntimeError, match="shapes"):
        integer(x[:, :7])
    seen = []
    integer[0].input.register_forward_hook(lambda *_: seen.append(True))
    assert torch.equal(integer(x), present(x))
    assert seen


@pytest.mark.parametrize("how", INPUTS)
def test_what_is_not_a_number_is_passed_on(how: str) -> None:
    integer, present, x = linear(**INPUTS[how])
    for value in (float("nan"), float("inf")):
        x[2, 3] = value
        assert torch.equal(integer(x).isnan(), present(x).isnan())
    x[2, 3] = float("nan")
    assert integer(x)[2].isnan().all()


def test_what_was_packed_follows_the_buffers() -> None:
    integer, present, x = linear()
    integer(x)
    for model in (integer, present):
        model[0].weight.scale.mul_(2)
        model[0].bias.add_(1)
    assert close(integer(x), present(x))
    for model in (integer, present):
        model.load_state_dict({name: t.clone() * 1 for name, t in linear()[0].state_dict().items()})
    assert close(integer(x), present(x))
    with torch.inference_mode():
        assert close(integer(x), present(x))
    assert integer.double()(x.double()).dtype == torch.float64


def test_copies_and_pickles_leave_the_packed_form_behind() -> None:
    integer, _, x = linear()
    want = integer(x)
    assert integer[0]._operands is not None
    for again in (copy.deepcopy(integer), pickle.loads(pickle.dumps(integer))):
        assert again[0]._operands is None
        assert torch.equal(again(x), want)


def test_a_model_on_kernels_is_exported_to_onnx_as_any_other(tmp_path: Any) -> None:
    path = save(finalize(prepared(bits=4, activations=Scheme(bits=8)), inputs()), tmp_path / "native")
    model = load(path, into=Small())
    model(inputs())
    to_onnx(model, tmp_path / "model.onnx", inputs()[:2])
    got = run_onnx(session(tmp_path / "model.onnx"), inputs())[0]
    assert (got - load(path, into=Small(), kernels=False)(inputs())).abs().max() < 1e-4


def test_a_zero_point_that_is_no_code_stays_with_floats() -> None:
    integer, present, x = linear(grid="asymmetric")
    for model in (integer, present):
        model[0].input.zero_point.fill_(0.5)
    assert torch.equal(integer(x), present(x))
    assert isinstance(integer[0], KernelLinear)
    assert not isinstance(present[0], IntegerConv)


@pytest.mark.parametrize(
    "weights", [{"grid": grid} for grid in WEIGHTS] + [{"granularity": "group", "group_size": 16}]
)
def test_scales_that_change_leave_the_weight_packed(weights: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 48)
    model = packed(
        nn.Sequential(nn.Linear(48, 20)),
        x,
        Scheme(**({"bits": 4, "granularity": "channel"} | weights)),
        Scheme(bits=8),
    )
    plain = copy.deepcopy(model)
    assert run_on_kernels(model) == ["0"]
    with torch.no_grad():
        before = model(x)
        data = model[0].operands().runs[0][0].data
        for layer in (model[0], plain[0]):
            layer.weight.scale.mul_(1.5)
            layer.input.scale.mul_(0.9)
            layer.bias.add_(1.0)
        assert not torch.equal(model(x), before)
        assert close(model(x), plain(x))
        assert model[0].operands().runs[0][0].data is data
        for layer in (model[0], plain[0]):
            layer.weight.codes.zero_()
        assert close(model(x), plain(x))
        assert model[0].operands().runs[0][0].data is not data
