"""`post_training:` in a recipe: rounded before training, or in its place; what cannot be is said at once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitsmith.errors import BitsmithError, DataError, RecipeError, SchemeError
from bitsmith.files import load_tensors
from bitsmith.recipe import Recipe, load_recipe, run
from bitsmith.recipe.predict import predict
from bitsmith.recipe.progress import Event

ROOT = Path(__file__).resolve().parents[2]
MODEL = "model.arguments={width: 16, depth: 1, heads: 2, context: 16}"
SMALL = ("float.epochs=3", MODEL, "quantize.calibration_samples=8", "post_training.samples=32")
TEXT = "the <b>quick</b> brown fox & the lazy dog; " * 60


def recipe(folder: Path, *changes: str) -> Recipe:
    (folder / "text.txt").write_text(TEXT)
    data = f"data={{name: 'text:{folder}/text.txt', arguments: {{context: 16}}}}"
    return load_recipe(ROOT / "recipes" / "output_matching.yaml", [*SMALL, data, *changes])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rounding")


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def finished(folder: Path, events: list[Event]) -> Path:
    run(recipe(folder), folder / "run", progress=events.append)
    return folder / "run"


def figures(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def test_without_epochs_the_rounded_model_is_delivered(finished: Path) -> None:
    metrics = figures(finished)
    assert metrics["quantized"]["loss"] == pytest.approx(metrics["post_training"]["loss"], abs=1e-6)
    assert json.loads((finished / "history.json").read_text())["qat"] == []


def test_it_is_nearer_to_the_float_model_than_rounding_to_nearest(folder: Path, finished: Path) -> None:
    weights = finished / "checkpoints" / "float.safetensors"
    plain = run(
        recipe(folder, "post_training=null", f"pretrained={weights}", "float=null"), folder / "nearest"
    )
    metrics = figures(finished)
    assert plain["float"] == metrics["float"]
    assert metrics["quantized"]["loss"] < plain["quantized"]["loss"]
    assert not (folder / "nearest" / "post_training.json").exists()


def test_every_layer_is_told_written_and_shown(
    finished: Path, events: list[Event], capsys: pytest.CaptureFixture[str]
) -> None:
    from bitsmith.cli.run import show_summary

    document = json.loads((finished / "post_training.json").read_text())
    assert document["options"]["samples"] == 32
    done = [layer for layer in document["layers"] if not layer["left"]]
    told = [event.note for event in events if event.stage == "post_training" and event.note]
    assert told == [layer["name"] for layer in done]
    assert all(layer["seconds"] > 0 and 0 < layer["error"] < 1 for layer in done)
    page = (finished / "report.html").read_text()
    assert "Rounding before training" in page
    for layer in done:
        assert layer["name"].replace(".", ".<wbr>") in page
        assert f"<b>{layer['error']:.3g}</b>" in page
    show_summary(finished)
    assert f"{len(done)} layers in" in capsys.readouterr().out


def test_training_starts_from_it(folder: Path, finished: Path) -> None:
    """At a rate of almost nothing training leaves what it began with."""
    weights = finished / "checkpoints" / "float.safetensors"
    still = (
        "train={epochs: 1, batch_size: 64, learning_rate: 1.0e-9}",
        "float=null",
        f"pretrained={weights}",
    )
    run(recipe(folder, *still), folder / "still")
    assert figures(folder / "still")["post_training"] == figures(finished)["post_training"]
    before, _ = load_tensors(
        finished / "checkpoints" / "qat.safetensors", "checkpoint", mark="bitsmith_stage"
    )
    after, _ = load_tensors(
        folder / "still" / "checkpoints" / "qat.safetensors", "checkpoint", mark="bitsmith_stage"
    )
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-5, rtol=1e-4)


def test_a_resumed_run_repeats_it_and_finds_the_same(folder: Path, finished: Path) -> None:
    before = figures(finished)
    for name in ("report.html", "metrics.json", "post_training.json"):
        (finished / name).unlink()
    again = run(recipe(folder), finished, resume=True)
    for stage in ("float", "post_training", "quantized", "exported", "cost"):
        assert again[stage] == before[stage]
    assert (finished / "post_training.json").exists()


def test_a_prediction_knows_that_nothing_is_trained(folder: Path) -> None:
    found = predict(recipe(folder))
    assert (found["steps"]["qat"], found["time"]["qat"]) == (0, 0.0)


WRONG: dict[str, tuple[tuple[str, ...], type[BitsmithError], str]] = {
    "rounding": (("post_training.rounding=gtpq",), SchemeError, r"post_training.rounding.*Did you mean gptq"),
    "option": (("post_training.dampings=1",), RecipeError, r"post_training.dampings.*Did you mean damping"),
    "damping": (("post_training.damping=-1",), SchemeError, r"post_training.damping.*0 or more"),
    "search": (
        ("train.epochs=1", "methods=[{budget_search: {budget: {bops: 0.04}}}]"),
        RecipeError,
        "post_training: weights cannot be rounded while budget_search",
    ),
    "methods without epochs": (
        ("post_training=null", "methods=[{fractional_bits: {target: {average_weight_bits: 3}}}]"),
        RecipeError,
        "train.epochs: a method works while the model trains",
    ),
    "float": (("float.epochs=0",), RecipeError, "float.epochs: the float model has to be trained"),
}


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused(
    changes: tuple[str, ...], kind: type[BitsmithError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        recipe(tmp_path, *changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("post_training.samples=3",), r"post_training: .*too few batches.*got 3.*post_training.samples"),
        (
            ("post_training={samples: 1, alpha: 1, beta: 1}",),
            r"post_training: .*down_proj: fewer calibration rows than inputs; got 16 rows",
        ),
        (("post_training.samples=5000",), "fewer training sequences than post-training looks at"),
    ],
    ids=["batches", "rows", "data"],
)
def test_too_little_data_is_found_out_before_anything_is_trained(
    changes: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        run(recipe(tmp_path, *changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match=message):
        predict(recipe(tmp_path, *changes))
