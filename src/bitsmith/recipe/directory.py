"""The run directory: which file is where, who may write to it, and what a resumed run finds.

A directory belongs to one recipe and to one process at a time. A stage is finished when its file in
`checkpoints/` exists; a resumed run loads it instead of doing the stage again. Nothing here trains.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from bitsmith.errors import FormatError, RecipeError
from bitsmith.files import directory_lock, load_tensors, save_tensors, write_atomic
from bitsmith.recipe.load import load_recipe
from bitsmith.recipe.paths import whole
from bitsmith.recipe.schema import Recipe

RUNS = Path("runs")
BEFORE_WORK = {"recipe.yaml", ".lock"}


@contextlib.contextmanager
def open_run(out: Path, recipe: Recipe, resume: bool) -> Iterator[Path]:
    """Hold the run directory and put the resolved recipe in it. Raises RecipeError, RunError where taken."""
    if out.exists() and not out.is_dir():
        raise _taken(out, "this is a file, not a directory", "Choose another --out")
    with hold(out):
        if _begun(out):
            if not resume:
                done = "a finished" if (out / "metrics.json").exists() else "an unfinished"
                raise _taken(
                    out,
                    f"this directory already holds {done} run",
                    "Go on with --resume, or choose another --out",
                )
            _same_recipe(out / "recipe.yaml", recipe)
        write_atomic(out / "recipe.yaml", dump(recipe).encode())
        yield out


@contextlib.contextmanager
def hold(out: Path) -> Iterator[None]:
    """Hold ``out`` for this process, made where it is not there. An error that comes before any work was
    saved takes away what was made: the folders, the recipe and the lock; what was there stays as it was."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    kept = {path.name for path in out.iterdir()} if not made else set()
    with directory_lock(out):
        try:
            yield
        except BaseException:
            # Still under the lock; whatever cannot be taken away (somebody has put a file there) stays.
            with contextlib.suppress(OSError):
                if {path.name for path in out.iterdir()} - kept <= BEFORE_WORK:
                    for name in BEFORE_WORK - kept:
                        (out / name).unlink(missing_ok=True)
                    for path in made:
                        path.rmdir()
            raise


def _begun(out: Path) -> bool:
    """Whether ``out`` holds a run, and not only what one writes before its first stage."""
    names = {path.name for path in out.iterdir()}
    return "recipe.yaml" in names and bool(names - BEFORE_WORK)


def _taken(out: Path, what: str, remedy: str) -> RecipeError:
    # Nothing failed yet: the value of --out is wrong, which is the user's input (exit code 2).
    return RecipeError(what, where=f"--out {out}", remedy=remedy)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with whole paths: it will be read from another folder."""
    return yaml.safe_dump(whole(recipe.to_dict()), sort_keys=False, default_flow_style=None, width=100)


def _same_recipe(path: Path, recipe: Recipe) -> None:
    """A resumed run may not change what was asked. Raises RecipeError naming the first key that differs."""
    before, now = (_flat(whole(one.to_dict())) for one in (load_recipe(path), recipe))
    for key in [*before, *now]:
        if before.get(key) != now.get(key):
            raise RecipeError(
                f"the run in this directory was started with another {key}",
                where=f"--resume {path.parent}",
                got=_text(now.get(key)),
                expected=_text(before.get(key)),
                remedy="Resume without changes, or choose another --out",
            )


def _text(value: Any) -> str:
    return "nothing" if value is None else str(value)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {
            k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}".lstrip(".")).items()
        }
    return {prefix: value}


def new_directory(name: str, runs: Path = RUNS) -> Path:
    """The first of ``runs/NAME``, ``runs/NAME-2``, ... that holds nothing."""
    names = (runs / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    return next(path for path in names if not path.exists())


def latest_directory(name: str, runs: Path = RUNS) -> Path:
    """The run that was last begun under this name, for --resume without --out. Raises RecipeError."""
    numbered = re.compile(re.escape(name) + r"(-\d+)?")
    found = [path for path in runs.glob("*") if numbered.fullmatch(path.name) and _begun(path)]
    if not found:
        raise _taken(runs / name, "there is no run to resume", "Leave --resume out, or name the run by --out")
    return max(found, key=lambda path: (path / "recipe.yaml").stat().st_mtime)


# ---- finished stages


def stage_path(out: Path, stage: str) -> Path:
    """Where the checkpoint of a finished stage lies."""
    return out / "checkpoints" / f"{stage}.safetensors"


def save_stage(out: Path, stage: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Mark ``stage`` as finished: its tensors, and plain ``facts`` such as history and seconds."""
    save_tensors(stage_path(out, stage), dict(tensors), {"bitsmith_stage": stage, "facts": json.dumps(facts)})


def load_stage(out: Path, stage: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `save_stage` wrote, or None where the stage is not finished. Raises FormatError."""
    path = stage_path(out, stage)
    if not path.exists():
        return None
    tensors, metadata = load_tensors(path, "checkpoint", mark="bitsmith_stage")
    if metadata.get("bitsmith_stage") != stage:
        raise FormatError(
            "this is not a checkpoint of ours",
            where=str(path),
            got=metadata.get("bitsmith_stage", "a foreign file"),
            expected=f"the finished stage {stage!r}",
            remedy="Delete it; --resume then does the stage again",
        )
    return tensors, json.loads(metadata["facts"])
