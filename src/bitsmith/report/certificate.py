"""What certificate.json says, as the report shows it: checks that held, failed, or were not made.

A certificate has one object per export under "exports": `{"passed", "runtime", "runtime_version",
"codes_equal", "codes", "checks": [{"name", "passed", "value", "limit"}], "sites": {layer: output error},
"options", "default_options", "failure"}`, and "not_checked" for all. Each may be missing: what is not said is
not shown as checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

TITLES = {
    "onnx": "ONNX Runtime",
    "onnxruntime": "ONNX Runtime",
    "native": "Bitsmith",
    "bitsmith": "Bitsmith",
    "openvino": "OpenVINO",
}


@dataclass(frozen=True)
class Certified:
    """What the certificate says about one export. `passed` is None where nothing was verified."""

    name: str
    passed: bool | None
    runtime_name: str  # "ONNX Runtime"
    runtime: str  # with its version
    checks: tuple[tuple[str, bool | None, str], ...]  # what, held, figures in words
    layers: tuple[tuple[str, float], ...]  # layer, output error in standard deviations; the largest first
    remarks: tuple[str, ...]
    failure: str


def is_number(value: Any) -> TypeGuard[float]:
    """A finite int or float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_certificate(certificate: Mapping[str, Any]) -> tuple[Certified, ...]:
    """One entry per export, in the certificate's order."""
    return tuple(_certify(name, entry) for name, entry in (certificate.get("exports") or {}).items())


def _certify(name: str, entry: Mapping[str, Any]) -> Certified:
    checks: list[tuple[str, bool | None, str]] = []
    if isinstance(entry.get("codes_equal"), bool):
        codes = f"{entry['codes']:,} codes" if isinstance(entry.get("codes"), int) else ""
        checks.append(("stored codes equal the trained codes, bit for bit", entry["codes_equal"], codes))
    checks += [
        (str(check.get("name", "check")), check.get("passed"), _figures(check))
        for check in entry.get("checks") or ()
    ]
    passed = entry.get("passed")
    if checks and passed is not False:  # a failed check outweighs a claim to have passed
        passed = all(held is not False for _, held, _ in checks)
    errors = [(layer, error) for layer, error in (entry.get("sites") or {}).items() if is_number(error)]
    title = runtime_title(str(entry.get("runtime", name)))
    version = str(entry.get("runtime_version") or "")
    return Certified(
        name=name,
        passed=passed,
        runtime_name=title,
        runtime=f"{title}{', ' if ' ' in version else ' '}{version}".strip(),
        checks=tuple(checks),
        layers=tuple(sorted(errors, key=lambda item: -item[1])),
        remarks=tuple(_remarks(entry)),
        failure=str(entry.get("failure") or ""),
    )


def _remarks(entry: Mapping[str, Any]) -> Iterator[str]:
    if is_number(entry.get("max_abs_difference")):
        yield f"Largest difference of an output: {entry['max_abs_difference']:.2g}."
    if entry.get("options"):
        options = ", ".join(f"{key} = {value}" for key, value in entry["options"].items())
        yield f"Session options: {options}."
    if isinstance(wider := entry.get("wider_containers"), dict) and wider:
        named = "; ".join(f"{site}: {text}" for site, text in wider.items())
        yield f"The trained codes lie in wider containers, where the format has none of their width: {named}."
    default = entry.get("default_options")
    if isinstance(default, dict) and isinstance(default.get("holds"), bool):
        where = f"With {default.get('options', 'the runtime default')}"
        rows = default.get("rows_within_tolerance")
        share = f", and {100 * rows:.4g}\u202f% of the outputs" if is_number(rows) else ""
        yield (
            f"{where} the predictions hold, too{share}."
            if default["holds"]
            else f"{where} the predictions do NOT hold: set the options above."
        )


def runtime_title(name: str) -> str:
    """The name that a runtime gives itself."""
    return TITLES.get(name.lower(), name)


def _figures(check: Mapping[str, Any]) -> str:
    """ "100 %, at least 99.5 %": which way a limit points is read off the verdict."""
    value, limit = check.get("value"), check.get("limit")
    if not is_number(value):
        return ""
    share = is_number(limit) and 0 < limit <= 1 and 0 <= value <= 1

    def show(number: float) -> str:
        return f"{100 * number:.4g}\u202f%" if share else f"{number:.4g}"

    if not is_number(limit):
        return show(value)
    side = "least" if (value >= limit) == bool(check.get("passed")) else "most"
    return f"{show(value)}, at {side} {show(limit)}"
