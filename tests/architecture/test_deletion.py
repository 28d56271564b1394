"""A method is one file: without it the package still imports, and so do the other methods."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.package import PACKAGE

BASE = {"__init__", "method"}
METHODS = sorted(path.stem for path in (PACKAGE / "methods").glob("*.py") if path.stem not in BASE)
# torch is imported once, and each copy of the package in a process that splits off after that
PROGRAM = """
import importlib, os, pathlib, sys, torch
place, gone, *rest = sys.argv[1:]
for one in gone.split(","):
    child = os.fork()
    if not child:
        sys.path.insert(0, str(pathlib.Path(place) / one))
        try:
            for name in ("", ".train", ".export", ".recipe", *(f".methods.{m}" for m in rest if m != one)):
                found = importlib.import_module(f"bitsmith{name}")
                assert pathlib.Path(found.__file__).is_relative_to(pathlib.Path(place) / one)
        except BaseException as error:
            print(f"without {one}: {error!r}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system splits no process")
def test_the_package_imports_without_any_one_method(tmp_path: Path) -> None:
    each = [*METHODS, "a_method_of_the_test"]
    for gone in each:
        copy = tmp_path / gone / "bitsmith"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "methods" / f"{gone}.py").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), ",".join(each), "method", *METHODS],
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
