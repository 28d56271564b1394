"""sensitivity.html: a heat map of sites and widths, the plan of a budget with its prices, measured losses.

Drawn from sensitivity.json alone. The heat map is a table, so that it reads aloud, scrolls on a phone and
keeps its text's size; its colour is the logarithm of the score, from the lowest to the highest on the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitsmith.files import read_json, write_atomic
from bitsmith.report import page, svg, words
from bitsmith.report.metrics import FLOAT_BITS

PAGE = "sensitivity.html"
SHADES = 1e4  # the palest shade stands for this much less than the hottest, and for all below
STYLE = """
.heatmap { table-layout:fixed; border-collapse:separate; border-spacing:3px; margin:0 -3px }
.heatmap th,.heatmap td { border:0; padding:5px 2px; text-align:center; font-size:13px }
.heatmap th:first-child { width:30%; text-align:left; white-space:normal; overflow-wrap:anywhere }
.heatmap td { border-radius:5px; background:color-mix(in srgb,var(--bad) calc(var(--heat)*1%),var(--track)) }
.heatmap td.none { background:none; color:var(--soft) }
.heatmap td.planned { font-weight:700; box-shadow:inset 0 0 0 2px var(--ink) }
.heatmap td.fixed { font-weight:700; box-shadow:inset 0 0 0 2px var(--soft) }
.shades { display:flex; gap:4px 22px; flex-wrap:wrap; font-size:13.5px; color:var(--soft); margin:0 0 10px }
.shades span { display:flex; align-items:center; gap:9px }
.shades .ramp { width:110px; height:12px; border-radius:3px; background:linear-gradient(90deg,var(--track),
  color-mix(in srgb,var(--bad) 62%,var(--track))) }
.shades .ring { width:16px; height:16px; border-radius:4px; box-shadow:inset 0 0 0 2px var(--ink) }
.shades .ring.fixed { box-shadow:inset 0 0 0 2px var(--soft) }
.prices .widths svg { min-width:56px; max-width:120px }
.prices .share { min-width:64px; margin-top:4px }
@media (max-width:720px){
  .heatmap { border-spacing:2px }
  .heatmap th,.heatmap td { font-size:11.5px; padding:5px 0 }
  .heatmap th:first-child { width:27% }
  .prices .bits,.prices tr>:nth-child(5) { display:none }
  .prices th,.prices td { padding-right:12px }
  .prices td:last-child { white-space:normal }
}
"""
HOTTEST = 62.0  # percent of red in the hottest cell: text stays readable on it


def write_sensitivity(directory: str | Path) -> Path:
    """Write ``sensitivity.html`` beside the sensitivity.json in ``directory``. Raises FormatError."""
    found = read_json(Path(directory) / "sensitivity.json", "sensitivity file")
    path = Path(directory) / PAGE
    write_atomic(path, render(found).encode())
    return path


def render(found: Mapping[str, Any]) -> str:
    """The page as a string."""
    title, lead = headline(found)
    header = (
        f'<div class="brand">{page.MARK}<b>Bitsmith</b><span class="run">sensitivity</span></div>'
        f'<h1>{page.name(title)}</h1><p class="lead">{page.text(lead)}</p>'
        f'<p class="asked">{page.text(asked(found))}</p>'
    )
    body = "".join(page.grid([card]) for card in (_heat(found), _prices(found), _measured(found)))
    footer = (
        "Made by Bitsmith from sensitivity.json; works offline. A score is the squared output error of a "
        "site at a width, weighted by the squared gradient of the loss: it ranks, and is no loss by itself."
    )
    return page.document(f"Sensitivity · {found['model']}", header, body, footer, STYLE)


def headline(found: Mapping[str, Any]) -> tuple[str, str]:
    """The pair that hurts most, as a title and a sentence."""
    pairs = [
        (score, site["name"], bits)
        for site in found["sites"]
        for bits, score in zip(site["candidates"], site["scores"], strict=True)
    ]
    _, name, bits = max(pairs)
    title = f"{name} at {bits_text(bits)} hurts most"
    before, by = found["float"]["loss"], words.share(found)
    for entry in found["measured"]:
        if (entry["site"], entry["bits"]) == (name, bits):
            return title, (
                f"That one site at {bits_text(bits)}, and all else in float, takes the loss from "
                f"{before:.3f} to {entry['loss']:.3f} and the {by.word} from "
                f"{words.percent(found['float'][by.key])} to {words.percent(entry[by.key])} "
                f"({found['samples']['measured']} validation {unit(found)})."
            )
    return title, f"By its score alone: nothing was measured. The float model's loss is {before:.3f}."


def unit(found: Mapping[str, Any]) -> str:
    """What the data are rows of: images, unless the file says otherwise."""
    return str(found.get("unit", "images"))


def bits_text(bits: int) -> str:
    """ "1 bit", "4 bits", "float"."""
    return words.bits(bits) if bits >= FLOAT_BITS else f"{bits} bit{'s' * (bits != 1)}"


def asked(found: Mapping[str, Any]) -> str:
    """Model, data, samples and budget in one line."""
    parts = [
        f"{found['model']} on {found['data']}",
        f"scores of {found['samples']['scores']} training {unit(found)}",
    ]
    if found["plan_from"] == "budget":
        parts += [f"budget {words.budget_text(entry)}" for entry in found["budget"]]
    else:
        parts.append("no budget: the recipe's own widths")
    return " · ".join(parts)


def figure(score: float) -> str:
    """A score in four characters or so: 0.0854, 3.1e-6."""
    if score == 0:
        return "0"
    if score >= 0.001:
        return f"{score:.2g}" if score < 100 else f"{score:.0f}"
    mantissa, exponent = f"{score:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", words.MINUS)


def price_text(price: Sequence[Mapping[str, Any]]) -> str:
    """ "+21 %" of the budget; several budgets one after the other, with their kinds."""
    if not price:
        return "not on this target"
    shares = [
        f"+{words.small_percent(entry['share'])} {kind_text(entry['kind']) if len(price) > 1 else ''}".strip()
        if entry["cost"] >= 0
        else f"{words.MINUS}{words.small_percent(-entry['share'])}"
        for entry in price
    ]
    return ", ".join(shares)


def kind_text(kind: str) -> str:
    """A kind of cost in words."""
    if kind.startswith("table:"):
        return kind.removeprefix("table:").replace("_", " ")
    return "BOPs" if kind == "bops" else kind.replace("_", " ")


def _heat(found: Mapping[str, Any]) -> str:
    widths = sorted({bits for site in found["sites"] for bits in site["candidates"]})
    scores = [score for site in found["sites"] for score in site["scores"] if score > 0]
    high = max(scores, default=1.0)
    low = max(min(scores, default=1.0), high / SHADES)
    rows = []
    for site in found["sites"]:
        known = dict(zip(site["candidates"], site["scores"], strict=True))
        cells = [f'<th scope="row">{page.name(site["name"])}</th>']
        for bits in widths:
            score = known.get(bits)
            if score is None:
                cells.append(f'<td class="none">{words.DASH}</td>')
                continue
            share = math.log(max(score, low) / low) / (math.log(high / low) or 1.0)
            planned = bits == site["bits"]
            kind = ("planned" if site["free"] else "fixed") if planned else ""
            said = f"{site['name']} at {bits_text(bits)}: {score:.3g}" + (" (the plan)" if planned else "")
            cells.append(
                f'<td class="{kind}" style="--heat:{HOTTEST * share:.0f}" title="{page.text(said)}">'
                f"{figure(score)}</td>"
            )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = '<th scope="col">bits</th>' + "".join(
        f'<th scope="col">{words.bits(bits)}</th>' for bits in widths
    )
    chosen = "the plan within the budget" if found["plan_from"] == "budget" else "the recipe's widths"
    fixed = any(not site["free"] for site in found["sites"])
    legend = (
        f'<div class="shades"><span>{figure(low)} or less<i class="ramp"></i>{figure(high)}</span>'
        f'<span><i class="ring"></i>{chosen}</span>'
        + ('<span><i class="ring fixed"></i>asked for by name, not searched</span>' if fixed else "")
        + "</div>"
    )
    table = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Score of every site and width">'
        f'<table class="heatmap"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    remark = "What each site at each width would cost in loss, all else in float. Logarithmic colour."
    return page.card("Every site at every width", legend + table, remark=remark, wide=True)


def _prices(found: Mapping[str, Any]) -> str:
    by_budget = found["plan_from"] == "budget"
    kind = kind_text(found["budget"][0]["kind"])
    of = "of budget" if by_budget else f"of float's {kind}"
    rows = []
    for site in sorted(found["sites"], key=lambda site: -site["score"]):
        color = "quant" if site["kind"] == "weight" else "acts"
        bar = svg.width_bar(site["bits"], color, f"{site['name']}: {bits_text(site['bits'])}")
        fixed = "" if site["free"] else " <small>fixed</small>"
        wider = site["next"]
        rows.append(
            [
                page.name(site["name"]) + fixed,
                f'<div class="widths"><b>{words.bits(site["bits"])}</b>{bar}</div>',
                figure(site["score"]),
                bits_text(wider["bits"]) if wider else "widest",
                figure(wider["score"]) if wider else words.DASH,
                _price_cell(wider),
            ]
        )
    title = "The plan within the budget, and the price of more" if by_budget else "The price of more bits"
    used = [
        f"{words.small_percent(entry['used'] / entry['limit'])} of the {kind_text(entry['kind'])} are used"
        for entry in found["budget"]
        if by_budget
    ]
    remark = "The most harmful sites first. " + (
        f"Chosen exactly, by the scores; {words.listing(used)}." if used else "Prices are shares of float."
    )
    columns = ["Site", "Bits", "Score", "Next", "Score then", f"Price, {of}"]
    table = page.table(columns, rows, "Plan and prices", numbers=(2, 3, 4, 5))
    return page.card(title, table.replace("<table>", '<table class="prices">', 1), remark=remark, wide=True)


def _price_cell(wider: Mapping[str, Any] | None) -> str:
    if wider is None:
        return words.DASH
    cell = page.text(price_text(wider["price"]))
    if wider["with"]:
        cell += f" <small>with {page.text(words.listing(wider['with']))}</small>"
    if wider["price"]:
        cell += svg.share_bar(max(entry["share"] for entry in wider["price"]), "post")
    return cell


def _measured(found: Mapping[str, Any]) -> str:
    if not found["measured"]:
        return ""
    by = words.share(found)
    rows = [
        [
            page.name(entry["site"]),
            words.bits(entry["bits"]),
            figure(entry["score"]),
            f"{entry['increase']:+.3f}".replace("-", words.MINUS),
            words.points(entry[by.key] - found["float"][by.key]),
        ]
        for entry in found["measured"]
    ]
    columns = ["Site", "Bits", "Score", "Loss", f"{by.title}, points"]
    remark = (
        f"The {len(rows)} pairs with the highest scores, each on {found['samples']['measured']} validation "
        f"{unit(found)} with all else in float, against float's loss of {found['float']['loss']:.3f}."
    )
    table = page.table(columns, rows, "Measured losses", numbers=(1, 2, 3, 4))
    return page.card("Measured", table, remark=remark, wide=True)
