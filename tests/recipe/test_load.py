"""A recipe is what its file and the overrides say, and nothing else."""

from pathlib import Path

import pytest
import yaml

from bitsmith.errors import BitsmithError, RecipeError
from bitsmith.recipe import Recipe, load_recipe, parse_recipe
from bitsmith.recipe.directory import dump
from bitsmith.recipe.load import DEFAULT, apply_override
from bitsmith.recipe.schema import Flatness

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_there_are_recipes_to_test() -> None:
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_resolved_recipe_is_a_recipe_for_the_same_job(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_the_embedded_recipe_is_the_one_in_the_folder() -> None:
    assert (ROOT / "recipes" / "digits.yaml").read_text() == DEFAULT.read_text()


def test_the_float_stage_takes_what_it_does_not_say_from_train() -> None:
    recipe = parse_recipe(
        {"train": {"epochs": 7, "batch_size": 32, "distillation": 0.5}, "float": {"epochs": 3}}
    )
    assert recipe.float_train is not None
    assert (recipe.float_train.epochs, recipe.float_train.batch_size) == (3, 32)
    assert recipe.float_train.distillation == 0  # it has no teacher


def test_pretrained_weights_take_the_place_of_the_float_stage() -> None:
    assert parse_recipe({"pretrained": "weights.safetensors"}).float_train is None
    assert parse_recipe({"pretrained": "weights.safetensors", "float": {"epochs": 1}}).float_train is not None


def test_weights_are_quantized_per_channel_unless_said_otherwise() -> None:
    assert parse_recipe({"quantize": {"weights": {"bits": 3}}}).quantize.weights.granularity == "channel"
    spec = parse_recipe({"quantize": {"weights": {"bits": 3, "granularity": "tensor"}}}).quantize
    assert spec.weights.granularity == "tensor"


def test_flatness_is_measured_where_it_is_asked_for() -> None:
    assert parse_recipe({}).flatness is None
    assert parse_recipe({"flatness": False}).flatness is None
    assert parse_recipe({"flatness": True}).flatness == Flatness(rows=512, points=11)
    assert parse_recipe({"flatness": {"rows": 64}}).flatness == Flatness(rows=64)
    assert load_recipe(None, ["flatness=true", "flatness.points=21"]).flatness == Flatness(points=21)
    with pytest.raises(BitsmithError, match=r"flatness.points: this value is out of range; got 4.*odd"):
        parse_recipe({"flatness": {"points": 4}})
    with pytest.raises(RecipeError, match=r"flatness.row: .*Did you mean rows\?"):
        parse_recipe({"flatness": {"row": 4}})
    with pytest.raises(RecipeError, match=r"flatness: this value does not fit; got 'yes'"):
        parse_recipe({"flatness": "yes"})


def test_a_target_without_a_runtime_has_no_onnx_file() -> None:
    assert parse_recipe({"target": "research"}).export == ["native"]
    assert parse_recipe({"target": "research", "export": []}).export == []
    with pytest.raises(
        RecipeError, match=r"mine\.yaml, export: target research has no runtime.*export: \[nat"
    ):
        parse_recipe({"target": "research", "export": ["onnx"]}, "mine.yaml")


def get(recipe: Recipe, *path: str | int) -> object:
    value: object = recipe.to_dict()
    for part in path:
        value = value[part]  # type: ignore[index]
    return value


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.epochs=3", ("train", "epochs"), 3),
        ("train.learning_rate=1e-4", ("train", "learning_rate"), 1e-4),
        ("train.learning_rate=1", ("train", "learning_rate"), 1.0),
        ("quantize.weights.bits=2", ("quantize", "weights", "bits"), 2),
        ("quantize.activations=null", ("quantize", "activations"), None),
        ("data=npz:/data/x.npz", ("data", "name"), "npz:/data/x.npz"),
        ("data.arguments.fold=2", ("data", "arguments"), {"fold": 2}),
        ("export=[onnx]", ("export",), ["onnx"]),
        ("export.0=onnx", ("export",), ["onnx", "onnx"]),
        ("float=null", ("float",), None),
        (
            'quantize.overrides."conv*.weight".bits=8',
            ("quantize", "overrides"),
            {"conv*.weight": {"bits": 8}},
        ),
        ("quantize.overrides.conv2.weight.bits=8", ("quantize", "overrides"), {"conv2.weight": {"bits": 8}}),
        ("quantize.overrides={fc.*: {bits: 8}}", ("quantize", "overrides"), {"fc.*": {"bits": 8}}),
    ],
)
def test_an_override_sets_one_value(
    override: str, path: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    (tmp_path / "plain.yaml").write_text("model: digits_cnn\ndata: digits\nexport: [native, onnx]\n")
    assert get(load_recipe(tmp_path / "plain.yaml", [override]), *path) == value


def test_list_entries_are_counted_from_zero() -> None:
    document = {"methods": [{"budget_search": {"budget": {"bops": 0.05}}}]}
    changed = apply_override(document, "methods.0.budget_search.budget.bops=0.03")
    assert changed == {"methods": [{"budget_search": {"budget": {"bops": 0.03}}}]}
    assert document["methods"][0]["budget_search"]["budget"]["bops"] == 0.05


def test_later_overrides_win() -> None:
    assert load_recipe(None, ["train.epochs=3", "train.epochs=4"]).train.epochs == 4


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {learning_rate: 1e-3, weight_decay: 5E-4}\n")
    train = load_recipe(tmp_path / "a.yaml").train
    assert (train.learning_rate, train.weight_decay) == (1e-3, 5e-4)
    assert yaml.safe_load("1e-3") == "1e-3"  # what would have happened


def test_an_unknown_method_lists_what_there_is() -> None:
    with pytest.raises(
        RecipeError, match=r"recipe, methods\.0: there is no such method; got gradient_search"
    ):
        parse_recipe({"methods": ["gradient_search"]})


def test_a_method_written_like_a_model_is_told_how_methods_are_written() -> None:
    with pytest.raises(RecipeError, match=r"expected a list of methods, each the name of one or \{NAME: "):
        parse_recipe({"methods": [{"name": "gradient_search"}]})


@pytest.mark.parametrize(
    "document",
    [
        {"quantize": {"weights": {"bits": 3.5}}},
        {"quantize": {"weights": None}},
        {"quantize": []},
        {"train": None},
        {"model": 3},
        {"model": {"arguments": {}}},
        {"methods": {"a": 1}},
        {"methods": [3]},
        {"methods": [{}]},
        {"export": "native"},
        {"quantize": {"first_last_bits": 40}},
        {"quantize": {"calibration_samples": 0}},
        {"quantize": {"overrides": {"fc.*": {"bit": 3}}}},
        {"quantize": {"overrides": {"fc.*": 3}}},
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_its_place(document: dict[str, object]) -> None:
    with pytest.raises(BitsmithError) as caught:
        parse_recipe(document, "mine.yaml")
    assert caught.value.where.startswith("mine.yaml, " + next(iter(document)))
    assert "\n" not in str(caught.value)
