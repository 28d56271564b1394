"""`bitsmith export`: write the model of a run in other formats, and verify each in its runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitsmith.cli.options import Json, OtherData, OwnModel, RunDirectory
from bitsmith.cli.show import output, print_json, table

EXAMPLES = (
    ("bitsmith export runs/digits --to onnx", "for ONNX Runtime"),
    ("bitsmith export runs/digits --to native,onnx --json", "both formats; the certificate as JSON"),
)


def command(
    run: RunDirectory,
    to: Annotated[
        str, typer.Option("--to", metavar="FORMATS", help="native, onnx, or both with a comma.")
    ] = "native,onnx",
    model: OwnModel = None,
    data: OtherData = None,
    json: Json = False,
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
