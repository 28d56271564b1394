"""Flatness, drawn: figures of each model, and the loss around each as a heat map with contour lines.

Reads flatness.json of a run for its report, or takes what `bitsmith evaluate --flatness` has just measured
for a page of its own. Empty where a run has none. All maps of a page share one colour scale and one set of
contour levels, so that they compare: logarithmic where losses go over a factor of ten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitsmith.errors import FormatError
from bitsmith.files import read_json, write_atomic
from bitsmith.report import page, svg, words
from bitsmith.report.certificate import is_number
from bitsmith.report.metrics import VERSION

FILE = "flatness.json"
FIGURES = {"loss": "Loss", "sharpness": "Sharpness", "top_eigenvalue": "Top eigenvalue"}
MODELS = {"float": "Float", "quantized": "Quantized", "uniform": "Uniform competitor"}
WIDE = 10.0  # factor between the least and the greatest loss from which colour is logarithmic
SHADES = 1e4  # the palest shade stands for this much less than the greatest loss, and for all below
SIDE, LEFT, TOP, BELOW = 300.0, 48.0, 8.0, 44.0  # of a map, and the room for its axes
STYLE = """
.surfaces { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(280px,100%),1fr)); gap:8px 34px;
  margin-top:18px }
.surfaces figure { margin:0; min-width:0; max-width:400px }
.surfaces h3 { margin:0 }
.surface { display:block; width:100%; height:auto }
.surface text { font-size:11.5px; fill:var(--soft); font-variant-numeric:tabular-nums }
.flat-figures { max-width:640px }
.surface rect { shape-rendering:crispEdges;
  fill:color-mix(in srgb,var(--bad) calc(var(--heat)*1%),var(--track)) }
.surface rect.none { fill:var(--soft) }
.surface .contours { fill:none; stroke:var(--ink); stroke-width:1.1; opacity:.6 }
.surface .level { fill:var(--ink); font-weight:600; font-size:10.5px; paint-order:stroke;
  stroke:color-mix(in srgb,var(--card) 72%,transparent); stroke-width:3.5px; stroke-linejoin:round }
.surface .here { fill:var(--card); stroke:var(--ink); stroke-width:1.6 }
.losses { display:flex; align-items:center; gap:9px; font-size:13.5px; color:var(--soft); margin:14px 0 0;
  font-variant-numeric:tabular-nums; flex-wrap:wrap }
.losses i { width:130px; height:12px; border-radius:3px;
  background:linear-gradient(90deg in srgb,var(--track),var(--bad)) }
"""

Surface = Sequence[Sequence[float | None]]


def read_flatness(directory: Path) -> Mapping[str, Any] | None:
    """What flatness.json of a run says; None where it has none. Raises FormatError."""
    path = directory / FILE
    if not path.exists():
        return None
    found = read_json(path, "flatness file")
    if found.get("version") != VERSION:
        raise FormatError(
            "this flatness file is of another version",
            where=str(path),
            got=found.get("version"),
            expected=VERSION,
            remedy="Read it with the Bitsmith that wrote it, or run again",
        )
    if not _is_whole(found):
        raise FormatError(
            "this flatness file has no figures of its models",
            where=str(path),
            remedy="Delete the file (the report leaves out what it held), or run again",
        )
    return found


def _is_whole(found: Mapping[str, Any]) -> bool:
    models = found.get("models")
    if not (isinstance(models, dict) and "quantized" in models and set(models) <= set(MODELS)):
        return False
    if not all(is_number(found.get(key)) for key in ("rows", "radius", "span")):
        return False
    sizes = set()
    for each in models.values():
        if not (isinstance(each, dict) and all(_is_figure(each.get(key, "")) for key in FIGURES)):
            return False
        surface = each.get("surface", [])
        if not (isinstance(surface, list) and all(isinstance(row, list) for row in surface)):
            return False
        if any(len(row) != len(surface) or not all(map(_is_figure, row)) for row in surface):
            return False
        sizes.add(len(surface))
    return len(sizes) == 1 and all(size == 0 or size % 2 == 1 < size for size in sizes)


def _is_figure(value: Any) -> bool:
    """A number, or None where the measured one was not finite."""
    return value is None or is_number(value)


def card(found: Mapping[str, Any] | None) -> str:
    """The figures of each model and its map."""
    return "" if found is None else page.card("Flatness", _body(found), remark=_remark(found), wide=True)


def write_flatness_page(found: Mapping[str, Any], path: Path, run: str) -> None:
    """What `bitsmith evaluate --flatness` measured, as a page."""
    models = found["models"]
    title = f"Sharpness {number(models['quantized']['sharpness'])}"
    lead = f"By so many nats the quantized model's loss rises within {_radius(found)} of every tensor's norm."
    if "float" in models:
        lead += f" Float: {number(models['float']['sharpness'])}."
    header = (
        f'<div class="brand">{page.MARK}<b>Bitsmith</b><span class="run">{page.text(run)}</span></div>'
        f'<h1>{page.text(title)}</h1><p class="lead">{page.text(lead)}</p>'
        f'<p class="asked">{page.text(_rows(found))} of {page.text(found["data"])}</p>'
    )
    footer = "Made by Bitsmith; works offline. Figures compare models of one architecture, on the same rows."
    document = page.document(f"{title} · {run}", header, page.grid([card(found)]), footer, STYLE)
    write_atomic(path, document.encode())


def number(value: float | None) -> str:
    """A figure with three digits: 0.0958, 29.8, 1.20e−5."""
    if value is None:
        return words.DASH
    mantissa, _, exponent = f"{value:#.3g}".partition("e")
    power = f"e{int(exponent)}" if exponent else ""
    return f"{mantissa.rstrip('.')}{power}".replace("-", words.MINUS)


def rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of the table: a row for each model."""
    models = found["models"]
    known = [name for name in MODELS if name in models]
    return ["", *FIGURES.values()], [
        [MODELS[name], *(number(models[name][key]) for key in FIGURES)] for name in known
    ]


def explained(found: Mapping[str, Any]) -> str:
    """What sharpness is here, in one sentence."""
    return f"Sharpness: the greatest rise of the loss found within {_radius(found)} of every tensor's norm"


def _radius(found: Mapping[str, Any]) -> str:
    return words.small_percent(found["radius"])


def _rows(found: Mapping[str, Any]) -> str:
    return f"{found['rows']} training {found.get('unit', 'rows')}"


def _remark(found: Mapping[str, Any]) -> str:
    return (
        f"Loss: mean cross entropy of {_rows(found)}, in nats. {explained(found)}. Top eigenvalue: of the "
        "Hessian, relative to the size of each tensor. The quantized model as it was trained, with its "
        "quantizers in place."
    )


def _body(found: Mapping[str, Any]) -> str:
    columns, cells = rows(found)
    marked = [[page.text(cell) for cell in row] for row in cells]
    table = page.table(columns, marked, "Flatness of each model", numbers=range(1, len(columns)))
    table = f'<div class="flat-figures">{table}</div>'
    surfaces = {
        name: found["models"][name].get("surface") or [] for name in MODELS if name in found["models"]
    }
    losses = [loss for surface in surfaces.values() for row in surface for loss in row if loss is not None]
    if not losses:
        return table
    low, high = min(losses), max(losses)
    logarithmic = 0 <= WIDE * low < high
    palest = max(low, high / SHADES) if logarithmic else low

    def scale(loss: float) -> float:
        return math.log(max(loss, palest)) if logarithmic else loss

    levels = contour_levels(palest, high, logarithmic)
    figures = "".join(
        f"<figure><h3>{MODELS[name]}</h3>"
        f"{_map(surface, scale, (palest, high), levels, float(found['span']), MODELS[name])}</figure>"
        for name, surface in surfaces.items()
    )
    lines = f"lines at {words.listing(f'{level:g}' for level in levels)}" if levels else ""
    said = "; ".join(filter(None, ("logarithmic colour" if logarithmic else "", lines)))
    legend = (
        f'<div class="losses"><span>Loss {number(palest)}{" or less" * (palest > low)}</span><i></i>'
        f"<span>{number(high)}</span><span>{page.text(said)}</span></div>"
    )
    note = page.note(
        f"The loss where all filters move along two random directions, the same ones for each model, by "
        f"up to {found['span']:g} of their norm. In the middle is the model."
    )
    return f'{table}<div class="surfaces">{figures}</div>{legend}{note}'


def contour_levels(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round losses strictly between ``low`` and ``high``, which are positive where it is logarithmic."""
    if not high > low:
        return []
    if not logarithmic:
        return [level for level in svg.ticks(low, high, 6) if low < level < high]
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        levels = [level for ten in tens for m in factors if low < (level := float(f"{m}e{ten}")) < high]
        if len(levels) <= 8:
            break
    return levels


def _map(
    surface: Surface,
    scale: Callable[[float], float],
    ends: tuple[float, float],
    levels: Sequence[float],
    span: float,
    name: str,
) -> str:
    count = len(surface)
    cell, (low, high) = SIDE / count, (scale(end) for end in ends)

    def x(column: float) -> float:
        return LEFT + (column + 0.5) * cell

    def y(row: float) -> float:  # the second direction goes upwards
        return TOP + SIDE - (row + 0.5) * cell

    body = []
    for i, row in enumerate(surface):
        for j, loss in enumerate(row):
            share = 0.0 if loss is None else (scale(loss) - low) / ((high - low) or 1.0)
            look = 'class="none"' if loss is None else f'style="--heat:{100 * share:.0f}"'
            body.append(
                f'<rect x="{x(j) - cell / 2:.2f}" y="{y(i) - cell / 2:.2f}" width="{cell:.2f}" '
                f'height="{cell:.2f}" {look}><title>{number(loss)}</title></rect>'
            )
    scaled = [[math.nan if loss is None else scale(loss) for loss in row] for row in surface]
    parts = [
        f"M{x(a):.1f} {y(b):.1f}L{x(c):.1f} {y(d):.1f}"
        for level in levels
        for (a, b), (c, d) in contour(scaled, scale(level))
    ]
    body.append(f'<path class="contours" d="{"".join(parts)}"/>')
    body.append(f'<circle class="here" cx="{x(count // 2):.1f}" cy="{y(count // 2):.1f}" r="3.5"/>')
    taken = [y(count // 2)]
    for level in levels:
        place = _upwards(scaled, scale(level))
        if place is not None and all(abs(y(place) - other) > 15 for other in taken):
            taken.append(y(place))
            body.append(_text(x(count // 2), y(place) + 3.5, f"{level:g}", "level middle"))
    for share, at in ((-1, 0), (0, count // 2), (1, count - 1)):
        said = f"{share * span:g}".replace("-", words.MINUS)
        body.append(_text(x(at), TOP + SIDE + 16, said, "middle"))
        body.append(_text(LEFT - 7, y(at) + 4, said, "end"))
    body.append(_text(LEFT + SIDE / 2, TOP + SIDE + 35, "along the first direction", "middle"))
    turned = f"translate(12 {TOP + SIDE / 2:g}) rotate(-90)"
    body.append(f'<text transform="{turned}" class="middle">along the second</text>')
    label = f"{name}: the loss around the model, from {number(ends[0])} to {number(ends[1])}"
    size = f"0 0 {LEFT + SIDE + 8:g} {TOP + SIDE + BELOW:g}"
    return f'<svg class="surface" role="img" aria-label="{label}" viewBox="{size}">{"".join(body)}</svg>'


def _text(x: float, y: float, said: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{said}</text>'


Point = tuple[float, float]


def contour(values: Sequence[Sequence[float]], level: float) -> Iterator[tuple[Point, Point]]:
    """The pieces ((x, y), (x, y)) of the line at ``level``: marching squares, linear along the sides.

    values: rows of y, columns of x. Squares with a corner that is nan have no line.
    """
    for i in range(len(values) - 1):
        for j in range(len(values[0]) - 1):
            corners = [(j, i), (j + 1, i), (j + 1, i + 1), (j, i + 1)]
            heights = [values[y][x] - level for x, y in corners]
            if any(math.isnan(height) for height in heights):
                continue
            cuts: list[Point] = []
            for k in range(4):
                ours, theirs = heights[k], heights[(k + 1) % 4]
                if (ours < 0) != (theirs < 0):
                    share = ours / (ours - theirs)
                    (x1, y1), (x2, y2) = corners[k], corners[(k + 1) % 4]
                    cuts.append((x1 + share * (x2 - x1), y1 + share * (y2 - y1)))
            if len(cuts) == 4 and (sum(heights) < 0) != (heights[0] < 0):
                cuts = [*cuts[1:], cuts[0]]  # a saddle: the middle says which corners hang together
            yield from zip(cuts[::2], cuts[1::2], strict=True)


def _upwards(values: Sequence[Sequence[float]], level: float) -> float | None:
    """Where the middle column first crosses ``level``, from the middle row on; None where it does not."""
    middle = len(values) // 2
    for i in range(middle, len(values) - 1):
        ours, theirs = values[i][middle] - level, values[i + 1][middle] - level
        if (ours < 0) != (theirs < 0) and not math.isnan(ours - theirs):
            return i + ours / (ours - theirs)
    return None
