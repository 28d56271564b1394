"""`bitsmith sensitivity`: where bits matter, before anything is trained with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from bitsmith.cli.options import Json, Overrides, directory, recipe_file
from bitsmith.cli.show import Display, output, print_json, table

EXAMPLES = (
    ("bitsmith sensitivity my.yaml", "every site at every width, and the plan of the recipe's budget"),
    ("bitsmith sensitivity my.yaml --budget bops=0.02", "the plan within 2 % of float's bit operations"),
    ("bitsmith sensitivity my.yaml --budget weight_bytes=4000 --budget bops=0.05", "several limits at once"),
    ("bitsmith sensitivity my.yaml --out runs/digits", "with the float model that a run has trained already"),
)


def command(
    recipe: Annotated[Path | None, recipe_file("Without it, the handwritten digits.")] = None,
    out: Annotated[
        Path | None,
        directory(
            "Where results go; its float model is used again, as that of a run is. "
            "Default: runs/NAME-sensitivity."
        ),
    ] = None,
    set_: Overrides = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=LIMIT",
            help="Choose a plan within this: bops, weight_bytes, activation_bytes (up to 1 a share of "
            "float), average_weight_bits, average_activation_bits or table:NAME; repeatable. Default: the "
            "budget of the recipe's search.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(metavar="N", help="Measure the loss of the N pairs with the highest scores.")
    ] = 10,
    json: Json = False,
) -> None:
    """Score every site at every width, and show the plan that a budget would give.

    The float model is trained (or found in DIR), and one backward per batch gives each site and width a
    score: its output error, weighted by the gradient of the loss. The highest scores are checked by measuring
    the loss. A budget then gets its exact best plan by these scores, and each line says what raising that
    site to its next width would cost. DIR holds sensitivity.json, sensitivity.html and
    plan_by_sensitivity.json, which a recipe can name as its plan.
    """
    from bitsmith.recipe.directory import RUNS
    from bitsmith.recipe.limits import parse_limits
    from bitsmith.recipe.load import load_recipe
    from bitsmith.recipe.sensitivity import analyse

    limits = parse_limits(budget or [])
    resolved = load_recipe(recipe, set_ or [])
    out = out or RUNS / f"{recipe.stem if recipe is not None else 'digits'}-sensitivity"
    with Display(quiet=json) as display:
        found = analyse(resolved, out, limits=limits, top=top, progress=display)
    print_json(found) if json else _show(found, out)


def _show(found: dict[str, Any], out: Path) -> None:
    from bitsmith.report.sensitivity import asked, bits_text, figure, kind_text, unit
    from bitsmith.report.words import bits, points, share, small_percent

    console, by = output(), share(found)
    by_budget = found["plan_from"] == "budget"
    kinds = " / ".join(kind_text(entry["kind"]) for entry in found["budget"])
    widths = sorted({width for site in found["sites"] for width in site["candidates"]})
    made = table(
        "Score of every site and width",
        ("site", *map(bits, widths), "plan" if by_budget else "bits", "next", "price"),
        (),
        caption="Higher hurts more; bold is the plan, dim was asked for by name. "
        f"Price of the next width: share of {'the budget' if by_budget else 'the float model'}'s {kinds}.",
    )
    for site in found["sites"]:
        known = dict(zip(site["candidates"], site["scores"], strict=True))
        chosen = "bold" if site["free"] else "dim bold"
        cells = [
            Text(figure(known[width]) if width in known else "", chosen if width == site["bits"] else "")
            for width in widths
        ]
        wider = site["next"]
        shares = [small_percent(entry["share"]) for entry in wider["price"]] if wider else []
        price = "not on this target" if wider and not shares else " / ".join(f"+{share}" for share in shares)
        made.add_row(
            Text(site["name"], "" if site["free"] else "dim"),
            *cells,
            Text(bits(site["bits"]), chosen),
            bits(wider["bits"]) if wider else "",
            price,
        )
    console.print(Text(asked(found), style="dim"))
    console.print(made)
    if found["measured"]:
        rows = [
            (
                f"{entry['site']} at {bits_text(entry['bits'])}",
                figure(entry["score"]),
                f"{entry['loss']:.3f}",
                f"{entry['increase']:+.3f}",
                points(entry[by.key] - found["float"][by.key]),
            )
            for entry in found["measured"]
        ]
        images, before = found["samples"]["measured"], found["float"]["loss"]
        title = f"Measured on {images} validation {unit(found)} (float: {before:.3f})"
        console.print(table(title, ("that alone", "score", "loss", "more", "points"), rows))
    console.print(f"Page {out / 'sensitivity.html'}\nPlan {out / 'plan_by_sensitivity.json'}")
