"""whole_widths: real bit-widths become whole ones, within an average or one by one.

Where a multiplier holds an average, every site pays alike for it: -dL/db_k = lambda n_k for its n_k elements.
With an error that falls as 4^-b, B bits instead of b then cost lambda n_k 4^(b - B) / ln 4. `within_averages`
finds the plan of the least sum of these exactly: up where that is cheap, down elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitsmith.quantization.allocate import allocate
from bitsmith.quantization.bits import Width, one_or_each
from bitsmith.quantization.budget import Budget, BudgetCost
from bitsmith.quantization.channel_groups import Groups
from bitsmith.quantization.cost import CostModel

HIT = 0.01  # bits that an average may lie below its limit, where widths are that fine
ROUNDINGS = ("nearest", "ceil", "floor")
Real = Mapping[str, Sequence[float]]  # site -> a number of its own, or one for each group of channels


def within_averages(
    cost: CostModel,
    real: Real,
    elements: Real,
    limits: Mapping[str, float],
    storable: Mapping[str, list[int]],
    groups: Groups,
) -> dict[str, Width]:
    """The whole widths of the sites in ``real`` whose loss is least within ``limits`` (average_weight_bits,
    average_activation_bits). elements: of each site or group; storable: the widths to choose from.

    Raises BudgetError where no plan is within the limits.
    """
    if not cost.target.pairs:  # weights and activations have nothing to do with each other
        found: dict[str, Width] = {}
        for kind, limit in limits.items():
            own = _sites_of(cost, kind) & set(real)
            found |= _best(cost, real, elements, {kind: limit}, storable, groups, own, 1 - HIT / limit)
        return found
    own = {site for kind in limits for site in _sites_of(cost, kind)} & set(real)
    return _best(cost, real, elements, limits, storable, groups, own, 0.0)


def _best(
    cost: CostModel,
    real: Real,
    elements: Real,
    limits: Mapping[str, float],
    storable: Mapping[str, list[int]],
    groups: Groups,
    names: set[str],
    fill: float,
) -> dict[str, Width]:
    """Of ``names``; they use at least the share ``fill`` of what the dearest plan does."""
    choices = {name: widths for name, widths in storable.items() if name in names}
    own = {name: sizes for name, sizes in groups.items() if name in names}
    program = BudgetCost(cost, Budget.from_dict(limits), choices, own)
    whole = sum(map(sum, elements.values()))
    worth = {
        group: [-(n / whole) * 4.0 ** (b - k) for k in program.candidates[group]]
        for name in choices
        for group, b, n in zip(program.names(name), real[name], elements[name], strict=True)
    }
    bits = allocate(program, worth, fill=fill).bits
    return {name: bits[name] for name in choices}


def _sites_of(cost: CostModel, kind: str) -> set[str]:
    """The sites that an average is taken over."""
    if kind == "average_weight_bits":
        return {layer.operands[0] for layer in cost.layers if layer.weight_elements}
    return {site for layer in cost.layers for site in layer.activation_elements}


def one_by_one(
    real: Real, storable: Mapping[str, Sequence[int]], groups: Groups, rounding: str
) -> dict[str, Width]:
    """Every width by itself to the `nearest` one that is stored, the next above (`ceil`) or below (`floor`),
    or to the last one there is."""
    found: dict[str, Width] = {}
    for name, numbers in real.items():
        each = [_whole(round(b, 3), storable[name], rounding) for b in numbers]
        sizes = groups.get(name, (1,))
        found[name] = one_or_each([k for k, size in zip(each, sizes, strict=True) for _ in range(size)])
    return found


def _whole(b: float, stored: Sequence[int], rounding: str) -> int:
    if rounding == "ceil":
        return min((k for k in stored if k >= b), default=max(stored))
    if rounding == "floor":
        return max((k for k in stored if k <= b), default=min(stored))
    return min(stored, key=lambda k: (abs(k - b), -k))
