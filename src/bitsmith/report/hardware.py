"""What hardware would have to do: the products and the weights of a run, by pair of widths.

One row per pair of weight and activation bits: how many multiply-accumulates run at it, and how many weight
bytes are read for them; 32 stands for float. From `Run` to rows, to a table file (`hardware_profile.csv`)
and to a card of the report. Shares are of the whole model: the rows sum to all MACs and to all weight bytes.
No device is assumed, and no pair is called fast or slow.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitsmith.report import page, svg, words
from bitsmith.report.metrics import FLOAT_BITS, Run

FILE = "hardware_profile.csv"
COLUMNS = ("weight_bits", "activation_bits", "macs", "mac_share", "weight_bytes", "byte_share")


@dataclass(frozen=True)
class Row:
    """All products of one pair of widths; of two activations the left operand counts as the weight."""

    weight_bits: float
    activation_bits: float
    macs: float
    mac_share: float
    weight_bytes: float
    byte_share: float


def profile(run: Run) -> list[Row]:
    """Rows by ascending widths; empty where the layers' MACs are not known.

    Products outside every site are float x float, and so are the bytes that no product multiplies (ranges of
    activations, parameters in float).
    """
    if not any(layer.macs for layer in run.layers):
        return []
    found: dict[tuple[float, float], tuple[float, float]] = {}

    def add(pair: tuple[float, float], macs: float, weight_bytes: float) -> None:
        before = found.get(pair, (0.0, 0.0))
        found[pair] = (before[0] + macs, before[1] + weight_bytes)

    for layer in run.layers:
        widths = (layer.weight_bits, layer.activation_bits)
        first, second = (float(FLOAT_BITS) if bits is None else bits for bits in widths)
        each = layer.channel_bits or (first,)
        for bits in sorted(
            set(each)
        ):  # channels have equal shares of the products, and of the bytes by their bits
            share = each.count(bits) / len(each)
            add((bits, second), share * (layer.macs or 0), share * bits / first * (layer.weight_bytes or 0))
    rest = (run.cost("weight_bytes") or 0) - sum(size for _, size in found.values())
    if run.cost("float_macs") or rest > 0.5:
        add((FLOAT_BITS, FLOAT_BITS), run.cost("float_macs") or 0, max(rest, 0.0))
    all_macs = sum(macs for macs, _ in found.values())
    all_bytes = sum(size for _, size in found.values()) or 1.0
    return [
        Row(*pair, macs, macs / all_macs, size, size / all_bytes)
        for pair, (macs, size) in sorted(found.items())
    ]


def to_csv(rows: list[Row]) -> str:
    """The rows as comma-separated values with a header; empty where there are none."""
    if not rows:
        return ""
    lines = [",".join(f"{getattr(row, column):.10g}" for column in COLUMNS) for row in rows]
    return "\n".join((",".join(COLUMNS), *lines, ""))


def card(run: Run) -> str:
    """Share of MACs and of weight bytes at each pair of widths, as two maps."""
    rows = profile(run)
    if not rows:
        return ""
    macs = {(row.weight_bits, row.activation_bits): row.mac_share for row in rows}
    sizes = {(row.weight_bits, row.activation_bits): row.byte_share for row in rows}
    halves = [_map("Multiply-accumulates", macs, "quant")]
    if any(sizes.values()):
        halves.append(_map("Weight bytes", sizes, "export"))
    body = "".join(f'<div class="half">{half}</div>' for half in halves)
    return page.card(
        "Hardware profile",
        f'<div class="halves">{body}</div>',
        remark=f"Which widths meet, and how much of the model at each pair. As a table: {FILE}. "
        "Float × float in bytes is what no product multiplies, as the ranges of activations.",
        wide=True,
    )


def _map(title: str, shares: dict[tuple[float, float], float], kind: str) -> str:
    dearest = max(shares, key=lambda pair: shares[pair])
    first, second = (words.bits(width) for width in dearest)
    most = f"{words.small_percent(shares[dearest])} at {first} x {second}"
    label = f"{title} by weight and activation bits: {most}, the largest share"
    return f"<h3>{title}</h3>{svg.pairs(shares, words.small_percent, kind, label)}"
