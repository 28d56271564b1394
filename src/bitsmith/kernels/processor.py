"""Which instruction sets this processor has, as the library needs them, best first, and their compiler flags.

Read from /proc/cpuinfo: what the operating system has switched on, so that a loaded library cannot meet an
illegal instruction. Elsewhere only plain C is taken for granted, and Arm's dot product on Apple's processors.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Literal, get_args

InstructionSet = Literal["avx512vnni", "avxvnni", "avx2", "neon", "portable"]
INSTRUCTION_SETS: tuple[InstructionSet, ...] = get_args(InstructionSet)

_AVX2 = ("-mavx2", "-mfma")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
FLAGS: dict[InstructionSet, tuple[str, ...]] = {
    "avx512vnni": (*_AVX2, *_AVX512, "-mprefer-vector-width=512"),
    "avxvnni": (*_AVX2, "-mavxvnni"),
    "avx2": _AVX2,
    "neon": ("-march=armv8.2-a+dotprod",),
    "portable": (),
}
_NEEDED: dict[InstructionSet, set[str]] = {
    "avx512vnni": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    "avxvnni": {"avx2", "fma", "avx_vnni"},
    "avx2": {"avx2", "fma"},
    "neon": {"asimddp"},
    "portable": set(),
}


def instruction_sets() -> list[InstructionSet]:
    """Those of the library that run here, best first; `portable` is always the last."""
    found = _flags()
    return [name for name in INSTRUCTION_SETS if _NEEDED[name] <= found]


def _flags() -> set[str]:
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return {"asimddp"}
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    keys = ("flags", "Features")
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith(keys)), set())


def processor() -> str:
    """A digest of what tells this kind of processor from another: what was built or timed is kept under
    it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    keys = ("model name", "flags", "Features", "CPU part")
    told = [platform.system(), platform.machine(), *sorted({x for x in lines if x.startswith(keys)})]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]
