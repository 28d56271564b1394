"""Layers that keep their weight as (in, out), and other classes that a user names, through ``swaps``."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitsmith.errors import FormatError, SiteError
from bitsmith.export import load, save
from bitsmith.export.native import stored_tensors
from bitsmith.export.verify import verify
from bitsmith.quantization import (
    Scheme,
    calibrate,
    commit,
    measure,
    parameter_groups,
    plan_of,
    prepare,
    set_bits,
    sites,
)
from bitsmith.quantization.bits import FixedBits
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.integer_layers import IntegerLinear
from bitsmith.quantization.layers import QuantLinear, QuantTransposedLinear, weights_of
from bitsmith.quantization.sensitivity import sensitivity


class InOut(nn.Module):
    """transformers' Conv1D, as it is written there."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        size_out = x.size()[:-1] + (self.nf,)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


SWAPS = {InOut: QuantTransposedLinear}
X = torch.randn(6, 3, 10, generator=torch.Generator().manual_seed(0))
SCHEMES = [
    Scheme(bits=4, granularity="tensor"),
    Scheme(bits=3, granularity="channel"),
    Scheme(bits=(2, 3, 4, 5, 6, 7, 8), granularity="channel"),
    Scheme(bits=4, granularity="group", group_size=4),
    Scheme(bits=4, granularity="group", group_size=4, grid="asymmetric"),
    Scheme(bits=2, granularity="channel", range="dorefa"),
    Scheme(bits=4, granularity="channel", range="dynamic"),
    Scheme(bits=4, granularity="channel", range="dynamic", grid="asymmetric"),
    Scheme(bits=32),
]
ACTIVATIONS = [
    None,
    Scheme(bits=8),
    Scheme(bits=8, granularity="channel"),
    Scheme(bits=8, granularity="token", range="dynamic"),
]


def pair(weights: Scheme, activations: Scheme | None = None) -> tuple[Any, Any]:
    """An (in, out) layer and the nn.Linear that computes the same, prepared alike."""
    torch.manual_seed(1)
    one: Any = nn.Sequential(InOut(7, 10))
    other: Any = nn.Sequential(nn.Linear(10, 7))
    other.load_state_dict({"0.weight": one[0].weight.t(), "0.bias": one[0].bias})
    for model in (one, other):
        prepare(model, weights, activations, first_last_bits=None, swaps=SWAPS)
        calibrate(model, [X])
    return one.eval(), other.eval()


# ---- as a Linear whose weight lies the other way


@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("weights", SCHEMES, ids=str)
def test_it_computes_trains_and_costs_what_the_transposed_linear_does(
    weights: Scheme, activations: Scheme | None
) -> None:
    one, other = pair(weights, activations)
    same_sums = torch.equal if not weights.is_float else torch.allclose  # as the float layer sums, then
    assert same_sums(one(X), other(X))
    for model in (one, other):
        model(X).square().sum().backward()
    torch.testing.assert_close(one[0].weight.grad, other[0].weight.grad.t(), rtol=1e-4, atol=1e-4)
    for a, b in zip(sites(one).values(), sites(other).values(), strict=True):
        if b.range.grad is not None:
            torch.testing.assert_close(a.range.grad, b.range.grad, rtol=1e-4, atol=1e-4)
    assert measure(one, X).report() == measure(other, X).report()
    assert plan_of(one) == plan_of(other)
    packed, same = finalize(one, X), finalize(other, X)
    assert torch.equal(packed(X), one(X))
    assert {n: t.tolist() for n, t in stored_tensors(packed).items()} == {
        n: t.tolist() for n, t in stored_tensors(same).items()
    }


def test_names_and_shapes_stay_so_that_float_checkpoints_load() -> None:
    one, _ = pair(Scheme(bits=4, granularity="channel"))
    plain = nn.Sequential(InOut(7, 10))
    missing = one.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all("quantizer" in key for key in missing.missing_keys)
    assert torch.equal(one[0].weight, plain[0].weight)
    assert weights_of(one)["0.weight"].shape == (7, 10)
    assert weights_of(one)["0.weight"].data_ptr() == one[0].weight.data_ptr()
    groups = {g["name"]: [id(p) for p in g["params"]] for g in parameter_groups(one, learning_rate=1.0)}
    assert id(one[0].weight) in groups["weights"]


def test_widths_are_committed_and_scored_by_output_channel() -> None:
    one, other = pair(Scheme(bits=4, granularity="channel"), Scheme(bits=8))
    for model in (one, other):
        commit(model, {"0.weight": (2, 3, 4, 5, 6, 7, 8), "0.input": 4})
    assert torch.equal(one(X), other(X))
    one, other = pair(Scheme(bits=4, granularity="channel"), Scheme(bits=8))
    scores = []
    for model in (one, other):
        set_bits(model, {"0.weight": FixedBits((2, 3, 4, 5, 6, 7, 8))})
        before = model[0].weight.clone()
        targets = torch.zeros(6, 3, 7)
        scores.append(sensitivity(model, [(X, targets)], nn.functional.mse_loss)["0.weight"])
        assert torch.equal(model[0].weight, before)
    assert scores[0].shape == (1, 7)
    torch.testing.assert_close(scores[0], scores[1])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 10), st.integers(1, 8), st.booleans())
@settings(max_examples=40, deadline=None)
def test_groups_lie_along_its_inputs_whatever_the_shape(
    outputs: int, inputs: int, group_size: int, bits: int, asymmetric: bool
) -> None:
    torch.manual_seed(outputs * 100 + inputs)
    scheme = Scheme(
        bits=bits,
        granularity="group",
        group_size=group_size,
        grid="asymmetric" if asymmetric else "auto",
        calibration="minmax",
    )
    model: Any = nn.Sequential(InOut(outputs, inputs))
    prepare(model, scheme, None, first_last_bits=None, swaps=SWAPS)
    x = torch.randn(2, inputs)
    packed = finalize(model, x)
    assert torch.equal(packed(x), model.eval()(x))
    payload = sum(t.numel() * t.element_size() for t in stored_tensors(packed).values())
    assert measure(model, x).report()["weight_bytes"] == payload
    assert packed[0].weight.scale.numel() == outputs * -(-inputs // group_size)


# ---- files


@pytest.mark.parametrize("weights", [SCHEMES[4], SCHEMES[-1]], ids=["groups", "float"])
def test_a_file_is_loaded_into_the_float_model_and_saves_the_same(weights: Scheme, tmp_path: Path) -> None:
    one, _ = pair(weights, Scheme(bits=8))
    packed = finalize(one, X)
    save(packed, tmp_path / "a")
    loaded = load(tmp_path / "a", into=nn.Sequential(InOut(7, 10)), kernels=False)
    assert isinstance(loaded[0], IntegerLinear)  # type: ignore[index]
    assert torch.equal(loaded(X), packed(X))
    save(loaded, tmp_path / "b")
    assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()


@pytest.mark.parametrize(
    ("into", "what"),
    [
        (nn.Linear(10, 7), "not in the model"),
        (nn.ReLU(), "not in the model"),
        (InOut(10, 7), "another shape"),
    ],
    ids=["linear", "no weight", "turned"],
)
def test_a_file_is_refused_by_a_model_whose_weight_lies_otherwise(
    into: nn.Module, what: str, tmp_path: Path
) -> None:
    one, _ = pair(Scheme(bits=4, granularity="channel"))
    save(finalize(one, X), tmp_path)
    with pytest.raises(FormatError, match=what):
        load(tmp_path, into=nn.Sequential(into))


def test_the_certificate_compares_its_codes(tmp_path: Path) -> None:
    one, _ = pair(
        Scheme(bits=(2, 3, 4, 5, 6, 7, 8), granularity="channel", grid="asymmetric"), Scheme(bits=8)
    )
    packed = finalize(one, X)
    save(packed, tmp_path)
    entry = verify(one, packed, {"native": tmp_path}, X)["exports"]["native"]
    assert entry["passed"]
    assert entry["codes"] == 70


# ---- swaps


class Mine(nn.Linear):
    """A subclass whose forward is its parent's."""


def test_a_subclass_is_quantized_where_the_user_says_what_it_is() -> None:
    model = nn.Sequential(Mine(4, 3), nn.Linear(3, 2))
    assert [s.name for s in prepare(copy.deepcopy(model), Scheme(bits=4), None).sites] == ["1.weight"]
    report = prepare(model, Scheme(bits=4), None, swaps={Mine: QuantLinear})
    assert [s.name for s in report.sites] == ["0.weight", "1.weight"]


@pytest.mark.parametrize("swap", [nn.Linear, nn.ReLU, Mine], ids=lambda c: c.__name__)
def test_a_swap_for_a_class_that_is_none_of_ours_is_refused(swap: type[nn.Module]) -> None:
    with pytest.raises(SiteError, match=r"swaps\.Mine.*QuantLinear") as error:
        prepare(nn.Sequential(Mine(4, 3)), Scheme(bits=4), None, swaps={Mine: swap})
    assert "QuantTransposedLinear" in str(error.value)


def test_without_the_swap_the_coverage_says_what_to_name() -> None:
    Conv1D: Callable[..., nn.Module] = type("Conv1D", (InOut,), {})
    report = prepare(nn.Sequential(Conv1D(7, 10), nn.Linear(7, 2)), Scheme(bits=4), None)
    reasons = {left.name: left.reason for left in report.leftovers}
    assert "swaps={Conv1D: QuantTransposedLinear}" in reasons["0.weight"]
