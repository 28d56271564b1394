"""Options that several commands share, so that one thing has one name and one help everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def _hint(metavar: str, help: str) -> Any:
    return typer.Option(metavar=metavar, help=help, show_default=False)


def recipe_file(help: str) -> Any:
    """The recipe, first after the command; ``help`` says what stands in for it."""
    return typer.Argument(metavar="RECIPE.yaml", help=help, show_default=False)


def directory(help: str) -> Any:
    """--out DIR."""
    return _hint("DIR", help)


Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the recipe, as train.epochs=5; repeatable.",
        show_default=False,
    ),
]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]
OwnModel = Annotated[
    str | None, _hint("module:factory", "What builds the model, where it is not a built-in one.")
]
OtherData = Annotated[
    str | None,
    _hint(
        "DATA",
        "Other data: digits, npz:FILE, folder:DIR, breast_cancer, pydoc, text:PATH, arithmetic, "
        "module:factory.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
