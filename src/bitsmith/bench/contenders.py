"""The forms in which one model can run on this machine, each opened as a function from a batch to outputs.

float32       the float model that the run began with, by PyTorch
native        the exported native model, by products of integers
dequantized   the same file, its weights unpacked in every forward and multiplied as floats
onnxruntime   the exported ONNX file, on as many threads, with the options that its certificate names
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from bitsmith.errors import BitsmithError, FormatError, RecipeError
from bitsmith.export import load
from bitsmith.export.onnx import run as run_onnx
from bitsmith.export.onnx import session
from bitsmith.recipe.reopen import data_of_run, model_of_run
from bitsmith.tasks import Examples, build
from bitsmith.tasks import load as load_data

Predict = Callable[[Tensor], Any]
NAMES = ("float32", "native", "dequantized", "onnxruntime")


def the_run(path: Path) -> Path | None:
    """The run directory that ``path`` is, or that it is the ``model/`` of; None for another native model.
    Raises FormatError where it is neither."""
    run = path.parent if path.name == "model" and (path.parent / "recipe.yaml").exists() else path
    if (run / "recipe.yaml").exists():
        if not (run / "model" / "config.json").exists():
            raise FormatError(
                "this run has no native model",
                where=str(run),
                remedy=f"Finish it with --resume, or write one: bitsmith export {run} --to native",
            )
        return run
    if (path / "config.json").exists():
        return None
    raise FormatError(
        "this is no run and no model: it has neither recipe.yaml nor config.json"
        if path.is_dir()
        else "there is no such directory",
        where=str(path),
        expected="a run directory, or an exported native model",
        remedy="Give the --out of a finished `bitsmith run`",
    )


def data_for(path: Path, data: str | None) -> Examples:
    """The inputs: of the run, or ``data``. Raises RecipeError where a model alone comes without any."""
    run = the_run(path)
    if run is not None:
        return data_of_run(run, data)
    if data is None:
        raise RecipeError(
            "a model alone does not say what its inputs are",
            where=str(path),
            expected="a run directory, or data for the model",
            remedy="Give --data, as --data digits",
        )
    return load_data(data)


def contender(path: Path, name: str, factory: str | None = None) -> Predict | str:
    """One of NAMES, opened; or why it is not there."""
    run = the_run(path)
    if name == "onnxruntime":
        return _onnx(path if run is None else run)
    if run is not None:
        model = model_of_run(run, name, factory=factory)
        return "this run has not kept its float model" if model is None else model
    if name == "float32":
        return "a native model alone has no float one beside it"
    return load(path, build(factory) if factory else None, kernels=name == "native")


def _onnx(folder: Path) -> Predict | str:
    file = folder / "model.onnx"
    if not file.exists():
        return f"there is no {file}"
    try:
        opened = session(file)
    except BitsmithError as error:  # onnxruntime is not installed
        return str(error)
    return lambda x: run_onnx(opened, x, batch_size=len(x))
