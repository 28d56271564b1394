"""The whole job with a language model: figures, report, errors, and what can be done with it later."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitsmith.cli.main import main
from bitsmith.errors import DataError, FormatError
from bitsmith.recipe import Recipe, load_recipe, run
from bitsmith.recipe.job import read_inputs
from bitsmith.recipe.predict import predict
from bitsmith.recipe.progress import Event
from bitsmith.recipe.reopen import evaluate_run, export_run, flatness_of_run
from bitsmith.report.flatness import number

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the <b>quick</b> brown fox & the lazy dog; " * 60
MODEL = "model.arguments={width: 16, depth: 1, heads: 2, context: 16}"


def recipe(folder: Path, *changes: str) -> Recipe:
    (folder / "text.txt").write_text(TEXT)
    data = f"data={{name: 'text:{folder}/text.txt', arguments: {{context: 16}}}}"
    settings = ("train.epochs=1", "float.epochs=2", MODEL, "quantize.calibration_samples=8", data)
    return load_recipe(ROOT / "recipes" / "language.yaml", [*settings, *changes])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("language")


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def finished(folder: Path, events: list[Event]) -> Path:
    run(recipe(folder, "flatness={rows: 8, points: 3}"), folder / "run", progress=events.append)
    return folder / "run"


@pytest.fixture(scope="module")
def metrics(finished: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished / "metrics.json").read_text())
    return found


def test_every_stage_has_its_figures(metrics: dict[str, Any], events: list[Event]) -> None:
    names = {"loss", "perplexity", "bits_per_byte", "accuracy"}
    for stage in ("float", "post_training", "quantized"):
        assert set(metrics[stage]) == names
        assert metrics[stage]["loss"] < 5.6  # ln 256 = 5.5 is guessing
    assert names < set(metrics["exported"]["native"])
    assert metrics["exported"]["native"]["loss"] == pytest.approx(metrics["quantized"]["loss"], abs=1e-6)
    assert metrics["task"] == "language"
    assert metrics["shift"] == {}
    assert "validation loss" in {event.stage: event for event in events if event.finished}["qat"].values


def test_the_report_shows_the_figures_and_text_of_both_models(
    finished: Path, metrics: dict[str, Any]
) -> None:
    page = (finished / "report.html").read_text()
    samples = json.loads((finished / "samples.json").read_text())["samples"]
    assert f"{metrics['quantized']['loss']:.3f}" in page
    assert f"{metrics['float']['bits_per_byte']:.3f}" in page
    assert "Perplexity" in page
    assert "Sampled text" in page
    for sample in samples:
        assert sample["float"].startswith(sample["prompt"])
        assert sample["quantized"].startswith(sample["prompt"])
    assert "<b>quick</b>" not in page.replace(f"<b>{samples[0]['prompt']}</b>", "")
    assert "&lt;" in page
    assert "Accuracy under shift" not in page
    assert "Misread" not in page


def test_the_terminal_shows_them_too(
    finished: Path, metrics: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from bitsmith.cli.run import show_summary

    show_summary(finished)
    shown = capsys.readouterr().out
    assert f"{metrics['quantized']['loss']:.3f}" in shown
    assert "bits per byte" in shown
    assert main(["compare", str(finished), str(finished), "--out", str(finished.parent / "c.html")]) == 0
    assert "nats" in capsys.readouterr().out
    assert main(["inspect", str(finished)]) == 0


def test_a_finished_run_is_evaluated_and_exported_again(finished: Path, metrics: dict[str, Any]) -> None:
    found = evaluate_run(finished)
    assert found["loss"] == pytest.approx(metrics["quantized"]["loss"], abs=1e-6)
    assert found["sequences"] > 0
    certificate, _ = export_run(finished, ["native"])
    assert certificate["exports"]["native"]["passed"]
    with pytest.raises(DataError, match="this is a shift of images"):
        evaluate_run(finished, shift="noise")
    assert main(["evaluate", str(finished)]) == 0


def test_the_kept_float_model_starts_another_run(
    finished: Path, folder: Path, metrics: dict[str, Any]
) -> None:
    weights = finished / "checkpoints" / "float.safetensors"
    found = run(recipe(folder, f"pretrained={weights}", "float=null"), folder / "again")
    assert found["float"] == metrics["float"]
    with pytest.raises(FormatError, match="has another shape"):
        read_inputs(recipe(folder, f"pretrained={weights}", MODEL.replace("16,", "32,", 1)))


def test_plan_bytes_are_the_payload_of_the_native_file_tied_or_not(
    finished: Path, folder: Path, metrics: dict[str, Any]
) -> None:
    tied = run(recipe(folder, MODEL.replace("}", ", tied: true}"), "float.epochs=1"), folder / "tied")
    for out, cost in ((finished, metrics["cost"]), (folder / "tied", tied["cost"])):
        content = (out / "model" / "model.safetensors").read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        assert cost["weight_bytes"] == len(content) - header


@pytest.mark.slow
def test_onnx_computes_what_was_trained(folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = run(recipe(folder, "target=onnxruntime", "export=[onnx]"), folder / "onnx")
    assert found["exported"]["onnx"]["agreement"] >= 0.995
    assert found["exported"]["onnx"]["loss"] == pytest.approx(found["quantized"]["loss"], abs=1e-3)


def test_a_search_is_decided_by_the_validation_loss(folder: Path) -> None:
    search = "methods=[{budget_search: {budget: {bops: 0.04}, candidates: [2, 4, 8]}}]"
    found = run(recipe(folder, search, "train.epochs=2"), folder / "search")
    contenders = {name: found[name]["validation_loss"] for name in ("searched", "uniform") if found[name]}
    assert found["winner"] == min(contenders, key=lambda name: contenders[name])
    page = (folder / "search" / "report.html").read_text()
    assert "on validation, which decided" in page
    assert "nats against" in page


def test_a_prediction_counts_sequences(folder: Path) -> None:
    found = predict(recipe(folder))
    assert found["data"]["unit"] == "sequences"
    assert found["steps"]["qat"] == -(-found["data"]["train"] // 16)


def test_a_model_of_transformers_goes_all_the_way(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "hub")
    settings = (
        f"model=hf:{folder}/hub",
        "data.arguments.tokenizer=bytes",
        "float=null",
        "export=[native]",
    )
    found = run(recipe(folder, *settings), folder / "hub-run")
    assert found["quantized"]["loss"] < 5.7
    assert evaluate_run(folder / "hub-run")["loss"] == pytest.approx(found["quantized"]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "data.arguments.context=32",
            "longer than the model's positions; got 32 tokens, expected at most 16",
        ),
        ("quantize.calibration_samples=5000", "fewer training sequences than calibration needs"),
        ("data.arguments.tokenizer=words", "no such tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    change: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        run(recipe(tmp_path, change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_relative_paths_are_meant_from_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipes" / "tiny").mkdir(parents=True)
    path = tmp_path / "recipes" / "my.yaml"
    path.write_text(
        "model: hf:tiny\ndata: {name: 'text:my.txt', arguments: {tokenizer: hf:tiny}}\ntarget: native\n"
    )
    found = load_recipe(path)
    assert found.data.name == f"text:{tmp_path}/recipes/my.txt"
    assert found.model.name == f"hf:{tmp_path}/recipes/tiny"
    assert found.data.arguments["tokenizer"] == f"hf:{tmp_path}/recipes/tiny"
    path.write_text("model: hf:some/name\ndata: pydoc\n")
    assert load_recipe(path).model.name == "hf:some/name"  # no folder: a name on a hub


def test_flatness_is_that_of_the_models_as_they_were_trained(finished: Path, metrics: dict[str, Any]) -> None:
    again = flatness_of_run(finished)
    for name in ("float", "quantized"):
        assert again["models"][name] == pytest.approx(metrics["flatness"][name])
    report = (finished / "report.html").read_text()
    for figure in metrics["flatness"]["quantized"].values():
        assert f">{number(figure)}</td>" in report
    assert report.count('class="surface"') == 2
