"""How a search came to its plan, and where that saved bits. From `Run` to markup.

Two cards, empty for a run whose widths were asked for: the search's traces (cost against budget, multiplier,
temperature, entropy), and the layers that got fewer bits than under the uniform plan that competed with it.
Who won is in contest.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitsmith.report import contest, page, svg, uniform, words
from bitsmith.report.certificate import is_number
from bitsmith.report.metrics import Layer, Run

KINDS = ("quant", "acts", "export", "post", "uniform")  # colours of several budgets
MOST = 6  # layers shown with what they save
Scalars = list[tuple[float, dict[str, float]]]


def traces(run: Run) -> str:
    """Cost against budget, multipliers, temperature and entropy, up to the decision and a little beyond."""
    searching = _records(run)
    if not searching:
        return ""
    end = searching[-1][0]
    last = max(
        [end, *(entry["step"] for entry in run.history.get("qat") or () if is_number(entry.get("step")))]
    )
    until = min(last, round(1.3 * end))
    kinds = [key.removeprefix("used_") for key in searching[0][1] if key.startswith("used_")]
    colours = dict(zip(kinds, KINDS * len(kinds), strict=False))

    def curves(prefix: str) -> list[svg.Series]:
        return [
            svg.Series(contest.kind_name(kind), colours[kind], _points(searching, prefix + kind))
            for kind in kinds
        ]

    def panel(name: str, series: Sequence[svg.Series], show: svg.Format, level: Any = None) -> str:
        known = [one for one in series if one.points]
        if not known:
            return ""
        ends = f"{name}: " + ", ".join(
            f"{one.label} from {show(one.points[0][1])} to {show(one.points[-1][1])}" for one in known
        )
        moment = (end, "decided")
        plot = svg.lines(
            known, show, "optimizer step", ends, height=130, level=level, moment=moment, until=until
        )
        return f'<div class="half"><h3>{name}</h3>{plot}</div>'

    cost = curves("used_") + _kept(run, colours, end, until)
    one = {key: [svg.Series(key, "quant", _points(searching, key))] for key in ("temperature", "entropy")}
    body = (
        panel("Expected cost, share of the budget", cost, svg.show_percent, level=(1.0, "budget"))
        + panel("Price of the budget, λ", curves("multiplier_"), _short)
        + panel("Temperature of the choice", one["temperature"], _short)
        + panel("Entropy of the choice", one["entropy"], svg.show_percent)
    )
    named = [(f"b-{colours[kind]}", contest.kind_name(kind).capitalize()) for kind in kinds]
    keys = page.legend(named) if len(kinds) > 1 else ""
    rest = f"; the other {last - end:,.0f} steps trained at exactly these" if last > end else ""
    remark = (
        f"Widths and weights were trained together for {end:,.0f} of {last:,.0f} steps; then the widths were "
        f"decided{rest}. λ rises while the expected cost is above the budget and falls while it is below. "
        "Entropy: 100 % is no preference among the candidates, 0 % is none left to decide."
    )
    return page.card("Search", f'{keys}<div class="halves">{body}</div>', remark=remark, wide=True)


def _short(value: float) -> str:
    return f"{value:.3g}"


def _records(run: Run) -> Scalars:
    """(step, scalars of the method that searches, without its name) while it searched."""
    found: Scalars = []
    for entry in run.traces:
        owners = [key.removesuffix(".entropy") for key in entry if key.endswith(".entropy")]
        own = {
            key.removeprefix(f"{owner}."): float(value)
            for owner in owners[:1]
            for key, value in entry.items()
            if key.startswith(f"{owner}.") and is_number(value)
        }
        if {"entropy", "temperature"} <= own.keys() and is_number(entry.get("step")):
            found.append((float(entry["step"]), own))
    return found


def _points(records: Scalars, key: str) -> list[tuple[float, float]]:
    return [(x, scalars[key]) for x, scalars in records if key in scalars]


def _kept(run: Run, colours: Mapping[str, str], start: float, until: float) -> list[svg.Series]:
    """What the decided plan costs, exactly; known where it is the one that was delivered."""
    if contest.winner(run) != "searched" or until <= start:
        return []
    return [
        svg.Series(
            "decided plan", colours[kind], [(x, budget["used"] / budget["limit"]) for x in (start, until)]
        )
        for budget in run.budgets
        if (kind := str(budget.get("kind"))) in colours and is_number(budget.get("used"))
    ]


# ---- where bits were saved


def savings(run: Run) -> str:
    """The layers with the fewest bits, and what that saved against the uniform plan."""
    widths = uniform.widths(run) if contest.winner(run) == "searched" else None
    if widths is None:
        return ""
    layers = [layer for layer in run.layers if layer.macs and _known(layer)]
    before = sum(_product(widths[layer.name]) * (layer.macs or 0) for layer in layers)
    stored = sum(widths[layer.name][0] * _weights(layer) for layer in layers) or 1.0
    gains = {
        layer.name: ((_product(widths[layer.name]) - _product(uniform.present(layer))) * (layer.macs or 0))
        / before
        for layer in layers
    }
    fewer = [
        layer
        for layer in layers
        if any(a < b for a, b in zip(uniform.present(layer), widths[layer.name], strict=True))
    ]
    if not fewer:
        return ""
    rows = []
    for layer in sorted(fewer, key=lambda layer: (_product(uniform.present(layer)), -gains[layer.name]))[
        :MOST
    ]:
        here, there = uniform.present(layer), widths[layer.name]
        kept = (there[0] - here[0]) * _weights(layer) / stored
        stored_less = _change(kept) if _weights(layer) else words.DASH
        change = f"{_pair(there)} → {_pair(here)}"
        rows.append([page.name(layer.name), change, _change(gains[layer.name]), stored_less])
    more = sorted((layer for layer in layers if gains[layer.name] < 0), key=lambda layer: gains[layer.name])
    spent = words.listing(f"{layer.name} ({_change(gains[layer.name])})" for layer in more[:3])
    remark = (
        "Layers to which the search gave fewer bits than the uniform plan, those with the fewest first. Bits "
        "are weights × activations. The last two columns: what that changes, as shares of the whole model "
        "under the uniform plan."
    )
    if spent:
        remark += (
            f" What was saved pays for more bits elsewhere, most of all in {spent} of the bit operations."
        )
    columns = ["Layer", "Bits: uniform → searched", "Bit operations", "Stored weight bits"]
    table = page.table(columns, rows, "Layers with the fewest bits", numbers=range(1, len(columns)))
    return page.card("Where bits were saved", table, remark=remark, wide=True)


def _known(layer: Layer) -> bool:
    return layer.weight_bits is not None and layer.activation_bits is not None


def _weights(layer: Layer) -> float:
    return 0.0 if layer.is_product else layer.weight_elements or 0.0


def _product(widths: tuple[float, float]) -> float:
    return widths[0] * widths[1]


def _pair(widths: tuple[float, float]) -> str:
    return f"{words.bits(widths[0])} {words.TIMES} {words.bits(widths[1])}"


def _change(saved: float) -> str:
    """A saved share as a change: 0.082 -> "−8.2 %"."""
    text = words.small_percent(abs(saved))
    return f"{'+' if saved < 0 else words.MINUS if saved > 0 else ''}{text}"
