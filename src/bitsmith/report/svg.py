"""Plots as inline SVG: plain functions from numbers to markup, no library, no script.

Widths and positions are percentages and heights are pixels, so that a plot fills whatever column it stands
in and its text keeps its size on a phone. (The usual fixed viewBox scales the text along with the plot.)
Axis labels hang outside of the SVG's own box; the wrapper's padding makes room for them. Colours are classes
that style.css defines for light and dark. Curves live in a nested, stretched SVG whose strokes keep
their width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

Format = Callable[[float], str]


def show_percent(fraction: float) -> str:
    """A tick of an accuracy axis, without useless zeros: 0.95 -> "95 %"."""
    return f"{100 * fraction:.4g}\u202f%"


def show_number(value: float) -> str:
    """A tick of any other axis: 1.25."""
    return f"{value:.4g}"


@dataclass(frozen=True)
class Mark:
    """A labelled value; `kind` is the colour's class; `spread` is a whisker's (low, high)."""

    label: str
    value: float
    kind: str
    text: str
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """A curve: points (x, y) with x increasing."""

    label: str
    kind: str
    points: Sequence[tuple[float, float]]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) that cover [low, high]; the outer ones may lie outside."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def powers(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis that cover [low, high]: 1, 2, 5 times powers of ten."""
    steps = [
        m * 10.0**exponent
        for exponent in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        for m in (1, 2, 5)
    ]
    first = max(index for index, step in enumerate(steps) if step <= low * 1.0001)
    last = min(index for index, step in enumerate(steps) if step >= high * 0.9999)
    inner = steps[first : max(last, first + 1) + 1]
    if len(inner) <= 6:
        return inner
    tens = [step for step in inner if math.isclose(math.log10(step) % 1, 0, abs_tol=1e-9)]
    return sorted({inner[0], *tens, inner[-1]})


def _at(value: float, low: float, high: float) -> float:
    """Position in percent."""
    return min(max(100 * (value - low) / ((high - low) or 1.0), 0.0), 100.0)


def _svg(height: float, body: str, label: str, room: str = "") -> str:
    """`room`: class of the wrapper, whose padding holds the axis labels."""
    name = escape(label)
    return (
        f'<div class="plot {room}"><svg role="img" aria-label="{name}" width="100%" height="{height:g}">'
        f"<title>{name}</title>{body}</svg></div>"
    )


def _text(x: str, y: str, text: str, style: str = "", **shift: float) -> str:
    moved = "".join(f' {key}="{value:g}"' for key, value in shift.items())
    return f'<text x="{x}" y="{y}"{moved} class="{style}">{escape(text)}</text>'


def dots(
    marks: Sequence[Mark], label: str, reference: float | None = None, show: Format = show_percent
) -> str:
    """One row per mark on a common axis that need not start at zero: positions are compared, not lengths."""
    most = 1.0 if show is show_percent else math.inf
    ends = [end for mark in marks for end in (mark.value, *(mark.spread or ()))]
    margin = 0.08 * (max(ends) - min(ends)) or 0.005
    grid = [t for t in ticks(min(ends) - margin, min(max(ends) + margin, most), 3) if t <= most + 1e-9]
    low, high = grid[0], max(grid[-1], max(ends))
    row, height = 38, 38 * len(marks) + 4
    body = []
    for tick in grid:
        x = f"{_at(tick, low, high):.2f}%"
        body.append(f'<line x1="{x}" x2="{x}" y1="0" y2="{height}" class="gridline"/>')
        body.append(_text(x, f"{height}", show(tick), "tick middle", dy=18))
    if reference is not None:
        x = f"{_at(reference, low, high):.2f}%"
        body.append(f'<line x1="{x}" x2="{x}" y1="0" y2="{height}" class="reference"/>')
    for index, mark in enumerate(marks):
        y, x = row * index + row / 2 + 2, f"{_at(mark.value, low, high):.2f}%"
        body.append(_text("0", f"{y}", mark.label, "name", dy=5))
        body.append(_text("100%", f"{y}", mark.text, "figure", dx=14, dy=5))
        if mark.spread:
            x1, x2 = (f"{_at(end, low, high):.2f}%" for end in mark.spread)
            body.append(f'<line x1="{x1}" x2="{x2}" y1="{y}" y2="{y}" class="whisker s-{mark.kind}"/>')
        body.append(
            f'<circle cx="{x}" cy="{y}" r="6.5" class="f-{mark.kind}">'
            f"<title>{escape(f'{mark.label}: {mark.text}')}</title></circle>"
        )
    return _svg(height, "".join(body), label, "room-dots")


def bars(groups: Sequence[tuple[str, Sequence[Mark]]], maximum: float, label: str) -> str:
    """Horizontal bars from zero to `maximum`, grouped; the group's name at the left, values at the right."""
    body, y = [], 2.0
    for name, marks in groups:
        thick = 20.0 if len(marks) == 1 else 13.0
        middle = y + (thick + 3) * len(marks) / 2 - 1.5
        body.append(_text("0", f"{middle:g}", name, "name", dy=5))
        for mark in marks:
            width = max(_at(mark.value, 0, maximum), 0.3)
            body.append(f'<rect x="0" y="{y:g}" width="100%" height="{thick:g}" rx="3" class="track"/>')
            body.append(
                f'<rect x="0" y="{y:g}" width="{width:.2f}%" height="{thick:g}" rx="3" class="f-{mark.kind}">'
                f"<title>{escape(f'{name}, {mark.label}: {mark.text}')}</title></rect>"
            )
            small = (
                "figure" if thick > 15 else "figure small quiet" if mark.kind == "float" else "figure small"
            )
            body.append(_text("100%", f"{y + thick / 2:g}", mark.text, small, dx=14, dy=4.5))
            y += thick + 3
        y += 11
    return _svg(y - 11, "".join(body), label, "room-bars")


def lines(
    series: Sequence[Series],
    show: Format,
    x_label: str,
    label: str,
    logarithmic: bool = False,
    *,
    height: int = 210,
    level: tuple[float, str] | None = None,
    moment: tuple[float, str] | None = None,
    until: float | None = None,
    span: Sequence[float] = (),
) -> str:
    """Curves over a common x axis; markers where there are few points.

    level: a named y to compare with. moment: a named x. until: where the x axis ends, if beyond the curves.
    span: values that the y axis covers as well.
    """
    xs = [x for one in series for x, _ in one.points] + ([] if until is None else [until])
    ys = [y for one in series for _, y in one.points] + ([] if level is None else [level[0]])
    ys += span
    grid = powers(min(ys), max(ys)) if logarithmic else ticks(min(ys), max(ys), 4)
    scale: Callable[[float], float] = math.log if logarithmic else float
    low, high = scale(grid[0]), scale(grid[-1])
    left, right = min(xs), max(xs)
    body = []
    for tick in grid:
        y = height * (1 - _at(scale(tick), low, high) / 100)
        body.append(f'<line x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}" class="gridline"/>')
        body.append(_text("0", f"{y:.1f}", show(tick), "tick end", dx=-10, dy=4))
    for tick in ticks(left, right, 6):
        if left <= tick <= right and float(tick).is_integer():  # epochs and steps are whole
            x = f"{_at(tick, left, right):.2f}%"
            body.append(_text(x, f"{height}", f"{tick:,.0f}", "tick middle", dy=19))
    body.append(_text("50%", f"{height}", x_label, "tick middle", dy=38))
    if level is not None:
        y = height * (1 - _at(scale(level[0]), low, high) / 100)
        body.append(f'<line x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}" class="reference"/>')
        body.append(_text("100%", f"{y:.1f}", level[1], "tick end", dx=-4, dy=-5))
    if moment is not None:
        x = f"{_at(moment[0], left, right):.2f}%"
        body.append(f'<line x1="{x}" x2="{x}" y1="0" y2="{height}" class="moment"/>')
        late = _at(moment[0], left, right) > 80
        body.append(_text(x, "0", moment[1], "tick end" if late else "tick", dx=-6 if late else 6, dy=12))
    paths, markers = [], []
    for one in series:
        spots = [(_at(x, left, right), 100 - _at(scale(y), low, high)) for x, y in one.points]
        track = " ".join(f"{x:.2f},{y:.2f}" for x, y in spots)
        paths.append(f'<polyline points="{track}" class="curve s-{one.kind}"/>')
        if len(spots) <= 40:
            markers += [
                f'<circle cx="{x:.2f}%" cy="{y:.2f}%" r="3" class="f-{one.kind}">'
                f"<title>{escape(f'{one.label}, {x_label} {point[0]:g}: {show(point[1])}')}</title></circle>"
                for (x, y), point in zip(spots, one.points, strict=True)
            ]
    body.append(
        f'<svg width="100%" height="{height}" viewBox="0 0 100 100" preserveAspectRatio="none">'
        f"{''.join(paths)}</svg>{''.join(markers)}"
    )
    return _svg(height, "".join(body), label, "room-axes")


def scatter(
    marks: Sequence[tuple[float, Mark]],
    front: Sequence[int],
    show_x: Format,
    x_label: str,
    label: str,
    reference: float | None = None,
    below: str = "",
) -> str:
    """Cost (x, logarithmic) against accuracy (`mark.value`); `front` are the indices joined by a staircase.

    `mark.text` is written beside the point, `mark.label` is what hovering says;
    `reference` is float's accuracy; marks of the kind `below` have their text below.
    """
    xs = [x for x, _ in marks]
    ys = [mark.value for _, mark in marks] + ([] if reference is None else [reference])
    columns = powers(min(xs), max(xs))
    left, right = math.log(columns[0]), math.log(columns[-1])
    margin = 0.08 * (max(ys) - min(ys)) or 0.005
    rows = [t for t in ticks(min(ys) - margin, min(max(ys) + margin, 1.0), 5) if t <= 1.0 + 1e-9]
    low, high = rows[0], max(rows[-1], max(ys))
    height = 300
    body = []
    for tick in rows:
        y = height * (1 - _at(tick, low, high) / 100)
        body.append(f'<line x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}" class="gridline"/>')
        body.append(_text("0", f"{y:.1f}", show_percent(tick), "tick end", dx=-10, dy=4))
    for tick in columns:
        x = f"{_at(math.log(tick), left, right):.2f}%"
        body.append(f'<line x1="{x}" x2="{x}" y1="0" y2="{height}" class="gridline"/>')
        body.append(_text(x, f"{height}", show_x(tick), "tick middle", dy=19))
    body.append(_text("50%", f"{height}", x_label, "tick middle", dy=40))
    if reference is not None:
        y = height * (1 - _at(reference, low, high) / 100)
        body.append(f'<line x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}" class="reference"/>')
        body.append(_text("0", f"{y:.1f}", "float", "tick", dx=6, dy=-5))
    spots = [(_at(math.log(x), left, right), 100 - _at(mark.value, low, high)) for x, mark in marks]
    steps: list[tuple[float, float]] = []
    for px, py in sorted(spots[index] for index in front):
        steps += [(px, steps[-1][1]), (px, py)] if steps else [(px, py)]
    if len(steps) > 1:
        track = " ".join(f"{px:.2f},{py:.2f}" for px, py in steps)
        body.append(
            f'<svg width="100%" height="{height}" viewBox="0 0 100 100" preserveAspectRatio="none">'
            f'<polyline points="{track}" class="curve front"/></svg>'
        )
    for index, ((px, py), (_, mark)) in enumerate(zip(spots, marks, strict=True)):
        hollow = "" if index in front or mark.kind == "float" else " hollow"
        body.append(
            f'<circle cx="{px:.2f}%" cy="{py:.2f}%" r="6.5" class="f-{mark.kind} s-{mark.kind}{hollow}">'
            f"<title>{escape(mark.label)}</title></circle>"
        )
    body += _labels(
        [(*spot, mark.text, mark.kind == below) for spot, (_, mark) in zip(spots, marks, strict=True)]
    )
    return _svg(height, "".join(body), label, "room-scatter")


def _labels(spots: Sequence[tuple[float, float, str, bool]]) -> list[str]:
    """Texts beside points (x, y in percent, text, below?); crowded ones step aside, or go on a phone."""
    together: dict[tuple[bool, int, int], list[str]] = {}
    for x, y, text, under in spots:
        together.setdefault((under, round(x), round(y)), []).append(text)
    body: list[str] = []
    placed: list[tuple[bool, int, int]] = []
    for (under, column, line), texts in sorted(together.items()):
        text = ", ".join(texts)
        gap = min((column - x for side, x, y in placed if side == under and abs(line - y) < 9), default=100)
        placed.append((under, column, line))
        style = "figure small crowded" if gap < 3 * len(text) + 2 else "figure small"
        away = 22 if gap < len(text) + 1 else 8
        # The staircase never passes above and to the left of a point, nor below and to its right.
        left = column > 92 if under else column >= 8
        style, shift = (f"{style} end", -9) if left else (style, 9)
        body.append(_text(f"{column}%", f"{line}%", text, style, dx=shift, dy=away + 10 if under else -away))
    return body


def width_bar(bits: float | None, kind: str, label: str) -> str:
    """A bit-width as eight cells, filled from the left; float is one hatched bar."""
    if bits is None:
        return ""
    if bits > 8:
        body = '<rect x="0" y="0.5" width="99.5%" height="11" rx="2" class="floating"/>'
    else:
        size = 'y="0" height="12" rx="1.5"'
        cells = [
            f'<rect x="{12.5 * i}%" y="0" width="11%" height="12" rx="1.5" class="track"/>' for i in range(8)
        ]
        for index in range(math.ceil(bits)):
            part = min(bits - index, 1.0)
            cells.append(f'<rect x="{12.5 * index}%" {size} width="{11 * part:.2f}%" class="f-{kind}"/>')
        body = "".join(cells)
    return (
        f'<svg class="bits" role="img" aria-label="{escape(label)}" width="100%" height="12">'
        f"<title>{escape(label)}</title>{body}</svg>"
    )


def share_bar(share: float, kind: str) -> str:
    """A thin bar for a table cell whose number stands beside it (hidden from screen readers)."""
    return (
        '<svg class="share" aria-hidden="true" width="100%" height="4">'
        '<rect width="100%" height="4" rx="2" class="track"/>'
        f'<rect width="{100 * min(share, 1):.2f}%" height="4" rx="2" class="f-{kind}"/></svg>'
    )


def pairs(shares: Mapping[tuple[float, float], float], show: Format, kind: str, label: str) -> str:
    """Shares of (weight, activation) widths as tinted cells: weights downwards, activations to the right.

    Every width that a key names has its row or column, also where its shares are zero.
    """
    rows, columns = (sorted({pair[axis] for pair in shares}) for axis in (0, 1))
    tall, wide = 44, 100 / len(columns)
    body = []
    for i, row in enumerate(rows):
        body.append(_text("0", f"{tall * (i + 0.5):g}", _bits(row), "tick end", dx=-10, dy=4))
        for j, column in enumerate(columns):
            share = shares.get((row, column), 0.0)
            # the tint stays light enough for the ink of the figure on it
            tint = f'class="f-{kind}" fill-opacity="{0.1 + 0.5 * math.sqrt(share):.2f}"'
            style = tint if share else 'class="track"'
            said = f"weights {_bits(row)}, activations {_bits(column)}: {show(share)}"
            body.append(
                f'<rect x="{wide * j + 0.4:.2f}%" y="{tall * i + 1}" width="{wide - 0.8:.2f}%" '
                f'height="{tall - 3}" rx="4" {style}><title>{escape(said)}</title></rect>'
            )
            if share:
                x = f"{wide * (j + 0.5):.2f}%"
                body.append(_text(x, f"{tall * (i + 0.5):g}", show(share), "cell middle", dy=4))
    height = tall * len(rows)
    for j, column in enumerate(columns):
        body.append(_text(f"{wide * (j + 0.5):.2f}%", f"{height}", _bits(column), "tick middle", dy=16))
    body.append(_text("50%", f"{height}", "activation bits", "tick middle", dy=36))
    body.append(_text("0", "0", "weight bits", "tick", dx=-46, dy=-9))
    return _svg(height, "".join(body), label, "room-pairs")


def _bits(width: float) -> str:
    return "float" if width >= 32 else f"{width:.3g}"


def heat(counts: Sequence[Sequence[int]], names: Sequence[str], label: str) -> str:
    """Confusion matrix: rows are true classes, columns answers; right is calm, wrong is hot."""
    size = len(counts)
    cell = 34.0 if size <= 20 else max(680.0 / size, 3.0)
    longest = max((len(name) for name in names), default=1)
    gutter = 8 + 7.5 * min(longest, 12) if size <= 40 else 4.0
    rotated = longest > 3
    top = (gutter if rotated else 22.0) if size <= 40 else 4.0
    body = []
    for i, row in enumerate(counts):
        for j, number in enumerate(row):
            x, y = gutter + j * cell, top + i * cell
            if not number:
                style, alpha = "track", 1.0
            elif i == j:
                style, alpha = "f-quant", 0.22
            else:
                style, alpha = "f-bad", 0.2 + 0.7 * math.sqrt(number / (sum(row) or 1))
            body.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 2:.1f}" height="{cell - 2:.1f}" rx="3" '
                f'class="{style}" fill-opacity="{alpha:.2f}"><title>'
                f"{escape(f'{names[i]} read as {names[j]}: {number}')}</title></rect>"
            )
            if number and size <= 20:
                body.append(
                    _text(
                        f"{x + cell / 2 - 1:.1f}", f"{y + cell / 2:.1f}", str(number), "cell middle", dy=3.5
                    )
                )
        if size <= 40:
            shown = names[i] if len(names[i]) <= 12 else names[i][:11] + "…"
            middle = i * cell + cell / 2
            body.append(_text(f"{gutter - 7:.1f}", f"{top + middle:.1f}", shown, "tick end", dy=3))
            x = gutter + middle
            turn = f' transform="rotate(-90 {x:.1f} {top - 6:.1f})"' if rotated else ""
            style = "tick" if rotated else "tick middle"
            place = f'x="{x + 3 * rotated:.1f}" y="{top - 7:.1f}"{turn}'
            body.append(f'<text {place} class="{style}">{escape(shown)}</text>')
    width, height = gutter + size * cell, top + size * cell
    return (
        f'<svg class="heat" role="img" aria-label="{escape(label)}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="max-width:{width * 1.3:.0f}px"><title>{escape(label)}</title>{"".join(body)}</svg>'
    )
