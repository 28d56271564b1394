"""cost_kinds: each kind of cost that a budget can limit, as a number: of a plan, of one layer, of what no
width changes.

`cost.CostModel` counts and a `CostTable` lists; here both answer to one name of a kind. `budget` puts
limits on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitsmith.errors import BudgetError, listing
from bitsmith.quantization.bits import Width, mean_width
from bitsmith.quantization.cost import CostModel, LayerCost, times
from bitsmith.quantization.cost_table import CostTable
from bitsmith.quantization.scheme import FLOAT

AVERAGES = ("average_weight_bits", "average_activation_bits")
SHARES = ("bops", "weight_bytes", "activation_bytes")  # <= 1: share of the float model


def float_cost(cost: CostModel, kind: str, table: CostTable | None = None) -> Any:
    """What shares of this kind refer to: the float model, or all layers at the dearest pair of the table."""
    if kind == "bops":
        return cost.bops_float
    if kind == "weight_bytes":
        return cost.float_bytes
    if kind == "activation_bytes":
        return cost.activation_bytes({})
    if kind in AVERAGES:
        return FLOAT
    table = _table(kind, table)
    return constant(cost, kind, table) + sum(
        layer_cost(cost, kind, layer, *table.dearest, table=table) for layer in cost.layers
    )


def used(cost: CostModel, kind: str, bits: Mapping[str, Any], table: CostTable | None = None) -> Any:
    """What ``bits`` (site -> width) cost: exact for integers; differentiable for tensors, but not of a table,
    whose entries are for integers. A kind "table:NAME" needs its ``table``, unless it is a built-in one."""
    if kind == "bops":
        return cost.bops(bits)
    if kind == "weight_bytes":
        return cost.weight_bytes(bits)
    if kind == "activation_bytes":
        return cost.activation_bytes(bits)
    if kind in AVERAGES:
        return cost.average_bits(bits, kind.split("_")[1])
    table = _table(kind, table)
    widths: list[list[Any]] = [[bits.get(site, FLOAT) for site in layer.operands] for layer in cost.layers]
    return constant(cost, kind, table) + sum(
        layer_cost(
            cost, kind, layer, tuple(first) if isinstance(first, tuple | list) else first, second, table
        )
        for layer, (first, second) in zip(cost.layers, widths, strict=True)
    )


def constant(cost: CostModel, kind: str, table: CostTable | None = None) -> float:
    """The part of this kind of cost that no width changes."""
    if kind == "bops":
        return cost.float_macs * FLOAT * FLOAT
    if kind == "weight_bytes":
        return cost.other_bytes
    if kind in (*AVERAGES, "activation_bytes"):
        return 0
    table = _table(kind, table)
    if table.constant is not None:
        return table.constant
    if not cost.float_macs:
        return 0
    return table.cost("products outside every site", "*", cost.float_macs, (), FLOAT, FLOAT)


def layer_cost(
    cost: CostModel, kind: str, layer: LayerCost, first: Width, second: int, table: CostTable | None = None
) -> float:
    """What one layer adds to a kind other than activation_bytes, its operands at these widths."""
    if kind == "bops":
        return times(layer.macs, first) * second
    if kind == "weight_bytes":
        bits = dict(zip(layer.operands, (first, second), strict=True))
        return cost.layer_bytes(layer, bits) + cost.range_bytes(layer, bits)
    if kind == "average_weight_bits":
        return times(layer.weight_elements, first) / max(cost.elements[0], 1)
    if kind == "average_activation_bits":
        counts = [layer.activation_elements.get(site, 0) for site in layer.operands]
        return (times(counts[0], first) + counts[1] * second) / max(cost.elements[1], 1)
    if len(layer.sites) < 2:
        return 0.0  # tables list products
    whole = _table(kind, table).cost(
        layer.name, layer.kind, layer.layer_macs, layer.weight_shape, first, second
    )
    return whole * (layer.macs / layer.part_of) if layer.part_of else whole


def _table(kind: str, table: CostTable | None) -> CostTable:
    if table is None:
        if not kind.startswith("table:"):
            expected = listing((*SHARES, *AVERAGES, "table:NAME"))
            raise BudgetError("there is no such kind of cost", got=kind, expected=expected)
        return CostTable.load(kind.removeprefix("table:"))
    return table


def average_shares(
    cost: CostModel, names: Sequence[str], groups: Mapping[str, Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The averages of AVERAGES as linear functions of the widths of ``names`` and their groups, T in all:
    (shares (2, T), fixed (2,), elements (T,)), so that shares @ b + fixed are the averages."""
    counts: tuple[dict[str, int], ...] = ({}, {})
    for layer in cost.layers:
        counts[0][layer.operands[0]] = counts[0].get(layer.operands[0], 0) + layer.weight_elements
        for site, number in layer.activation_elements.items():
            counts[1][site] = counts[1].get(site, 0) + number
    free = set(names)
    total = [max(sum(kind.values()), 1) for kind in counts]
    fixed = [
        sum(
            number * mean_width(cost.present.get(site, FLOAT))
            for site, number in kind.items()
            if site not in free
        )
        for kind in counts
    ]
    each = []
    for name in names:
        sizes = groups.get(name, (1,))
        each += [[kind.get(name, 0) * size / sum(sizes) for kind in counts] for size in sizes]
    elements = torch.tensor(each).T
    whole = torch.tensor(total, dtype=torch.float32)
    return elements / whole.unsqueeze(1), torch.tensor(fixed) / whole, elements.sum(0)
