"""`bitsmith inspect`: what a model or a run is made of, and what this machine offers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitsmith.cli.show import output, print_json, table

EXAMPLES = """
[bold]Examples[/bold]

bitsmith inspect runs/digits                  bits, bytes and BOPs per layer; what stays in float, and why\n
bitsmith inspect runs/digits/model --json     the exported model itself\n
bitsmith inspect --system                     versions, threads and instruction sets
"""


def command(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL_OR_RUN]", help="A run directory or an exported native model.", show_default=False),
    ] = None,
    system: Annotated[bool, typer.Option("--system", help="Show the machine and the versions in use.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
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
        found["system"] = environment()
    if json:
        print_json(found)
        return
    console = output()
    if model is not None:
        _show(console, found)
    if system:
        console.print(table("System", ("", "value"), [(name, _text(value)) for name, value in found["system"].items()]))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _show(console: Any, found: dict[str, Any]) -> None:
    from bitsmith.report.words import count, size

    sites = [
        (site["name"], site["kind"], site["bits"], site["grid"], _granularity(site), size(site["bytes"]))
        for site in found["sites"]
    ]
    console.print(table("Sites", ("site", "kind", "bits", "grid", "scales per", "size"), sites))
    if layers := found.get("layers"):
        rows = [
            (layer["name"], layer["kind"], _pair(layer), count(layer["macs"]), size(layer["weight_bytes"]), count(layer["bops"]))
            for layer in layers
        ]
        console.print(table("Layers", ("layer", "kind", "bits w × a", "MACs", "weights", "BOPs"), rows))
    if leftovers := found.get("leftovers"):
        rows = [(left["name"], left["elements"], left["reason"]) for left in leftovers]
        made = table("In float", ("name", "elements", "why"), rows)
        made.columns[2].justify, made.columns[2].no_wrap = "left", False
        console.print(made)
    if totals := found.get("totals"):
        console.print(table("Totals", ("", "value"), totals.items()))


def _granularity(site: dict[str, Any]) -> str:
    return f"group of {site['group_size']}" if site.get("group_size") else str(site["granularity"])


def _pair(layer: dict[str, Any]) -> str:
    first, second = layer["operand_bits"]
    return f"{first} × {second}"
