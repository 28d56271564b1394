"""knapsack: the linear program behind `allocate`, with scipy's HiGHS.

Sites that must share a width are one class with one decision. A product of two decisions gets variables of
its own only where a cost is not the sum of a part of each, or the target forbids a pair; the peak of the
activations is one variable above the sum of every moment.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitsmith.errors import BudgetError, SiteError, nearest
from bitsmith.quantization.budget import BudgetCost
from bitsmith.quantization.cost import LayerCost
from bitsmith.quantization.cost_table import Shared
from bitsmith.quantization.scheme import FLOAT

SCALE = 1e3  # of the objective: HiGHS stops at an absolute gap of 1e-6. Rows scaled so made it cycle

Class = tuple[tuple[str, ...], tuple[int, ...]]  # (sites of one width, the widths that it may be)
Row = dict[int, float]  # column -> coefficient


@dataclass(frozen=True)
class Solution:
    """bits: of all sites; value: as the solver sees it, whose binaries are such to 1e-6; bound: no plan has a
    greater one."""

    bits: dict[str, int]
    value: float
    bound: float


def classes_of(cost: BudgetCost, shared: Sequence[Sequence[str]]) -> list[Class]:
    """Every site in a class; a class of several sites may have the widths that all of them may have.

    Raises SiteError for an unknown site, BudgetError for sites that must share a width and have none in
    common.
    """
    present, names = list(cost.whole.present), list(cost.cost.present)
    leader = {name: name for name in names}

    def find(site: str) -> str:
        while leader[site] != site:
            site = leader[site]
        return site

    for group in shared:
        for site in group:
            if site not in present:
                close = nearest(site, present) or present[:3]
                raise SiteError(
                    "there is no such site to share a width",
                    where=site,
                    remedy=f"The nearest are {', '.join(close)}",
                )
    rules: list[Shared] = [cost.cost.target.shared, *(table.shared for table in cost.tables.values())]
    for group in [*shared, *(group for rule in rules for group in _matched(rule, present))]:
        for parts in _in_step([cost.names(site) for site in group]):
            for name in parts[1:]:
                leader[find(name)] = find(parts[0])
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(find(name), []).append(name)
    classes = []
    for group in members.values():
        widths = [w for w in cost.widths(group[0]) if all(w in cost.widths(site) for site in group)]
        if not widths:
            raise BudgetError(
                "these sites must share a width and have no candidate in common",
                where=" = ".join(group),
                got="; ".join(f"{site}: {list(cost.widths(site))}" for site in group),
                remedy="Give them a common candidate",
            )
        classes.append((tuple(group), tuple(widths)))
    return classes


def _in_step(sites: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """What shares a width where sites do: their first groups, their second, ...; all, if the numbers
    differ."""
    if len({len(names) for names in sites}) == 1:
        return list(zip(*sites, strict=True))
    return [tuple(name for names in sites for name in names)]


def _matched(shared: Shared, present: Sequence[str]) -> Iterable[list[str]]:
    for item in shared:
        if isinstance(item, str):
            yield [site for site in present if fnmatch.fnmatchcase(site, item)]
            continue
        found: dict[tuple[str, ...], list[str]] = {}
        for glob in item:
            pattern = re.compile(re.escape(glob).replace(r"\*", "(.*)").replace(r"\?", "(.)"))
            for site in present:
                match = pattern.fullmatch(site)
                if match:
                    found.setdefault(match.groups(), []).append(site)
        yield from found.values()


class Program:
    """The rows and columns for the classes of ``cost``; `solve` adds objective, limits and cuts."""

    def __init__(self, cost: BudgetCost, classes: Sequence[Class]) -> None:
        self.cost, self.classes = cost, [*classes, (("",), (FLOAT,))]  # the last: all operands in float
        self.class_of = {site: c for c, (sites, _) in enumerate(self.classes) for site in sites}
        self.start = list(np.cumsum([0, *(len(widths) for _, widths in self.classes)]))
        self.columns = int(self.start[-1])
        self.products: list[int] = []
        self.upper: dict[int, float] = {}
        self.rounding = 7 / 8 * self._count_ragged()  # bytes that the rows lie below the file at most
        self.equalities: list[tuple[Row, float]] = [
            ({self.start[c] + k: 1.0 for k in range(len(widths))}, 1.0)
            for c, (_, widths) in enumerate(self.classes)
        ]
        self.inequalities: list[tuple[Row, float]] = []  # row <= number
        self.costs: dict[str, Row] = {kind: {} for kind in cost.kinds}
        for layer in cost.cost.layers:
            self._add_layer(layer)
        if "activation_bytes" in cost.kinds:
            self._add_peak()

    def values(self, value: Mapping[str, Sequence[float]]) -> Row:
        """The objective, of one value for each candidate of each free site."""
        row: Row = {}
        for c, (sites, widths) in enumerate(self.classes):
            for k, width in enumerate(widths):
                numbers = [
                    value[s][self.cost.candidates[s].index(width)] for s in sites if s in self.cost.sites
                ]
                row[self.start[c] + k] = math.fsum(numbers)
        return row

    def spread(self, objective: Row) -> float:
        """Sum over the classes of their best minus their worst value."""
        ranges = [
            [objective.get(self.start[c] + k, 0.0) for k in range(len(widths))]
            for c, (_, widths) in enumerate(self.classes)
        ]
        return math.fsum(max(r) - min(r) for r in ranges)

    def solve(
        self,
        objective: Row,
        limits: Mapping[str, float],
        *,
        slack: float = 0.0,
        floors: Mapping[str, float] | None = None,
        cuts: Sequence[Mapping[str, int]] = (),
        time_limit: float | None = None,
        gap: float = 0.0,
    ) -> Solution | None:
        """The plan that maximizes ``objective`` within ``limits`` (tightened by the relative ``slack``, and
        then by all bytes that codes of groups may be rounded up by), not below ``floors``, none of
        ``cuts``; None where there is none. Raises BudgetError where the time was too short to find one."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # a second: only who allocates pays it
        from scipy.sparse import csr_array

        rows = [*((row, b, b) for row, b in self.equalities)]
        rows += [(row, -np.inf, b) for row, b in self.inequalities]
        for kind, limit in limits.items():
            row = {i: a / limit for i, a in self.costs[kind].items()}
            most = self._between(kind, limit) * (1 - slack) - self._constant(kind)
            if slack and kind == "weight_bytes":
                most -= self.rounding
            rows.append((row, -np.inf, most / limit))
        for kind, floor in (floors or {}).items():
            row = {i: a / floor for i, a in self.costs[kind].items()}
            rows.append((row, 1.0 - self._constant(kind) / floor, np.inf))
        for plan in cuts:
            chosen = [self._column(c, plan) for c, (_, widths) in enumerate(self.classes) if len(widths) > 1]
            rows.append((dict.fromkeys(chosen, 1.0), -np.inf, len(chosen) - 1.0))
        lengths = np.cumsum([0, *(len(row) for row, *_ in rows)])
        matrix = csr_array(
            ([a for row, *_ in rows for a in row.values()], [i for row, *_ in rows for i in row], lengths),
            shape=(len(rows), self.columns),
        )
        products = [a for i, a in objective.items() if i >= self.start[-1]]
        unit = (self.spread(objective) + max(map(abs, products), default=0.0) or 1.0) / SCALE
        weights, integral, upper = (
            np.zeros(self.columns),
            np.zeros(self.columns),
            np.full(self.columns, np.inf),
        )
        # Products of binaries are binary by themselves; left continuous, the presolve of HiGHS 1.12
        # does not end, or cuts off the best plan.
        integral[self.products] = 1
        upper[: self.start[-1]] = 1
        upper[self.products] = 1
        base = 0.0  # each class's least value goes before the division: only differences need the precision
        for c, (_, widths) in self._all():
            own = slice(int(self.start[c]), int(self.start[c + 1]))
            numbers = [objective.get(i, 0.0) for i in range(own.start, own.stop)]
            weights[own] = [(min(numbers) - number) / unit for number in numbers]
            integral[own] = len(widths) > 1
            base += min(numbers)
        for i, a in objective.items():
            if i >= self.start[-1]:
                weights[i] = -a / unit
        for i, most in self.upper.items():
            upper[i] = most
        done = milp(
            weights,
            integrality=integral,
            bounds=Bounds(0, upper),
            constraints=LinearConstraint(matrix, [low for _, low, _ in rows], [high for *_, high in rows]),
            options={"mip_rel_gap": gap, **({} if time_limit is None else {"time_limit": time_limit})},
        )
        if done.x is None:
            if done.status == 1:
                raise BudgetError(
                    "the solver found no plan in the time that it was given",
                    where="allocate",
                    got=f"time_limit {time_limit}",
                    remedy="Give it more, or fewer candidates",
                )
            return None
        # The dual bound that HiGHS states can be far off where it also states a gap of 0.
        ended = done.mip_dual_bound is None or (done.status == 0 and done.mip_gap <= 1e-9)
        bound = done.fun if ended else done.mip_dual_bound
        bits = {}
        for c, (sites, widths) in self._all():
            best = int(np.argmax(done.x[self.start[c] : self.start[c] + len(widths)]))
            bits.update(dict.fromkeys(sites, widths[best]))
        bits.pop("")
        return Solution(bits, base - done.fun * unit, base - bound * unit)

    def cheapest(self, kind: str, limits: Mapping[str, float] | None = None) -> Solution | None:
        """The plan that costs the least of ``kind``, within ``limits`` of others, or None."""
        return self.solve({i: -a for i, a in self.costs[kind].items()}, limits or {})

    # ---- columns and rows

    def _all(self) -> Iterable[tuple[int, Class]]:
        return enumerate(self.classes)

    def _column(self, c: int, bits: Mapping[str, int]) -> int:
        sites, widths = self.classes[c]
        return int(self.start[c]) + widths.index(bits[sites[0]])

    def _between(self, kind: str, limit: float) -> float:
        """A limit half a unit above ``limit`` where costs come in units (operations, bytes, bits of one
        element): plans at the limit and plans just over it are then both clear of the solver's tolerance."""
        layers = self.cost.cost.layers
        elements = {
            "average_weight_bits": sum(layer.weight_elements for layer in layers),
            "average_activation_bits": sum(sum(layer.activation_elements.values()) for layer in layers),
        }
        if kind.startswith("table:"):
            return limit
        if kind == "weight_bytes" and self.rounding:  # eighths of a byte; the file's are whole
            return math.floor(limit * (1 + 1e-12)) + 1 / 16
        units = max(elements.get(kind, 1), 1)
        return (math.floor(limit * units * (1 + 1e-12)) + 0.5) / units

    def _constant(self, kind: str) -> float:
        return float(self.cost.constant(kind))

    def _new_column(self) -> int:
        self.columns += 1
        return self.columns - 1

    def _add_layer(self, layer: LayerCost) -> None:
        """Costs and forbidden pairs of one layer, over its operands' decisions or their product."""
        target, last = self.cost.cost.target, len(self.classes) - 1
        c1, c2 = (self.class_of.get(site, last) for site in layer.operands)
        first, second = self.classes[c1][1], self.classes[c2][1]
        kinds = [kind for kind in self.cost.kinds if kind != "activation_bytes"]
        tables = {
            kind: np.array(
                [[self.cost.layer_cost(kind, layer, w, a) for a in second] for w in first], dtype=float
            )
            for kind in kinds
        }
        allowed = np.array([[layer.is_held_by(target, w, a) for a in second] for w in first])
        x1 = [int(self.start[c1]) + j for j in range(len(first))]
        x2 = [int(self.start[c2]) + k for k in range(len(second))]
        if c1 == c2:
            columns: dict[int, tuple[int, int]] = {x: (j, j) for j, x in enumerate(x1)}
        elif len(second) == 1:
            columns = {x: (j, 0) for j, x in enumerate(x1)}
        elif len(first) == 1:
            columns = {x: (0, k) for k, x in enumerate(x2)}
        elif allowed.all() and all(_separable(table) for table in tables.values()):
            for kind, table in tables.items():
                for j, x in enumerate(x1):
                    _add(self.costs[kind], x, table[j, 0])
                for k, x in enumerate(x2):
                    _add(self.costs[kind], x, table[0, k] - table[0, 0])
            return
        else:
            columns = {self._new_column(): (j, k) for j in range(len(first)) for k in range(len(second))}
            self.products += columns
            for j, x in enumerate(x1):
                same = {y: 1.0 for y, (jj, _) in columns.items() if jj == j}
                self.equalities.append(({**same, x: -1.0}, 0.0))
            for k, x in enumerate(x2):
                same = {y: 1.0 for y, (_, kk) in columns.items() if kk == k}
                self.equalities.append(({**same, x: -1.0}, 0.0))
        for column, pair in columns.items():
            if not allowed[pair]:
                self.upper[column] = 0.0
            for kind, table in tables.items():
                _add(self.costs[kind], column, table[pair])

    def _count_ragged(self) -> int:
        """Layers in groups whose codes, group by group, do not fill whole bytes, and the same of their zero
        points."""
        held, layers = self.cost.cost.target.weight_bits, self.cost.cost.layers
        return len(
            {
                (layer.name, what)
                for layer in layers
                for what in ("weight_elements", "weight_zero_points")
                if layer.part_of
                and any(held(getattr(layer, what), w) % 8 for w in self.cost.widths(layer.operands[0]))
            }
        )

    def _add_peak(self) -> None:
        """A variable for every tensor that several classes read, and one for the peak above all moments."""
        live = self.cost.cost.live
        parts: list[Row] = []
        for tensor in live.tensors:
            classes = sorted({self.class_of[site] for site in tensor.sites})
            rows = [
                {int(self.start[c]) + k: float(tensor.bytes_at(w)) for k, w in enumerate(self.classes[c][1])}
                for c in classes
            ] or [{int(self.start[-2]): float(tensor.bytes_at(FLOAT))}]
            if len(rows) > 1:
                widest = self._new_column()
                self.inequalities += [(_scaled({**row, widest: -1.0}), 0.0) for row in rows]
                rows = [{widest: 1.0}]
            parts.append(rows[0])
        peak = self._new_column()
        for moment in live.moments:
            total: Row = {peak: -1.0}
            for at in moment:
                for i, a in parts[at].items():
                    _add(total, i, a)
            self.inequalities.append((_scaled(total), 0.0))
        self.costs["activation_bytes"] = {peak: 1.0}


def _separable(table: Any) -> bool:
    rest = table - table[:, :1] - table[:1, :] + table[0, 0]
    return bool(np.abs(rest).max() <= 1e-12 * np.abs(table).max())


def _add(row: Row, column: int, number: float) -> None:
    if number:
        row[column] = row.get(column, 0.0) + float(number)


def _scaled(row: Row) -> Row:
    largest = max(abs(a) for a in row.values())
    return {i: a / largest for i, a in row.items()}
