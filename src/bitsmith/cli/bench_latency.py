"""`bitsmith bench latency`: what each layer takes here at each pair of widths, as a table for budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitsmith.cli.options import Json, Overrides
from bitsmith.cli.show import output, print_json, table

EXAMPLES = (
    ("bitsmith bench latency my.yaml", "latency.json: every layer at every pair of the search's candidates"),
    (
        "bitsmith bench latency runs/digits --candidates 2,4,8 --check 3",
        "against whole models of mixed widths",
    ),
    ("bitsmith bench latency my.yaml --runtime onnxruntime", "layers as ONNX Runtime runs them"),
)


def command(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="RECIPE.yaml|RUN",
            help="Whose model is measured; without it, the handwritten digits.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="The table.")] = Path("latency.json"),
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="native or onnxruntime. Default: that of the recipe's target.",
            show_default=False,
        ),
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            metavar="B,B,...",
            help="Widths of all free sites. Default: those of the recipe's search.",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rounds in which all models take turns.")
    ] = 20,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Inputs of an inference.")] = 1,
    check: Annotated[
        int, typer.Option(min=0, metavar="N", help="Also measure N plans of mixed widths, drawn at random.")
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted measurement.")] = False,
    set_: Overrides = None,
    json: Json = False,
) -> None:
    """Measure what every layer of a model takes on this machine, at every pair of widths.

    The file is a cost table: name it in a budget, as tables: [{table: latency.json, limit: 0.5}], where 0.5
    is half of what the float model takes. Times are microseconds of one input. Weights need not be trained.
    """
    from rich.console import Console
    from rich.progress import Progress

    from bitsmith.bench.latency import bench_latency, parse_widths
    from bitsmith.recipe.load import load_recipe

    if recipe is not None and recipe.is_dir():
        from bitsmith.recipe.reopen import refuse_code

        file = recipe / "recipe.yaml"
        resolved = load_recipe(file, set_ or [])
        refuse_code(recipe, resolved, "bitsmith bench latency RECIPE.yaml")
    else:
        resolved = load_recipe(recipe, set_ or [])
    console = Console(stderr=True, highlight=False, quiet=json)
    with Progress(console=console, disable=not console.is_terminal or json) as bar:
        task = bar.add_task("rounds", total=rounds, visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        found = bench_latency(
            resolved,
            out,
            runtime=runtime,
            candidates=None if candidates is None else parse_widths(candidates),
            rounds=rounds,
            batch_size=batch_size,
            check=check,
            resume=resume,
            tell=console.print,
            progress=progress,
        )
    print_json(found) if json else _show(found, out)


def _show(found: dict[str, Any], out: Path) -> None:
    from bitsmith.quantization.bits import in_words

    def pair(entry: dict[str, Any]) -> tuple[int, int]:
        return entry["weight_bits"], entry["activation_bits"]

    console, measured = output(), found["measured"]
    layers: dict[str, dict[tuple[int, int], float]] = {}
    for entry in found["entries"]:
        what = f"{entry['kind']} {'x'.join(map(str, entry.get('shape', ())))}".strip()
        layers.setdefault(f"{what}, {entry['macs']:,} MACs", {})[pair(entry)] = entry["per_layer"]
    widths = sorted({width for known in layers.values() for width in known})
    console.print(
        table(
            f"µs of a layer, {measured['runtime']}",
            ("widths", *(f"{in_words(a)} x {in_words(b)}" for a, b in widths)),
            [
                (name, *(f"{known[w]:.3g}" if w in known else "" for w in widths))
                for name, known in layers.items()
            ],
            caption=f"beside the layers {found['constant']:.3g} µs; half of the rounds lie within "
            f"{measured['spread']['entries']:.0%} of each other",
        )
    )
    console.print(
        table(
            "µs of whole plans",
            ("plan", "predicted", "measured", "ratio", "spread"),
            [
                (
                    one["plan"],
                    f"{one['predicted_us']:.4g}",
                    f"{one['measured_us']:.4g}",
                    f"{one['ratio']:.2f}",
                    f"{one['spread']:.0%}",
                )
                for one in measured["plans"]
            ],
            caption="mixed plans are drawn at random; nothing in the table is taken from them",
        )
    )
    console.print(f"Table {out}")
