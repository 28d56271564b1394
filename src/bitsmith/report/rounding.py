"""Weights that were rounded layer by layer before training: post_training.json, read and drawn.

Empty where a run has none. From the file to `Rounded` values, and from these to markup and to words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsmith.errors import FormatError
from bitsmith.files import read_json
from bitsmith.report import page, words
from bitsmith.report.certificate import is_number
from bitsmith.report.metrics import VERSION

FILE = "post_training.json"
COLUMNS = ("Layer", "Error, to nearest", "Error", "α", "β", "Rows", "Time")
NUMBERS = ("error_nearest", "error", "alpha", "beta", "rows", "seconds")


@dataclass(frozen=True)
class Rounded:
    """A layer: its figures by the names of NUMBERS, or why it was left to its quantizer."""

    name: str
    figures: dict[str, float]
    left: str = ""


def read_rounding(path: Path) -> tuple[Rounded, ...]:
    """The layers of a run; none where there is no file. Raises FormatError."""
    if not path.exists():
        return ()
    document = read_json(path, "post-training file")
    if document.get("version") != VERSION:
        raise FormatError(
            "this post-training file is of another version",
            where=str(path),
            got=document.get("version"),
            expected=VERSION,
            remedy="Read it with the Bitsmith that wrote it, or run again",
        )
    found = document.get("layers")
    if not isinstance(found, list) or not all(_is_layer(entry) for entry in found):
        raise FormatError(
            "layers is not a list of layers with figures",
            where=str(path),
            remedy="Delete the file (the report leaves out what it held), or run again",
        )
    return tuple(
        Rounded(
            str(entry["name"]),
            {key: float(entry[key]) for key in NUMBERS if entry.get(key) is not None},
            str(entry.get("left") or ""),
        )
        for entry in found
    )


def _is_layer(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and "name" in entry
        and all(entry.get(key) is None or is_number(entry[key]) for key in NUMBERS)
    )


def card(layers: Sequence[Rounded]) -> str:
    """What became of every layer."""
    rows = [_row(layer) for layer in layers if not layer.left]
    left = [f"{layer.name} ({layer.left})" for layer in layers if layer.left]
    if not rows:
        return ""
    shown = page.table(COLUMNS, rows, "Layers that were rounded", numbers=range(1, len(COLUMNS)))
    rest = page.note(f"Left to their quantizers: {', '.join(left)}.") if left else ""
    remark = (
        f"{sentence(layers)}. Error: of the outputs on the samples looked at, as a share of their energy; of "
        "the weight rounded to nearest, and of the one that training begins with."
    )
    return page.card("Rounding before training", shown + rest, remark=remark, wide=True)


def sentence(layers: Sequence[Rounded]) -> str:
    """ "7 layers in 1.2 s, output error 0.0120 instead of 0.0340 on average"; empty where there is none."""
    done = [layer.figures for layer in layers if not layer.left]
    if not done:
        return ""
    mean = {key: sum(each.get(key, 0.0) for each in done) / len(done) for key in NUMBERS}
    took = words.seconds(mean["seconds"] * len(done))
    return (
        f"{len(done)} layer{'s' * (len(done) > 1)} in {took}, output error {mean['error']:.3g} instead of "
        f"{mean['error_nearest']:.3g} on average"
    )


def _row(layer: Rounded) -> list[str]:
    figures = layer.figures

    def cell(key: str, form: str) -> str:
        return f"{figures[key]:{form}}" if key in figures else words.DASH

    return [
        page.name(layer.name),
        cell("error_nearest", ".3g"),
        f"<b>{cell('error', '.3g')}</b>",
        cell("alpha", ".2f"),
        cell("beta", ".2f"),
        cell("rows", ",.0f"),
        words.seconds(figures.get("seconds")),
    ]
