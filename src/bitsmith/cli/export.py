"""`bitsmith export`: write the model of a run in other formats, and verify each in its runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitsmith.cli.show import output, print_json, table

EXAMPLES = (
    ("bitsmith export runs/digits --to onnx", "for ONNX Runtime"),
    ("bitsmith export runs/digits --to native,onnx --json", "both formats; the certificate as JSON"),
)


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    to: Annotated[
        str, typer.Option("--to", metavar="FORMATS", help="native, onnx, or both with a comma.")
    ] = "native,onnx",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="module:factory",
            help="What builds the model, where it is not a built-in one.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="What to verify on, where the run's data is not built in.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the certificate and nothing else.")] = False,
) -> None:
    """Export the trained codes of a run, never re-quantized, and run each file in its own runtime.

    A file that does not compute what was trained is an error (exit code 1).
    """
    from bitsmith.recipe.reopen import export_run

    certificate, paths = export_run(run, [name.strip() for name in to.split(",")], data=data, factory=model)
    if json:
        print_json(certificate)
        return
    from bitsmith.report.words import size

    rows = [(name, size(_bytes(path)), path) for name, path in paths.items()]
    output().print(table("Exported and verified", ("format", "size", "path"), rows))


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else list(path.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())
