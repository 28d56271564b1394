"""How the quantized model trained where codes did, in a line: the ``training`` part of metrics.json."""

from __future__ import annotations

from bitsmith.report import words
from bitsmith.report.certificate import is_number
from bitsmith.report.metrics import Run

MODES = {
    "integer": "Trained on integer codes",
    "zeroth_order": "Trained by forward passes alone",
}


def sentence(run: Run) -> str:
    """ "Trained on integer codes: 5.2 % of 5,596 codes changed, 31 % lie at an end of their grid (30 %
    before); 1.66 bytes of state a weight"; empty where float weights trained, or nothing is known."""
    found = run.metrics.get("training")
    mode = found.get("mode") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(mode, str) or mode not in MODES:
        return ""
    codes = []
    if is_number(found.get("changed")) and is_number(found.get("codes")):
        codes.append(f"{words.small_percent(found['changed'])} of {found['codes']:,} codes changed")
    if is_number(found.get("saturated")):
        before = found.get("saturated_before")
        was = f" ({words.small_percent(before)} before)" if is_number(before) else ""
        codes.append(f"{words.small_percent(found['saturated'])} lie at an end of their grid{was}")
    parts = [": ".join(filter(None, (MODES[mode], ", ".join(codes))))]
    if is_number(found.get("state_bytes_per_weight")):
        parts.append(f"{found['state_bytes_per_weight']:.2f} bytes of state a weight")
    if isinstance(found.get("frozen"), list) and found["frozen"]:
        parts.append(f"frozen: {words.listing(map(str, found['frozen']))}")
    return "; ".join(parts)
