"""Several runs on one page: table, Pareto fronts of accuracy against cost, bits per layer.

A run lies on the front when no other run is at least as accurate and at least as cheap, and better in one of
the two; by mean IoU where all runs are of segmentation. Runs are numbered in the order given; the number is
their name in the pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bitsmith.errors import RunError
from bitsmith.files import write_atomic
from bitsmith.report import page, svg, words
from bitsmith.report.metrics import Run, read_run


def write_comparison(run_directories: Sequence[str | Path], out: str | Path) -> Path:
    """Write a page that shows the runs side by side to the file ``out``. Raises FormatError, RunError."""
    if not run_directories:
        raise RunError("there is nothing to compare", remedy="Name at least one run directory")
    runs = [read_run(directory) for directory in run_directories]
    write_atomic(out, render(runs).encode())
    return Path(out)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, accuracy) that no other point dominates, cheapest first.

    Equal points do not dominate each other: both stay.
    """
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def render(runs: Sequence[Run]) -> str:
    """The page as a string."""
    names = _names(runs)
    by = words.common_share(runs)
    best = max(range(len(runs)), key=lambda index: runs[index].figure("quantized", by.key) or 0.0)
    title = f"{len(runs)} run{'s' * (len(runs) > 1)} compared"
    first = "Most accurate" if by is words.ACCURACY else "Best"
    lead = (
        f"{first}: {names[best]}, {' '.join(words.headline(runs[best])[:1])}"
        f" ({words.against_float(runs[best])})."
    )
    header = (
        f'<div class="brand">{page.MARK}<b>Bitsmith</b></div>'
        f'<h1>{page.text(title)}</h1><p class="lead">{page.text(lead)}</p>'
    )
    share = _scatter(
        runs,
        names,
        f"{by.title} against bit operations",
        lambda run: _ratio(run.cost("bops"), run.cost("bops_float")),
        words.small_percent,
        "bit operations, share of float",
    )
    size = _scatter(
        runs,
        names,
        f"{by.title} against size",
        lambda run: run.cost("weight_bytes"),
        words.size,
        "weight bytes",
    )
    body = page.grid([_table(runs, names)]) + page.grid([share, size]) + page.grid([_layers(runs, names)])
    footer = "Made by Bitsmith; works offline. Logarithmic cost axes; bytes are decimal (1 kB = 1,000 B)."
    return page.document(title, header + '<p class="asked"></p>', body, footer)


def _names(runs: Sequence[Run]) -> list[str]:
    """Directory names, with their parents where they would collide."""
    short = [run.name for run in runs]
    return [
        name if short.count(name) == 1 else f"{run.directory.resolve().parent.name}/{name}"
        for name, run in zip(short, runs, strict=True)
    ]


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part and whole else None


def _scatter(
    runs: Sequence[Run],
    names: Sequence[str],
    title: str,
    cost: Callable[[Run], float | None],
    show: Callable[[float | None], str],
    x_label: str,
) -> str:
    by = words.common_share(runs)
    known = [
        (index, value, run.figure("quantized", by.key) or 0.0)
        for index, run in enumerate(runs)
        if (value := cost(run))
    ]
    if not known:
        return ""
    marks = []
    for index, value, accuracy in known:
        text = f"{names[index]}: {words.percent(accuracy, words.decimals(runs[index]))} at {show(value)}"
        marks.append((value, svg.Mark(text, accuracy, "quant", str(index + 1))))
    front = pareto_front([(value, accuracy) for _, value, accuracy in known])
    floats = {round(run.figure("float", by.key) or 0.0, 6) for run in runs}
    float_accuracy = floats.pop() if len(floats) == 1 else None
    listed = words.listing(names[known[position][0]] for position in front)
    plot = svg.scatter(marks, front, _tick(show), x_label, f"{title}. On the front: {listed}", float_accuracy)
    return page.card(title, plot, remark=f"Filled and joined: no other run is both cheaper and {_more(by)}.")


def _more(by: words.Measure) -> str:
    return "more accurate" if by is words.ACCURACY else "better"


def _tick(show: Callable[[float | None], str]) -> Callable[[float], str]:
    return lambda value: words.tick(show(value))


def _table(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        shift = ((run.metrics.get("shift") or {}).get("quantized") or {}).get("mean")
        weights, activations = run.cost("average_weight_bits"), run.cost("average_activation_bits")
        verified = {
            True: '<span class="badge good">yes</span>',
            False: '<span class="badge bad">failed</span>',
            None: "no",
        }
        rows.append(
            [
                f"<small>{index + 1}</small> {page.text(name)}",
                words.result(run, "float"),
                words.result(run, "post_training"),
                f"<b>{words.result(run, 'quantized')}</b>",
                words.change(run, "quantized"),
                words.result(run, "exported"),
                words.percent(shift),
                words.size(run.cost("weight_bytes")),
                words.factor(run.cost("weight_bytes_float"), run.cost("weight_bytes")),
                words.small_percent(_ratio(run.cost("bops"), run.cost("bops_float"))),
                f"{words.bits(weights)} / {words.bits(activations)}",
                verified[run.verified],
            ]
        )
    columns = [
        "Run", "Float", "Post-training", "Quantized", "Against float", "Exported", "Under shift", "Weights",
        "Smaller", "Bit operations", "Mean bits W / A", "Verified",
    ]  # fmt: skip
    return page.card("Runs", page.table(columns, rows, "Runs side by side", numbers=range(1, 12)), wide=True)


def _layers(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Weight / activation bits of the layers, where at least two runs share their layers' names."""
    order = list(dict.fromkeys(layer.name for run in runs for layer in run.layers))
    tables = [{layer.name: layer for layer in run.layers} for run in runs]
    if len(runs) < 2 or not order or not any(sum(name in table for table in tables) > 1 for name in order):
        return ""
    rows = [
        [page.text(name)]
        + [
            f"{words.bits(table[name].weight_bits)} / {words.bits(table[name].activation_bits)}"
            if name in table
            else words.DASH
            for table in tables
        ]
        for name in order
    ]
    columns = ["Layer", *(f"{index + 1} {name}" for index, name in enumerate(names))]
    body = page.table(columns, rows, "Bits per layer and run", numbers=range(1, len(columns)))
    return page.card(
        "Bits per layer", body, remark="Weights / activations; of a product both operands.", wide=True
    )
