"""The float model of a recipe, apart from a run: trained once in a directory, then shared by what needs it.

The directory is laid out like a run's, so that an existing run lends its float model and `bitsmith run
--resume` takes over one that was trained here. Nothing here quantizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitsmith.errors import FormatError, RecipeError
from bitsmith.files import write_atomic
from bitsmith.recipe.directory import BEFORE_WORK, dump, hold, stage_path
from bitsmith.recipe.job import train_float
from bitsmith.recipe.load import load_recipe
from bitsmith.recipe.paths import whole
from bitsmith.recipe.progress import Progress
from bitsmith.recipe.schema import Recipe
from bitsmith.recipe.threads import enough_threads
from bitsmith.tasks import Examples

DECIDING = ("model", "data", "pretrained", "float")  # the keys that the float model depends on


@contextlib.contextmanager
def open_baseline(out: Path, recipe: Recipe) -> Iterator[Path]:
    """Hold ``out``, new or a run's, for the float model of ``recipe``; a new one gets its recipe.yaml.

    Raises RecipeError where it holds a float model that another recipe trained, RunError where it is in use.
    """
    if out.exists() and not out.is_dir():
        raise RecipeError(
            "this is a file, not a directory", where=f"--out {out}", remedy="Choose another --out"
        )
    with hold(out):
        begun = {path.name for path in out.iterdir()} - BEFORE_WORK
        if begun and (out / "recipe.yaml").exists():
            _same_baseline(out, recipe)
        elif stage_path(out, "float").exists():
            raise FormatError(
                "this directory has a float model and no recipe.yaml that says how it was trained",
                where=f"--out {out}",
                remedy="Choose another --out",
            )
        else:
            write_atomic(out / "recipe.yaml", dump(recipe).encode())
        yield out


def _same_baseline(out: Path, recipe: Recipe) -> None:
    before, now = _deciding(load_recipe(out / "recipe.yaml")), _deciding(recipe)
    for key, value in now.items():
        if before.get(key) != value:
            raise RecipeError(
                f"the float model in this directory belongs to another {key}",
                where=f"--out {out}",
                got=str(value),
                expected=str(before.get(key)),
                remedy="Choose another --out, which trains one anew",
            )


def _deciding(recipe: Recipe) -> dict[str, Any]:
    found = whole(recipe.to_dict())
    flat: dict[str, Any] = {"train.seed": recipe.train.seed}
    for key in DECIDING:
        section = found[key]
        flat.update({f"{key}.{k}": v for k, v in section.items()} if isinstance(section, dict) else {})
        flat.update({} if isinstance(section, dict) else {key: section})
    return flat


def float_model(recipe: Recipe, model: nn.Module, data: Examples, out: Path, tell: Progress) -> float:
    """Train ``model`` by the recipe's `float:` section, or load it where that is done; returns seconds."""
    with (
        torch.random.fork_rng(devices=[]),
        enough_threads(model, data.example(), recipe.train.batch_size),
    ):
        return train_float(recipe, model, data, out, tell)[1]


def lend(source: Path, run: Path) -> None:
    """Give the run directory ``run`` the finished float stage of ``source``, unless it has its own."""
    here, there = stage_path(source, "float"), stage_path(run, "float")
    if here.exists() and not there.exists():
        there.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(there, here.read_bytes())
