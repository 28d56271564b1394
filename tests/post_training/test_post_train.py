"""A model rounded without training: on its grid, nearer to the float model, nothing left out in silence."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import BitsmithError, DataError, SchemeError, SiteError
from bitsmith.post_training.post_train import LayerFacts, grid_of, post_train
from bitsmith.post_training.rounding import ROUNDINGS
from bitsmith.post_training.streams import output_errors
from bitsmith.post_training.structure import structure_of
from tests.post_training import models


def rounded(model: nn.Module, batches: list[Tensor], quantized: Any = None, **options: Any) -> Any:
    quantized = models.prepared(model) if quantized is None else quantized
    post_train(quantized, model, batches, **options)
    return quantized


def handled(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if getattr(m, "weight_quantizer", None) is not None]


SCHEMES: dict[str, dict[str, Any]] = {
    "symmetric": {"grid": "symmetric"},
    "balanced": {"grid": "balanced", "bits": 2},
    "seq": {"grid": "seq", "bits": 2},
    "asymmetric": {"grid": "asymmetric"},
    "per tensor": {"granularity": "tensor"},
    "groups": {"granularity": "group", "group_size": 4},
    "ragged groups": {"granularity": "group", "group_size": 5, "grid": "asymmetric"},
    "widths per channel": {"bits": (2, 3, 4, 8)},
    "one bit": {"bits": 1},
    "static": {"range": "static"},
    "powers of two": {"grid": "powers_of_two"},
    "learned levels": {"grid": "levels"},
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_weights_lie_on_their_grid_and_are_stored_as_they_are(scheme: dict[str, Any], rounding: str) -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), models.tokens()
    quantized = copy.deepcopy(model)
    bits = scheme.get("bits", 3)
    overrides = {"2.weight": {"bits": bits}} if isinstance(bits, tuple) else None
    plain = {**scheme, "bits": 3 if isinstance(bits, tuple) else bits}
    bs.prepare(
        quantized,
        bs.Scheme(**{"granularity": "channel", **plain}),
        first_last_bits=None,
        overrides=overrides,
    )
    rounded(model, batches, quantized, rounding=rounding)
    packed = bs.finalize(quantized, batches[0])
    for layer in handled(quantized):
        assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)
        assert torch.equal(grid_of(layer.weight_quantizer, layer.weight).nearest(layer.weight), layer.weight)
    torch.testing.assert_close(packed(batches[0]), quantized(batches[0]))


@pytest.mark.parametrize("kind", ["residual", "vit", "resnet"])
def test_the_float_models_outputs_are_matched_better_than_by_any_rounding_alone(kind: str) -> None:
    """On samples that were not calibrated on."""
    make, data = getattr(models, kind), models.tokens if kind == "residual" else models.images
    model, batches, other = make(), data(8), data(2, seed=1)
    wrong = {}
    for name in (*ROUNDINGS, "ours"):
        options: dict[str, Any] = {} if name == "ours" else {"rounding": name, "matching": False}
        quantized = rounded(model, batches, models.prepared(model, bits=2), **options)
        with torch.no_grad():
            wrong[name] = sum(float((quantized(b) - model(b)).square().sum()) for b in other)
    assert wrong["ours"] < min(error for name, error in wrong.items() if name != "ours"), wrong


def test_activations_may_be_quantized_too() -> None:
    model, batches = models.residual(), models.tokens(8)
    wrong = {}
    for name, options in (("gptq", {"matching": False}), ("ours", {})):
        quantized = rounded(model, batches, models.prepared(model, batches), **options)  # type: ignore[arg-type]
        shape = structure_of(quantized, model, batches[0])
        wrong[name] = output_errors(quantized, model, models.tokens(2, seed=1), shape)["head"]
    assert wrong["ours"] < wrong["gptq"]


def test_a_layer_that_nothing_comes_before_is_left_to_its_rounding() -> None:
    model, batches = models.residual(), models.tokens()
    plain, matched = (rounded(model, batches, matching=matching) for matching in (False, True))
    assert torch.equal(plain.embed.weight, matched.embed.weight)
    assert not torch.equal(plain.blocks[0].down.weight, matched.blocks[0].down.weight)


def test_alpha_and_beta_of_zero_are_gptq() -> None:
    model, batches = models.residual(), models.tokens()
    plain = rounded(model, batches, matching=False)
    nothing = rounded(model, batches, alpha=0.0, beta=0.0, norm=False)
    for a, b in zip(handled(plain), handled(nothing), strict=True):
        assert torch.equal(a.weight, b.weight)


def test_a_correction_of_zero_is_gptq_and_any_other_is_not() -> None:
    model, batches = models.residual(), models.tokens()
    plain = rounded(model, batches, matching=False)
    for correction, same in ((0.0, True), (0.25, False)):
        partly = rounded(model, batches, rounding="gptaq", matching=False, correction=correction)
        pairs = zip(handled(plain), handled(partly), strict=True)
        assert all(torch.equal(a.weight, b.weight) for a, b in pairs) is same


def test_without_refit_ranges_stay_what_they_were() -> None:
    model, batches = models.residual(), models.tokens()
    quantized = models.prepared(model)
    before = [layer.weight_quantizer.levels().scale for layer in handled(quantized)]
    rounded(model, batches, quantized, refit=False)
    for scale, layer in zip(before, handled(quantized), strict=True):
        assert torch.equal(scale, layer.weight_quantizer.levels().scale)
        assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)


def test_the_facts_say_what_became_of_every_layer() -> None:
    model, batches = models.residual(), models.tokens()
    quantized = models.prepared(model)
    quantized.head.weight_quantizer = None
    told: list[tuple[str, int, int]] = []
    facts = post_train(
        quantized, model, batches, progress=lambda fact, done, count: told.append((fact.name, done, count))
    )
    names = [name for name, layer in quantized.named_modules() if isinstance(layer, nn.Linear)]
    assert sorted(fact.name for fact in facts) == sorted(names)
    assert told == [(fact.name, i + 1, 7) for i, fact in enumerate(facts[:-1])]
    assert facts[-1] == LayerFacts("head", left="its weight is left in float")
    by_name = {fact.name: fact for fact in facts}
    for fact in facts[:-1]:
        assert fact.rows == 160
        assert fact.error is not None
        assert fact.alpha is not None
        assert 0 < fact.error < 1
        assert fact.seconds > 0
    assert by_name["blocks.0.up"].beta is None
    assert by_name["blocks.0.down"].beta is not None
    assert sum(f.error for f in facts[:-1]) < sum(f.error_nearest for f in facts[:-1])  # type: ignore[misc]


def test_errors_are_those_of_the_outputs() -> None:
    model, batches = models.residual(), models.tokens()
    quantized = models.prepared(model)
    facts = {fact.name: fact for fact in post_train(quantized, model, batches, alpha=1.0, beta=1.0)}
    found = output_errors(quantized, model, batches, structure_of(quantized, model, batches[0]))
    with torch.no_grad():
        bias = sum(float((model.embed(b) - model.embed.bias).square().sum()) for b in batches)
        whole = sum(float(model.embed(b).square().sum()) for b in batches)
    assert facts["embed"].error == pytest.approx(found["embed"] * whole / bias, rel=1e-3)


def test_the_model_is_the_start_of_a_training() -> None:
    model, batches = models.residual(), models.tokens()
    quantized = rounded(model, batches)
    start = quantized(batches[0]).detach()
    optimizer = torch.optim.SGD(bs.parameter_groups(quantized, learning_rate=0.0))
    (quantized(batches[0]) - model(batches[0])).square().mean().backward()
    assert all(layer.weight.grad.any() for layer in handled(quantized))
    optimizer.step()
    assert torch.equal(quantized(batches[0]), start)


def test_modes_and_the_float_model_stay_as_they_were() -> None:
    model, batches = models.resnet(), models.images()
    before = copy.deepcopy(model.state_dict())
    quantized = models.prepared(model)
    quantized.train()
    statistics = quantized.bn1.running_mean.clone()
    post_train(quantized, model, batches)
    assert quantized.training
    assert quantized.bn1.training
    assert torch.equal(quantized.bn1.running_mean, statistics)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_with_fewer_rows_than_inputs_nothing_is_touched() -> None:
    model = models.resnet()
    quantized = models.prepared(model)
    before = copy.deepcopy(quantized.state_dict())
    with pytest.raises(
        DataError,
        match=r"layer2.0.conv2: fewer calibration rows than inputs; got 192 rows .*288 or more.*2 times",
    ):
        post_train(quantized, model, [batch[:4] for batch in models.images(3)], alpha=1.0, beta=1.0)
    assert all(torch.equal(value, before[name]) for name, value in quantized.state_dict().items())


WRONG: dict[str, tuple[dict[str, Any], type[BitsmithError], str]] = {
    "rounding": ({"rounding": "gtpq"}, SchemeError, "Did you mean gptq"),
    "alpha": ({"alpha": 1.5}, SchemeError, "alpha: .*1.5.*0 to 1"),
    "beta": ({"beta": -0.1}, SchemeError, "beta: .*0 to 1"),
    "correction": ({"correction": 2.0}, SchemeError, "correction: .*0 to 1"),
    "damping": ({"damping": -1.0}, SchemeError, "damping: .*0 or more"),
}


@pytest.mark.parametrize(("options", "kind", "message"), WRONG.values(), ids=WRONG)
def test_options_out_of_range_are_refused(
    options: dict[str, Any], kind: type[BitsmithError], message: str
) -> None:
    model = models.residual()
    with pytest.raises(kind, match=message):
        post_train(models.prepared(model), model, models.tokens(), **options)


def test_too_few_batches_are_refused_where_some_are_held_out() -> None:
    model, batches = models.residual(), models.tokens(3)
    with pytest.raises(DataError, match=r"got 3, expected 4 or more.*pass alpha and beta"):
        post_train(models.prepared(model), model, batches)
    post_train(models.prepared(model), model, batches, alpha=1.0, beta=0.5)
    with pytest.raises(DataError, match="no batch"):
        post_train(models.prepared(model), model, [])


@pytest.mark.parametrize("moving", ["dorefa", "dynamic"])
def test_a_grid_that_moves_with_the_weight_is_refused(moving: Any) -> None:
    model = models.residual()
    with pytest.raises(SchemeError, match=f"embed.weight.range: .*moves with the weight.*got {moving}"):
        post_train(models.prepared(model, range=moving), model, models.tokens())


def test_a_model_that_is_not_prepared_or_not_calibrated_is_refused() -> None:
    model, batches = models.residual(), models.tokens()
    with pytest.raises(SiteError, match=r"no weight to round.*bs.prepare"):
        post_train(copy.deepcopy(model), model, batches)
    quantized = copy.deepcopy(model)
    bs.prepare(quantized, bs.Scheme(bits=3, granularity="channel"), bs.Scheme(bits=4))
    with pytest.raises(SiteError, match="never calibrated"):
        post_train(quantized, model, batches)
