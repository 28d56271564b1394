"""`bitsmith evaluate`: the model of a run on its own or on other data; under shifts; questions; flatness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitsmith.cli.options import Json, OtherData, OwnModel, RunDirectory
from bitsmith.cli.show import output, print_json, table

EXAMPLES = (
    ("bitsmith evaluate runs/digits", "on the test images of the run"),
    (
        "bitsmith evaluate runs/digits --shift corruptions --out shifts.html",
        "float and quantized, with pictures",
    ),
    ("bitsmith evaluate runs/digits --shift noise,pgd --severity 3", "two shifts at one severity"),
    ("bitsmith evaluate runs/digits --data npz:mine.npz", "on your own images, resized"),
    (
        "bitsmith evaluate runs/digits --flatness --out flatness.html",
        "how flat its minimum is, with pictures",
    ),
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
            help="default (what the run measured), all (whatever these data know: corruptions and attacks of "
            "images, a left-out domain, typos and other prose of text, a table's other rows), corruptions, "
            "adversarial, domains, text, covariate; or names of shifts, as noise,jpeg,pgd.",
            show_default=False,
        ),
    ] = None,
    severity: Annotated[
        list[int] | None,
        typer.Option(
            metavar="1..5", help="Only this severity; repeatable. Default: all.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="Also write a page with pictures of the shifts, or of flatness."
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
    flatness: Annotated[
        bool,
        typer.Option(
            "--flatness",
            help="Sharpness, top Hessian eigenvalue and loss of the models as they were trained.",
        ),
    ] = False,
    radius: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="How far sharpness looks, a share of every tensor's norm. Default: as the run, 0.005.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Training rows that flatness is measured on. Default: as the run, 512.",
            show_default=False,
        ),
    ] = None,
    model: OwnModel = None,
    json: Json = False,
) -> None:
    """Measure the model of a run on its test split, or on yours; under shifts; on questions; its flatness."""
    from bitsmith.errors import RecipeError
    from bitsmith.recipe.reopen import ask_run, evaluate_run, flatness_of_run

    for option, value in (("--radius", radius), ("--rows", rows)):
        if value is not None and not flatness:
            raise RecipeError("flatness is not asked for", where=option, got=value, remedy="Give --flatness")
    if flatness:
        others = {"--shift": shift, "--severity": severity, "--questions": questions, "--limit": limit}
        for option, other in others.items():
            if other:
                remedy = "Leave one out"
                raise RecipeError("this is not of flatness", where=option, got=other, remedy=remedy)
        flat = flatness_of_run(run, radius=radius, rows=rows, data=data, page=out, factory=model)
        print_json(flat) if json else _show_flatness(flat, out)
        return
    for option, given in (("--severity", severity), ("--out", out)):
        if given and shift is None:
            remedy = "Give --shift SUITE" + ", or --flatness" * (option == "--out")
            raise RecipeError("there is no shift", where=option, got=given, remedy=remedy)
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
    result = evaluate_run(run, data=data, shift=shift, severities=severity, page=out, factory=model)
    print_json(result) if json else _show(result)
    if out is not None and not json:
        output().print(f"Page {out}")


def _show(result: dict[str, Any]) -> None:
    from bitsmith.report.words import percent

    if "shifts" in result:
        _show_shifts(result)
        return
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
        row = ("as they are", percent(result["mean_iou"], 2), percent(result["accuracy"], 2))
        output().print(table(_title(result), ("", "mean IoU", "pixels right"), [row]))
        return
    output().print(table(_title(result), ("", "accuracy"), [("as it is", percent(result["accuracy"], 2))]))


def _title(result: dict[str, Any]) -> str:
    unit = next(unit for unit in ("images", "rows", "sequences") if unit in result)
    converted = f", {result['converted']}" if "converted" in result else ""
    return f"{result['data']}: {result[unit]} test {unit}{converted}"


def _show_shifts(result: dict[str, Any]) -> None:
    """A row for each shift: float and quantized, then quantized at each severity."""
    from bitsmith.report.shifts import measured, rows, severities

    found = result["shifts"]
    columns, cells = rows(found)
    notes = []
    if any(column.isdigit() for column in columns):
        notes = [f"Means of {severities(found)}", "columns with a number: quantized at that severity"]
    if "float" not in found["figures"]:
        notes.append("this run has not kept its float model")
    caption = "; ".join(notes)
    output().print(table(f"{_title(result)}: {measured(found)}", columns, cells, caption=caption))


def _show_flatness(found: dict[str, Any], page: Path | None) -> None:
    """A row for each model."""
    from bitsmith.report.flatness import explained, rows

    columns, cells = rows(found)
    notes = [explained(found)]
    if "float" not in found["models"]:
        notes.append("this run has not kept its float model")
    title = f"{found['data']}: flatness on {found['rows']} training {found['unit']}"
    lower = [column.lower() for column in columns]
    output().print(table(title, lower, [[row[0].lower(), *row[1:]] for row in cells]))
    output().print("; ".join(notes))
    if page is not None:
        output().print(f"Page {page}")


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
