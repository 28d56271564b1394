"""Paths in a recipe are meant from its folder, those on the command line from where one stands."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitsmith.errors import RecipeError
from bitsmith.files import save_tensors
from bitsmith.recipe import load_recipe, run
from bitsmith.recipe.directory import dump, open_run
from bitsmith.recipe.paths import located
from bitsmith.recipe.reopen import export_run
from bitsmith.tasks.models import build
from tests.cli.conftest import write_images
from tests.quantization.test_target_json import NPU

TABLES = [
    {"table": "board.json", "limit": 1e6},
    {"table": "energy_45nm", "limit": 0.9},
    {"table": "latency", "limit": 1},
]
RECIPE: dict[str, Any] = {
    "data": {"name": "npz:images.npz", "arguments": {"classes": 10, "validation": 0}},
    "pretrained": "weights.safetensors",
    "target": "npu.json",
    "methods": [{"budget_search": {"budget": {"tables": TABLES}, "candidates": [4, 8]}}],
    "train": {"epochs": 1},
    "export": ["native"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe and all the files that it names, side by side."""
    folder = tmp_path / "mine"
    folder.mkdir()
    write_images(folder / "images.npz")
    save_tensors(folder / "weights.safetensors", build("digits_cnn", seed=0).state_dict())
    (folder / "npu.json").write_text(json.dumps(NPU))
    table = {**NPU["latency"], "name": "board"}
    (folder / "board.json").write_text(json.dumps(table))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def test_a_recipe_and_its_files_run_from_anywhere_and_move_together(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.move(folder, tmp_path / "moved")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    out = elsewhere / "run"
    metrics = run(load_recipe("../moved/recipe.yaml"), out)
    assert {entry["kind"] for entry in metrics["budget"]} == {
        "table:board",
        "table:energy_45nm",
        "table:npu_latency",
    }
    assert metrics["data"] == "images"

    again = tmp_path / "again"
    again.mkdir()
    monkeypatch.chdir(again)  # the run directory is read from another place than it was written from
    assert load_recipe(out / "recipe.yaml") == load_recipe(Path(moved) / "recipe.yaml")
    with open_run(out, load_recipe("../moved/recipe.yaml"), resume=True):
        pass
    certificate, _ = export_run(out, ["native"])
    assert certificate["exports"]["native"]["passed"]


def test_a_plan_lies_beside_the_recipe_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("plan: plans/best.json\n")
    assert load_recipe(tmp_path / "recipe.yaml").plan == str(tmp_path / "plans" / "best.json")
    assert load_recipe(tmp_path / "recipe.yaml", ["plan=/there/best.json"]).plan == "/there/best.json"


def test_what_is_set_is_meant_from_the_current_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = [
        "target=here.json",
        "data.name=npz:here.npz",
        "methods.0.budget_search.budget.tables.0.table=here.json",
    ]
    recipe = load_recipe("mine/recipe.yaml", sets)
    assert (recipe.target, recipe.data.name) == ("here.json", "npz:here.npz")
    assert recipe.pretrained == "mine/weights.safetensors"
    saved = yaml.safe_load(dump(recipe))
    assert saved["target"] == str(tmp_path / "here.json")
    assert saved["methods"][0]["budget_search"]["budget"]["tables"][0]["table"] == str(tmp_path / "here.json")


def test_names_and_code_are_no_paths(tmp_path: Path) -> None:
    names = {"model": {"name": "mine:make"}, "data": {"name": "mine:load"}, "target": "onnxruntime"}
    assert located(names, tmp_path) == names
    assert located({"data": {"name": "digits"}, "plan": None}, tmp_path) == {
        "data": {"name": "digits"},
        "plan": None,
    }


def test_malformed_values_are_left_to_the_check(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("methods: [budget_search: {budget: {tables: 3}}, 4]\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml, methods"):
        load_recipe(tmp_path / "recipe.yaml")
