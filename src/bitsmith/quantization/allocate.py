"""allocate: the plan of the greatest value that a budget admits, found exactly.

A multiple-choice knapsack: one width a site, several budgets, values that add up. BOPs and cost tables
multiply two decisions; written over *pairs* of widths of a layer's operands the program stays linear:

    maximize  sum v[c, k] x[c, k]
    where     sum over k of x[c, k] = 1                                  for every class c of sites
              sum over k of y[l, j, k] = x[first(l), j],  sum over j of y[l, j, k] = x[second(l), k]
              constant + sum a x + sum c[l, j, k] y[l, j, k] <= limit    for every budget

with x and y binary (y is the product, and the relaxation tighter than McCormick's). The well-known
allocations (HAWQ-V3, 2011.10680) fix the activations or couple them to the weights, so that one sum remains.
The solver is HiGHS; what it returns is checked again with integers, for its rows hold to 1e-6 only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitsmith.errors import SiteError
from bitsmith.quantization.bits import Width
from bitsmith.quantization.budget import BudgetCost
from bitsmith.quantization.knapsack import Program, classes_of
from bitsmith.quantization.overspent import overspent

CUTS = 32  # plans that the solver let over by its tolerance and that are then forbidden one by one
ROUNDED_CUTS = 128  # the same, where codes of groups of channels are rounded up to bytes
TIGHTEN = 1e-6  # relative, beyond that
NEARLY = 1e-3  # relative: how near to the dearest plan the search for it comes


@dataclass(frozen=True)
class Allocation:
    """bits: every site, fixed ones included; choices: the same with groups of channels by themselves;
    value: of the free sites; gap: how much better, relative to the
    value, another plan could be at most (0: proven best); used, limits: kind -> cost and limit, absolute."""

    bits: dict[str, Width]
    choices: dict[str, Width]
    value: float
    gap: float
    used: dict[str, Any]
    limits: dict[str, float]


def allocate(
    cost: BudgetCost,
    value: Mapping[str, Sequence[float]],
    *,
    shared: Sequence[Sequence[str]] = (),
    fill: float = 0.0,
    time_limit: float | None = None,
    gap: float = 0.0,
) -> Allocation:
    """Choose one candidate for every free site of ``cost`` so that the values sum to the most within all
    budgets.

    value: free site (or group of channels) -> one number for each of its candidates, in their order.
    shared: groups of sites that must have one width, besides those that the target and the tables name.
    fill: share of what the dearest plan within the budgets uses (of the budget that it comes nearest to)
    that the chosen one uses at least: a value learned from few steps undervalues bits. time_limit: seconds,
    after which the best plan so far is returned with its ``gap``; gap: relative, at which to stop.

    Raises BudgetError where no plan fits (with the cheapest plan and what holds it up) or the time was too
    short for any, SiteError where value or shared do not fit the sites.
    """
    _check_values(cost, value)
    limits = dict(zip(cost.kinds, cost.limits.tolist(), strict=True))
    program = Program(cost, classes_of(cost, shared))
    objective = program.values(value)
    floors = _floors(cost, program, limits, fill) if fill else {}
    cuts: list[dict[str, int]] = []
    bound, slack = math.inf, 0.0
    while True:
        found = program.solve(
            objective, limits, slack=slack, floors=floors, cuts=cuts, time_limit=time_limit, gap=gap
        )
        if found is None:
            raise overspent(cost, program, limits)
        if not slack:  # cuts forbid plans that are over; a tightened limit may forbid others
            bound = found.bound
        bits, used = found.bits, cost.exact(found.bits)
        if all(used[kind] <= limit for kind, limit in limits.items()):
            break
        if len(cuts) < (ROUNDED_CUTS if program.rounding else CUTS):
            cuts.append(bits)
        else:
            slack += TIGHTEN
    total = math.fsum(value[site][cost.candidates[site].index(bits[site])] for site in cost.sites)
    spread = program.spread(objective)
    return Allocation(
        bits=cost.joined(bits),
        choices=dict(bits),
        value=total,
        gap=max(bound - found.value, 0.0) / max(abs(total), spread) if spread else 0.0,
        used=used,
        limits=limits,
    )


def _floors(cost: BudgetCost, program: Program, limits: Mapping[str, float], fill: float) -> dict[str, float]:
    """The least that a plan must use of the budget that can be used up best: kind -> absolute."""
    dearest = {}
    for kind, limit in limits.items():
        # Less than all, as the solver may be over by its tolerance; a peak has no row that could hold it up.
        # To the last unit it would be a subset sum, minutes where many sites are alike.
        within = {**limits, kind: limit * (1 - TIGHTEN)}
        found = program.solve(program.costs[kind], within, gap=NEARLY)
        if found is not None and kind != "activation_bytes":
            reached = min(cost.exact(found.bits)[kind], limit)
            dearest[kind] = reached, min(fill * found.bound, reached)
    if not dearest:
        return {}
    kind = max(dearest, key=lambda kind: dearest[kind][0] / limits[kind])
    return {kind: dearest[kind][1]}


def uniform_plan(cost: BudgetCost) -> dict[str, Width]:
    """The dearest plan of the form "b bits everywhere" that fits every budget: site -> width, all sites.

    A free site takes its largest candidate that is at most b, or its smallest. Widths that make a pair which
    the target cannot multiply are passed over. Raises BudgetError where no b fits.
    """
    limits = dict(zip(cost.kinds, cost.limits.tolist(), strict=True))
    classes = classes_of(cost, ())
    for b in sorted({width for site in cost.sites for width in cost.candidates[site]} or {8}, reverse=True):
        bits: dict[str, Width] = dict(cost.fixed)
        for members, widths in classes:
            nearest = widths[0]  # of a fixed site
            if len(widths) > 1:
                nearest = max((w for w in widths if w <= b), default=min(widths))
            bits.update(dict.fromkeys(members, nearest))
        possible = all(
            (bits.get(layer.operands[0], 32), bits.get(layer.operands[1], 32)) in cost.pairs(layer)
            for layer in cost.cost.layers
        )
        if possible and all(used <= limits[kind] for kind, used in cost.exact(bits).items()):
            return cost.joined(bits)
    raise overspent(cost, Program(cost, classes), limits, uniform=True)


def _check_values(cost: BudgetCost, value: Mapping[str, Sequence[float]]) -> None:
    for site in cost.sites:
        numbers = value.get(site)
        widths = cost.candidates[site]
        if numbers is None or len(numbers) != len(widths) or not all(math.isfinite(n) for n in numbers):
            raise SiteError(
                "allocate needs a value for each candidate of this site",
                where=f"value.{site}",
                got=None if numbers is None else repr(list(numbers)),
                expected=f"{len(widths)} finite numbers, for {list(widths)} bits",
            )
