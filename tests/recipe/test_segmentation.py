"""The whole job with a segmentation: mean IoU decides and is shown, in every command, with every method."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitsmith.cli.main import main
from bitsmith.errors import DataError, FormatError
from bitsmith.recipe import Recipe, load_recipe, run
from bitsmith.recipe.progress import Event
from bitsmith.recipe.reopen import evaluate_run, export_run, flatness_of_run
from bitsmith.recipe.sensitivity import analyse
from bitsmith.recipe.sweep import sweep
from bitsmith.report.flatness import number
from bitsmith.report.masks import read_masks
from bitsmith.tasks.masks import SHOWN

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "model.arguments={width: 2, depth: 1}",
    "data.arguments={train: 24, validation: 8, test: 10, augment: shift}",
    "quantize.calibration_samples=16",
    "float.epochs=1",
    "train.epochs=1",
    "train.batch_size=8",
    "export=[native]",
)
SEARCH = "methods=[{budget_search: {budget: {bops: 0.03}, candidates: [2, 4, 8]}}]"


def recipe(*changes: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / "segmentation.yaml", [*SMALL, *changes])


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, events: list[Event]) -> Path:
    out = tmp_path_factory.mktemp("segmentation") / "run"
    changes = ("export=[native, onnx]", "train.label_smoothing=0.1", "flatness={rows: 8, points: 3}")
    run(recipe(*changes), out, progress=events.append)
    return out


@pytest.fixture(scope="module")
def metrics(finished: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished / "metrics.json").read_text())
    return found


def test_every_stage_has_its_mean_iou(metrics: dict[str, Any], events: list[Event]) -> None:
    for stage in ("float", "post_training", "quantized"):
        assert set(metrics[stage]) == {"mean_iou", "accuracy", "loss"}
    assert metrics["task"] == "segmentation"
    assert metrics["test_images"] == 10
    for runtime in ("onnx", "native"):
        assert metrics["exported"][runtime]["mean_iou"] == pytest.approx(metrics["quantized"]["mean_iou"])
    assert set(metrics["shift"]["quantized"]) == {"noise", "blur", "contrast", "mean"}
    assert "validation mean iou" in {event.stage: event for event in events if event.finished}["qat"].values


def test_pictures_hold_what_the_models_answer(finished: Path, metrics: dict[str, Any]) -> None:
    found = read_masks(finished / "masks.npz")
    assert found is not None
    assert found.images.shape == (SHOWN, 1, 24, 24)
    assert set(found.answers) == {"float", "quantized"}
    for name, values in found.iou.items():
        assert np.nanmean(values) == pytest.approx(metrics[name]["mean_iou"])


def test_the_report_and_the_terminal_speak_of_mean_iou(
    finished: Path, metrics: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    page = (finished / "report.html").read_text()
    shown = f"{100 * metrics['quantized']['mean_iou']:.1f}"
    assert f"<h1>Mean IoU {shown}" in page
    for title in ("Predictions", "IoU of every class", "Mean IoU under shift", "Validation mean IoU"):
        assert title in page
    assert page.count("data:image/png") == 4 * SHOWN + 3 * 6  # of each shift six
    assert "Accuracy" not in page
    assert "ccurac" not in page.replace("accuracy_level", "")  # an option of ONNX Runtime's
    main(["compare", str(finished), "--out", str(finished.parent / "compare.html")])
    assert f"{shown}" in capsys.readouterr().out
    assert "Mean IoU against size" in (finished.parent / "compare.html").read_text()
    main(["evaluate", str(finished), "--shift", "all"])
    said = capsys.readouterr().out
    assert "mean IoU" in said
    assert "contrast" in said


def test_a_finished_run_is_evaluated_and_exported_again(finished: Path, metrics: dict[str, Any]) -> None:
    found = evaluate_run(finished, shift="noise")
    assert found["mean_iou"] == pytest.approx(metrics["quantized"]["mean_iou"])
    assert found["shift"]["quantized"]["noise"] == pytest.approx(metrics["shift"]["quantized"]["noise"])
    with pytest.raises(DataError, match="this shift is not for these data; got rotation"):
        evaluate_run(finished, shift="rotation")
    certificate, _ = export_run(finished, ["native"])
    assert certificate["exports"]["native"]["passed"]
    assert certificate["exports"]["native"]["mean_iou"] == pytest.approx(metrics["quantized"]["mean_iou"])


METHODS = {
    "search": SEARCH,
    "fractional": "methods=[{fractional_bits: {target: {average_weight_bits: 3}}}]",
    "progressive": "methods=[{progressive_bits: {}}]",
    "output": "methods=[{output_approximation: {strength: 0.1}}]",
    "teacher": "methods=[{output_approximation: {strength: 0.1, against: teacher}}]",
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_on_it(name: str, tmp_path: Path) -> None:
    native = ("target=native",) if name in ("fractional", "progressive") else ()
    found = run(recipe(METHODS[name], *native), tmp_path / "run")
    assert 0 <= found["quantized"]["mean_iou"] <= 1
    if name == "search":
        ahead = "searched" if rank(found["searched"]) > rank(found["uniform"]) else "uniform"
        assert found["winner"] == ahead
        assert "which decided" in (tmp_path / "run" / "report.html").read_text()


def rank(contender: dict[str, Any]) -> tuple[float, float]:
    return contender["validation_mean_iou"], -contender["validation_loss"]


def test_weights_are_rounded_without_training(tmp_path: Path) -> None:
    found = run(recipe("post_training={rounding: gptq, samples: 16}", "train.epochs=0"), tmp_path / "run")
    assert 0 <= found["quantized"]["mean_iou"] <= 1
    rounded = json.loads((tmp_path / "run" / "post_training.json").read_text())
    assert "a transposed convolution: it is rounded to nearest" in json.dumps(rounded)


def test_sensitivities_say_what_each_site_costs_in_mean_iou(tmp_path: Path) -> None:
    found = analyse(recipe(SEARCH), tmp_path / "out", top=2)
    assert found["task"] == "segmentation"
    assert {site["name"] for site in found["sites"]} >= {"up.0.0.weight", "up.0.0.input"}
    assert len(found["measured"]) == 2
    page = (tmp_path / "out" / "sensitivity.html").read_text()
    assert "Mean IoU, points" in page
    assert "ccuracy" not in page


@pytest.mark.slow
def test_a_sweep_is_a_front_of_mean_iou(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = sweep(recipe(SEARCH), [0.02, 0.04], tmp_path / "out")
    best = max(point["searched"]["mean_iou"] for point in found["points"])
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert "Mean IoU against bit operations" in page
    assert f"{100 * best:.1f}" in page
    assert "ccurac" not in page
    assert "test images" in page


def test_what_does_not_fit_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the model does not give logits for every class and pixel"):
        run(recipe("model={name: digits_cnn, arguments: {}}"), tmp_path / "run")


def test_damaged_pictures_are_an_error_of_one_line(tmp_path: Path, finished: Path) -> None:
    with np.load(finished / "masks.npz") as archive:
        arrays = dict(archive)
    path = tmp_path / "masks.npz"
    for change, message in (
        ({"truth": arrays["truth"][:, 1:]}, "truth of these masks has the wrong form"),
        ({"quantized": arrays["quantized"] + 50}, "quantized holds a class that there is not"),
        ({"iou_float": arrays["iou_float"] + 2}, "iou_float of these masks has the wrong form"),
    ):
        np.savez(path, **{**arrays, **change})
        with pytest.raises(FormatError, match=message):
            read_masks(path)
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="these masks are corrupted"):
        read_masks(path)


def test_flatness_is_that_of_the_models_as_they_were_trained(finished: Path, metrics: dict[str, Any]) -> None:
    again = flatness_of_run(finished)
    for name in ("float", "quantized"):
        assert again["models"][name] == pytest.approx(metrics["flatness"][name])
    report = (finished / "report.html").read_text()
    for figure in metrics["flatness"]["quantized"].values():
        assert f">{number(figure)}</td>" in report
    assert report.count('class="surface"') == 2
