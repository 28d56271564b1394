"""`bitsmith inspect`: what a model or a run is made of, and what this machine offers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bitsmith.cli.options import Json
from bitsmith.cli.show import facts, output, print_json, table

EXAMPLES = (
    ("bitsmith inspect runs/digits", "bits, bytes and BOPs per layer; what stays in float, and why"),
    ("bitsmith inspect runs/digits/model --json", "the exported model itself, for a program"),
    ("bitsmith inspect --system", "versions, threads, instruction sets and the integer kernels in use"),
)


def command(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL_OR_RUN", help="A run directory or an exported native model.", show_default=False
        ),
    ] = None,
    system: Annotated[
        bool, typer.Option("--system", help="Show the machine and the versions in use.")
    ] = False,
    json: Json = False,
) -> None:
    """Show sites, bits, bytes, BOPs and coverage: nothing is quantized, or left out, in silence."""
    from bitsmith.errors import RecipeError
    from bitsmith.recipe.environment import environment
    from bitsmith.recipe.reopen import inspect_path

    if model is None and not system:
        raise RecipeError(
            "there is nothing to inspect",
            where="bitsmith inspect",
            expected="a run directory, a model directory, or --system",
            remedy="Try: bitsmith inspect runs/digits",
        )
    found: dict[str, Any] = inspect_path(model) if model is not None else {}
    if system:
        from bitsmith.kernels.choose import describe

        found["system"] = environment() | describe()
    if json:
        print_json(found)
        return
    console = output()
    if model is not None:
        _show(console, found)
    if system:
        console.print(facts("System", found["system"]))


def _show(console: Console, found: dict[str, Any]) -> None:
    from bitsmith.report.words import count, size, widths

    show_sites(console, found["sites"])
    if layers := found.get("layers"):
        rows = [
            (
                layer["name"],
                layer["kind"],
                " × ".join(map(widths, layer["operand_bits"])),
                count(layer["macs"]),
                size(layer["weight_bytes"]),
                count(layer["bops"]),
            )
            for layer in layers
        ]
        console.print(table("Layers", ("layer", "kind", "bits", "MACs", "weights", "BOPs"), rows))
    show_leftovers(console, found.get("leftovers") or [])
    if totals := found.get("totals"):
        console.print(facts("Totals", {name: _figure(name, value) for name, value in totals.items()}))


def _figure(name: str, value: float) -> str:
    from bitsmith.report.words import count, percent, size

    if "bytes" in name:
        return size(value)
    if "bits" in name:
        return f"{value:.2f}"
    return percent(value) if "share" in name else count(value)


def show_sites(console: Console, sites: list[dict[str, Any]]) -> None:
    """One row a site: bits, grid and what shares a scale; in float it has neither."""
    from bitsmith.report.metrics import FLOAT_BITS
    from bitsmith.report.words import DASH, widths

    rows = [
        (s["name"], s["kind"], widths(s["bits"]))
        + ((DASH, DASH) if s["bits"] == FLOAT_BITS else (_grid(s["grid"]), _shared(s)))
        for s in sites
    ]
    console.print(table("Sites", ("site", "kind", "bits", "grid", "a scale per"), rows))


def show_leftovers(console: Console, leftovers: list[dict[str, Any]]) -> None:
    """One row a reason why tensors stay in float."""
    from bitsmith.report.record import by_reason

    if not leftovers:
        return
    rows = [
        (", ".join(left["name"] for left in same), sum(left["elements"] for left in same), reason)
        for reason, same in by_reason(leftovers).items()
    ]
    made = table("In float", ("tensors", "elements", "why"), rows)
    made.columns[2].justify, made.columns[2].no_wrap = "left", False
    console.print(made)


def _grid(grid: Any) -> str:
    """Channels of different widths may be on different grids."""
    return grid if isinstance(grid, str) else " and ".join(dict.fromkeys(grid))


def _shared(site: dict[str, Any]) -> str:
    return f"group of {site['group_size']}" if site.get("group_size") else str(site["granularity"])
