"""`import bitsmith` is cheap: what only some users need is imported where it is used.

Seconds are not asserted, as they depend on the machine; the modules that would cost them are.
"""

import subprocess
import sys

import pytest

from tests.architecture.package import ROOT

HEAVY = [
    "lm_eval",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "PIL",
    "pydantic",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "tokenizers",
    "transformers",
    "typer",
    "yaml",
]


def imported_by(program: str) -> set[str]:
    """The top-level modules that a new interpreter has loaded after ``program``."""
    program = f"{program}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "program",
    [
        "import bitsmith",
        "import bitsmith as bs; bs.Scheme; bs.prepare; bs.calibrate; bs.finalize; bs.save; bs.load",
    ],
    ids=["the package", "a model prepared, finalized and saved"],
)
def test_heavy_modules_are_not_imported(program: str) -> None:
    # torch itself brings some of them along where they are installed; only what we add counts
    added = imported_by(program) - imported_by("import torch")
    assert "bitsmith" in added
    assert sorted(added & set(HEAVY)) == []
