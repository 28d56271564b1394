"""`bitsmith compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitsmith.cli.show import output, print_json

EXAMPLES = (
    ("bitsmith compare runs/digits runs/digits-2", "in the terminal"),
    ("bitsmith compare runs/* --out compare.html", "with plots"),
)


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Also write a page with plots.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the metrics of all runs as JSON.")] = False,
) -> None:
    """Show runs side by side: accuracy, size and BOPs, and which of them no other beats."""
    from bitsmith.cli.summary import side_by_side
    from bitsmith.report import write_comparison
    from bitsmith.report.metrics import read_run

    read = [read_run(run) for run in runs]
    if out is not None:
        write_comparison([run.directory for run in read], out)
    if json:
        print_json({run.name: dict(run.metrics) for run in read})
        return
    console = output()
    console.print(side_by_side(read))
    if out is not None:
        console.print(f"Page {out}")
