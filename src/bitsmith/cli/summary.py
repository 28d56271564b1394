"""The end of a run, and runs side by side, as tables for a terminal. Words and figures are the report's."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bitsmith.cli.show import table
from bitsmith.report import language, rounding, training
from bitsmith.report.metrics import Run
from bitsmith.report.words import (
    DASH,
    LOSS,
    against_float,
    asked,
    change,
    common_share,
    count,
    decimals,
    factor,
    headline,
    measure,
    percent,
    points,
    result,
    seconds,
    size,
    verdict,
)

STAGES = (
    ("float", "float"),
    ("post_training", "post-training"),
    ("quantized", "quantized"),
    ("exported", "exported"),
)


def summary(run: Run) -> Panel:
    """What was asked, what came out, and where to look."""
    title, _ = headline(run)
    verdict_style = {True: "green", False: "bold red", None: "yellow"}[run.verified]
    body = Group(
        Text(asked(run), style="dim"),
        Text(),
        _losses(run) if measure(run) is LOSS else _accuracies(run),
        Text(),
        _costs(run),
        Text(),
        Text.assemble(
            (f"{against_float(run)}".capitalize(), "bold"),
            "; ",
            _gain(run),
            "; ",
            (verdict(run), verdict_style),
            ".",
        ),
        Text(),
        _where(run),
    )
    return Panel(
        body, title=f"[bold]{title}[/]", title_align="left", expand=False, padding=(1, 2), box=box.ROUNDED
    )


def _accuracies(run: Run) -> Table:
    """Accuracy or mean IoU of each stage, in distribution and under shift, and its distance from float."""
    digits, by = decimals(run), measure(run)
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("", by.word, "points from float", "under shift"):
        made.add_column(column, justify="left" if not column else "right")
    shift = run.metrics.get("shift") or {}
    for key, name in STAGES:
        accuracy = run.figure(key, by.key)
        if accuracy is None:
            continue
        before = run.figure("float", by.key) or 0.0
        difference = "" if key == "float" else points(accuracy - before, digits)
        shifted = (shift.get(key) or {}).get("mean")
        made.add_row(
            name,
            Text(percent(accuracy, digits), style="bold" if key == "quantized" else ""),
            difference,
            "" if shifted is None else percent(shifted, digits),
        )
    return made


def _losses(run: Run) -> Table:
    """The figures of language modelling of each stage."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("", *(column.lower() for column in language.columns(run))):
        made.add_column(column, justify="left" if not column else "right")
    for stage, name, cells in language.table(run):
        made.add_row(name.lower(), *cells, style="bold" if stage == "quantized" else "")
    return made


def _costs(run: Run) -> Table:
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("", "float", "quantized", "less"):
        made.add_column(column, justify="left" if not column else "right")
    cost = run.cost
    made.add_row(
        "weights", size(cost("weight_bytes_float")), size(cost("weight_bytes")),
        factor(cost("weight_bytes_float"), cost("weight_bytes")),
    )  # fmt: skip
    made.add_row(
        "bit operations", count(cost("bops_float")), count(cost("bops")),
        factor(cost("bops_float"), cost("bops")),
    )  # fmt: skip
    made.add_row("average bits", "32 / 32", _bits(run), "")
    return made


def _bits(run: Run) -> str:
    """Weight bits / activation bits, on average."""
    pair = (run.cost("average_weight_bits"), run.cost("average_activation_bits"))
    return " / ".join("–" if bits is None else f"{bits:.2f}" for bits in pair)


def _where(run: Run) -> Table:
    """The files to look at, and the time that they took."""
    made = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    made.add_column(style="dim")
    made.add_column(overflow="fold")
    made.add_row("report", str(run.directory / "report.html"))
    for path, held in run.files.items():
        name = "model" if path.startswith("model/") else path
        made.add_row(name, f"{run.directory / path} ({size(held)})")
    if rounded := rounding.sentence(rounding.read_rounding(run.directory / rounding.FILE)):
        made.add_row("rounded", rounded)
    if trained := training.sentence(run):
        made.add_row("trained", trained)
    total = (run.metrics.get("time") or {}).get("total")
    if total is not None:
        made.add_row("time", seconds(total))
    return made


def _gain(run: Run) -> str:
    """What training gained over quantizing after training."""
    by, gap = measure(run), change(run, "quantized", "post_training")
    if gap == DASH:
        return "not compared with post-training quantization"
    if by is LOSS:
        return f"training changed the loss of post-training quantization by {gap} {by.unit}s"
    return f"training gained {gap} {by.unit}s over post-training quantization"


def side_by_side(runs: Sequence[Run]) -> Table:
    """One row a run, the smallest first; a dot marks what no other run beats in both size and accuracy."""
    ordered = sorted(runs, key=lambda run: run.cost("weight_bytes") or 0.0)
    rows = [
        (
            ("• " if on_front(run, runs) else "  ") + run.name,
            result(run, "float"),
            result(run, "post_training"),
            result(run, "quantized"),
            _bits(run),
            size(run.cost("weight_bytes")),
            count(run.cost("bops")),
            {True: "yes", False: "NO", None: "–"}[run.verified],
        )
        for run in ordered
    ]
    columns = ("run", "float", "post-training", "quantized", "bits w / a", "weights", "BOPs", "verified")
    return table("", columns, rows, caption="• no other run here is both smaller and more accurate")


def on_front(run: Run, runs: Sequence[Run]) -> bool:
    """Whether no other run is at least as good in size and accuracy, and better in one of them."""

    by = common_share(runs)

    def figures(of: Run) -> tuple[float, float]:
        return -(of.cost("weight_bytes") or 0.0), of.figure("quantized", by.key) or 0.0

    own = figures(run)
    return not any(other[0] >= own[0] and other[1] >= own[1] and other != own for other in map(figures, runs))
