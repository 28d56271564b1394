"""overspent: the one line that says why no plan fits a budget, and what holds it up."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from bitsmith.errors import BudgetError
from bitsmith.quantization.bits import in_words
from bitsmith.quantization.budget import BudgetCost
from bitsmith.quantization.knapsack import Program
from bitsmith.quantization.scheme import FLOAT

NAMED = 3  # contributors in a message


def overspent(
    cost: BudgetCost, program: Program, limits: Mapping[str, float], *, uniform: bool = False
) -> BudgetError:
    """The error for ``limits`` that no plan meets (with ``uniform``: no plan of one width for all sites)."""
    cheapest = {kind: program.cheapest(kind) for kind in limits}
    facts = []
    for kind, found in cheapest.items():
        if found is None:
            return BudgetError(
                "no plan has only pairs of widths that the target multiplies, whatever it costs",
                where=f"target {cost.cost.target.name}",
                expected=f"pairs of {cost.cost.target.pairs}",
                remedy="Change the candidates, the fixed sites or what shares a width",
            )
        least = cost.exact(found.bits)[kind]
        if least > limits[kind]:
            facts.append(
                f"the cheapest plan costs {number(least)} {name(cost, kind)}, "
                f"the budget is {number(limits[kind])}" + _held_up(cost, kind, found.bits, least)
            )
    if facts:
        return BudgetError(
            "; ".join(facts),
            where="budget",
            remedy="Raise the limit, add narrower candidates, or free sites that are fixed",
        )
    if uniform:
        return BudgetError(
            "no single width for all free sites fits this budget, but plans of mixed widths do",
            where="budget",
            remedy="Use allocate",
        )
    return _contradiction(cost, program, limits)


def _contradiction(cost: BudgetCost, program: Program, limits: Mapping[str, float]) -> BudgetError:
    """Every limit can be met alone: the first two that cannot be met together, else all of them."""
    guilty: tuple[str, ...] = tuple(limits)
    for pair in combinations(limits, 2):
        if program.solve({}, {kind: limits[kind] for kind in pair}) is None:
            guilty = pair
            break
    facts = []
    for kind in guilty:
        others = {k: limits[k] for k in guilty if k != kind}
        best = program.cheapest(kind, others)
        if best is not None:
            facts.append(
                f"{number(limits[kind])} {name(cost, kind)} (at least "
                f"{number(cost.exact(best.bits)[kind])} within the other)"
            )
    return BudgetError(
        "these limits contradict each other: each can be met alone, together they cannot",
        where="budget: " + " and ".join(guilty),
        got="; ".join(facts) or None,
        remedy="Raise one of them",
    )


def _held_up(cost: BudgetCost, kind: str, bits: Mapping[str, Any], total: float) -> str:
    """What of ``total`` no choice among the candidates changes, the largest parts first."""
    parts = fixed_parts(cost, kind, bits)
    shown = [(what, part) for what, part in parts if part > 0.005 * total][:NAMED]
    if not shown:
        return "; every site is free and as narrow as its candidates"
    return "; held up by " + ", ".join(f"{what}: {part / total:.0%}" for what, part in shown)


def fixed_parts(cost: BudgetCost, kind: str, bits: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(what, cost) of the fixed sites and float leftovers that ``kind`` counts, dearest first."""
    free = set(cost.sites)

    def width(site: str) -> str:
        return in_words(bits.get(site, FLOAT))

    if kind == "activation_bytes":
        live, known = cost.cost.live, dict(bits)

        def size(at: int) -> int:
            tensor = live.tensors[at]
            return tensor.bytes_at(max((known.get(s, FLOAT) for s in tensor.sites), default=FLOAT))

        moment = max(live.moments, key=lambda m: sum(map(size, m)), default=())
        in_float = sum(size(i) for i in moment if not live.tensors[i].sites)
        held = [
            (" = ".join(f"{s} ({width(s)} bits)" for s in live.tensors[i].sites), float(size(i)))
            for i in moment
            if live.tensors[i].sites and not free & set(live.tensors[i].sites)
        ]
        parts = [("tensors that stay in float", float(in_float)), *held]
    else:
        counts: Mapping[str, Any] = {
            "weight_bytes": "scales, and parameters that stay in float",
            "bops": "products that stay in float",
        }
        parts = [(counts.get(kind, "products that stay in float"), float(cost.constant(kind)))]
        for layer in cost.cost.layers:
            first, second = layer.operands
            if kind in ("weight_bytes", "average_weight_bits"):
                sites: tuple[str, ...] = (first,) if layer.weight_elements else ()
            elif kind == "average_activation_bits":
                sites = tuple(s for s in layer.operands if s in layer.activation_elements)
            else:
                sites = layer.sites if layer.macs else ()
            if sites and not set(sites) <= free:
                what = " x ".join(sites) + f" ({' x '.join(width(s) for s in sites)} bits)"
                at = (bits.get(first, FLOAT), bits.get(second, FLOAT))
                parts.append((what, float(cost.layer_cost(kind, layer, *at))))
    return sorted(parts, key=lambda part: -part[1])


def name(cost: BudgetCost, kind: str) -> str:
    """A kind as a unit in a sentence."""
    table = cost.tables.get(kind)
    return kind.replace("_", " ") if table is None else f"{table.unit} ({table.name})"


def number(value: float) -> str:
    """Integers whole up to six digits, else four significant digits."""
    return str(value) if isinstance(value, int) and abs(value) < 10**6 else f"{value:.4g}"
