"""The uniform plan that competed with a search: the widths that it gives each layer.

A run says its width ("3 x 3"), not its sites. From `Run` to numbers; what is made of them is in contest.py
and search.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from bitsmith.report.certificate import is_number
from bitsmith.report.metrics import FLOAT_BITS, Layer, Run, mean_bits

Pair = tuple[float, float]


def present(layer: Layer) -> Pair:
    """The widths of a layer's two operands in the delivered plan; 32 in float."""
    return (layer.weight_bits or FLOAT_BITS, layer.activation_bits or FLOAT_BITS)


def is_delivered(run: Run) -> bool:
    """Whether the delivered plan gives every layer the uniform plan's widths."""
    known = widths(run)
    return known is not None and all(known[layer.name] == present(layer) for layer in run.layers)


def widths(run: Run) -> dict[str, Pair] | None:
    """Layer -> widths of its operands under the uniform plan: as ``uniform.sites`` gives them, else deduced.

    What is deduced has to add up to the uniform plan's bit operations as the run reports them; None where it
    does not, or where they are not reported.
    """
    uniform = run.metrics.get("uniform") or {}
    if isinstance(uniform.get("sites"), Mapping):
        return _by_layer(run, uniform["sites"])
    reported = (uniform.get("cost") or {}).get("bops")
    if not is_number(reported):
        return None
    found = (_by_layer(run, sites) for sites in _guesses(run, str(uniform.get("bits") or "")))
    return next((one for one in found if abs(_bops(run, one) - reported) < 1e-6 * reported), None)


def _by_layer(run: Run, sites: Mapping[str, Any]) -> dict[str, Pair]:
    """Sites that are not named, as the second use of a tied weight, are as in the delivered plan."""
    found = {}
    for layer in run.layers:
        names = ("left", "right") if layer.is_product else ("weight", "input")
        first, second = (mean_bits(sites.get(f"{layer.name}.{operand}")) for operand in names)
        found[layer.name] = (first or present(layer)[0], second or present(layer)[1])
    return found


def _bops(run: Run, found: Mapping[str, Pair]) -> float:
    total = sum(found[layer.name][0] * found[layer.name][1] * (layer.macs or 0) for layer in run.layers)
    return total + (run.cost("float_macs") or 0) * FLOAT_BITS**2


def _guesses(run: Run, bits: str) -> Iterator[dict[str, float]]:
    """Site -> width, for each pair of widths that a recipe may have asked for where it named no site.

    A site that was prepared at another width was asked for by name and keeps it, unless it was searched.
    """
    width = re.fullmatch(r"(\d+) x \1", bits)
    listed = run.coverage.get("sites") or []
    if width is None or not isinstance(listed, list):
        return
    prepared = {str(site.get("name")): (site.get("kind"), mean_bits(site.get("bits"))) for site in listed}
    planned = {name: mean_bits(site.get("bits")) for name, site in (run.plan.get("sites") or {}).items()}
    asked = [
        {b for kind, b in prepared.values() if kind == one} or {None} for one in ("weight", "activation")
    ]
    for usual in itertools.product(*asked):
        default = dict(zip(("weight", "activation"), usual, strict=True))
        yield {
            name: float(width[1]) if name in prepared and _is_free(prepared[name], b, default) else b
            for name, b in planned.items()
            if b is not None
        }


def _is_free(prepared: tuple[Any, float | None], planned: float, default: Mapping[str, float | None]) -> bool:
    kind, bits = prepared
    return bits != planned or bits == default.get(str(kind))
