"""What is refused before any work is done."""

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Bitsmith
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
