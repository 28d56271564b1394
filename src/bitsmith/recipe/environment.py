"""What a result depends on besides the recipe: versions, the processor and its instruction sets, threads."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

PACKAGES = ("bitsmith", "torch", "numpy", "onnx", "onnxruntime", "scikit-learn")
# What low-bit arithmetic on a CPU lives on; the names are the kernel's (/proc/cpuinfo).
INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx_vnni",
    "avx512_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
)


def environment() -> dict[str, str | int]:
    """Plain facts for metrics.json and for ``bitsmith inspect --system``; what is absent is left out."""
    facts: dict[str, str | int | None] = {
        "python": platform.python_version(),
        **{name.replace("-", "_"): version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instruction_sets": " ".join(_instruction_sets()),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "onnxruntime_providers": " ".join(_providers()),
    }
    return {name: value for name, value in facts.items() if value}


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo(*keys: str) -> str | None:
    """The first line of /proc/cpuinfo with one of these keys; None off Linux."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return None
    for line in path.read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return None


def _processor() -> str:
    return _cpuinfo("model name", "Model") or platform.processor() or "unknown"


def _instruction_sets() -> list[str]:
    flags = (_cpuinfo("flags", "Features") or "").split()
    return [name for name in INSTRUCTION_SETS if name in flags]


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())
