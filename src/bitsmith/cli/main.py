"""The `bitsmith` command: which commands there are, and how an error becomes one line and an exit code.

Each command lives in a file of its own and imports torch only when it works, so that `bitsmith --help`
answers at once. Exit codes: 0 done; 1 the work failed; 2 the input is wrong; 130 interrupted and saved.
BITSMITH_DEBUG=1 shows the traceback instead of the line.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated

import typer

from bitsmith.cli import (
    adapt,
    bench,
    bench_latency,
    compare,
    evaluate,
    export,
    inspect,
    run,
    sensitivity,
    sweep,
)
from bitsmith.errors import BitsmithError

app = typer.Typer(
    name="bitsmith",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _add(name: str, command: ModuleType, to: typer.Typer = app) -> None:
    """A command's file offers `command`, whose docstring is its help, and EXAMPLES: (line, what for)."""
    lines = ("[bold]Examples[/bold]", *(f"[dim]# {why}[/dim]\n{line}" for line, why in command.EXAMPLES))
    to.command(name, help=_paragraphs(command.command.__doc__), epilog="\n\n".join(lines))(command.command)


def _paragraphs(text: str | None) -> str:
    """``text`` with one line a paragraph: typer keeps the line breaks of a docstring."""
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


for _name, _command in {
    "run": run,
    "sweep": sweep,
    "sensitivity": sensitivity,
    "inspect": inspect,
    "evaluate": evaluate,
    "export": export,
    "adapt": adapt,
    "compare": compare,
}.items():
    _add(_name, _command)

benches = typer.Typer(no_args_is_help=True, help="Measure models on this machine.")
_add("run", bench, benches)
_add("latency", bench_latency, benches)
app.add_typer(benches, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"bitsmith {version('bitsmith')}")
        raise typer.Exit


ABOUT = """From a float PyTorch model to a verified low-bit one.

[bold]bitsmith run[/bold] does the whole job on handwritten digits, with nothing to prepare: it trains a float
model and a low-bit one, exports it, runs the exported file in ONNX Runtime, and writes a report."""


@app.callback(help=_paragraphs(ABOUT))
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself; its help is ABOUT."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. ``arguments`` defaults to the process's own."""
    debug = os.environ.get("BITSMITH_DEBUG", "") not in ("", "0")
    if arguments is None:
        atexit.register(gc.freeze)  # the process ends here: freeing torch's objects one by one takes seconds
    try:
        return int(app(arguments, prog_name="bitsmith", standalone_mode=False) or 0)
    except BitsmithError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted.", 130)
    except BrokenPipeError:  # `bitsmith inspect ... | head`
        sys.stderr.close()
        return 0
    except Exception as error:
        if type(error).__name__ == "Abort":  # what typer makes of a KeyboardInterrupt
            return _fail("interrupted.", 130)
        # typer's own findings (unknown option, missing argument) carry format_message; its classes have moved
        # between releases
        if hasattr(error, "format_message"):
            return _fail(_usage(error), 2) if error.format_message() else 2  # no command: help was the answer
        if debug:
            raise
        return _fail(
            f"{type(error).__name__}: {error} (this is a defect of Bitsmith, or of a factory of yours: "
            "run again with BITSMITH_DEBUG=1 to see where).",
            1,
        )


def _usage(error: Exception) -> str:
    message: str = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "bitsmith"
    return f"{message.rstrip('.')}. See {command} --help."


def _fail(line: str, code: int) -> int:
    sys.stderr.write(f"bitsmith: {' '.join(line.split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
