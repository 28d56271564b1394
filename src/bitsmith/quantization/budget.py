"""budget: limits on what a plan may cost, and the cost as one quick function of the shares of all widths.

`Budget` is what a user writes. `BudgetCost` is what methods and `allocate` work with: it knows the sites that
are free, and every kind of cost but the peak of the activations is a sum over layers of a table of pairs,

    cost = constant + sum over layers l of sum over j, k of  p[first(l), j] * p[second(l), k] * c[l, j, k]

which is exact for one-hot p, and for a distribution the expectation with independent sites. Methods that
relax bits to real numbers instead (CO-QAT and its like) see a smooth cost where a container or a table has
steps; here steps stay steps, at the price of one table of K x K figures a layer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bitsmith.errors import BudgetError, SiteError, TargetError, listing, nearest
from bitsmith.quantization.bits import Width
from bitsmith.quantization.channel_groups import Groups, group_names, joined, split
from bitsmith.quantization.cost import CostModel, LayerCost
from bitsmith.quantization.cost_kinds import AVERAGES, SHARES, constant, float_cost, layer_cost, used
from bitsmith.quantization.cost_table import CostTable
from bitsmith.quantization.expected_peak import ExpectedPeak
from bitsmith.quantization.scheme import FLOAT

NAMED_TABLES = ("latency", "energy")  # of the target


@dataclass(frozen=True)
class Budget:
    """What a plan may cost; a plan must hold all that is given.

    bops, weight_bytes, activation_bytes: up to 1 a share of the float model, above 1 absolute.
    average_weight_bits, average_activation_bits: bits, over the elements of all weights or operands.
    tables: {"table": CostTable, path, built-in name, or the target's "latency" or "energy"; "limit": number},
    the limit in the table's unit above 1, up to 1 a share of what the table's dearest pair of widths costs.

    Raises BudgetError where nothing is limited or a limit is not a number above 0.
    """

    bops: float | None = None
    weight_bytes: float | None = None
    activation_bytes: float | None = None
    average_weight_bits: float | None = None
    average_activation_bits: float | None = None
    tables: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        for kind in (*SHARES, *AVERAGES):
            if getattr(self, kind) is not None:
                _check_number(getattr(self, kind), f"budget.{kind}", average=kind in AVERAGES)
        if isinstance(self.tables, str | Mapping) or not isinstance(self.tables, Sequence):
            raise BudgetError(
                "these are no tables",
                where="budget.tables",
                got=self.tables,
                expected='a list such as [{"table": "energy_45nm", "limit": 0.1}]',
            )
        object.__setattr__(self, "tables", tuple(self.tables))
        for i, entry in enumerate(self.tables):
            keys = sorted(entry) if isinstance(entry, Mapping) else entry
            if keys != ["limit", "table"] or not isinstance(entry["table"], str | os.PathLike | CostTable):
                raise BudgetError(
                    "this is no limit on a table",
                    where=f"budget.tables.{i}",
                    got=repr(entry),
                    expected='{"table": NAME or PATH, "limit": NUMBER}',
                )
            _check_number(entry["limit"], f"budget.tables.{i}.limit", average=False)
        if not self.tables and all(getattr(self, kind) is None for kind in (*SHARES, *AVERAGES)):
            raise BudgetError(
                "this budget limits nothing",
                where="budget",
                expected=f"at least one of {', '.join((*SHARES, *AVERAGES, 'tables'))}",
                remedy="Say for example bops: 0.05, which is 5 % of the float model's bit operations",
            )

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], where: str = "budget") -> Budget:
        """The budget that ``mapping`` describes. Raises BudgetError, for an unknown key with the nearest."""
        known = [f.name for f in fields(cls)]
        if not isinstance(mapping, Mapping):
            raise BudgetError(
                "a budget is a mapping", where=where, got=repr(mapping), expected="for example {bops: 0.05}"
            )
        for key in mapping:
            if key not in known:
                close = nearest(str(key), known, 1)
                raise BudgetError(
                    "a budget has no such key",
                    where=f"{where}.{key}",
                    expected=listing(known),
                    remedy=f"Did you mean {close[0]}?" if close else "",
                )
        try:
            return cls(**mapping)
        except BudgetError as error:
            error.where = where + error.where.removeprefix("budget")
            raise


def _check_number(value: Any, where: str, average: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BudgetError(
            "this is no limit",
            where=where,
            got=repr(value),
            expected="a number above 0",
            remedy="Give bits, such as 4"
            if average
            else "Up to 1 is a share of the float model, above absolute",
        )


def tables_of(budget: Budget, cost: CostModel) -> dict[str, CostTable]:
    """Kind ("table:NAME") -> the table, read. Raises BudgetError where the target has none, FormatError."""
    found: dict[str, CostTable] = {}
    for i, entry in enumerate(budget.tables):
        table: Any = entry["table"]
        if table in NAMED_TABLES:
            table = getattr(cost.target, table)
            if table is None:
                raise BudgetError(
                    f"target {cost.target.name} has no table of this name",
                    where=f"budget.tables.{i}.table",
                    got=entry["table"],
                    expected="a built-in table, the path of a table, or a target file that has it",
                )
        elif not isinstance(table, CostTable):
            table = CostTable.load(table)
        if f"table:{table.name}" in found:
            raise BudgetError(
                "two limits on tables of one name", where=f"budget.tables.{i}.table", got=table.name
            )
        found[f"table:{table.name}"] = table
    return found


def limits(budget: Budget, cost: CostModel) -> dict[str, float]:
    """Kind -> absolute limit: bit operations, bytes, bits, or the unit of a table."""
    found = {}
    for kind in (*SHARES, *AVERAGES):
        limit = getattr(budget, kind)
        if limit is not None:
            found[kind] = limit * float_cost(cost, kind) if kind in SHARES and limit <= 1 else limit
    for (kind, table), entry in zip(tables_of(budget, cost).items(), budget.tables, strict=True):
        limit = entry["limit"]
        found[kind] = limit * float_cost(cost, kind, table) if limit <= 1 else limit
    return found


# ---- all kinds of a budget at once


class BudgetCost:
    """All costs that a budget limits, as functions of how the free sites share their candidates.

    candidates: site -> its widths, in the order of the columns of p; a site with one candidate, and every
    site that is not named, is fixed (at the model's own width where it is not named). groups: weight site ->
    channels of each of its groups, whose widths are chosen one by one: each is a site here (channel_groups).

    sites (S of them) are the free sites in the order of ``candidates``; width is the largest number of
    candidates; kinds and limits (B,) are those of the budget; fixed: site -> width of all others.
    Raises SiteError (no such site, no such width), TargetError (a layer without any pair of widths that the
    target multiplies), BudgetError (a table says nothing of a pair that could be chosen).
    """

    def __init__(
        self,
        cost: CostModel,
        budget: Budget,
        candidates: Mapping[str, Sequence[int]],
        groups: Groups | None = None,
    ) -> None:
        self.groups = {site: sizes for site, sizes in (groups or {}).items() if len(sizes) > 1}
        _check_candidates(cost, candidates, self.groups)
        self.whole, self.cost, self.budget = cost, split(cost, self.groups), budget
        self.candidates = {
            name: tuple(int(b) for b in widths)
            for site, widths in candidates.items()
            for name in self.names(site)
        }
        self.sites = tuple(site for site, widths in self.candidates.items() if len(widths) > 1)
        self.width = max((len(self.candidates[site]) for site in self.sites), default=1)
        chosen = {site: widths[0] for site, widths in self.candidates.items() if len(widths) == 1}
        self.fixed = {s: chosen.get(s, b) for s, b in cost.present.items() if s not in self.sites}
        self.tables = tables_of(budget, cost)
        found = limits(budget, cost)
        self.kinds = tuple(found)
        self.limits = torch.tensor(list(found.values()), dtype=torch.float64)
        self._moved: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for layer in cost.layers:
            _check_pairs(self, layer)
        self._coefficients()

    def names(self, site: str) -> tuple[str, ...]:
        """The sites that stand for ``site`` here: its groups, or itself."""
        return group_names(site, self.groups[site]) if site in self.groups else (site,)

    def joined(self, bits: Mapping[str, Any]) -> dict[str, Any]:
        """Bits of all sites of the model, in its order, those of groups put together."""
        found = joined(bits, self.groups)
        return {site: found[site] for site in self.whole.present}

    def widths(self, site: str) -> tuple[Any, ...]:
        """The widths that ``site`` may have: its candidates, or what it is fixed at (32: in float; one per
        channel)."""
        return self.candidates.get(site) or (self.cost.present.get(site, FLOAT),)

    def expected(self, p: Tensor) -> Tensor:
        """p (S, width), rows of shares padded with zeros -> expected costs (B,), absolute, differentiable."""
        known = self._on(p)
        rows = torch.cat([p, known["one_hot"]])  # the last row stands for every fixed operand
        first, second = rows.index_select(0, known["both"]).view(2, -1, self.width)
        pairs = first[:, :, None] * second[:, None, :]
        costs = known["constants"] + known["pairs"] @ pairs.flatten()
        if self._peak is None:
            return costs
        peak = self._peak.peak(rows).unsqueeze(0)
        at = self.kinds.index("activation_bytes")
        return torch.cat([costs[:at], peak, costs[at + 1 :]])

    def used(self, p: Tensor) -> Tensor:
        """`expected` over the limits, (B,) float32."""
        return (self.expected(p) / self._on(p)["limits"]).float()

    def exact(self, bits: Mapping[str, Any]) -> dict[str, Any]:
        """Kind -> what the plan costs; sites that ``bits`` does not name are at their fixed widths. Groups
        may go by their own names, or be put together."""
        whole = joined({**self.fixed, **bits}, self.groups)
        return {kind: used(self.whole, kind, whole, self.tables.get(kind)) for kind in self.kinds}

    def constant(self, kind: str) -> float:
        """`constant` of a kind of this budget."""
        return constant(self.cost, kind, self.tables.get(kind))

    def layer_cost(self, kind: str, layer: LayerCost, first: Width, second: int) -> float:
        """`layer_cost` of a kind of this budget. A pair that the target cannot multiply and that a table does
        not list counts as the layer's dearest possible pair: nothing is gained by moving towards it."""
        table = self.tables.get(kind)
        listed = table is None or table.lists(layer.kind, layer.layer_macs, layer.weight_shape, first, second)
        if listed or layer.is_held_by(self.cost.target, first, second):
            return layer_cost(self.cost, kind, layer, first, second, table)
        return max(layer_cost(self.cost, kind, layer, *pair, table) for pair in self.pairs(layer))

    def pairs(self, layer: LayerCost) -> list[tuple[Any, int]]:
        """The pairs of widths that the operands of ``layer`` may have on this target."""
        first, second = (self.widths(site) for site in layer.operands)
        return [(w, a) for w in first for a in second if layer.is_held_by(self.cost.target, w, a)]

    # The coefficients are made once; a step of a search then is a handful of small tensor operations.

    def _coefficients(self) -> None:
        layers, width = self.cost.layers, self.width
        row = {site: i for i, site in enumerate(self.sites)}
        index = torch.tensor([[row.get(s, len(row)) for s in layer.operands] for layer in layers]).view(-1, 2)
        pairs = torch.zeros(len(self.kinds), len(layers), width, width, dtype=torch.float64)
        constants = torch.zeros(len(self.kinds), dtype=torch.float64)
        for b, kind in enumerate(self.kinds):
            if kind == "activation_bytes":
                continue
            constants[b] = self.constant(kind)
            for at, layer in enumerate(layers):
                first, second = (self.widths(site) for site in layer.operands)
                pairs[b, at, : len(first), : len(second)] = torch.tensor(
                    [[self.layer_cost(kind, layer, w, a) for a in second] for w in first], dtype=torch.float64
                )
        self._base = {
            "constants": constants,
            "pairs": pairs.flatten(1),
            "limits": self.limits,
            "both": index.T.flatten(),
            "one_hot": torch.eye(1, width, dtype=torch.float64),
        }
        self._peak = None
        if "activation_bytes" in self.kinds:
            names = [*self.sites, *(s for s, bits in self.fixed.items() if isinstance(bits, int))]
            self._peak = ExpectedPeak(self.cost.live, row, {s: self.widths(s) for s in names}, width)

    def _on(self, p: Tensor) -> dict[str, Tensor]:
        key = (p.device, p.dtype)
        if key not in self._moved:
            self._moved[key] = {
                name: t.to(p.device, p.dtype if t.is_floating_point() else t.dtype)
                for name, t in self._base.items()
            }
        return self._moved[key]


def _check_candidates(cost: CostModel, candidates: Mapping[str, Sequence[int]], groups: Groups) -> None:
    for site, widths in candidates.items():
        if site not in cost.present:
            close = nearest(site, cost.present) or list(cost.present)[:3]
            raise SiteError("there is no such site", where=site, remedy=f"The nearest are {', '.join(close)}")
        if (
            not widths
            or len(set(widths)) < len(widths)
            or any(b not in (*range(1, 9), FLOAT) for b in widths)
        ):
            raise SiteError(
                "these are no candidates for a site",
                where=site,
                got=repr(list(widths)),
                expected="different integers from 1 to 8, or 32 for float, at least one",
            )
        if site in groups and FLOAT in widths:
            raise SiteError(
                "the channels of a weight are all in float or all stored as codes",
                where=site,
                got=f"{len(groups[site])} groups and candidates {list(widths)}",
                remedy="Leave 32 out of its candidates, or take it as one group",
            )


def _check_pairs(cost: BudgetCost, layer: LayerCost) -> None:
    if cost.pairs(layer):
        return
    target = cost.cost.target
    first, second = (list(cost.widths(site)) for site in layer.operands)
    raise TargetError(
        f"target {target.name} multiplies no pair of these widths",
        where=f"{layer.operands[0]} x {layer.operands[1]}",
        got=f"{first} x {second} bits",
        expected=listing(f"{w} x {a}" for w, a in target.pairs or ()),
    )
