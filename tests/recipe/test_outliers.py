"""Outlier channels in a recipe: found in the trained float model, kept apart in every file of the run."""

from pathlib import Path

import pytest

from bitsmith.errors import BitsmithError
from bitsmith.export import load
from bitsmith.files import read_json
from bitsmith.quantization.outliers import splits_of
from bitsmith.recipe import load_recipe, run
from bitsmith.recipe.predict import predict
from bitsmith.recipe.reopen import evaluate_run, export_run
from tests.recipe.test_job import QUICK

APART = "quantize.outliers={share: 0.1, above: 1, bits: 7}"
SMALL = ("methods=[]", "export=[native, onnx]", "float.epochs=1", "train.epochs=1", APART)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    run(load_recipe(None, [*QUICK, *SMALL]), out)
    return out


def test_they_have_their_width_in_plan_and_file(finished: Path) -> None:
    channels = read_json(finished / "outliers.json", "outliers")["channels"]
    assert channels
    sites = read_json(finished / "plan.json", "plan")["sites"]
    model = load(finished / "model")
    assert splits_of(model) == channels
    for layer, chosen in channels.items():
        assert {sites[f"{layer}.outliers.{end}"]["bits"] for end in ("weight", "input")} == {7}
        assert model.get_submodule(f"{layer}.outliers").weight.shape[1] == len(chosen)


def test_both_files_compute_what_was_trained_and_can_be_written_again(finished: Path) -> None:
    metrics = read_json(finished / "metrics.json", "metrics")
    assert evaluate_run(finished)["accuracy"] == metrics["quantized"]["accuracy"]
    assert all(entry["passed"] for entry in read_json(finished / "certificate.json", "c")["exports"].values())
    before = (finished / "model" / "model.safetensors").read_bytes()
    export_run(finished, ["native"])
    assert (finished / "model" / "model.safetensors").read_bytes() == before


def test_a_dry_run_shows_their_sites() -> None:
    sites = predict(load_recipe(None, [*QUICK, *SMALL]))["sites"]
    assert {site["bits"] for site in sites if ".outliers." in site["name"]} == {7}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{share: 2}", r"quantize\.outliers\.share: .*got 2"),
        ("{above: 0.5}", r"quantize.outliers.above"),
        ("{bits: 0}", r"quantize.outliers.bits"),
        ("{most: 3}", r"quantize.outliers.most"),
        ("{layers: [nothing]}", r"outliers.layers.*nothing"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_trains(
    options: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BitsmithError, match=message):
        run(load_recipe(None, [*QUICK, "methods=[]", f"quantize.outliers={options}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
