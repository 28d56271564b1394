"""prepare: what becomes a site and with which scheme; nothing is skipped in silence; all or nothing."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import BitsmithError, SchemeError, SiteError, TargetError
from bitsmith.quantization import MatMul, Scheme, calibrate, parameter_groups, prepare, sites
from bitsmith.quantization.layers import QuantConv2d, QuantLinear, QuantMatMul
from bitsmith.tasks.models import build
from tests.quantization.widths import Sampled

W4, A8 = Scheme(bits=4, granularity="channel"), Scheme(bits=8)


def three() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def bits(model: nn.Module) -> dict[str, int]:
    return {name: int(q.bits.expected()) for name, q in sites(model).items()}


# ---- what becomes a site


@pytest.mark.parametrize("name", ["digits_cnn", "digits_vit"])
def test_every_multiplying_operand_is_a_site_and_coverage_sums_to_all_parameters(name: str) -> None:
    model = build(name, seed=0)
    elements = {name: p.numel() for name, p in model.named_parameters()}
    coverage = prepare(model, W4, A8)
    weights = {s.name for s in coverage.sites if s.kind == "weight"}
    assert weights == {
        f"{n}.weight" for n, m in model.named_modules() if isinstance(m, (QuantLinear, QuantConv2d))
    }
    matmuls = [n for n, m in model.named_modules() if isinstance(m, QuantMatMul)]
    operands = {f"{n}.{o}" for n in matmuls for o in ("left", "right")}
    inputs = {n.removesuffix("weight") + "input" for n in weights}
    assert {s.name for s in coverage.sites} == weights | operands | inputs == set(sites(model))
    listed = [(s.name, s.elements) for s in coverage.sites if s.kind == "weight"]
    listed += [(x.name, x.elements) for x in coverage.leftovers if x.elements]
    assert dict(listed) == elements
    assert len(listed) == len(elements)
    assert coverage.parameters == sum(elements.values())


def test_parameter_names_stay_so_that_float_checkpoints_load() -> None:
    model, state = three(), three().state_dict()
    before = dict(model.named_parameters())
    prepare(model, W4, A8)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert not model.load_state_dict(state, strict=False).unexpected_keys


def test_nothing_but_the_layers_changes() -> None:
    model = three()
    model[2].register_forward_hook(lambda *_: None)
    hooks, modules = dict(model[2]._forward_hooks), list(model)
    prepare(model, W4, A8)
    assert [a is b for a, b in zip(model, modules, strict=True)] == [True] * 5
    assert model[2]._forward_hooks == hooks
    assert copy.deepcopy(model)[2].weight_quantizer.name == "2.weight"


def test_a_model_that_is_one_layer_has_sites_without_a_prefix() -> None:
    model = nn.Linear(4, 2)
    prepare(model, W4, A8)
    assert bits(model) == {"weight": 8, "input": 8}


def test_none_and_32_bits_leave_operands_in_float_and_say_so() -> None:
    model = three()
    coverage = prepare(model, W4, None, overrides={"2.weight": {"bits": 32}})
    assert set(sites(model)) == {"0.weight", "4.weight"}
    reasons = {x.name: x.reason for x in coverage.leftovers}
    assert reasons["2.weight"] == reasons["2.input"] == "left in float by its scheme or plan"
    assert "0.bias" in reasons


def test_the_first_and_last_layer_have_eight_bits_unless_overridden() -> None:
    model = three()
    prepare(model, W4, Scheme(bits=3), overrides={"4.*": {"bits": 2}})
    assert bits(model) == {
        "0.weight": 8, "0.input": 8, "2.weight": 4, "2.input": 3, "4.weight": 2, "4.input": 2,
    }  # fmt: skip
    free = three()
    prepare(free, W4, Scheme(bits=3), first_last_bits=None)
    assert set(bits(free).values()) == {4, 3}


def test_the_last_matching_override_wins() -> None:
    model = three()
    prepare(model, W4, A8, overrides={"*.weight": {"bits": 2}, "2.*": {"bits": 5, "estimator": "ewgs"}})
    assert bits(model)["0.weight"] == 2
    assert bits(model)["2.weight"] == 5
    assert sites(model)["2.weight"].scheme.granularity == "channel"
    assert sites(model)["2.input"].scheme.estimator == "ewgs"


def test_an_override_can_quantize_what_is_float_by_default() -> None:
    model = three()
    prepare(model, W4, None, overrides={"2.input": {"bits": 6}})
    assert bits(model)["2.input"] == 6


def test_multihead_attention_is_left_alone_with_a_reason() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
    coverage = prepare(model, W4, A8, first_last_bits=None)
    assert set(sites(model)) == {"linear1.weight", "linear1.input", "linear2.weight", "linear2.input"}
    reasons = {x.name: x.reason for x in coverage.leftovers}
    assert "subclass of Linear" in reasons["self_attn.out_proj.weight"]
    assert "no quantized form of MultiheadAttention" in reasons["self_attn.in_proj_weight"]
    assert reasons["norm1.weight"] == "LayerNorm: normalisation stays in float"


def test_no_fast_path_reads_weights_past_their_quantizers() -> None:
    """TransformerEncoderLayer has one in eval mode, which calibration's own hooks switch off."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 3, 8)
    prepare(model, Scheme(bits=2, granularity="channel"), A8, first_last_bits=None)
    calibrate(model, [x])
    with torch.no_grad():
        silent = model(x)
    torch.testing.assert_close(silent, model(x))


def test_tied_weights_are_one_site() -> None:
    model = three()
    model[4] = nn.Linear(8, 8)
    model[4].weight = model[2].weight
    coverage = prepare(model, W4, A8)
    assert model[2].weight_quantizer is model[4].weight_quantizer
    assert list(sites(model)) == ["0.weight", "0.input", "2.weight", "2.input", "4.input"]
    assert bits(model)["2.weight"] == 8, "one of its layers is the last one"
    assert coverage.parameters == sum(p.numel() for p in three()[:4].parameters()) + 8
    assert len(list(model.parameters())) == len(set(model.parameters()))


def test_a_pattern_for_the_second_name_of_a_tied_weight_is_not_lost() -> None:
    model = three()
    model[4] = nn.Linear(8, 8)
    model[4].weight = model[2].weight
    with pytest.raises(SiteError, match=r"overrides\.4\.weight: this pattern matches no site.*2\.weight"):
        prepare(model, W4, A8, overrides={"4.weight": {"bits": 2}})


def test_a_module_that_stands_in_two_places_is_one_layer() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(8, 8), shared, shared, nn.Linear(8, 2))
    prepare(model, W4, A8)
    assert set(bits(model)) == {f"{i}.{o}" for i in (0, 1, 3) for o in ("weight", "input")}


# ---- refusals


def test_a_glob_that_matches_nothing_names_the_nearest_sites() -> None:
    with pytest.raises(
        SiteError, match=r"overrides\.2\.wieght: .* no site\. .* 2\.weight.* or remove the pattern\.$"
    ):
        prepare(three(), W4, A8, overrides={"2.wieght": {"bits": 2}})


def test_a_model_without_quantizable_layers_is_refused() -> None:
    with pytest.raises(SiteError, match=r"Sequential: this model has no layer to quantize.*nn\.Linear"):
        prepare(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), W4, A8)


def test_preparing_twice_is_refused() -> None:
    model = three()
    prepare(model, W4, A8)
    with pytest.raises(SiteError, match="prepared already"):
        prepare(model, W4, A8)


def test_groups_may_be_ragged_where_the_target_holds_them() -> None:
    scheme = Scheme(bits=4, granularity="group", group_size=5)
    with pytest.raises(SchemeError) as error:
        prepare(three(), scheme, target="onnxruntime")
    assert str(error.value) == (
        "0.weight: 6 input values do not split into groups of 5. "
        "Choose group_size 2, 3 or 6, or granularity: channel."
    )
    model = three()
    prepare(model, scheme)
    assert sites(model)["2.weight"].range.shape == (1, 8 * 2)
    assert model(torch.randn(2, 6)).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (SchemeError, {"overrides": {"2.weight": {"bits": 12}}}),
        (SchemeError, {"overrides": {"2.weight": {"bit": 2}}}),
        (SchemeError, {"overrides": {"2.input": {"granularity": "group", "group_size": 4}}}),
        (TargetError, {"target": "onnxruntime", "overrides": {"4.input": {"range": "dynamic"}}}),
        (SiteError, {"overrides": {"x": {}}}),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(kind: type[BitsmithError], arguments: dict) -> None:
    model = three()
    with pytest.raises(kind):
        prepare(model, W4, A8, **arguments)
    assert [type(m) for m in model] == [type(m) for m in three()]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(model, three(), strict=True))
    prepare(model, W4, A8)


def test_a_matmul_has_no_channels() -> None:
    with pytest.raises(SchemeError, match=r"left\.granularity: a MatMul operand has no channels"):
        prepare(MatMul(), None, Scheme(granularity="channel"))


# ---- the report, and groups for an optimizer


def test_coverage_prints_a_line_per_site_and_one_per_reason_to_stay_in_float() -> None:
    coverage = prepare(three(), W4, A8)
    text = str(coverage)
    assert text.startswith("6 sites; 87.7% of 155 parameters quantized")
    assert len(text.splitlines()) == 1 + len(coverage.sites) + 1
    assert text.endswith("not multiplied (0.bias, 2.bias, 4.bias)")
    assert coverage.to_dict()["sites"][0]["name"] == "0.weight"
    assert coverage.quantized_share == (48 + 64 + 24) / 155


def test_parameter_groups_hold_every_trainable_parameter_once() -> None:
    model = build("digits_vit", width=8, depth=1, heads=2, hidden=8, seed=0)
    prepare(model, W4, Scheme(bits=8, range="lsq+"), overrides={"head.input": {"range": "static"}})
    sites(model)["blocks.0.mlp.up.weight"].set_bits(Sampled([2, 4]), model.blocks[0].mlp.up.weight)
    groups = {
        g["name"]: g for g in parameter_groups(model, learning_rate=0.1, weight_decay=0.01, range_factor=0.5)
    }
    names = {id(p): name for name, p in model.named_parameters()}
    held = {name: sorted(names[id(p)] for p in g["params"]) for name, g in groups.items()}
    everything = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(name for group in held.values() for name in group) == sorted(everything)
    assert "head.input_quantizer.range" not in everything
    assert all(name.endswith(("weight", "embedding")) for name in held["weights"])
    assert all(name.endswith(("range", "zero_shift")) for name in held["ranges"])
    assert "blocks.0.mlp.up.weight_quantizer.bits.logits" in held["others"]
    assert "blocks.0.norm1.weight" in held["others"]
    rates = {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()}
    assert rates == {"weights": (0.1, 0.01), "others": (0.1, 0.0), "ranges": (0.05, 0.0)}


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = three().requires_grad_(False)
    model[2].weight.requires_grad_(True)
    (group,) = parameter_groups(model, learning_rate=0.1)
    assert group["params"] == [model[2].weight]


def test_a_prepared_layer_computes_with_its_quantized_operands() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv1d(3, 3, 1))
    x = torch.randn(2, 2, 7)
    prepare(model, W4, A8)
    calibrate(model, [x])

    def product(layer: nn.Conv1d, x: Tensor) -> Tensor:
        return nn.functional.conv1d(
            layer.input_quantizer(x), layer.weight_quantizer(layer.weight), layer.bias, padding=layer.padding
        )

    assert torch.equal(model(x), product(model[2], product(model[0], x).relu()))
