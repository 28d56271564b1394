"""What every benchmark shares: the machine in words, statistics with their spread, JSON that says how it was made."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bitsmith.files import write_json

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """Processor, the instruction sets that decide its speed at low bits, versions, threads."""
    flags = ""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
        model = next(
            (line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), model
        )
    return {
        "processor": model,
        "kind": "AVX512-VNNI"
        if "avx512_vnni" in flags
        else "AVX2"
        if "avx2" in flags
        else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def save(name: str, results: dict[str, Any], out: Path | None = None) -> Path:
    """Write ``results`` with the machine to benchmarks/results/NAME.json, or to ``out``."""
    path = out or RESULTS / f"{name}.json"
    write_json(path, {"benchmark": name, "machine": machine(), **results})
    return path


def load(name: str, out: Path | None = None) -> dict[str, Any]:
    """What ``save`` wrote before, or an empty dictionary."""
    path = out or RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}
