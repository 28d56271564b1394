"""The recipe's `quantize.outliers:`: input channels whose values dwarf the others, in a layer of their own.

They are looked for in the trained float model, on the samples that ranges are calibrated on, so that a
resumed run finds the same. What was found is in FILE; the parts are sites like any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from bitsmith.files import read_json, write_json
from bitsmith.quantization.outliers import linear_layers, split_as, split_outliers, splits_of
from bitsmith.recipe.schema import Recipe
from bitsmith.tasks import Examples

FILE = "outliers.json"


def check(recipe: Recipe, model: nn.Module) -> None:
    """Find out before a long training what `split` would refuse. Raises SiteError."""
    if recipe.quantize.outliers is not None:
        linear_layers(model, recipe.quantize.outliers.layers)


def split(recipe: Recipe, model: nn.Module, data: Examples, out: Path | None = None) -> None:
    """Split the layers of the float ``model`` that have outliers, in place, and write FILE into ``out``;
    nothing where the recipe has no such section. Raises SiteError for a glob that matches no Linear."""
    spec = recipe.quantize.outliers
    if spec is None:
        return
    batches = [x for x, _ in data.drawn(recipe.quantize.calibration_samples, recipe.train.seed)]
    found = split_outliers(model, batches, share=spec.share, above=spec.above, layers=spec.layers)
    if out is not None:
        write_json(out / FILE, {"version": 1, "bits": spec.bits, "channels": found})


def split_again(recipe: Recipe, model: nn.Module, run: Path) -> nn.Module:
    """``model`` split as that of a finished run. Raises FormatError."""
    if recipe.quantize.outliers is None:
        return model
    return split_as(model, read_json(run / FILE, "list of outliers")["channels"])


def overrides(recipe: Recipe, model: nn.Module) -> dict[str, dict[str, Any]]:
    """The width of the parts that hold outliers, one exact name each."""
    spec = recipe.quantize.outliers
    if spec is None:
        return {}
    both = ("weight", "input") if recipe.quantize.activations is not None else ("weight",)
    return {f"{layer}.outliers.{end}": {"bits": spec.bits} for layer in splits_of(model) for end in both}
