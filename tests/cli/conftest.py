"""A small finished run, and a way to call the command line as a user does, in process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from bitsmith.cli.main import main

# Two optimizer steps in each training: enough for every path, in seconds.
QUICK = [
    argument
    for override in (
        *("train.epochs=1", "train.batch_size=640", "float.epochs=1", "export=[native]"),
        *("quantize.weights.calibration=minmax", "quantize.activations.calibration=minmax"),
    )
    for argument in ("--set", override)
]


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


Bitsmith = Callable[..., Result]


@pytest.fixture
def bitsmith(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bitsmith:
    """Call `bitsmith ARGUMENTS`."""
    monkeypatch.delenv("BITSMITH_DEBUG", raising=False)

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run directory; copy it before changing it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["run", "--out", str(out), "--json", *QUICK]) == 0
    return out


def write_images(path: Path, *, classes: Sequence[int] = (0, 1, 2), nan: bool = False) -> Path:
    """An .npz of 24 random 8x8 images whose labels go through ``classes``."""
    random = np.random.default_rng(0)
    images = random.random((24, 1, 8, 8), dtype=np.float32)
    if nan:
        images[5, 0, 3, 3] = np.nan
    labels = np.resize(np.array(classes), 24)
    np.savez(path, train_x=images, train_y=labels, test_x=images[:6], test_y=labels[:6])
    return path
