"""`bitsmith sweep` and `bitsmith sensitivity` as a user calls them, on a digits CNN and a few steps."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitsmith.cli.main import main
from tests.cli.conftest import Bitsmith
from tests.cli.test_errors import assert_one_line

RECIPE = {
    "model": "digits_cnn",
    "data": "digits",
    "methods": [{"budget_search": {"budget": {"bops": 0.05}, "candidates": [2, 4, 8]}}],
    "float": {"epochs": 2},
    "train": {"epochs": 1, "batch_size": 320},
    "export": ["native"],
}


def figures(run: Path) -> dict[str, Any]:
    metrics = json.loads((run / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if key not in ("time", "environment")}


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="session")
def swept(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of two budgets; copy it before changing it."""
    out = tmp_path_factory.mktemp("sweeps") / "swept"
    assert main(["sweep", str(recipe), "--budgets", "0.02,0.05", "--out", str(out), "--json"]) == 0
    return out


def test_a_sweep_holds_a_run_per_budget_and_one_float_model(swept: Path) -> None:
    found = json.loads((swept / "sweep.json").read_text())
    assert [point["budget"] for point in found["points"]] == [0.05, 0.02]
    assert [point["start"] for point in found["points"]] == ["sensitivity", "bops-0.05"]
    shared = (swept / "checkpoints" / "float.safetensors").read_bytes()
    for point in found["points"]:
        run = swept / point["name"]
        assert (
            point["searched"]["used"]
            <= point["limit"]
            == pytest.approx(point["budget"] * found["float"]["used"])
        )
        metrics = figures(run)
        assert metrics["budget"][0]["limit"] == pytest.approx(point["limit"])
        assert point["searched"]["accuracy"] == metrics["searched"]["accuracy"]
        assert point["delivered"] == metrics["quantized"]["accuracy"]
        assert point["winner"] == metrics["winner"]
        assert (run / "checkpoints" / "float.safetensors").read_bytes() == shared
        delivered = {
            name: site["bits"] for name, site in json.loads((run / "plan.json").read_text())["sites"].items()
        }
        assert point["winner"] == "uniform" or delivered == point["searched"]["bits"]
    assert "</html>" in (swept / "sweep.html").read_text()


def test_a_finished_sweep_is_shown_again_and_not_done_again(
    bitsmith: Bitsmith, recipe: Path, swept: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("*") if path.is_file()}
    result = bitsmith("sweep", recipe, "--budgets", "0.05,0.02", "--out", swept, "--resume")
    assert result.code == 0, result.err
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed <= {".lock", "recipe.yaml", "sweep.json", "sweep.html"}
    text = " ".join(result.out.split())
    for fragment in ("budget", "searched", "uniform", "winner", "one standard error", "sweep.html"):
        assert fragment in text
    assert "plan" in text  # a verdict, whichever it is


def test_an_interrupted_sweep_ends_as_if_it_had_not_been(
    bitsmith: Bitsmith, recipe: Path, swept: Path, tmp_path: Path
) -> None:
    out = tmp_path / "swept"
    shutil.copytree(swept, out)
    for name in (
        "metrics.json",
        "report.html",
        "checkpoints/qat.safetensors",
        "checkpoints/winner.safetensors",
    ):
        (out / "bops-0.02" / name).unlink()
    result = bitsmith("sweep", recipe, "--budgets", "0.02,0.05", "--out", out, "--resume", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out) == json.loads((swept / "sweep.json").read_text())
    assert figures(out / "bops-0.02") == figures(swept / "bops-0.02")


def test_the_directory_of_a_sweep_is_not_taken_by_another(
    bitsmith: Bitsmith, recipe: Path, swept: Path
) -> None:
    result = bitsmith("sweep", recipe, "--budgets", "0.02", "--out", swept)
    assert_one_line(result.err, "already holds a sweep", "--resume")
    result = bitsmith(
        "sweep", recipe, "--budgets", "0.02", "--out", swept, "--resume", "--set", "train.epochs=9"
    )
    assert_one_line(result.err, "train.epochs", "got 9, expected 1")


def test_the_points_of_a_sweep_are_runs(bitsmith: Bitsmith, swept: Path) -> None:
    result = bitsmith("compare", swept / "bops-0.02", swept / "bops-0.05")
    assert "bops-0.02" in result.out


ERRORS = {
    "no budget": (["--budgets", ","], ["--budgets", "between commas", "Write --budgets"]),
    "no number": (["--budgets", "0.02,x"], ["--budgets", "got x", "a number above 0"]),
    "unknown kind": (["--budgets", "1", "--kind", "bytes"], ["--kind", "got bytes", "weight_bytes"]),
    "impossible": (["--budgets", "0.02,0.0001"], ["--budgets 0.0001", "the cheapest plan costs", "Raise"]),
    "nothing to sweep": (
        ["--budgets", "0.02", "--set", "methods=[]"],
        ["methods", "searches nothing", "budget_search"],
    ),
    "missing": ([], ["--budgets", "bitsmith sweep --help"]),
}


@pytest.mark.parametrize(("arguments", "fragments"), ERRORS.values(), ids=ERRORS)
def test_a_wrong_sweep_is_one_line(
    arguments: list[str], fragments: list[str], bitsmith: Bitsmith, recipe: Path, tmp_path: Path
) -> None:
    result = bitsmith("sweep", recipe, "--out", tmp_path / "out", "--json", *arguments)
    assert_one_line(result.err, *fragments)
    assert (result.code, result.out) == (2, "")
    assert not (tmp_path / "out").exists()


def test_sensitivity_uses_the_float_model_of_a_run(bitsmith: Bitsmith, recipe: Path, swept: Path) -> None:
    out = swept / "bops-0.02"
    result = bitsmith("sensitivity", recipe, "--out", out, "--budget", "bops=0.03", "--top", 2, "--json")
    assert result.err == ""
    found = json.loads(result.out)
    assert found == json.loads((out / "sensitivity.json").read_text())
    assert found["budget"][0]["used"] <= found["budget"][0]["limit"]
    text = bitsmith("sensitivity", recipe, "--out", out, "--top", 2).out
    for fragment in (
        "conv1.weight",
        "price",
        "Measured on 179",
        "sensitivity.html",
        "plan_by_sensitivity.json",
    ):
        assert fragment in text


SENSITIVITY = {
    "unknown kind": (["--budget", "bop=1"], ["--budget", "got bop", "Did you mean bops?"]),
    "no limit": (["--budget", "bops"], ["--budget", "no limit", "bops=0.02"]),
    "impossible": (["--budget", "bops=0.0001"], ["the cheapest plan costs", "Raise the limit"]),
    "pairs": (["--top", "-1"], ["--top", "got -1", "0 or more"]),
}


@pytest.mark.parametrize(("arguments", "fragments"), SENSITIVITY.values(), ids=SENSITIVITY)
def test_a_wrong_sensitivity_is_one_line(
    arguments: list[str], fragments: list[str], bitsmith: Bitsmith, recipe: Path, tmp_path: Path
) -> None:
    result = bitsmith("sensitivity", recipe, "--out", tmp_path / "out", "--json", *arguments)
    assert_one_line(result.err, *fragments)
    assert (result.code, result.out) == (2, "")


@pytest.mark.parametrize("command", ["sensitivity", "sweep"])
def test_what_is_no_recipe_is_one_line(command: str, bitsmith: Bitsmith, tmp_path: Path) -> None:
    (tmp_path / "note.yaml").write_text("just a note")
    extra = ["--budgets", "0.02"] if command == "sweep" else []
    result = bitsmith(command, tmp_path / "note.yaml", "--out", tmp_path / "out", *extra)
    assert_one_line(result.err, "note.yaml", "not a mapping")
    assert result.code == 2


@pytest.mark.parametrize("command", ["sensitivity", "sweep"])
def test_help_teaches_by_examples(command: str, bitsmith: Bitsmith) -> None:
    text = bitsmith(command, "--help").out
    assert "Examples" in text
    assert text.count(f"bitsmith {command}") >= 3
