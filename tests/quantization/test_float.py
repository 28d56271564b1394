"""32 bits: a candidate that stands in for float while widths are undecided, and float itself once decided."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import FormatError, SchemeError, SiteError
from bitsmith.export import load, save, to_onnx, verify
from bitsmith.quantization import (
    FLOAT,
    FixedBits,
    Plan,
    Scheme,
    calibrate,
    check_calibrated,
    collapse,
    commit,
    measure,
    plan_of,
    prepare,
    set_bits,
    sites,
)
from bitsmith.quantization.categorical import Categorical
from bitsmith.quantization.coverage import coverage
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.integer_layers import FloatWeight, packed_sites
from bitsmith.tasks.models import build

W4, A4 = Scheme(bits=4, granularity="channel"), Scheme(bits=4)
IMAGES = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
X = 3 * torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
VIT = {"width": 8, "depth": 1, "heads": 2, "hidden": 16}
MODELS = pytest.mark.parametrize(("name", "arguments"), [("digits_cnn", {}), ("digits_vit", VIT)])


def network(name: str = "digits_cnn", **arguments: int) -> nn.Module:
    model = build(name, seed=0, **arguments)
    prepare(model, W4, A4, first_last_bits=None)
    calibrate(model, [IMAGES])
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


def some_in_float(model: nn.Module) -> dict[str, int]:
    """Every third site in float."""
    return {site: FLOAT if i % 3 == 1 else 4 for i, site in enumerate(sites(model))}


# ---- while widths are undecided


@pytest.mark.parametrize("range", ["lsq", "lsq+", "pact", "static", "dynamic"])
@pytest.mark.parametrize("estimator", ["clipped", "pure", "ewgs", "stochastic"])
@pytest.mark.parametrize("kind", ["weight", "input"])
def test_the_row_of_32_bits_stands_in_for_float(range: str, estimator: str, kind: str) -> None:
    """In value and in every gradient, also of what calibration never saw."""
    net = nn.Linear(16, 5)
    scheme = Scheme(bits=4, range=range, estimator=estimator)
    prepare(net, scheme, scheme, first_last_bits=None)
    set_bits(net, {site: Categorical([2, 4, FLOAT]) for site in sites(net)})
    calibrate(net, [X])
    quantizer = sites(net.train())[kind]
    assert int(quantizer.bits.rows) == 2
    for x in (X, 1e3 * X, 1e-3 * X):
        x = x.clone().requires_grad_()
        g = torch.randn_like(x)
        y = quantizer(x)
        y.backward(g)
        torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-8)
        assert torch.equal(x.grad, g)
        assert quantizer.bits.logits.grad.abs().max() <= 1e-5
        assert quantizer.range.grad is None or quantizer.range.grad.abs().max() <= 1e-20


def test_a_mixed_site_counts_32_bits_as_x_itself() -> None:
    net = nn.Linear(16, 5)
    prepare(net, W4, None, first_last_bits=None)
    set_bits(net, {"weight": Categorical([2, FLOAT], "mixed")})
    quantizer, x = sites(net)["weight"], net.weight.detach()
    torch.testing.assert_close(quantizer(x), (quantizer.at_row(x, 0) + x) / 2)


@pytest.mark.parametrize(
    ("scheme", "field"),
    [(Scheme(bits=4, range="dorefa"), "range"), (Scheme(bits=4, estimator="smooth"), "estimator")],
)
def test_where_nothing_can_stand_in_for_float_it_is_no_candidate(scheme: Scheme, field: str) -> None:
    net = nn.Linear(16, 5)
    prepare(net, scheme, None, first_last_bits=None)
    with pytest.raises(
        SchemeError, match=rf"^weight\.{field}: 32 bits cannot be one candidate .*leave 32 out"
    ):
        set_bits(net, {"weight": Categorical([4, FLOAT])})
    commit(net, {"weight": FLOAT})
    torch.testing.assert_close(net(X), nn.functional.linear(X, net.weight, net.bias), rtol=0, atol=0)


# ---- decided


def test_a_site_that_is_decided_for_32_bits_returns_its_input() -> None:
    model = network()
    set_bits(model, {site: Categorical([2, FLOAT]) for site in sites(model)})
    calibrate(model, [IMAGES])
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    commit(model, dict.fromkeys(sites(model), FLOAT))
    assert all(quantizer(X) is X for quantizer in sites(model).values())
    assert torch.equal(logits(model), logits(build("digits_cnn", seed=0)))
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes


@pytest.mark.parametrize("undecided", [False, True], ids=["fixed", "searched"])
def test_a_state_says_which_sites_are_in_float(undecided: bool) -> None:
    def fresh() -> nn.Module:
        model = network()
        if undecided:
            set_bits(model, {site: Categorical([2, 4, FLOAT]) for site in sites(model)})
            calibrate(model, [IMAGES])
        return model

    model, other = fresh(), fresh()
    commit(model, some_in_float(model))
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    other.load_state_dict(fresh().state_dict())
    assert torch.equal(logits(other), logits(fresh()))


def test_a_site_comes_back_from_float_with_the_range_that_it_had() -> None:
    model = network()
    before = logits(model)
    report = commit(model, dict.fromkeys(sites(model), FLOAT))
    assert not report.post_training
    commit(model, dict.fromkeys(sites(model), 4))
    assert torch.equal(logits(model), before)


def test_an_activation_that_was_calibrated_in_float_has_no_range_to_come_back_to() -> None:
    model = network()
    set_bits(model, {"conv2.input": FixedBits(FLOAT)})
    calibrate(model, [IMAGES])
    check_calibrated(model)
    commit(model, dict.fromkeys(sites(model), 4))
    with pytest.raises(SiteError, match=r"^conv2\.input: this site was never calibrated"):
        check_calibrated(model)


# ---- plans


@MODELS
def test_a_plan_with_float_makes_the_same_model_anew(tmp_path: Path, name: str, arguments: dict) -> None:
    model = network(name, **arguments)
    commit(model, some_in_float(model))
    plan_of(model).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.bits == some_in_float(network(name, **arguments))

    fresh = network(name, **arguments)
    commit(fresh, plan)
    assert torch.equal(logits(fresh), logits(model))

    asked = build(name, seed=0, **arguments)
    prepare(asked, W4, A4, overrides={site: {"bits": bits} for site, bits in plan.bits.items()})
    calibrate(asked, [IMAGES])
    commit(asked, plan)
    assert FLOAT in plan.bits.values()
    assert len(sites(asked)) == sum(bits != FLOAT for bits in plan.bits.values())
    assert torch.equal(logits(asked), logits(model))
    assert plan_of(asked) == plan


def test_sites_that_a_scheme_leaves_in_float_are_in_the_plan_too() -> None:
    model = build("digits_cnn")
    prepare(model, W4, None, overrides={"conv2.weight": {"bits": FLOAT}}, first_last_bits=None)
    bits = plan_of(model).bits
    assert bits["conv2.weight"] == bits["conv1.input"] == FLOAT
    assert {bits[site] for site in sites(model)} == {4}
    commit(model, plan_of(model))


def test_a_site_in_float_takes_no_other_width_without_a_quantizer() -> None:
    model = build("digits_cnn")
    prepare(model, W4, A4, overrides={"conv2.weight": {"bits": FLOAT}})
    with pytest.raises(SiteError, match=r"^conv2\.weight: the plan has a site that the model has not"):
        commit(model, plan_of(model).bits | {"conv2.weight": 4})


def test_no_channel_is_in_float_by_itself() -> None:
    entry = {"kind": "weight", "granularity": "channel", "bits": [2, FLOAT]}
    with pytest.raises(FormatError, match="or 32 for float"):
        Plan.from_dict({"version": 1, "sites": {"fc.weight": entry}})


def test_a_tied_weight_in_float_is_one_site_of_the_plan() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    prepare(model, W4, None, overrides={"0.weight": {"bits": FLOAT}}, first_last_bits=None)
    assert plan_of(model).bits == dict.fromkeys(("0.weight", "0.input", "2.input"), FLOAT)


# ---- files


@MODELS
def test_what_is_decided_for_float_is_packed_as_what_was_left_in_float(name: str, arguments: dict) -> None:
    model = network(name, **arguments)
    commit(model, some_in_float(model))
    whole = copy.deepcopy(model)
    collapse(model)
    in_float = {site for site, bits in some_in_float(network(name, **arguments)).items() if bits == FLOAT}
    assert in_float
    assert in_float == set(sites(whole)) - set(sites(model))
    assert torch.equal(logits(model), logits(whole))
    assert plan_of(model) == plan_of(whole)
    assert coverage(model) == coverage(whole)
    assert measure(model, IMAGES).report() == measure(whole, IMAGES).report()
    packed = [finalize(one, IMAGES) for one in (model, whole)]
    assert not in_float & set(packed_sites(packed[1]))
    assert any(isinstance(module, FloatWeight) for module in packed[0].modules())
    assert torch.equal(logits(packed[0]), logits(packed[1]))
    torch.testing.assert_close(logits(packed[0]), logits(whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "arguments", "dropped"),
    [
        ("digits_cnn", {}, True),
        ("digits_vit", VIT, False),
        pytest.param("digits_cnn", {}, False, marks=pytest.mark.slow),
        pytest.param("digits_vit", VIT, True, marks=pytest.mark.slow),
    ],
)
def test_files_with_sites_in_float_are_verified(
    tmp_path: Path, name: str, arguments: dict, dropped: bool
) -> None:
    pytest.importorskip("onnxruntime")
    model = network(name, **arguments)
    commit(model, some_in_float(model))
    if dropped:
        collapse(model)
    packed = finalize(model, IMAGES)
    save(packed, tmp_path / "model")
    to_onnx(packed, tmp_path / "model.onnx", IMAGES)
    files = {"native": tmp_path / "model", "onnx": tmp_path / "model.onnx"}
    certificate = verify(model, packed, files, IMAGES)
    assert all(entry["passed"] for entry in certificate["exports"].values())
    assert torch.equal(logits(load(tmp_path / "model", kernels=False)), logits(packed))


def test_a_model_all_in_float_goes_through_to_its_files(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = network()
    commit(model, dict.fromkeys(sites(model), FLOAT))
    collapse(model)
    cost = measure(model, IMAGES)
    assert cost.bops(cost.present) == cost.bops_float
    packed = finalize(model, IMAGES)
    save(packed, tmp_path / "model")
    to_onnx(packed, tmp_path / "model.onnx", IMAGES)
    verify(model, packed, {"native": tmp_path / "model", "onnx": tmp_path / "model.onnx"}, IMAGES)
