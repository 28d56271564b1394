"""The whole job, in two steps of training: its figures, and what an interruption changes (nothing)."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitsmith.errors import DataError, Interrupted
from bitsmith.files import read_json, save_tensors
from bitsmith.recipe import Recipe, load_recipe, run
from bitsmith.recipe.progress import STAGES, Event
from bitsmith.recipe.reopen import evaluate_run, export_run
from bitsmith.recipe.schema import Shifts
from bitsmith.tasks.models import build

ROOT = Path(__file__).resolve().parents[2]
CHEAP = ("quantize.weights.calibration=minmax", "quantize.activations.calibration=minmax")
QUICK = ("train.epochs=2", "train.batch_size=640", "float.epochs=2", "export=[native]", *CHEAP)


def figures(out: Path) -> dict[str, Any]:
    """metrics.json without what may differ between two runs of one job."""
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if key not in ("time", "environment")}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(None, QUICK)


@pytest.fixture(scope="module")
def uninterrupted(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(recipe, out)
    return out


def test_every_stage_is_told_and_finishes(recipe: Recipe, tmp_path: Path) -> None:
    events: list[Event] = []
    run(recipe, tmp_path / "run", progress=events.append)
    assert list(dict.fromkeys(event.stage for event in events)) == list(STAGES)
    last = {event.stage: event for event in events}
    assert all(event.finished for event in last.values())
    assert last["qat"].values["validation accuracy"] > 0


def test_the_same_seed_gives_the_same_figures(recipe: Recipe, uninterrupted: Path, tmp_path: Path) -> None:
    run(recipe, tmp_path / "again")
    assert figures(tmp_path / "again") == figures(uninterrupted)


LATER = [pytest.param(*where, marks=pytest.mark.slow) for where in (("float", 4), ("qat", 2), ("uniform", 2))]


@pytest.mark.parametrize(("stage", "step"), [("float", 2), ("qat", 4), *LATER])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    stage: str, step: int, recipe: Recipe, uninterrupted: Path, tmp_path: Path
) -> None:
    def interrupt(event: Event) -> None:
        if event.stage == stage and event.done >= step and event.total > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    every_step = load_recipe(None, QUICK)
    with pytest.raises(Interrupted, match="SIGTERM"):
        run(every_step, tmp_path / "run", progress=interrupt)
    assert not (tmp_path / "run" / "metrics.json").exists()
    run(recipe, tmp_path / "run", resume=True)
    assert figures(tmp_path / "run") == figures(uninterrupted)
    assert (tmp_path / "run" / "plan.json").read_text() == (uninterrupted / "plan.json").read_text()


def test_a_finished_stage_is_not_trained_again(recipe: Recipe, uninterrupted: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(event: Event) -> None:
        if event.stage == "export":
            raise Killed

    with pytest.raises(Killed):
        run(recipe, tmp_path / "run", progress=kill)
    trained = []
    run(recipe, tmp_path / "run", resume=True, progress=lambda event: trained.append(event.total > 1))
    assert not any(trained)
    assert figures(tmp_path / "run") == figures(uninterrupted)


def test_a_run_that_ends_leaves_no_half_finished_checkpoint(uninterrupted: Path) -> None:
    assert {path.name for path in (uninterrupted / "checkpoints").iterdir()} == {
        "float.safetensors",
        "qat.safetensors",
        "uniform.safetensors",
        "winner.safetensors",
    }


def test_plan_bytes_are_the_payload_of_the_native_file(uninterrupted: Path) -> None:
    """Target native stores codes at their true width; so the plan's bytes are the tensors' bytes."""
    out = uninterrupted.parent / "native"
    run(load_recipe(None, [*QUICK, "target=native"]), out)
    content = (out / "model" / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert figures(out)["cost"]["weight_bytes"] == len(content) - header


def data_for(name: str, tmp_path: Path) -> list[str]:
    """What the recipes that need files are given instead: the overrides."""
    if name in ("language", "output_matching"):
        (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 60)
        arguments = "{width: 16, depth: 1, heads: 2, context: 16}"
        return [
            f"model.arguments={arguments}",
            f"data={{name: 'text:{tmp_path}/text.txt', arguments: {{context: 16}}}}",
            "quantize.calibration_samples=8",
            *(["post_training.samples=8"] if name == "output_matching" else []),
        ]
    if name == "arithmetic":
        return [
            "model.arguments={width: 16, depth: 1, heads: 2, context: 32}",
            "data.arguments={largest: 9}",
            "quantize.calibration_samples=8",
        ]
    if name == "segmentation":
        return [
            "model.arguments={width: 4, depth: 1}",
            "data.arguments={train: 24, validation: 8, test: 10, augment: shift}",
            "quantize.calibration_samples=16",
        ]
    few = ["train.batch_size=640", "quantize.calibration_samples=64"]
    if name in ("digits_vit", "progressive", "output_approximation"):
        return ["model.arguments={width: 16, depth: 2, heads: 2, hidden: 48}", *few, *CHEAP]
    if name != "cifar10_resnet20":
        return few
    random = np.random.default_rng(0)
    arrays = {
        f"{split}_{part}": random.integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
        if part == "x"
        else np.arange(32) % 10
        for split in ("train", "val", "test")
        for part in "xy"
    }
    np.savez(tmp_path / "cifar.npz", **arrays)
    save_tensors(tmp_path / "weights.safetensors", build("resnet20", seed=0).state_dict())
    return [
        "train.batch_size=16",
        f"data.name=npz:{tmp_path}/cifar.npz",
        f"pretrained={tmp_path}/weights.safetensors",
    ]


LONGER = ("cifar10_resnet20", "fractional_output", "search_anchor")  # search_sharpness is composed, too
RECIPES = [
    pytest.param(path.stem, marks=[pytest.mark.slow] if path.stem in LONGER else [])
    for path in sorted((ROOT / "recipes").glob("*.yaml"))
]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_to_its_end(name: str, tmp_path: Path) -> None:
    written = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    overrides = [f"train.epochs={min(1, written.train.epochs)}", *data_for(name, tmp_path)]
    if name not in ("cifar10_resnet20", "digits", "output_matching"):
        overrides.append("export=[native]")  # seconds each, and what is exported differs in no kind
    if written.float_train is not None:
        overrides.append("float.epochs=1")
    if written.flatness is not None or name == "tabular":
        overrides.append("flatness={rows: 16, points: 3}")
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides)
    metrics = run(recipe, tmp_path / "run")
    assert set(metrics["flatness"]) == (set() if recipe.flatness is None else {"float", "quantized"})
    assert (tmp_path / "run" / "flatness.json").exists() == (recipe.flatness is not None)
    assert set(metrics["exported"]) == {"native", "onnx"} if "onnx" in recipe.export else {"native"}
    assert all(entry["agreement"] >= 0.995 for entry in metrics["exported"].values())
    assert metrics["cost"]["weight_bytes"] < metrics["cost"]["weight_bytes_float"] / 3
    if name == "fractional_output":  # widths that the recipe does not say
        export_run(tmp_path / "run", ["native"])


def test_the_callers_random_numbers_and_threads_are_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    run(recipe, tmp_path / "run")
    assert torch.equal(torch.rand(4), expected)
    assert torch.get_num_threads() == threads


def test_a_recipe_names_its_suite_and_the_run_keeps_what_was_measured(recipe: Recipe, tmp_path: Path) -> None:
    asked = recipe.model_copy(update={"shift": Shifts(suite="noise,fgsm,pgd_transferred", severities=[4])})
    metrics = run(asked, tmp_path / "run")
    assert list(metrics["shift"]["quantized"]) == ["noise", "fgsm", "pgd_transferred", "mean"]
    found = read_json(tmp_path / "run" / "shift.json", "shift file")
    assert found["shifts"]["fgsm"]["severities"] == [4]
    for model in ("float", "quantized"):
        assert found["figures"][model] == metrics["shift"][model]
        assert found["plain"][model]["accuracy"] == metrics[model]["accuracy"]
    assert "Shift by shift" in (tmp_path / "run" / "report.html").read_text()
    again = evaluate_run(tmp_path / "run", shift="default", severities=[4])
    assert again["shift"] == metrics["shift"]


def test_a_suite_of_other_data_is_refused_before_anything_is_trained(recipe: Recipe, tmp_path: Path) -> None:
    asked = recipe.model_copy(update={"shift": Shifts(suite="typos")})
    with pytest.raises(DataError, match=r"shift.suite: this is a shift of text; got typos for data digits"):
        run(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()
