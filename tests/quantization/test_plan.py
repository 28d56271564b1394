"""Plans: written, read, refused when damaged, and committed to a model."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import FormatError, SchemeError, SiteError
from bitsmith.quantization import Plan, Scheme, calibrate, commit, measure, plan_of, prepare, set_bits, sites
from bitsmith.tasks.models import build
from tests.quantization.widths import Sampled

W4, A8 = Scheme(bits=4, granularity="channel"), Scheme(bits=8)
IMAGES = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
VIT = {"width": 8, "depth": 1, "heads": 2, "hidden": 16}
MODELS = pytest.mark.parametrize(("name", "arguments"), [("digits_cnn", {}), ("digits_vit", VIT)])


def prepared(name: str = "digits_cnn", seed: int = 0, **arguments) -> nn.Module:
    model = build(name, seed=seed, **arguments)
    prepare(model, W4, A8)
    return model


def calibrated(name: str = "digits_cnn", seed: int = 0, **arguments) -> nn.Module:
    model = prepared(name, seed, **arguments)
    calibrate(model, [IMAGES])
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


# ---- the file


@MODELS
def test_a_plan_comes_back_from_its_file_as_it_was(tmp_path: Path, name: str, arguments: dict) -> None:
    model = calibrated(name, **arguments)
    plan = plan_of(model, measure(model, IMAGES).report())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.bits == {site: int(q.bits.expected()) for site, q in sites(model).items()}
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 1


def test_a_plan_describes_its_sites_in_words() -> None:
    model = calibrated()
    planned = plan_of(model).sites
    first, hidden = planned["conv1.input"], planned["conv2.input"]
    assert (first.kind, first.granularity, hidden.grid) == ("activation", "tensor", "unsigned")
    assert (hidden.symmetric, hidden.signed) == (False, False)
    weight = planned["conv2.weight"]
    assert (weight.kind, weight.bits, weight.grid, weight.signed) == ("weight", 4, "symmetric", True)


@MODELS
def test_a_plan_applied_to_a_fresh_model_gives_equal_logits_with_its_state(
    tmp_path: Path, name: str, arguments: dict
) -> None:
    """The widths come from the file, also those that prepare would not choose; the numbers from the state."""
    model = calibrated(name, **arguments)
    changed = dict(zip(sites(model), [4, 5, 3, 8, 7] * 9, strict=False))
    commit(model, changed)
    plan_of(model).save(tmp_path / "plan.json")

    fresh = prepared(name, seed=1, **arguments)
    commit(fresh, Plan.load(tmp_path / "plan.json"))
    assert plan_of(fresh).bits == changed
    assert fresh.load_state_dict(model.state_dict())
    assert plan_of(fresh) == plan_of(model)
    assert torch.equal(logits(fresh), logits(model))
    assert len(logits(model).unique()) > 100


GOOD = {"version": 1, "sites": {"fc.weight": {"kind": "weight", "bits": 4}}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "got version 2, expected version 1 with a table of sites"),
        ({"version": None}, "not a plan that we can read"),
        ({"sites": []}, "not a plan that we can read"),
        (
            {"sites": {"fc.weight": {"kind": "weight", "bits": 9}}},
            r"plan\.json: sites\.fc\.weight: .*bits 1 to 8",
        ),
        ({"sites": {"fc.weight": {"kind": "weight", "bits": "4"}}}, "is not valid"),
        ({"sites": {"fc.weight": {"kind": "output", "bits": 4}}}, "kind weight or activation"),
        ({"sites": {"fc.weight": 4}}, "is not valid"),
        ({"sites": {"fc.weight": {"kind": "weight", "granularity": "channel", "bits": []}}}, "is not valid"),
        (
            {"sites": {"fc.weight": {"kind": "weight", "granularity": "channel", "bits": [2, 9]}}},
            "is not valid",
        ),
        (
            {"sites": {"fc.input": {"kind": "activation", "granularity": "channel", "bits": [2, 4]}}},
            r"sites\.fc\.input\.bits: .*got activation",
        ),
        (
            {"sites": {"fc.weight": {"kind": "weight", "granularity": "group", "bits": [2, 4]}}},
            r"sites\.fc\.weight\.bits: .*granularity group, expected kind weight, granularity channel",
        ),
        (
            {"sites": {"fc.weight": {"kind": "weight", "bits": 4, "gird": "seq"}}},
            r"sites\.fc\.weight\.gird: .*Did you mean grid\?",
        ),
    ],
)
def test_a_damaged_plan_is_one_line(tmp_path: Path, change: dict, words: str) -> None:
    assert Plan.from_dict(GOOD).bits == {"fc.weight": 4}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(FormatError, match=words):
        Plan.load(path)


def test_a_method_decides_a_plan_among_candidates_without_committing_it() -> None:
    model = prepared()
    set_bits(model, {name: Sampled([2, 4, 8]) for name in sites(model)})
    calibrate(model, [IMAGES])
    before = plan_of(model)
    decided = plan_of(model, bits={"conv2.weight": 2, "fc.input": 4})
    assert plan_of(model) == before
    assert decided.bits == before.bits | {"conv2.weight": 2, "fc.input": 4}
    assert (before.sites["conv2.weight"].grid, decided.sites["conv2.weight"].grid) == ("symmetric", "seq")
    commit(model, decided)
    assert plan_of(model) == decided
    with pytest.raises(SiteError, match=r"conv3\.weight: .* got 3, expected 2, 4 or 8"):
        plan_of(model, bits={"conv3.weight": 3})
    with pytest.raises(SiteError, match=r"conv9\.weight: there is no such site"):
        plan_of(model, bits={"conv9.weight": 4})


# ---- commit


def test_committing_the_own_plan_changes_nothing() -> None:
    model = calibrated()
    before = logits(model)
    report = commit(model, plan_of(model))
    assert not report.post_training
    assert set(report.trained) == set(sites(model))
    assert str(report) == "10 sites committed to a trained width"
    assert torch.equal(logits(model), before)


def test_other_widths_are_reported_as_post_training_quantization() -> None:
    model = calibrated()
    report = commit(model, plan_of(model).bits | {"conv2.weight": 2, "fc.input": 5})
    assert report.post_training == ("conv2.weight", "fc.input")
    assert str(report).endswith("not trained (post-training quantization): conv2.weight, fc.input")
    assert plan_of(model).bits["conv2.weight"] == 2
    fresh = build("digits_cnn", seed=0)
    prepare(fresh, W4, A8, overrides={"conv2.weight": {"bits": 2}})
    assert torch.equal(
        fresh.conv2.weight_quantizer(fresh.conv2.weight), model.conv2.weight_quantizer(model.conv2.weight)
    )


def test_commit_drops_nothing() -> None:
    model = prepared()
    set_bits(model, {name: Sampled([2, 4, 8]) for name in sites(model)})
    calibrate(model, [IMAGES])
    optimizer = torch.optim.AdamW(model.parameters())
    model(IMAGES).sum().backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    report = commit(model, dict.fromkeys(sites(model), 4))
    assert not report.post_training
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].shape == before[name].shape for name in after)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    optimizer.zero_grad()
    model(IMAGES).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("take", [commit, set_bits])
def test_unknown_sites_are_refused_with_the_nearest(take) -> None:
    model = calibrated()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SiteError, match=r"^conv2\.wieght: .*The nearest are conv2\.weight"):
        take(model, {name: Sampled([2]) for name in sites(model)} | {"conv2.wieght": Sampled([2])})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plan_must_speak_of_every_site() -> None:
    model = calibrated()
    bits = plan_of(model).bits
    del bits["conv3.input"]
    with pytest.raises(SiteError, match=r"^conv3\.input: the plan says nothing of this site"):
        commit(model, bits)


@pytest.mark.parametrize("width", [0, 9, 16])
def test_impossible_widths_are_refused_and_change_nothing(width: int) -> None:
    model = calibrated()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SchemeError, match=r"^conv3\.input\.bits: "):
        commit(model, dict.fromkeys(sites(model), 2) | {"conv3.input": width})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tied_weight_takes_its_rows_from_its_one_tensor() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    prepare(model, W4, None)
    set_bits(model, {"0.weight": Sampled([2, 4])})
    assert model[0].weight_quantizer is model[2].weight_quantizer
    assert model(torch.randn(2, 4)).isfinite().all()


# ---- widths per channel

EACH = {"conv2.weight": (1, 2, 3, 4, 5, 6, 7, 8, 8, 2, 2, 4), "fc.weight": (2, 3) * 5}


def test_a_plan_with_widths_per_channel_is_prepared_committed_and_read_again(tmp_path: Path) -> None:
    """Prepared with a list, or committed to one: the same model, whose plan comes back from its file."""
    model = build("digits_cnn", seed=0)
    coverage = prepare(model, W4, A8, overrides={name: {"bits": list(bits)} for name, bits in EACH.items()})
    calibrate(model, [IMAGES])
    plan = plan_of(model)
    assert {name: plan.bits[name] for name in EACH} == EACH
    assert plan.sites["conv2.weight"].grid == "auto"
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["sites"]["fc.weight"]["bits"] == [2, 3] * 5
    assert Plan.load(tmp_path / "plan.json") == plan

    other = calibrated()
    report = commit(other, Plan.load(tmp_path / "plan.json"))
    assert set(report.post_training) == set(EACH)
    assert plan_of(other) == plan
    assert {n: t.shape for n, t in other.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    assert torch.equal(logits(other), logits(model))
    assert commit(model, plan).post_training == ()
    assert "1-8, 4.3 on average bits" in str(coverage)


def test_a_list_of_one_width_is_that_width() -> None:
    model = calibrated()
    commit(model, plan_of(model).bits | {"fc.weight": [4] * 10})
    assert plan_of(model).bits["fc.weight"] == 4
    with pytest.raises(SchemeError, match=r"fc\.weight\.bits: .*9 widths, expected 10"):
        commit(model, plan_of(model).bits | {"fc.weight": [4] * 9})


def test_candidates_per_channel_make_a_plan_that_is_not_committed() -> None:
    model = calibrated()
    planned = plan_of(model, bits={"conv2.weight": 4})
    assert planned.bits["conv2.weight"] == 4
    commit(model, planned.bits | EACH)
    assert plan_of(model, bits=EACH) == plan_of(model)
    with pytest.raises(SiteError, match=r"fc\.weight: this width is not a candidate"):
        plan_of(model, bits={"fc.weight": (2, 4) * 5})
