"""Runs that train codes: what is delivered is what trained, whatever interrupts it, and what has no place."""

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.cli.main import main
from bitsmith.errors import BitsmithError, Interrupted, RecipeError, SiteError
from bitsmith.files import read_json, save_tensors
from bitsmith.quantization.integer_layers import packed_layers
from bitsmith.recipe import Recipe, job, load_recipe, run
from bitsmith.recipe.directory import load_stage
from bitsmith.recipe.load import parse_recipe
from bitsmith.recipe.progress import Event
from bitsmith.recipe.reopen import evaluate_run, export_run, flatness_of_run
from bitsmith.tasks.models import build

ROOT = Path(__file__).resolve().parents[2]
Finished = tuple[Path, dict[str, torch.Tensor]]
MODES = {"integer": "integer", "zeroth_order": "forward_only"}
ONCE = ["integer", pytest.param("zeroth_order", marks=pytest.mark.slow)]  # that it resumes: tests/train
QUICK = (
    "float.epochs=2", "float.batch_size=64", "train.epochs=3", "train.batch_size=320", "export=[native]",
    "shift=none",
)  # fmt: skip


def digits(mode: str, *changes: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{MODES[mode]}.yaml", [*QUICK, *changes])


def figures(out: Path) -> dict[str, Any]:
    """metrics.json without what may differ between two runs of one job."""
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if key not in ("time", "environment")}


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    """By mode a run on digits, and the tensors of the model that trained as its last step left them."""

    @functools.cache
    def finish(mode: str) -> Finished:
        out, left = tmp_path_factory.mktemp(mode) / "run", {}
        kept = job.train

        def watched(model: nn.Module, *arguments: Any, **options: Any) -> Any:
            result = kept(model, *arguments, **options)
            left.clear()
            left.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "train", watched)
            run(digits(mode), out)
        return out, left

    return finish


@pytest.fixture
def finished(mode: str, whole: Callable[[str], Finished]) -> Finished:
    return whole(mode)


def test_what_trained_is_what_the_file_holds(mode: str, finished: Finished) -> None:
    out, left = finished
    loaded = bs.load(out / "model", kernels=False).state_dict()
    codes = [name for name in loaded if name.endswith((".codes", ".scale"))]
    assert len(codes) > 10
    for name in codes:
        assert torch.equal(loaded[name], left[name]), name
    entry = read_json(out / "certificate.json", "certificate")["exports"]["native"]
    assert entry["passed"]
    assert entry["codes_equal"]


def test_it_trains_and_the_figures_say_how(mode: str, finished: Finished) -> None:
    metrics = figures(finished[0])
    assert metrics["quantized"]["loss"] < metrics["post_training"]["loss"]
    told = metrics["training"]
    assert told["mode"] == mode
    assert (told["changed"] > 0) == (mode == "integer")
    assert told["saturated_before"] > 0
    assert (0.25 < told["state_bytes_per_weight"] < 0.5) == (mode == "zeroth_order")
    start = load_stage(finished[0], "start")
    assert start is not None
    assert start[0]["conv1.weight"].dtype == torch.float32  # the prepared model, before codes were made


def test_the_report_and_the_screen_say_how_it_trained(
    mode: str, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (finished[0] / "report.html").read_text()
    words = {"integer": "Trained on integer codes", "zeroth_order": "Trained by forward passes alone"}
    assert words[mode] in page
    assert "bytes of state a weight" in page
    assert main(["inspect", str(finished[0])]) == 0
    traces = read_json(finished[0] / "history.json", "history")["traces"]
    assert {"integer": "IntegerAdam.moved", "zeroth_order": "ZerothOrder.saturated"}[mode] in traces[0]


@pytest.mark.parametrize("mode", ONCE)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    mode: str, whole: Callable[[str], Finished], tmp_path: Path
) -> None:
    def interrupt(event: Event) -> None:
        if event.stage == "qat" and event.done >= 4 and event.total > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM"):
        run(digits(mode), tmp_path / "run", progress=interrupt)
    assert (tmp_path / "run" / "checkpoints" / "qat_training.safetensors").exists()
    run(digits(mode), tmp_path / "run", resume=True)
    uncut = whole(mode)[0]
    assert figures(tmp_path / "run") == figures(uncut)
    for file in ("model.safetensors", "config.json"):
        again, expected = (place / "model" / file for place in (tmp_path / "run", uncut))
        assert again.read_bytes() == expected.read_bytes(), file


def test_a_finished_run_is_evaluated_and_exported_again_with_the_same_codes(
    finished: Finished,
) -> None:
    out = finished[0]
    before = (out / "model" / "model.safetensors").read_bytes()
    certificate, _ = export_run(out, ["native"])
    assert certificate["exports"]["native"]["passed"]
    assert (out / "model" / "model.safetensors").read_bytes() == before
    found = evaluate_run(out, shift="fgsm", severities=[3])
    assert found["accuracy"] == figures(out)["quantized"]["accuracy"]
    assert found["shift"]["quantized"]["fgsm"] < found["accuracy"]  # gradients of codes lead somewhere
    with pytest.raises(RecipeError, match="flatness is that of float weights"):
        flatness_of_run(out)


@pytest.mark.slow
def test_codes_that_trained_run_in_onnx_runtime(finished: Finished) -> None:
    certificate, _ = export_run(finished[0], ["onnx"])
    assert certificate["exports"]["onnx"]["codes_equal"]
    assert certificate["exports"]["onnx"]["agreement"] >= 0.995


def byte_model(folder: Path, mode: str, *changes: str) -> Recipe:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 60)
    return load_recipe(
        ROOT / "recipes" / "language.yaml",
        [
            "model.arguments={width: 16, depth: 1, heads: 2, context: 16}",
            f"data={{name: 'text:{folder}/text.txt', arguments: {{context: 16}}}}",
            "quantize.calibration_samples=8",
            "quantize.weights.bits=2",
            "float.epochs=2",
            "float.gradient_clip=1.0",
            "train.gradient_clip=0",
            "train.epochs=1",
            "train.learning_rate=1e-2",
            f"train.mode={mode}",
            "shift=none",
            *changes,
        ],
    )


@pytest.mark.parametrize("mode", ONCE)
def test_the_byte_language_model(mode: str, tmp_path: Path) -> None:
    metrics = run(byte_model(tmp_path, mode), tmp_path / "run")
    assert metrics["quantized"]["loss"] < metrics["post_training"]["loss"]
    assert metrics["exported"]["native"]["agreement"] >= 0.995
    codes = bs.load(tmp_path / "run" / "model", kernels=False).state_dict()
    stage = load_stage(tmp_path / "run", "qat")
    assert stage is not None
    held = [name for name in codes if name.endswith(".codes")]
    assert "lm_head.weight.codes" in held
    assert all(torch.equal(codes[name], stage[0][name]) for name in held)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_resnet_20(mode: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_x"] = draw.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_y"] = np.resize(np.arange(10), 16)
    np.savez(tmp_path / "cifar.npz", **arrays)
    save_tensors(tmp_path / "weights.safetensors", build("resnet20", seed=0).state_dict())
    settings = [
        f"data.name=npz:{tmp_path}/cifar.npz",
        f"pretrained={tmp_path}/weights.safetensors",
        "quantize.calibration_samples=8",
        "train.epochs=1",
        "train.batch_size=8",
        f"train.mode={mode}",
        "train.learning_rate=0.01",
        "export=[native]",
        "shift=none",
    ]
    metrics = run(load_recipe(ROOT / "recipes" / "cifar10_resnet20.yaml", settings), tmp_path / "run")
    assert metrics["exported"]["native"]["agreement"] >= 0.995
    assert (metrics["training"]["changed"] > 0) == (mode == "integer")
    codes = bs.load(tmp_path / "run" / "model", kernels=False).state_dict()
    stage = load_stage(tmp_path / "run", "qat")
    assert stage is not None
    assert all(torch.equal(codes[n], stage[0][n]) for n in codes if n.endswith((".codes", ".scale")))


def test_inputs_in_float_are_delivered_in_float_and_what_is_float_as_asked_stays_frozen(
    tmp_path: Path,
) -> None:
    changes = ("quantize.activations=null", "quantize.overrides={conv3.weight: {bits: 32}}")
    metrics = run(digits("integer", *changes, "train.epochs=1"), tmp_path / "run")
    assert metrics["training"]["frozen"] == ["conv3"]
    layers = packed_layers(bs.load(tmp_path / "run" / "model", kernels=False))
    assert all(getattr(layer, "input", None) is None for layer in layers.values())
    assert metrics["cost"]["average_activation_bits"] == 32


def test_a_layer_without_an_integer_form_is_refused_before_anything_trains(tmp_path: Path) -> None:
    change = "quantize.overrides={conv3.weight: {bits: 4, grid: powers_of_two}}"
    told: list[Event] = []
    with pytest.raises(SiteError, match=r"train.mode: integer: 1 parts.*conv3 \(weights of.*zeroth_order"):
        run(digits("integer", change, "target=native"), tmp_path / "run", progress=told.append)
    assert {event.stage for event in told} == {"data"}


@pytest.mark.parametrize("mode", ONCE)
def test_a_dry_run_says_what_trains(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "recipes" / f"{MODES[mode]}.yaml"
    changes = (*QUICK, "train.batch_size=32", "float.batch_size=32")
    sets = [argument for change in changes for argument in ("--set", change)]
    assert main(["run", str(recipe), "--dry-run", *sets]) == 0
    assert {"integer": "on integer codes", "zeroth_order": "forward passes"}[mode] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"methods": ["weight_anchor"]}, "methods: not with mode integer: methods work on float weights"),
        ({"flatness": True}, "flatness: not with mode integer"),
        ({"train": {"mode": "integer", "epochs": 0}, "float": {"epochs": 1}}, "train.epochs: not with mode"),
        ({"float": {"mode": "integer"}}, "float.mode: the float model has float weights"),
        ({"train": {"mode": "integer", "ema": 0.9}}, "train.ema: not with mode integer"),
        ({"train": {"mode": "integers"}}, "train.mode: there is no such mode"),
        ({"train": {"gradients": 4}}, "train.gradients: this is a setting of mode integer"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(document: dict[str, Any], message: str) -> None:
    whole = {"train": {"mode": "integer"}, **document}
    with pytest.raises(BitsmithError, match=message) as error:
        parse_recipe(whole, "mine.yaml")
    assert "\n" not in str(error.value)


def test_a_mode_has_its_usual_rate_and_the_float_model_its_own() -> None:
    recipe = parse_recipe({"train": {"mode": "integer", "batch_size": 16}})
    assert recipe.train.learning_rate == 1e-2
    assert recipe.float_train is not None
    assert (recipe.float_train.mode, recipe.float_train.learning_rate) == ("float", 1e-3)
    assert recipe.float_train.batch_size == 16
    assert parse_recipe({"train": {"mode": "integer", "learning_rate": 0.1}}).train.learning_rate == 0.1
    plain = parse_recipe({"train": {"learning_rate": 0.1}})
    assert plain.float_train is not None
    assert plain.float_train.learning_rate == plain.train.learning_rate == 0.1
