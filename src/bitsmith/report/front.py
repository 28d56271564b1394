"""sweep.html: accuracy over cost of a sweep, with the plans that were searched, uniform plans and float.

Drawn from sweep.json alone. A point is dominated where another costs no more, is at least as accurate, and is
better in one of the two. Where a uniform plan dominates one that was searched, `verdicts` says so in words;
the page and the terminal show the same sentences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsmith.files import read_json, write_atomic
from bitsmith.report import page, svg, words
from bitsmith.report.compare import pareto_front

PAGE = "sweep.html"


@dataclass(frozen=True)
class Spot:
    """A plan on the picture. kind: "searched" or "uniform"; budgets: those that it was trained for."""

    kind: str
    label: str
    used: float
    accuracy: float
    budgets: tuple[float, ...]


def write_front(directory: str | Path) -> Path:
    """Write ``sweep.html`` beside the sweep.json in ``directory``. Raises FormatError."""
    found = read_json(Path(directory) / "sweep.json", "sweep file")
    path = Path(directory) / PAGE
    write_atomic(path, render(found).encode())
    return path


def spots(found: Mapping[str, Any]) -> list[Spot]:
    """All plans of a sweep; a uniform plan that competed for several budgets stands once."""
    made, key = [], words.share(found).key
    uniform: dict[tuple[str, float, float], list[float]] = {}
    for point in found["points"]:
        one = point["searched"]
        label = budget_text(found, point["budget"])
        made.append(Spot("searched", label, one["used"], one[key], (point["budget"],)))
        if other := point["uniform"]:
            plan = (other["bits"], other["used"], other[key])
            uniform.setdefault(plan, []).append(point["budget"])
    made += [Spot("uniform", *plan, tuple(budgets)) for plan, budgets in uniform.items()]
    return made


def dominator(spot: Spot, others: list[Spot]) -> Spot | None:
    """The most accurate of the spots that dominate ``spot``, or None."""
    better = [
        other
        for other in others
        if other.used <= spot.used
        and other.accuracy >= spot.accuracy
        and (other.used, other.accuracy) != (spot.used, spot.accuracy)
    ]
    return max(better, key=lambda other: (other.accuracy, -other.used), default=None)


def verdicts(found: Mapping[str, Any]) -> list[str]:
    """Where uniform plans dominate searched ones, in sentences; one that says so where none does."""
    known = spots(found)
    uniform = [spot for spot in known if spot.kind == "uniform"]
    if not uniform:
        return ["No uniform plan fits any of these budgets."]
    better: list[str] = []
    equal: dict[Spot, list[str]] = {}
    for spot in known:
        other = dominator(spot, uniform) if spot.kind == "searched" else None
        if other is None:
            continue
        gain = words.points(other.accuracy - spot.accuracy, decimals(found)).lstrip("+")
        if not float(gain):
            equal.setdefault(other, []).append(spot.label)
            continue
        better.append(
            f"At {cost_text(found, other.used)} the uniform {other.label} plan is better by {gain} points "
            f"than the plan searched within {spot.label} ({percent(found, other.accuracy)} against "
            f"{percent(found, spot.accuracy)} at {cost_text(found, spot.used)})."
        )
    same = [
        f"At {cost_text(found, other.used)} the uniform {other.label} plan is as {_good(found)} "
        f"({percent(found, other.accuracy)}) and no dearer than what was searched within "
        f"{words.listing(labels)}."
        for other, labels in equal.items()
    ]
    return better + same or ["No uniform plan dominates a plan that was searched."]


def noise(found: Mapping[str, Any]) -> str:
    """How far apart two accuracies must be to mean something, in words."""
    if words.share(found) is words.MEAN_IOU:
        return (
            f"Mean IoU is over {found['test_images']:,} test images; what differs by less than other seeds "
            "do means nothing by itself."
        )
    best = max(point["searched"]["accuracy"] for point in found["points"])
    error = math.sqrt(best * (1 - best) / found["test_images"])
    counted = found.get("counted", "images")
    return (
        f"Accuracies are of {found['test_images']:,} test {counted}: one standard error is "
        f"{100 * error:.1f} points, and smaller differences mean nothing by themselves."
    )


def decimals(found: Mapping[str, Any]) -> int:
    """Digits that the test set can carry."""
    if words.share(found) is words.MEAN_IOU:
        return 1
    return 2 if found["test_images"] >= 2000 else 1


def _good(found: Mapping[str, Any]) -> str:
    return "accurate" if words.share(found) is words.ACCURACY else "good"


def percent(found: Mapping[str, Any], accuracy: float) -> str:
    """An accuracy, or a mean IoU."""
    return words.percent(accuracy, decimals(found))


def budget_text(found: Mapping[str, Any], budget: float) -> str:
    """A budget as it was asked for: "2.0 %", or absolute."""
    share = budget <= 1 and "average" not in found["kind"]
    return words.small_percent(budget) if share else cost_text(found, budget)


def cost_text(found: Mapping[str, Any], used: float) -> str:
    """A cost with its unit: "2.10 M BOPs", "4.30 kB", "3.25 bits"."""
    kind = found["kind"]
    if "average" in kind:
        return f"{used:.2f}{words.SPACE}bits"
    if "bytes" in kind:
        return words.size(used)
    return f"{words.count(used)}{words.SPACE}{'BOPs' if kind == 'bops' else found['unit'] or ''}".strip()


def axis(found: Mapping[str, Any]) -> str:
    """What the cost axis is of."""
    names = {
        "bops": "bit operations",
        "weight_bytes": "weight bytes",
        "activation_bytes": "peak of activations",
    }
    return names.get(found["kind"], found["kind"].removeprefix("table:").replace("_", " "))


def render(found: Mapping[str, Any]) -> str:
    """The page as a string."""
    known = spots(found)
    count = len(found["points"])
    won = sum(point["winner"] == "searched" for point in found["points"])
    front = [known[at] for at in pareto_front([(spot.used, spot.accuracy) for spot in known])]
    cheapest, best = front[0], next(s for s in front if s.accuracy == front[-1].accuracy)
    title = f"{percent(found, best.accuracy)} at {cost_text(found, best.used)}"
    lead = (
        f"The cheapest plan has {percent(found, cheapest.accuracy)} at {cost_text(found, cheapest.used)}. "
        f"On the validation split the searched plan won {won} of {count} against a uniform plan that trained "
        f"as long; float has {percent(found, found['float'][words.share(found).key])}."
    )
    header = (
        f'<div class="brand">{page.MARK}<b>Bitsmith</b><span class="run">sweep</span></div>'
        f'<h1>{page.text(title)}</h1><p class="lead">{page.text(lead)}</p>'
        f'<p class="asked">{page.text(asked(found))}</p>'
    )
    said = "".join(f"<p>{page.text(line)}</p>" for line in verdicts(found))
    verdict = page.card("Against uniform plans", said, remark=noise(found), wide=True)
    body = page.grid([_picture(found, known)]) + page.grid([verdict]) + page.grid([_table(found, known)])
    footer = (
        "Made by Bitsmith from sweep.json; works offline. The cost axis is logarithmic. Test figures "
        "decide nothing: who is delivered was decided on the validation split."
    )
    return page.document(f"Sweep · {found['model']}", header, body, footer)


def asked(found: Mapping[str, Any]) -> str:
    """Model, data, and what float costs."""
    return (
        f"{found['model']} on {found['data']} · float: {cost_text(found, found['float']['used'])} · "
        f"seed {found['seed']}"
    )


def _picture(found: Mapping[str, Any], known: list[Spot]) -> str:
    marks = []
    for spot in known:
        what = f"searched within {spot.label}" if spot.kind == "searched" else f"uniform {spot.label}"
        text = f"{what}: {percent(found, spot.accuracy)} at {cost_text(found, spot.used)}"
        kind = "quant" if spot.kind == "searched" else "acts"
        marks.append((spot.used, svg.Mark(text, spot.accuracy, kind, spot.label)))
    front = pareto_front([(spot.used, spot.accuracy) for spot in known])
    by = words.share(found)
    label = f"{by.title} against {axis(found)}: " + "; ".join(mark.label for _, mark in marks)

    def show(cost: float) -> str:
        return words.tick(cost_text(found, cost))

    plot = svg.scatter(marks, front, show, axis(found), label, found["float"][by.key], "acts")
    keys = page.legend([("b-quant", "Searched, by budget"), ("b-acts", "Uniform"), ("b-float", "Float")])
    better = "more accurate" if by is words.ACCURACY else "better"
    remark = f"Filled and joined: no other plan is both cheaper and {better}. Hollow: dominated."
    return page.card(f"{by.title} against {axis(found)}", keys + plot, remark=remark, wide=True)


def _table(found: Mapping[str, Any], known: list[Spot]) -> str:
    rows = []
    for point in found["points"]:
        one, other = point["searched"], point["uniform"]
        won = point["winner"] == "searched"
        share = words.small_percent(one["used"] / point["limit"])
        rows.append(
            [
                budget_text(found, point["budget"]),
                f"{_accuracy(found, one, known, won)}<br><small>{cost_text(found, one['used'])}</small>",
                f"<small>{share}</small>",
                f"{_accuracy(found, other, known, not won)}"
                f"<br><small>{other['bits']}, {cost_text(found, other['used'])}</small>"
                if other
                else "<small>none fits</small>",
                point["winner"],
                page.text(point["start"]),
            ]
        )
    columns = ["Budget", "Searched", "of budget", "Uniform", "Delivered", "Search began at"]
    table = page.table(columns, rows, "Points of the sweep", numbers=(1, 2, 3))
    remark = "Bold is delivered; ○ is dominated by another plan here."
    return page.card("Points", table, remark=remark, wide=True)


def _accuracy(found: Mapping[str, Any], plan: Mapping[str, Any], known: list[Spot], won: bool) -> str:
    value = plan[words.share(found).key]
    shown = percent(found, value)
    beaten = dominator(Spot("", "", plan["used"], value, ()), known)
    shown = f"<b>{shown}</b>" if won else shown
    return f"{shown} ○" if beaten else shown
