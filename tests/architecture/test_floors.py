"""The floors of docs/architecture.md, checked by import-linter: imports go downward only.

The contracts stand in pyproject.toml. The last tests break them on purpose, in a copy: a contract that
nothing can break would be decoration.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.package import PACKAGE, ROOT


def lint(root: Path) -> tuple[int, str]:
    """Exit status and output of import-linter on the package under root/src."""
    program = (
        "import sys; sys.path.insert(0, 'src'); from importlinter.cli import lint_imports;"
        "sys.exit(lint_imports(config_filename='pyproject.toml', no_cache=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "src" / "bitsmith", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_go_downward_only() -> None:
    status, output = lint(ROOT)
    assert status == 0, output


def test_a_folder_without_a_floor_is_refused(copy: Path) -> None:
    (copy / "src/bitsmith/basement").mkdir()
    (copy / "src/bitsmith/basement/__init__.py").touch()
    status, output = lint(copy)
    assert status != 0
    assert "basement" in output


@pytest.mark.parametrize(
    ("floor", "line", "broken"),
    [
        ("numerics", "import bitsmith.quantization", "Imports go downward only"),
        ("numerics", "import bitsmith.errors", "numerics is torch"),
        ("numerics", "import bitsmith.kernels", "Imports go downward only"),
        ("kernels", "import bitsmith.quantization", "Imports go downward only"),
        ("post_training", "import bitsmith.methods", "Imports go downward only"),
        ("quantization", "import onnx", "other people's file formats"),
        ("quantization", "import rich.table", "the terminal"),
        ("train", "import yaml", "YAML"),
        ("train", "import sklearn.datasets", "data sets"),
    ],
)
def test_a_forbidden_import_is_refused(copy: Path, floor: str, line: str, broken: str) -> None:
    (copy / "src/bitsmith" / floor / "intruder.py").write_text(line + "\n")
    status, output = lint(copy)
    assert status != 0
    assert f"{floor}.intruder" in output
    assert any(broken in row and "BROKEN" in row for row in output.splitlines()), output


def test_a_method_that_imports_another_is_refused(copy: Path) -> None:
    (copy / "src/bitsmith/methods/left.py").write_text("import bitsmith.methods.method\n")
    (copy / "src/bitsmith/methods/right.py").write_text("import bitsmith.methods.left\n")
    (copy / "src/bitsmith/methods/method.py").touch()
    status, output = lint(copy)
    assert status != 0
    assert "A method never imports another method BROKEN" in output
