"""What certificate.json says, as the report shows it: checks that held, failed, or were not made.

A certificate has one object per export (under "exports", or at the top level):
`{"passed", "runtime", "runtime_version", "codes_equal", "checks": [{"name", "passed", "value", "limit"}],
"sites": {site: output error}, "not_checked": [...], "failure"}`. All of them may be missing: what is not said
is not shown as checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Certified:
    """What the certificate says about one export. `passed` is None where nothing was verified."""

    name: str
    passed: bool | None
    runtime_name: str  # "ONNX Runtime"
    runtime: str  # with its version
    checks: tuple[tuple[str, bool | None, str], ...]  # what, held, figures in words
    sites: tuple[tuple[str, float], ...]  # site, output error; the largest first
    not_checked: tuple[str, ...]
    failure: str


def is_number(value: Any) -> bool:
    """A finite int or float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_certificate(certificate: Mapping[str, Any]) -> tuple[Certified, ...]:
    """One entry per export, in the certificate's order."""
    exports = certificate.get("exports")
    if exports is None:  # one object per export at the top level
        exports = {name: entry for name, entry in certificate.items() if isinstance(entry, dict)}
    if isinstance(exports, list):
        exports = {str(entry.get("name", entry.get("format", "export"))): entry for entry in exports}
    shared = tuple(str(item) for item in certificate.get("not_checked") or ())
    return tuple(_certify(name, entry, shared) for name, entry in exports.items())


def _certify(name: str, entry: Mapping[str, Any], not_checked: tuple[str, ...]) -> Certified:
    checks: list[tuple[str, bool | None, str]] = []
    if isinstance(entry.get("codes_equal"), bool):
        checks.append(("stored codes equal the trained codes, bit for bit", entry["codes_equal"], ""))
    for check in entry.get("checks") or ():
        value, limit = check.get("value"), check.get("limit")
        figures = "" if value is None else _figure(value)
        if limit is not None:
            figures += f" (limit {_figure(limit)})"
        checks.append((str(check.get("name", "check")), check.get("passed"), figures.strip()))
    passed = entry.get("passed")
    if passed is None and checks:
        passed = all(held is not False for _, held, _ in checks)
    errors = [
        (site, float(error["error"] if isinstance(error, dict) and "error" in error else error))
        for site, error in (entry.get("sites") or {}).items()
        if is_number(error) or (isinstance(error, dict) and is_number(error.get("error")))
    ]
    version = entry.get("runtime_version") or entry.get("version") or ""
    return Certified(
        name=name,
        passed=passed,
        runtime_name=runtime_title(str(entry.get("runtime", name))),
        runtime=f"{runtime_title(str(entry.get('runtime', name)))} {version}".strip(),
        checks=tuple(checks),
        sites=tuple(sorted(errors, key=lambda item: -item[1])),
        not_checked=tuple(str(item) for item in entry.get("not_checked") or ()) + not_checked,
        failure=str(entry.get("failure") or entry.get("error") or ""),
    )


def runtime_title(name: str) -> str:
    """The name that a runtime gives itself."""
    titles = {
        "onnx": "ONNX Runtime",
        "onnxruntime": "ONNX Runtime",
        "native": "Bitsmith",
        "bitsmith": "Bitsmith",
        "openvino": "OpenVINO",
    }
    return titles.get(name.lower(), name)


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
