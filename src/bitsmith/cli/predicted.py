"""The screen of `bitsmith run --dry-run`."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from bitsmith.cli.inspect import show_leftovers, show_sites
from bitsmith.cli.show import facts, output
from bitsmith.report.words import count, factor, seconds, size

MODES = {"float": "", "integer": " on integer codes", "zeroth_order": " of forward passes alone"}


def show_prediction(found: dict[str, Any]) -> None:
    """Sites, cost, memory and time, as tables."""
    console = output()
    cost, data, steps, time = found["cost"], found["data"], found["steps"], found["time"]
    console.print(
        Text(
            f"{found['model']} on {data['name']} ({data['train']} training {data['unit']}), "
            f"for {found['target']}",
            style="dim",
        )
    )
    show_sites(console, found["sites"])
    show_leftovers(console, found["leftovers"])
    rows = {
        "quantized": f"{found['quantized_share']:.1%} of {found['parameters']:,} parameters",
        "weights": _less(size, cost["weight_bytes"], cost["weight_bytes_float"]),
        "bit operations": _less(count, cost["bops"], cost["bops_float"]),
        "average weight bits": f"{cost['average_weight_bits']:.2f}",
        "average activation bits": f"{cost['average_activation_bits']:.2f}",
        "float training": f"{seconds(time['float'])} for {steps['float']} steps",
        "quantized training": f"{seconds(time['qat'])} for {steps['qat']} steps" + MODES[found["mode"]],
        **(
            {"uniform competitor": f"{seconds(time['uniform'])} for as many steps"}
            if "uniform" in time
            else {}
        ),
        "memory": size(found["peak_memory_bytes"]),
    }
    console.print(facts("Prediction", rows))
    if found["searches"]:
        console.print(Text("The widths are those that the search starts from.", style="dim"))
    console.print(Text("Times were measured on a few steps; export and report come on top.", style="dim"))


def _less(words: Any, now: float, before: float) -> str:
    return f"{words(now)} of {words(before)} ({factor(before, now)} less)"
