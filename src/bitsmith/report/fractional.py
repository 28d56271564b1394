"""Widths that trained as real numbers, and the curriculum that steps through them. From `Run` to markup.

Three cards, each empty where the run has nothing for it: how the widths moved and what each became, how the
channels of a weight spread, and the steps of a schedule. What the decided widths cost is in outcome.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from bitsmith.report import page, svg, words
from bitsmith.report.certificate import is_number
from bitsmith.report.metrics import Run, mean_bits

KINDS = {"weight": ("Weights", "quant"), "activation": ("Activations", "acts")}  # -> title, colour
CELLS = 60  # of a site's row of colours: more cannot be told apart in half a page
LEVEL = 0.25  # bits: neighbours in one such step share a cell, which keeps the page small
LONGEST = 32  # characters of a name beside its colours
FEW, TALL, MOST = 16, 40, 6  # rows of a table, rows of colours, and histograms, that stand open
BIN = 0.5  # bits, of a histogram
BAND, BAR = 74, 46  # px: a histogram with its figures, and its highest bar
STYLE = """
.shades { display:flex; gap:4px 22px; flex-wrap:wrap; font-size:13.5px; color:var(--soft); margin:0 0 10px }
.shades span { display:flex; align-items:center; gap:8px }
.shades i { width:80px; height:12px; border-radius:3px; background:linear-gradient(90deg,
  color-mix(in srgb,var(--ramp) 10%,transparent),var(--ramp)) }
.motion { --char:6.2px; padding:0 44px 28px calc(var(--char)*var(--longest) + 14px) }
.learned { fill-opacity:.5 }
.mean { fill:var(--soft) }
.fractions { table-layout:fixed }
.scroll .fractions th:first-child { width:30%; white-space:normal; overflow-wrap:anywhere }
.fractions th:nth-child(2) { width:20% }
.fractions svg { max-width:150px }
@media (max-width:720px){
  .motion { --char:5.4px; padding-right:34px }
  .motion .small { font-size:10.5px }
  .scroll .fractions th:first-child { width:36% }
  .fractions th:nth-child(2),.fractions td:nth-child(2) { display:none }
}
"""
Points = list[tuple[float, float]]  # (step, number)


def style(run: Run) -> str:
    """What the cards need beside the common style; nothing for a page without them."""
    return STYLE if run.learned_bits else ""


def card(run: Run) -> str:
    """How widths moved up to the decision, of the model and of each site; what each learned and became."""
    if not run.learned_bits:
        return ""
    count, traces = len(run.learned_bits), _traces(run)
    motion = _motion(run, traces)
    learning = max((points[-1][0] for points in motion.values()), default=0)
    last = _last(run, learning)
    span = f" for {learning:,.0f} of {last:,.0f} steps" if learning else ""
    rest = f", and the other {last - learning:,.0f} steps trained at exactly these" if learning < last else ""
    remark = (
        f"{count} tensor{'s' * (count > 1)} learned a real number of bits{span}; a width between two whole "
        f"ones is a mixture of both. Then every width became a whole one{rest if learning else ''}."
    )
    body = _averages(run, traces) + _motions(run, motion) + _table(run)
    return page.card("Fractional bits", body, remark=remark, wide=True)


def sentence(each: Sequence[float], stored: Any = None) -> str:
    """ "5.3 bits = 70 % 5-bit + 30 % 6-bit, stored as 5"; of several groups "2-8 bits, 3.4 on average;
    stored 3.4"."""
    if len(each) > 1:
        low, high, mean = (words.bits(round(b, 1)) for b in (min(each), max(each), sum(each) / len(each)))
        learned = f"{low}-{high} bits, {mean} on average" if low != high else _plural(low)
        became = mean_bits(stored)
        return learned if became is None else f"{learned}; stored {words.bits(round(became, 1))}"
    b = round(each[0], 2)  # so that the shares are those of the number that is written
    below = math.floor(b)
    learned = _plural(words.bits(b))
    if b > below:
        shares = (words.percent(share, 0) for share in (below + 1 - b, b - below))
        learned += " = " + " + ".join(f"{share} {below + i}-bit" for i, share in enumerate(shares))
    return learned if stored is None else f"{learned}, stored as {words.widths(stored)}"


def _plural(bits: str) -> str:
    return f"{bits} bit{'s' * (bits != '1')}"


def _stored(run: Run, site: str) -> Any:
    """The width in the delivered plan: a number, a list of one for each channel, or None."""
    bits = ((run.plan.get("sites") or {}).get(site) or {}).get("bits")
    return bits if mean_bits(bits) is not None else None


def _learned(run: Run, site: str) -> list[float]:
    """The real widths of a site's channels, or the one of the whole tensor."""
    each = run.learned_bits[site]
    return by_channel(each, _stored(run, site))[0] if len(each) > 1 else list(each)


def _short(site: str) -> str:
    return site if len(site) <= LONGEST else f"{site[: LONGEST // 2 - 1]}…{site[-LONGEST // 2 :]}"


def _kind(run: Run, site: str) -> str:
    known = ((run.plan.get("sites") or {}).get(site) or {}).get("kind")
    return str(known) if known in KINDS else "weight" if site.endswith(".weight") else "activation"


# ---- over the steps


def _traces(run: Run) -> dict[str, Points]:
    """The methods' scalars over the steps, by their names without the method's; of two the first."""
    found: dict[str, dict[str, Points]] = {}
    for entry in run.traces:
        for key, value in entry.items():
            method, _, name = key.partition(".")
            if is_number(value) and is_number(entry.get("step")):
                point = float(entry["step"]), float(value)
                found.setdefault(name, {}).setdefault(method, []).append(point)
    return {name: next(iter(by_method.values())) for name, by_method in found.items()}


def _motion(run: Run, traces: Mapping[str, Points]) -> dict[str, Points]:
    """Site -> its real width over the steps, where that was kept."""
    return {site: traces[f"bits.{site}"] for site in run.learned_bits if f"bits.{site}" in traces}


def _last(run: Run, end: float) -> float:
    """The last step of all."""
    steps = (entry.get("step") for entry in run.history.get("qat") or ())
    return max([end, *(step for step in steps if is_number(step))])


def _averages(run: Run, traces: Mapping[str, Points]) -> str:
    """The model's averages, and how far from their falling targets they were."""
    averages, used = [], []
    for kind, (title, colour) in KINDS.items():
        points = traces.get(f"average_{kind}_bits", [])
        if not any(abs(y - points[0][1]) > 0.005 for _, y in points):
            continue  # of these no width was learned
        averages.append(svg.Series(title, colour, points))
        used.append(svg.Series(title, colour, traces.get(f"used_average_{kind}_bits", [])))
    if not averages:
        return ""
    end = averages[0].points[-1][0]
    until = min(_last(run, end), round(1.3 * end))
    decided: list[svg.Series] = []
    for kind, (_, colour) in KINDS.items():
        stored = run.cost(f"average_{kind}_bits")
        if stored is not None and until > 1.02 * end and any(one.kind == colour for one in averages):
            decided.append(svg.Series("decided plan", colour, [(end, stored), (until, stored)]))

    def panel(name: str, series: Sequence[svg.Series], show: svg.Format, level: Any = None) -> str:
        known = [one for one in series if one.points]
        if not known:
            return ""
        said = f"{name}: " + ", ".join(
            f"{one.label} from {show(one.points[0][1])} to {show(one.points[-1][1])}" for one in known
        )
        plot = svg.lines(
            known,
            show,
            "optimizer step",
            said,
            height=150,
            level=level,
            moment=(end, "decided"),
            until=until,
        )
        return f'<div class="half"><h3>{name}</h3>{plot}</div>'

    keys = page.legend([(f"b-{one.kind}", one.label) for one in averages])
    halves = [
        panel("Bits of the model on average", averages + decided, words.bits),
        panel("Share of the falling target", used, svg.show_percent, (1.0, "target")),
    ]
    body = "".join(halves)
    return keys + (f'<div class="halves">{body}</div>' if all(halves) else body)


def _motions(run: Run, motion: Mapping[str, Points]) -> str:
    """A row of colours for each site: steps to the right, more bits deeper."""
    if not motion:
        return ""
    ends = _ends(y for points in motion.values() for _, y in points)
    parts, ramps, rows = [], [], 0
    for kind, (title, colour) in KINDS.items():
        own = {site: points for site, points in motion.items() if _kind(run, site) == kind}
        rows = max(rows, len(own))
        if own:
            ramp = f'<i style="--ramp:var(--{colour})"></i>'
            ramps.append(f"<span>{title}, {ends[0]}{ramp}{_plural(str(ends[1]))}</span>")
            parts.append(f'<div class="half">{_rows(run, own, ends, colour, title)}</div>')
    body = "".join(parts)
    drawn = f'<div class="halves">{body}</div>' if len(parts) > 1 else body
    longest = max(len(_short(site)) for site in motion)  # so that both halves start alike
    drawn = f'<div class="shades">{"".join(ramps)}</div><div style="--longest:{longest}">{drawn}</div>'
    if rows > TALL:
        return page.folded(f"Bits of {len(motion)} sites over the steps", drawn)
    several = any(len(each) > 1 for each in run.learned_bits.values())
    return f"<h3>Bits of each site over the steps{', mean of its channels' * several}</h3>{drawn}"


def _ends(bits: Iterable[float]) -> tuple[int, int]:
    """The whole widths around some, but for their last digits."""
    known = list(bits)
    low = math.floor(min(known) + 0.01)
    return low, max(math.ceil(max(known) - 0.01), low + 1)


def _rows(run: Run, motion: Mapping[str, Points], ends: tuple[int, int], colour: str, title: str) -> str:
    tall = 22 if len(motion) <= 12 else 15
    body, said = [], []
    for index, (site, points) in enumerate(motion.items()):
        learned = float(np.mean(_learned(run, site)))
        said.append(f"{site} from {words.bits(points[0][1])} to {words.bits(learned)}")
        middle = tall * (index + 0.5)
        body.append(
            f'<svg y="{tall * index}" width="100%" height="{tall - 3}" viewBox="0 0 {CELLS} 1" '
            f'preserveAspectRatio="none" shape-rendering="crispEdges"><title>{escape(said[-1])}</title>'
            f"{_cells([y for _, y in points], ends, colour)}</svg>"
            f'<text x="0" y="{middle}" dx="-9" dy="2.5" class="tick end small">{escape(_short(site))}</text>'
            f'<text x="100%" y="{middle}" dx="9" dy="2.5" class="figure small">{learned:.2f}</text>'
        )
    height = tall * len(motion)
    first, last = (next(iter(motion.values()))[i][0] for i in (0, -1))
    body.append(f'<text x="0" y="{height}" dy="15" class="tick">step {first:,.0f}</text>')
    body.append(f'<text x="100%" y="{height}" dy="15" class="tick end">{last:,.0f}</text>')
    label = escape(f"{title}, bits over the steps: " + ", ".join(said))
    return (
        f'<div class="plot motion"><svg role="img" aria-label="{label}" '
        f'width="100%" height="{height}">{"".join(body)}</svg></div>'
    )


def _cells(bits: Sequence[float], ends: tuple[int, int], colour: str) -> str:
    """Runs of neighbours with the same level of colour, in a box CELLS wide and 1 high."""
    low, high = ends
    parts = np.array_split(np.asarray(bits), min(CELLS, len(bits)))
    levels = [round(float(part.mean()) / LEVEL) * LEVEL for part in parts]
    cells, start = [], 0
    for level, same in groupby(levels):
        stop = start + len(list(same))
        x, wide = (CELLS * count / len(levels) for count in (start, stop - start))
        deep = 0.1 + 0.9 * (level - low) / (high - low)
        cells.append(
            f'<path d="M{x:g} 0h{wide:g}v1h-{wide:g}z" class="f-{colour}" fill-opacity="{deep:.2f}"/>'
        )
        start = stop
    return "".join(cells)


def _table(run: Run) -> str:
    """What each site learned and is stored as, in words."""
    rows = []
    for site in run.learned_bits:
        learned, colour = _learned(run, site), KINDS[_kind(run, site)][1]
        mean = float(np.mean(learned))
        bar = svg.width_bar(mean, colour, f"{site}: {_plural(words.bits(mean))} learned")
        rows.append([page.name(site), bar, page.text(sentence(learned, _stored(run, site)))])
    title = f"Learned and stored bits of {len(rows)} site{'s' * (len(rows) > 1)}"
    inner = page.table(["Site", "Learned", "In words"], rows, title)
    inner = inner.replace("<table>", '<table class="fractions">', 1)
    return page.folded(title, inner, opened=len(rows) <= FEW)


# ---- over the channels


def channels(run: Run) -> str:
    """How the widths of a site spread whose channels, or groups of them, learned their own."""
    spread = {
        site: by_channel(each, _stored(run, site)) for site, each in run.learned_bits.items() if len(each) > 1
    }
    if not spread:
        return ""
    ends = _ends(b for learned, stored, _ in spread.values() for b in (*learned, *stored))
    parts = []
    for site, (learned, stored, what) in spread.items():
        said = sentence(learned, _stored(run, site))
        bands = {name: widths for name, widths in (("learned", learned), ("stored", stored)) if widths}
        plot = _histograms(site, bands, what, ends, KINDS[_kind(run, site)][1])
        head = f"<h3>{page.name(site)}</h3>{page.note(f'{len(learned)} {what}: {said}.')}"
        parts.append(f'<div class="half">{head}{plot}</div>')
    drawn = f'<div class="halves">{"".join(parts)}</div>'
    if len(parts) > MOST:
        drawn = page.folded(f"Histograms of {len(parts)} sites", drawn)
    remark = (
        "How many channels have which width: above as it was learned, counted to the nearest half bit, below "
        "as it is stored. ▲ marks the mean."
    )
    return page.card("Bits of the channels", drawn, remark=remark, wide=True)


def by_channel(each: Sequence[float], stored: Any) -> tuple[list[float], list[float], str]:
    """Learned and stored widths of every channel, or of every group where a plan does not say how many
    channels there are; and which of the two they are, in a word."""
    if not isinstance(stored, list) or len(stored) < len(each):
        became = mean_bits(stored)
        return list(each), [] if became is None else [became] * len(each), "groups of channels"
    # array_split makes the same groups as quantization.channel_groups.even_sizes
    sizes = [len(part) for part in np.array_split(np.arange(len(stored)), len(each))]
    learned = [b for b, size in zip(each, sizes, strict=True) for _ in range(size)]
    return learned, [float(b) for b in stored], "channels"


def bins(widths: Sequence[float]) -> dict[float, int]:
    """How many widths are nearest to 2, 2.5, 3, ... bits: a whole width is in the middle of its bin."""
    counts = Counter(math.floor(width / BIN + 0.5) * BIN for width in widths)
    return dict(sorted(counts.items()))


def _histograms(
    site: str, bands: Mapping[str, Sequence[float]], what: str, ends: tuple[int, int], colour: str
) -> str:
    """Learned above stored, over one axis of bits, so that one sees where rounding took them."""
    low, high = ends
    span = high - low + BIN

    def at(bits: float) -> str:
        return f"{100 * (bits - low + BIN / 2) / span:.2f}%"

    body, said = [], []
    for index, (name, widths) in enumerate(bands.items()):
        floor, counts = BAND * (index + 1), bins(widths)
        mean = f"mean {words.bits(round(float(np.mean(widths)), 1))}"
        said.append(f"{name} {', '.join(f'{n} at {words.bits(b)}' for b, n in counts.items())}, {mean}")
        for bits, number in counts.items():
            tall = max(BAR * number / max(counts.values()), 1.5)
            hover = f"{number} {what} {name} at {_plural(words.bits(bits))}"
            body.append(
                f'<rect x="{at(bits - 0.46 * BIN)}" width="{92 * BIN / span:.2f}%" y="{floor - tall:.1f}" '
                f'height="{tall:.1f}" rx="2" class="f-{colour} {name}"><title>{escape(hover)}</title></rect>'
                f'<text x="{at(bits)}" y="{floor - tall:.1f}" dy="-4" class="tick middle">{number}</text>'
            )
        body.append(
            f'<line x1="0" x2="100%" y1="{floor}" y2="{floor}" class="gridline"/>'
            f'<svg x="{at(float(np.mean(widths)))}" y="{floor}"><path d="M0 1l4 6h-8z" class="mean"/></svg>'
            f'<text x="100%" y="{floor - BAND}" dy="18" class="tick end">{mean}</text>'
            f'<text x="0" y="{floor}" dx="-9" dy="-3" class="tick end">{name}</text>'
        )
    height = BAND * len(bands)
    body += [
        f'<text x="{at(bits)}" y="{height}" dy="20" class="tick middle">{bits}</text>'
        for bits in range(low, high + 1)
    ]
    body.append(f'<text x="50%" y="{height}" dy="38" class="tick middle">bits</text>')
    label = escape(f"{site}, {what}: {'; '.join(said)}")
    return (
        f'<div class="plot room-axes"><svg role="img" aria-label="{label}" width="100%" height="{height}">'
        f"{''.join(body)}</svg></div>"
    )


# ---- the curriculum


def curriculum(run: Run) -> str:
    """The widths that a schedule stepped through."""
    points = _traces(run).get("bits", [])
    if len({y for _, y in points}) < 2:
        return ""
    stairs = points[:1]
    for (_, before), (x, y) in pairwise(points):
        stairs += [(x, before), (x, y)] if y != before else [(x, y)]
    passed = [y for y, _ in groupby(y for _, y in points)]
    last = words.bits(passed[-1])
    since = next(x for x, y in points if y == passed[-1])
    share = (points[-1][0] - since + 1) / points[-1][0]
    remark = (
        "All sites of the schedule stepped down together: "
        f"{words.listing(words.bits(y) for y in passed)} bits. "
        f"The last {words.percent(share, 0)} of the steps trained at {_plural(last)}."
    )
    label = f"Bits over the steps: {', '.join(words.bits(y) for y in passed)}"
    plot = svg.lines([svg.Series("bits", "quant", stairs)], words.bits, "optimizer step", label, height=150)
    return page.card("Bits over the steps", plot, remark=remark, wide=True)
