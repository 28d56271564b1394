"""What is refused before any work is done, and that it leaves nothing behind."""

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import QUICK, Bitsmith
from tests.cli.test_errors import assert_one_line


@pytest.mark.parametrize("formats", [["--to", "onnx"], []], ids=["asked for", "by default"])
def test_a_run_for_no_runtime_has_no_onnx_file_afterwards_either(
    formats: list[str], bitsmith: Bitsmith, finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("target: onnxruntime", "target: research"))
    result = bitsmith("export", run, *formats)
    assert_one_line(result.err, "--to", "onnx", "target research", "Give --to native")
    assert (result.code, result.out) == (2, "")
    assert not (run / "model.onnx").exists()


# What is found out at different moments: data, model, sites, budget.
REFUSED = {
    "data": "data=npz:nowhere.npz",
    "model": "model=nowhere:make",
    "sites": "quantize.overrides={nothing.*: {bits: 4}}",
    "budget": "methods.0.budget_search.budget={bops: 0.001}",
}


@pytest.mark.parametrize("setting", REFUSED.values(), ids=REFUSED)
def test_a_refused_run_leaves_no_directory(
    setting: str, bitsmith: Bitsmith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bitsmith("run", *QUICK, "--set", setting).code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_leaves_directories_of_others_alone(
    bitsmith: Bitsmith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "runs" / "mine"
    mine.mkdir(parents=True)
    refused = ("--set", REFUSED["model"])
    assert bitsmith("run", "--out", mine, *QUICK, *refused).code == 2
    assert list(mine.iterdir()) == [], "empty as it was, and free for another run"
    (mine / "notes.txt").write_text("kept")
    assert bitsmith("run", "--out", mine, *QUICK, *refused).code == 2
    assert bitsmith("run", *QUICK, *refused).code == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]
    assert (mine / "notes.txt").read_text() == "kept"


def test_a_run_that_is_refused_again_keeps_what_it_had_trained(
    bitsmith: Bitsmith, finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("report.html", "metrics.json", "checkpoints/qat.safetensors"):
        (run / name).unlink()
    before = (run / "recipe.yaml").read_text()
    (run / "checkpoints" / "float.safetensors").write_bytes(b"damaged")
    assert bitsmith("run", "--resume", "--out", run).code == 2
    assert (run / "recipe.yaml").read_text() == before
    assert (run / "checkpoints" / "float.safetensors").exists()
