"""`bitsmith evaluate`: the model of a run on its own or on other data, and under shifts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitsmith.cli.show import output, print_json, table

EXAMPLES = (
    ("bitsmith evaluate runs/digits", "on the test images of the run"),
    ("bitsmith evaluate runs/digits --shift all", "under noise, blur, contrast, rotation and translation"),
    ("bitsmith evaluate runs/digits --data npz:mine.npz", "on your own images"),
)


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Other data, as in a recipe: digits, npz:FILE, folder:DIR, module:factory.",
            show_default=False,
        ),
    ] = None,
    shift: Annotated[
        str | None,
        typer.Option(
            metavar="SUITE",
            help="all, or one of noise, blur, contrast, rotation, translation.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="module:factory",
            help="What builds the model, where it is not a built-in one.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Measure the packed model of a run on its test images, or on yours, and under shifts of the input."""
    from bitsmith.recipe.reopen import evaluate_run

    result = evaluate_run(run, data=data, shift=shift, factory=model)
    if json:
        print_json(result)
        return
    from bitsmith.report.words import percent

    rows = [(name, percent(value, 2)) for name, value in result["shift"].items()]
    rows = [("as it is", percent(result["accuracy"], 2)), *rows]
    title = f"{result['data']}: {result['images']} test images"
    output().print(table(title, ("", "accuracy"), rows))
