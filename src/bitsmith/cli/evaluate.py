"""`bitsmith evaluate`: the model of a run on its own or on other data, and under shifts."""

from __future__ import annotations

from typing import Annotated

import typer

from bitsmith.cli.options import Json, OtherData, OwnModel, RunDirectory
from bitsmith.cli.show import output, print_json, table

EXAMPLES = (
    ("bitsmith evaluate runs/digits", "on the test images of the run"),
    ("bitsmith evaluate runs/digits --shift all", "under noise, blur, contrast, rotation and translation"),
    ("bitsmith evaluate runs/digits --data npz:mine.npz", "on your own images"),
)
LANGUAGE = ("loss", "perplexity", "bits_per_byte")


def command(
    run: RunDirectory,
    data: OtherData = None,
    shift: Annotated[
        str | None,
        typer.Option(
            metavar="SUITE",
            help="all, or one of noise, blur, contrast, rotation, translation.",
            show_default=False,
        ),
    ] = None,
    model: OwnModel = None,
    json: Json = False,
) -> None:
    """Measure the packed model of a run on its test images, or on yours, and under shifts of the input."""
    from bitsmith.recipe.reopen import evaluate_run

    result = evaluate_run(run, data=data, shift=shift, factory=model)
    if json:
        print_json(result)
        return
    from bitsmith.report.words import percent

    rows = [(name, percent(value, 2)) for name, value in result["shift"].items()]
    if "perplexity" in result:
        title = f"{result['data']}: {result['sequences']} test sequences"
        figures = ((key.replace("_", " "), f"{result[key]:.4g}") for key in LANGUAGE)
        output().print(table(title, ("", ""), [*figures, ("accuracy", percent(result["accuracy"], 2))]))
        return
    rows = [("as it is", percent(result["accuracy"], 2)), *rows]
    title = f"{result['data']}: {result['images']} test images"
    output().print(table(title, ("", "accuracy"), rows))
