"""Channel groups: consecutive output channels of a weight that choose their width together.

To what a plan costs, a group is a site of its own: `split` takes a layer apart, each part with its share of
the products, elements and scales, and `joined` puts the widths of the groups back together into one list
for the site. So nothing that works with sites (`BudgetCost`, `allocate`) needs to know of groups.

One thing is not a sum of parts: the codes of a weight fill whole bytes, and a byte may hold codes of two
groups; so do zero points. Parts therefore count elements * bits / 8, less than a byte a layer below the file
for each of the two, and `allocate` forbids the plans that the file's bytes put over a limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

from bitsmith.quantization.bits import Width, one_or_each
from bitsmith.quantization.cost import CostModel, LayerCost

BY_CHANNEL = ("macs", "weight_elements", "weight_scales", "weight_zero_points", "bias_elements")
Groups = Mapping[str, Sequence[int]]  # site -> channels of each of its groups, in their order


def even_sizes(channels: int, groups: int) -> tuple[int, ...]:
    """Sizes of ``groups`` groups of consecutive channels that differ by at most one; not more than
    channels."""
    groups = min(groups, channels)
    size, rest = divmod(channels, groups)
    return tuple(size + (g < rest) for g in range(groups))


def group_names(site: str, sizes: Sequence[int]) -> tuple[str, ...]:
    """The names of the groups of a site: "conv2.weight[0:8]"."""
    return tuple(f"{site}[{start}:{stop}]" for start, stop in pairwise(accumulate(sizes, initial=0)))


def split(cost: CostModel, groups: Groups) -> CostModel:
    """The cost of the same model with each group in the place of its site."""
    layers = [part for layer in cost.layers for part in _parts(layer, groups.get(layer.operands[0], ()))]
    present: dict[str, Width] = {}
    for site, bits in cost.present.items():
        present.update(dict.fromkeys(group_names(site, groups[site]) if site in groups else (site,), bits))
    return replace(cost, layers=tuple(layers), present=present)


def _parts(layer: LayerCost, sizes: Sequence[int]) -> list[LayerCost]:
    if not sizes:
        return [layer]
    ends = pairwise(accumulate(sizes, initial=0))
    return [
        replace(
            layer,
            operands=(name, layer.operands[1]),
            activation_elements={} if start else layer.activation_elements,
            activation_scales={} if start else layer.activation_scales,
            part_of=layer.macs,
            **{
                count: getattr(layer, count) * stop // sum(sizes)
                - getattr(layer, count) * start // sum(sizes)
                for count in BY_CHANNEL
            },
        )
        for name, (start, stop) in zip(group_names(layer.operands[0], sizes), ends, strict=True)
    ]


def joined(bits: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """``bits`` with those of a site's groups, where they are given, as the site's one width or list."""
    found = dict(bits)
    for site, sizes in groups.items():
        names = group_names(site, sizes)
        if names[0] in found:
            each = [found.pop(name) for name in names]
            found[site] = one_or_each([b for b, n in zip(each, sizes, strict=True) for _ in range(n)])
    return found
