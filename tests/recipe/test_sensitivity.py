"""Scores, measured losses and prices of a tiny job, each against a second way of finding it."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from bitsmith.errors import BudgetError, Interrupted, RecipeError, SchemeError
from bitsmith.files import read_json
from bitsmith.quantization import Plan, Scheme, measure, prepare
from bitsmith.recipe import Recipe, load_recipe, run
from bitsmith.recipe.directory import load_stage
from bitsmith.recipe.job import read_inputs
from bitsmith.recipe.limits import budget_of, parse_limits, with_budget
from bitsmith.recipe.progress import Event
from bitsmith.recipe.sensitivity import _validation, analyse
from bitsmith.tasks import evaluate

SEARCH = "methods=[{budget_search: {budget: {bops: 0.02}, candidates: [2, 4, 8]}}]"
QUICK = ["quantize.overrides={}", SEARCH, "float.epochs=2", "train.epochs=1", "train.batch_size=320"]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(None, [*QUICK, "export=[native]"])


@pytest.fixture(scope="module")
def out(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sensitivity") / "out"
    analyse(recipe, directory, top=6)
    return directory


@pytest.fixture(scope="module")
def found(out: Path) -> dict[str, Any]:
    return read_json(out / "sensitivity.json", "sensitivity file")


def test_every_site_has_a_score_at_every_width(found: dict[str, Any]) -> None:
    names = {site["name"] for site in found["sites"]}
    assert names >= {"conv1.weight", "conv1.input", "fc.weight", "fc.input"}
    for site in found["sites"]:
        assert site["candidates"] == [2, 4, 8]
        assert len(site["scores"]) == 3
        assert site["scores"][0] > site["scores"][-1] >= 0


def test_a_measured_loss_is_that_of_a_model_with_this_one_site(
    recipe: Recipe, out: Path, found: dict[str, Any]
) -> None:
    data, _ = read_inputs(recipe)
    weights = [entry for entry in found["measured"] if entry["site"].endswith(".weight")]
    assert weights
    for entry in weights:
        _, model = read_inputs(recipe)
        model.load_state_dict(load_stage(out, "float")[0])  # type: ignore[index]
        overrides = {"*": {"bits": 32}, entry["site"]: {"bits": entry["bits"]}}
        prepare(model, Scheme(bits=4, granularity="channel"), None, overrides=overrides, target=recipe.target)
        after = evaluate(model, *_validation(data))
        assert entry["loss"] == pytest.approx(after["loss"], rel=1e-5)
        assert entry["increase"] == pytest.approx(after["loss"] - found["float"]["loss"], abs=1e-5)


def test_the_measured_pairs_have_the_highest_scores(found: dict[str, Any]) -> None:
    scores = sorted((score for site in found["sites"] for score in site["scores"]), reverse=True)
    assert [entry["score"] for entry in found["measured"]] == scores[:6]


def test_the_plan_is_within_the_budget_and_leaves_fixed_sites_alone(out: Path, found: dict[str, Any]) -> None:
    (budget,) = found["budget"]
    assert budget["used"] <= budget["limit"]
    fixed = {site["name"]: site["bits"] for site in found["sites"] if not site["free"]}
    assert fixed == dict.fromkeys(("conv1.weight", "conv1.input", "fc.weight", "fc.input"), 8)
    saved = Plan.load(out / "plan_by_sensitivity.json")
    assert saved.bits == {site["name"]: site["bits"] for site in found["sites"]}


def test_a_price_is_what_the_raised_plan_costs_more(recipe: Recipe, found: dict[str, Any]) -> None:
    data, model = read_inputs(recipe)
    prepare(model, recipe.quantize.weights, recipe.quantize.activations, target=recipe.target)
    cost = measure(model, data.example())
    bits = {site["name"]: site["bits"] for site in found["sites"]}
    priced = [site for site in found["sites"] if site["next"]]
    assert priced
    for site in priced:
        (price,) = site["next"]["price"]
        extra = cost.bops({**bits, site["name"]: site["next"]["bits"]}) - cost.bops(bits)
        assert price["cost"] == extra
        assert price["share"] == pytest.approx(extra / found["budget"][0]["limit"])


def test_the_float_model_is_that_of_a_run(recipe: Recipe, tmp_path: Path) -> None:
    run(recipe, tmp_path / "run")
    stage = tmp_path / "run" / "checkpoints" / "float.safetensors"
    before = stage.stat().st_mtime_ns
    found = analyse(recipe, tmp_path / "run", top=0)
    assert stage.stat().st_mtime_ns == before
    assert found["measured"] == []
    assert (tmp_path / "run" / "sensitivity.html").exists()


def test_without_a_budget_prices_are_of_the_recipes_own_widths(out: Path, tmp_path: Path) -> None:
    plain = load_recipe(
        None, [*QUICK, "methods=[]", "quantize.weights.bits=3", "quantize.activations.bits=4"]
    )
    found = analyse(plain, shutil.copytree(out, tmp_path / "out"), top=1)
    assert found["plan_from"] == "recipe"
    bits = {site["name"]: site["bits"] for site in found["sites"]}
    assert bits["conv2.weight"] == 3
    assert bits["conv2.input"] == 4
    assert bits["conv1.weight"] == 8


def test_a_float_model_of_another_recipe_is_refused(out: Path) -> None:
    with pytest.raises(RecipeError, match=r"another float.epochs; got 3, expected 2"):
        analyse(load_recipe(None, [*QUICK, "float.epochs=3"]), out)


def test_an_impossible_budget_is_found_before_training(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="the cheapest plan costs"):
        analyse(recipe, tmp_path / "out", limits={"bops": 0.0001})
    assert not (tmp_path / "out" / "checkpoints").exists()
    corrected = load_recipe(None, [*QUICK, "float.epochs=1"])  # the directory is as good as new
    assert analyse(corrected, tmp_path / "out", top=0)["budget"]
    with pytest.raises(SchemeError, match="stores none of these widths"):
        analyse(load_recipe(None, [*QUICK, "methods.0.budget_search.candidates=[9]"]), tmp_path / "o")


def test_an_interrupted_float_training_goes_on(recipe: Recipe, out: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.stage == "float" and event.done >= 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="Give the same command again"):
        analyse(recipe, tmp_path / "out", progress=interrupt)
    analyse(recipe, tmp_path / "out", top=6)
    assert (tmp_path / "out" / "sensitivity.json").read_text() == (out / "sensitivity.json").read_text()


def test_the_callers_random_numbers_are_left_alone(recipe: Recipe, out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "out")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    analyse(recipe, copy, top=0)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("items", "fragment"),
    [
        (["bops"], "Write --budget bops=0.02"),
        (["bop=0.1"], "Did you mean bops?"),
        (["bops=much"], "got much, expected a number above 0"),
        (["bops=0.1", "bops=0.2"], "given twice"),
    ],
)
def test_a_wrong_limit_is_named(items: list[str], fragment: str) -> None:
    with pytest.raises(BudgetError, match=fragment.replace("?", r"\?")):
        parse_limits(items)


def test_limits_become_what_a_recipe_says() -> None:
    limits = parse_limits(["bops=0.02", "table:energy_45nm=0.1"])
    assert budget_of(limits) == {"bops": 0.02, "tables": [{"table": "energy_45nm", "limit": 0.1}]}
    with pytest.raises(BudgetError, match="a number above 0"):
        budget_of({"bops": -1.0})


def test_a_budget_replaces_the_whole_budget_of_the_search(recipe: Recipe) -> None:
    (entry,) = with_budget(recipe, {"weight_bytes": 4000.0}).methods
    assert entry["budget_search"]["budget"] == {"weight_bytes": 4000.0}
    assert entry["budget_search"]["candidates"] == [2, 4, 8]
    with pytest.raises(RecipeError, match="searches nothing"):
        with_budget(load_recipe(None, ["methods=[]"]), {"bops": 0.1})
