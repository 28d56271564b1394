"""`bitsmith sweep`: accuracy over cost, in one command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from bitsmith.cli.options import Json, Overrides, directory, recipe_file
from bitsmith.cli.show import Display, output, print_json, table

EXAMPLES = (
    ("bitsmith sweep my.yaml --budgets 0.02,0.03,0.05", "three shares of float's bit operations"),
    ("bitsmith sweep my.yaml --budgets 3,4,6 --kind average_weight_bits", "by average bits of the weights"),
    ("bitsmith sweep my.yaml --budgets 0.01,0.02,0.03,0.05 --out runs/front --resume", "two points more"),
    ("bitsmith sweep --budgets 0.006,0.008,0.012", "the handwritten digits, with nothing to prepare"),
)


def command(
    budgets: Annotated[
        str,
        typer.Option(
            metavar="B,B,...",
            help="Limits, up to 1 a share of the float model, above absolute; averages in bits.",
        ),
    ],
    recipe: Annotated[
        Path | None,
        recipe_file("A recipe with budget_search among its methods; without it, the handwritten digits."),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="What the budgets limit: bops, weight_bytes, activation_bytes, average_weight_bits, "
            "average_activation_bits or table:NAME.",
        ),
    ] = "bops",
    out: Annotated[
        Path | None, directory("Holds a run directory per budget. Default: runs/NAME-sweep.")
    ] = None,
    set_: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an interrupted sweep, or add budgets to a finished one."),
    ] = False,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold", help="Start every search from sensitivities, none from the plan found before."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Run a recipe once per budget and show accuracy over cost.

    The float model is trained once. Each budget gets a whole run in DIR/KIND-BUDGET, the largest first; the
    recipe's own budget is replaced. A search starts around the plan of the budget before it. Every plan
    competes with a uniform one that trains as long: where a uniform plan is the better one, the table and the
    page say so. DIR holds sweep.json and sweep.html.
    """
    from bitsmith.recipe.directory import RUNS
    from bitsmith.recipe.load import load_recipe
    from bitsmith.recipe.progress import Progress
    from bitsmith.recipe.sweep import parse_budgets, sweep

    wanted = parse_budgets(budgets)
    resolved = load_recipe(recipe, set_ or [])
    out = out or RUNS / f"{recipe.stem if recipe is not None else 'digits'}-sweep"

    @contextlib.contextmanager
    def watch(part: str) -> Iterator[Progress]:
        with Display(quiet=json) as display:
            display.console.print(f"[bold]{part}[/]")
            yield display

    found = sweep(resolved, wanted, out, kind=kind, resume=resume, warm=not cold, watch=watch)
    print_json(found) if json else _show(found, out)


def _show(found: dict[str, Any], out: Path) -> None:
    from bitsmith.report.front import (
        Spot,
        asked,
        budget_text,
        cost_text,
        dominator,
        noise,
        percent,
        spots,
        verdicts,
    )
    from bitsmith.report.words import share, small_percent

    known = spots(found)

    def accuracy(plan: dict[str, Any]) -> str:
        value = plan[share(found).key]
        beaten = dominator(Spot("", "", plan["used"], value, ()), known)
        return f"{'○ ' if beaten else ''}{percent(found, value)}"

    rows = [
        (
            budget_text(found, point["budget"]),
            f"{cost_text(found, point['searched']['used'])} "
            f"({small_percent(point['searched']['used'] / point['limit'])})",
            accuracy(point["searched"]),
            f"{accuracy(point['uniform'])} ({point['uniform']['bits']})" if point["uniform"] else "none fits",
            point["winner"],
        )
        for point in found["points"]
    ]
    console = output()
    console.print(Text(asked(found), style="dim"))
    columns = ("budget", "used (share)", "searched", "uniform", "winner")
    console.print(table("", columns, rows, caption="○ dominated by another plan here"))
    for sentence in verdicts(found):
        console.print(sentence)
    console.print(Text(noise(found), style="dim"))
    console.print(f"Page {out / 'sweep.html'}")
