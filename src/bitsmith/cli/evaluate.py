"""`bitsmith evaluate`: the model of a run on its own or on other data, under shifts, and on questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitsmith.cli.options import Json, OtherData, OwnModel, RunDirectory
from bitsmith.cli.show import output, print_json, table

EXAMPLES = (
    ("bitsmith evaluate runs/digits", "on the test images of the run"),
    ("bitsmith evaluate runs/digits --shift all", "under noise, blur, contrast, rotation and translation"),
    ("bitsmith evaluate runs/digits --data npz:mine.npz", "on your own images"),
    ("bitsmith evaluate runs/language --questions arc.jsonl", "how many questions a language model answers"),
)
LANGUAGE = ("loss", "perplexity", "bits_per_byte")
SHARES = ("accuracy", "normalized_accuracy")  # of the questions


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
    questions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Score the run's language models on these questions, one JSON object a line.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ask the first N alone.", show_default=False)
    ] = None,
    model: OwnModel = None,
    json: Json = False,
) -> None:
    """Measure the packed model of a run on its test split, or on yours; under shifts; on questions."""
    from bitsmith.errors import RecipeError
    from bitsmith.recipe.reopen import ask_run, evaluate_run

    if questions is not None:
        if shift is not None:
            raise RecipeError("questions know no shift", where="--shift", got=shift, remedy="Leave one out")
        asked = ask_run(run, questions, limit=limit, data=data, factory=model)
        print_json(asked) if json else _show_answers(asked)
        return
    if limit is not None:
        raise RecipeError(
            "there are no questions", where="--limit", got=limit, remedy="Give --questions FILE"
        )
    result = evaluate_run(run, data=data, shift=shift, factory=model)
    print_json(result) if json else _show(result)


def _show(result: dict[str, Any]) -> None:
    from bitsmith.report.words import percent

    if "perplexity" in result:
        title = f"{result['data']}: {result['sequences']} test sequences"
        rows = [(key.replace("_", " "), f"{result[key]:.4g}") for key in LANGUAGE]
        rows += [
            (key.replace("_", " "), percent(result[key], 2))
            for key in ("accuracy", "exact_match")
            if key in result
        ]
        output().print(table(title, ("", ""), rows))
        return
    if "mean_iou" in result:
        title = f"{result['data']}: {result['images']} test images"
        shifted = [(name, percent(value, 2), "") for name, value in result["shift"].items()]
        figures = ("as they are", percent(result["mean_iou"], 2), percent(result["accuracy"], 2))
        output().print(table(title, ("", "mean IoU", "pixels right"), [figures, *shifted]))
        return
    rows = [("as it is", percent(result["accuracy"], 2))]
    rows += [(name, percent(value, 2)) for name, value in result["shift"].items()]
    title = f"{result['data']}: {result['images']} test images"
    output().print(table(title, ("", "accuracy"), rows))


def _show_answers(asked: dict[str, Any]) -> None:
    """A row for each model, a column for each share with its standard error."""
    models = {name: asked[name] for name in ("float", "quantized") if asked[name] is not None}
    shares = [key for key in SHARES if key in asked["quantized"]]
    rows = [(name, *(_share(scores, key) for key in shares)) for name, scores in models.items()]
    title = f"{Path(asked['file']).name}: {asked['questions']} questions"
    columns = ("", *(key.replace("_", " ") for key in shares))
    output().print(table(title, columns, rows, caption="\u00b1: the standard error"))


def _share(scores: dict[str, float], key: str) -> str:
    from bitsmith.report.words import percent

    return f"{percent(scores[key], 1)} \u00b1 {percent(scores[f'{key}_standard_error'], 1)}"
