"""A method is one file: without it the package still imports, and so do the other methods."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.package import PACKAGE

BASE = {"__init__", "method"}
METHODS = sorted(path.stem for path in (PACKAGE / "methods").glob("*.py") if path.stem not in BASE)


@pytest.mark.parametrize("gone", [*METHODS, "a_method_of_the_test"])
def test_the_package_imports_without_a_method(gone: str, tmp_path: Path) -> None:
    copy = tmp_path / "bitsmith"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "methods" / f"{gone}.py").unlink(missing_ok=True)
    rest = [f"bitsmith.methods.{name}" for name in ["method", *METHODS] if name != gone]
    program = "\n".join(
        [
            "import pathlib, bitsmith",
            f"assert pathlib.Path(bitsmith.__file__).is_relative_to({str(tmp_path)!r})",
            f"import bitsmith.train, bitsmith.export, bitsmith.recipe, {', '.join(rest)}",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
