"""Which number format the forward runs in: measured here and now, and said in words.

Unlike most trainers we do not look up processor flags: bfloat16 exists in software on every CPU and is tens
to hundreds of times slower than float32 without AMX or AVX512-BF16. A small matrix product settles it in a
few milliseconds. Only the forward is autocast; weights, gradients, losses and quantizers stay float32.
"""

from __future__ import annotations

import time

import torch

PRECISIONS = ("float32", "bfloat16", "auto")

WORTH_IT = 1.3  # a smaller gain of one matrix product is lost again in the casts around it


def choose_precision(requested: str, device: torch.device) -> tuple[str, str]:
    """("float32" or "bfloat16", a sentence with the measured figures, "" where nothing was measured)."""
    if requested == "float32":
        return "float32", ""
    plain = matmul_seconds(torch.float32, device)
    # One product first: where bfloat16 is emulated it alone tells enough.
    half = matmul_seconds(torch.bfloat16, device, repeats=1)
    if half < 4 * plain:
        half = matmul_seconds(torch.bfloat16, device)
    ratio = plain / half
    figures = (
        f"a {_size(device)} matrix product takes {plain * 1e6:.0f} us in float32 and {half * 1e6:.0f} us in "
        f"bfloat16 on this {device.type}"
    )
    if requested == "auto":
        precision = "bfloat16" if ratio >= WORTH_IT else "float32"
        return precision, f"precision auto chose {precision}: {figures}"
    slow = f", {1 / ratio:.0f} times slower: precision float32 is better here" if ratio < 0.8 else ""
    return "bfloat16", f"precision bfloat16 as asked for: {figures}{slow}"


def matmul_seconds(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """Best wall time of one square matrix product after a warm-up (GPU: of a synchronised one)."""
    size = _size(device)
    left = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for attempt in range(repeats + 1):
        _synchronize(device)
        start = time.perf_counter()
        left @ left
        _synchronize(device)
        if attempt:
            best = min(best, time.perf_counter() - start)
    return best


def _size(device: torch.device) -> int:
    return 128 if device.type == "cpu" else 2048


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
