"""`bitsmith run`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitsmith.cli.options import Overrides, directory, recipe_file
from bitsmith.cli.show import Display, output, print_json

EXAMPLES = (
    ("bitsmith run", "handwritten digits, in under a minute"),
    ("bitsmith run recipes/weight_only.yaml --out runs/w2", "two-bit weights"),
    ("bitsmith run --set methods.0.budget_search.budget.bops=0.01", "the same job with other values"),
    ("bitsmith run recipes/digits_vit.yaml --dry-run", "sites, cost, memory and time; nothing is trained"),
    ("bitsmith run --resume --out runs/w2", "go on where an interrupted run stopped"),
)


def command(
    recipe: Annotated[Path | None, recipe_file("What to do; without it, the handwritten digits.")] = None,
    out: Annotated[
        Path | None, directory("The run directory. Default: runs/NAME, or NAME-2, NAME-3, ...")
    ] = None,
    set_: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; ends as if it had not been.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, and what it would cost.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print metrics.json (or the prediction) and nothing else.")
    ] = False,
) -> None:
    """Train a float model and a low-bit one, export, verify, report.

    The float baseline is trained (or loaded), quantized after training as a first figure, then trained with
    quantization in the loop. What was learned is packed at its true widths, exported, run in its own
    runtime and compared. The run directory holds metrics.json, plan.json, certificate.json, model/,
    model.onnx and report.html.
    """
    from bitsmith.recipe.directory import latest_directory, new_directory
    from bitsmith.recipe.load import load_recipe
    from bitsmith.recipe.reopen import refuse_code

    name = recipe.stem if recipe is not None else "digits"
    if resume and out is None:
        out = latest_directory(name)
    if resume and recipe is None and out is not None and (out / "recipe.yaml").exists():
        resolved = load_recipe(out / "recipe.yaml", set_ or [])
        refuse_code(out, resolved, f"bitsmith run RECIPE.yaml --resume --out {out}")
    else:
        resolved = load_recipe(recipe, set_ or [])
    if dry_run:
        from bitsmith.cli.predicted import show_prediction
        from bitsmith.recipe.predict import predict

        prediction = predict(resolved)
        print_json(prediction) if json else show_prediction(prediction)
        return
    from bitsmith.recipe.job import run

    out = out or new_directory(name)
    with Display(quiet=json) as display:
        metrics = run(resolved, out, resume=resume, progress=display)
    print_json(metrics) if json else show_summary(out)


def show_summary(out: Path) -> None:
    """The end of a run on one screen."""
    from bitsmith.cli.summary import summary
    from bitsmith.report.metrics import read_run

    output().print(summary(read_run(out)))
