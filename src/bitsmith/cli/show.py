"""How results look in a terminal: consoles, the progress display, tables.

Results go to standard output, progress and errors to standard error, so that a pipe or `--json` carries
results alone. Figures are written by `report.words`, as in the report.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from bitsmith.recipe.progress import Event


def output() -> Console:
    """Standard output, made when asked for, so that a redirected one is honoured."""
    # Off a terminal rich assumes 80 columns and would cut site names; a file has no edge.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def print_json(value: Any) -> None:
    """Indented JSON on standard output, and nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str = "") -> Table:
    """A table whose first column is text and whose others are figures, to the right."""
    made = Table(title=title or None, caption=caption or None, box=box.SIMPLE_HEAD, pad_edge=False)
    made.min_width = len(title)  # or a title wider than its columns would be wrapped
    made.title_justify = made.caption_justify = "left"
    made.title_style = "bold"
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", no_wrap=index > 0, overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def facts(title: str, values: Mapping[str, Any]) -> Table:
    """Names and values, both to the left."""
    made = table(title, ("", ""), values.items())
    made.show_header, made.columns[1].justify = False, "left"
    return made


class Display:
    """Draws the events of a run: live bars in a terminal, one line a finished stage elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self._tasks: dict[str, TaskID] = {}
        self._finished: set[str] = set()
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[values]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        from bitsmith.recipe.progress import STAGES

        name = STAGES.get(event.stage, event.stage)
        values = "  ".join(
            f"{what.replace('iou', 'IoU')} {figure(what, value)}" for what, value in event.values.items()
        )
        if event.note:
            self.console.print(f"[dim]{event.note}[/]")
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task(name, total=event.total, values="")
        self._bars.update(self._tasks[event.stage], completed=event.done, total=event.total, values=values)
        if event.finished and event.stage not in self._finished:
            self._finished.add(event.stage)
            if self._bars.disable:
                self.console.print(f"{name}: {values or 'done'}")


def figure(name: str, value: float) -> str:
    """A progress figure: accuracies and mean IoUs as percentages, losses with three digits."""
    return f"{100 * value:.1f} %" if "accuracy" in name or "iou" in name else f"{value:.3g}"
