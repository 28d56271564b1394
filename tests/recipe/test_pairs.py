"""Recipes for a target that multiplies some pairs of widths alone: searched within them, refused outside."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitsmith.errors import TargetError
from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.quantization import calibrate, commit, prepare
from bitsmith.recipe import load_recipe, run
from bitsmith.recipe.sensitivity import analyse
from bitsmith.tasks.models import build
from tests.quantization.test_pairs import A4, W4, pairs
from tests.quantization.test_target_json import NPU, write


def test_a_search_starts_from_any_widths_and_ends_at_listed_pairs(tmp_path: Path) -> None:
    target = write(tmp_path, NPU | {"pairs": [[4, 8], [8, 4], [8, 8]]})
    model, images = build("digits_cnn"), torch.rand(8, 1, 8, 8)
    prepare(model, W4, A4, target=target, check_pairs=False)
    search = BudgetSearch({"average_weight_bits": 7, "bops": 0.05}, images, candidates=(4, 8))
    search.attach(model)
    calibrate(model, [images])
    for step in range(10):
        model(images).square().mean().backward()
        if search.is_searching():
            search.penalty().backward()
        search.after_step(step, 10)
    assert not search.is_searching()
    assert pairs(model) <= {(4, 8), (8, 4), (8, 8)}
    commit(model, search.plan())


def fixed(**changes: Any) -> list[str]:
    settings = {
        "train.epochs": 1,
        "float.epochs": 1,
        "train.batch_size": 640,
        "export": "[native]",
        **changes,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def test_recipes_are_refused_by_pair_and_by_plan_but_searched_within_the_pairs(tmp_path: Path) -> None:
    target = write(tmp_path, NPU)
    with pytest.raises(TargetError, match=r"^conv2\.weight x conv2\.input: .*4 x 4 bits"):
        run(load_recipe(None, fixed(target=target, methods="[]")), tmp_path / "fixed")
    out = tmp_path / "searched"
    run(load_recipe(None, [*fixed(target=target), "methods.0.budget_search.budget={bops: 0.05}"]), out)
    plan = json.loads((out / "plan.json").read_text())
    widths = {name: site["bits"] for name, site in plan["sites"].items()}
    assert {
        (b, widths[name.replace("weight", "input")]) for name, b in widths.items() if "weight" in name
    } <= {(4, 8), (8, 8)}
    plan["sites"]["conv2.input"]["bits"] = 4
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    wrong = fixed(target=target, methods="[]", plan=tmp_path / "plan.json")
    with pytest.raises(TargetError, match=r"plan\.json: conv2\.weight x conv2\.input: "):
        run(load_recipe(None, wrong), tmp_path / "planned")


def test_sensitivity_plans_within_the_pairs_whatever_the_recipe_starts_from(tmp_path: Path) -> None:
    target = write(tmp_path, NPU)
    recipe = load_recipe(None, fixed(target=target, methods="[]"))
    found = analyse(recipe, tmp_path / "out", limits={"bops": 0.05}, top=0)
    widths = {site["name"]: site["bits"] for site in found["sites"]}
    assert {widths["conv2.input"], widths["conv3.input"]} == {8}
    with pytest.raises(TargetError, match="4 x 4 bits"):
        analyse(recipe, tmp_path / "own")
