"""allocate_roughly: the two usual ways to choose widths within a budget, to be compared with the exact one.

Both take what `allocate` takes and are never over a budget either; neither proves anything: their gap is inf.

    greedy        from the cheapest plan, raise the class of sites that gains most value per share of the
                  budget, as long as something fits
    evolutionary  plans of a population are crossed, mutated, cut back at random to the budget and filled up
                  at random; the most valuable survive

Both change one class of sites at a time, so where a target multiplies only some pairs of widths they do not
find plans that only two changes at once lead to.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator, Mapping, Sequence

import torch

from bitsmith.quantization.allocate import Allocation, allocate
from bitsmith.quantization.budget import BudgetCost
from bitsmith.quantization.knapsack import classes_of

Values = Mapping[str, Sequence[float]]
Rows = list[int]  # a plan: which of its widths, ascending, each class has
POPULATION, GENERATIONS, MUTATIONS = 24, 20, 0.1


def greedy(cost: BudgetCost, value: Values, *, shared: Sequence[Sequence[str]] = ()) -> Allocation:
    """The plan that raising the best class again and again ends at. Raises what `allocate` raises."""
    plans = _Plans(cost, value, shared)
    rows = plans.first
    plans.stand_at(rows)
    heap = [(-plans.best(rows, c)[0], c) for c in range(len(rows))]
    heapq.heapify(heap)
    while heap:
        _, c = heapq.heappop(heap)
        ratio, row = plans.best(rows, c)  # what was raised since may have made it dearer
        if ratio <= 0:
            continue
        if not heap or ratio >= -heap[0][0]:
            plans.take(rows, c, row)
            ratio = plans.best(rows, c)[0]
        heapq.heappush(heap, (-ratio, c))
    return plans.allocation(rows)


def evolutionary(
    cost: BudgetCost,
    value: Values,
    *,
    shared: Sequence[Sequence[str]] = (),
    generator: torch.Generator | None = None,
) -> Allocation:
    """The best plan of a small population after some generations. Raises what `allocate` raises."""
    seed = int(torch.randint(2**31, (1,), generator=generator or torch.Generator().manual_seed(0)))
    chance, plans = random.Random(seed), _Plans(cost, value, shared)
    population = [plans.first, *(plans.child(plans.first, plans.first, chance) for _ in range(POPULATION))]
    for _ in range(GENERATIONS):
        parents = [chance.sample(population, 2) for _ in range(POPULATION)]
        children = [plans.child(mother, father, chance) for mother, father in parents]
        different = {tuple(rows): rows for rows in (*population, *children)}
        best = sorted(different.values(), key=plans.value, reverse=True)
        population = (best if len(best) > 1 else best * 2)[:POPULATION]
    return plans.allocation(population[0])


class _Plans:
    """What plans are worth and cost, one change at a time. `stand_at` a plan before changes of it are
    asked."""

    def __init__(self, cost: BudgetCost, value: Values, shared: Sequence[Sequence[str]]) -> None:
        classes = [(members, tuple(sorted(widths))) for members, widths in classes_of(cost, shared)]
        self.cost, self.numbers, self.limits = cost, value, cost.limits.tolist()
        self.fixed = {site: widths[0] for members, widths in classes for site in members if len(widths) == 1}
        self.classes = [(members, widths) for members, widths in classes if len(widths) > 1]
        self.values = [
            [math.fsum(value[s][cost.candidates[s].index(w)] for s in members) for w in widths]
            for members, widths in self.classes
        ]
        of = {site: c for c, (members, _) in enumerate(self.classes) for site in members}
        self.operands = [tuple(of.get(site, -1) for site in layer.operands) for layer in cost.cost.layers]
        self.layers: list[list[int]] = [[] for _ in self.classes]
        for at, operands in enumerate(self.operands):
            for c in set(operands) - {-1}:
                self.layers[c].append(at)
        self.sums = [
            kind for kind in cost.kinds if kind != "activation_bytes"
        ]  # a peak is no sum over layers
        self.known: dict[tuple[int, int, int], list[float] | None] = {}
        self.first = self._first(shared)

    def _first(self, shared: Sequence[Sequence[str]]) -> Rows:
        """The cheapest plan; where that is none for the target or the tables, one that is."""
        rows = [0] * len(self.classes)
        possible = all(self._layer(at, rows) is not None for at in range(len(self.operands)))
        if possible and self.fits(rows):
            return rows
        few = {site: [-float(w) for w in self.cost.candidates[site]] for site in self.cost.sites}
        bits = allocate(self.cost, few, shared=shared).choices
        return [widths.index(bits[members[0]]) for members, widths in self.classes]

    def bits(self, rows: Rows) -> dict[str, int]:
        """Site -> width."""
        pairs = zip(self.classes, rows, strict=True)
        return self.fixed | {site: widths[row] for (members, widths), row in pairs for site in members}

    def value(self, rows: Rows) -> float:
        """Of all free sites."""
        return math.fsum(values[row] for values, row in zip(self.values, rows, strict=True))

    def fits(self, rows: Rows) -> bool:
        """Within every budget, counted with integers."""
        used = self.cost.exact(self.bits(rows))
        return all(used[kind] <= limit for kind, limit in zip(self.cost.kinds, self.limits, strict=True))

    def _layer(self, at: int, rows: Rows) -> list[float] | None:
        """What a layer costs in ``sums``, over the limits; None for a pair that the target does not
        multiply."""
        first, second = (rows[c] if c >= 0 else -1 for c in self.operands[at])
        key = (at, first, second)
        if key not in self.known:
            layer = self.cost.cost.layers[at]
            pair = [
                self.classes[c][1][rows[c]] if c >= 0 else self.cost.widths(site)[0]
                for c, site in zip(self.operands[at], layer.operands, strict=True)
            ]
            self.known[key] = (
                [
                    self.cost.layer_cost(kind, layer, pair[0], pair[1]) / limit
                    for kind, limit in zip(self.cost.kinds, self.limits, strict=True)
                    if kind in self.sums
                ]
                if tuple(pair) in self.cost.pairs(layer)
                else None
            )
        return self.known[key]

    def stand_at(self, rows: Rows) -> None:
        """Count a plan anew; from there `take` keeps count."""
        used = self.cost.exact(self.bits(rows))
        limits = dict(zip(self.cost.kinds, self.limits, strict=True))
        self.used = [used[kind] / limits[kind] for kind in self.sums]

    def change(self, rows: Rows, c: int, row: int) -> list[float] | None:
        """What the costs, over the limits, change by where class c takes ``row``; None where it may not."""
        changed = [*rows[:c], row, *rows[c + 1 :]]
        total = [0.0] * len(self.sums)
        for at in self.layers[c]:
            before, after = self._layer(at, rows), self._layer(at, changed)
            if before is None or after is None:
                return None
            total = [t + b - a for t, b, a in zip(total, after, before, strict=True)]
        return total

    def best(self, rows: Rows, c: int) -> tuple[float, int]:
        """(value gained per share of the budget, row) of the best change of class c that fits; 0 for none."""
        found = (0.0, rows[c])
        for row, value in enumerate(self.values[c]):
            gain = value - self.values[c][rows[c]]
            change = self.change(rows, c, row) if gain > 0 else None
            if change is None or any(u + d > 1 for u, d in zip(self.used, change, strict=True)):
                continue
            ratio = gain / max(*change, 1e-12)
            if ratio > found[0] and (len(self.sums) == len(self.limits) or self._peak_fits(rows, c, row)):
                found = (ratio, row)
        return found

    def _peak_fits(self, rows: Rows, c: int, row: int) -> bool:
        return self.fits([*rows[:c], row, *rows[c + 1 :]])

    def take(self, rows: Rows, c: int, row: int) -> None:
        """Make a change, in place."""
        change = self.change(rows, c, row)
        assert change is not None
        self.used = [u + d for u, d in zip(self.used, change, strict=True)]
        rows[c] = row

    def child(self, mother: Rows, father: Rows, chance: random.Random) -> Rows:
        """A plan with classes of both and some by chance, within the budgets."""
        rows = mother.copy()
        self.stand_at(rows)
        for c, (_, widths) in enumerate(self.classes):
            row = father[c] if chance.random() < 0.5 else rows[c]
            row = chance.randrange(len(widths)) if chance.random() < MUTATIONS else row
            if row != rows[c] and self.change(rows, c, row) is not None:
                self.take(rows, c, row)
        for c in self._order(chance):  # back into the budgets; at last to the first plan, which is within
            if max(self.used, default=0) <= 1 and self.fits(rows):
                break
            if rows[c] > self.first[c] and self.change(rows, c, self.first[c]) is not None:
                self.take(rows, c, self.first[c])
        for c in self._order(chance):
            ratio, row = self.best(rows, c)
            if ratio > 0:
                self.take(rows, c, row)
        return rows if self.fits(rows) else self.first

    def _order(self, chance: random.Random) -> Iterator[int]:
        return iter(chance.sample(range(len(self.classes)), len(self.classes)))

    def allocation(self, rows: Rows) -> Allocation:
        """A plan as `allocate` would return it."""
        while not self.fits(rows):  # sums of parts may be off in their last digits
            c = max(range(len(rows)), key=lambda c: rows[c] - self.first[c])
            rows = [*rows[:c], self.first[c], *rows[c + 1 :]]
        bits = self.bits(rows)
        return Allocation(
            bits=self.cost.joined(bits),
            choices=dict(bits),
            value=self.value(rows),
            gap=math.inf,
            used=self.cost.exact(bits),
            limits=dict(zip(self.cost.kinds, self.limits, strict=True)),
        )
