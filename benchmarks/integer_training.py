"""What a step of integer training costs: time and peak memory beside float32 and bfloat16 with Adam, and beside
an inference pass.

    python benchmarks/integer_training.py                          # all; some minutes on a quiet machine
    python benchmarks/integer_training.py --models llama --rounds 5

Three models: eight 2048-wide Linear layers with ReLU between them on 512 tokens, a small Llama (width 512, 6
layers) on 1,024, and ResNet-20 on 32 images of 32 x 32. All steps and passes take turns in every round, in one process; a ratio is the
median of the rounds' own. Floats have fused Adam; "medium" is torch.set_float32_matmul_precision's, which may compute
in bfloat16 where a processor does, and "best" the faster one in each round. Memory is that of tensors: state
(weights, optimizer) and the most bytes that live at once in a step or a pass (train/peak.py), which is the same on
any machine; what libraries keep for themselves is not in it.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.bench.rounds import in_turn
from bitsmith.kernels.choose import describe
from bitsmith.optim import IntegerAdam
from bitsmith.quantization.integer_packed import finalize_integer
from bitsmith.quantization.integer_prepare import prepare_integer
from bitsmith.quantization.integer_products import run_on_kernels
from bitsmith.tasks import build
from bitsmith.train.peak import PeakBytes

WIDTHS = {"W4A8G8": (4, 8, 8), "W8A8G8": (8, 8, 8), "W4A4G4": (4, 4, 4)}
GOALS = {
    "linear": {"step / best float32": 1 / 3, "step / our pass": 4.0, "memory / float32": 0.25},
    "llama": {"step / best float32": 1 / 2, "memory / float32": 0.4},
    "resnet20": {},
}


@dataclass
class Entry:
    """What takes turns: a function, and the tensors that stay between its calls."""

    run: Callable[[], object]
    state: Callable[[], list[Tensor]]
    precision: str = "highest"


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def linear() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """Eight layers, 512 tokens."""
    layers = [part for _ in range(8) for part in (nn.Linear(2048, 2048, bias=False), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), drawn(512, 2048), lambda y: y.square().mean()


def llama() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """Four rows of 256 bytes."""
    model = build("byte_llama", seed=0, width=512, depth=6, heads=8, context=256)
    tokens = torch.randint(0, 256, (4, 257), generator=torch.Generator().manual_seed(0))
    return model, tokens[:, :-1], lambda y: F.cross_entropy(y.flatten(0, -2), tokens[:, 1:].flatten())


def resnet20() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """The usual one for small images."""
    labels = torch.arange(32) % 10
    return build("resnet20", seed=0), drawn(32, 3, 32, 32), lambda y: F.cross_entropy(y, labels)


MODELS = {"linear": linear, "llama": llama, "resnet20": resnet20}


def float_step(name: str, precision: str = "highest", dtype: torch.dtype = torch.float32) -> Entry:
    """A step with Adam."""
    torch.manual_seed(0)
    model, x, loss = MODELS[name]()
    model = model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model(x).float()).backward()
        optimizer.step()

    def state() -> list[Tensor]:
        kept = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        return [*model.parameters(), *model.buffers(), *kept]

    return Entry(step, state, precision)


def float_pass(name: str, precision: str = "highest") -> Entry:
    """Inference."""
    torch.manual_seed(0)
    model, x, _ = MODELS[name]()
    model.eval()
    return Entry(passes(model, x), lambda: [*model.parameters(), *model.buffers()], precision)


def passes(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return model(x)

    return run


def integer_entries(name: str, widths: tuple[int, int, int]) -> tuple[Entry, Entry]:
    """A step, and a pass of the packed model."""
    torch.manual_seed(0)
    model, x, loss = MODELS[name]()
    prepare_integer(model, *widths)
    packed = finalize_integer(model)
    run_on_kernels(packed)
    optimizer = IntegerAdam(model, lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()

    def state() -> list[Tensor]:
        others = optimizer.float_optimizer.state.values() if optimizer.float_optimizer else []
        kept = [t for values in others for t in values.values() if isinstance(t, Tensor)]
        return [*model.parameters(), *model.buffers(), *optimizer.tensors().values(), *kept]

    held = [*packed.parameters(), *packed.buffers()]
    return Entry(step, state), Entry(passes(packed, x), lambda: held)


@contextlib.contextmanager
def matmul_precision(value: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def memory(entry: Entry) -> dict[str, int]:
    """Bytes of the state, and the most that lived at once beside it (after a first call)."""
    state = entry.state()
    with PeakBytes(state) as seen:
        entry.run()
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in state}
    return {"state": sum(sizes.values()), "peak": sum(sizes.values()) + seen.peak}


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Every contender's times, memory, and the ratios that matter."""
    entries = {
        "float32 step": float_step(name),
        "medium step": float_step(name, "medium"),
        "float32 pass": float_pass(name),
        "medium pass": float_pass(name, "medium"),
    }
    if multiplies_bfloat16():
        entries["bfloat16 step"] = float_step(name, dtype=torch.bfloat16)
    for label, widths in WIDTHS.items():
        entries[f"{label} step"], entries[f"{label} pass"] = integer_entries(name, widths)
    for entry in entries.values():
        entry.run()
    held = {label: memory(entry) for label, entry in entries.items()}
    times: dict[str, list[float]] = {label: [] for label in entries}
    for turn in range(rounds):
        for label in in_turn(list(entries), turn):
            with matmul_precision(entries[label].precision):
                started = time.perf_counter()
                entries[label].run()
                times[label].append(time.perf_counter() - started)
    best = {what: best_of(times, what) for what in ("step", "pass")}
    found: dict[str, Any] = {
        "median_ms": {n: 1e3 * statistics.median(t) for n, t in times.items()},
        "memory": held,
    }
    for label in WIDTHS:
        step = times[f"{label} step"]
        beside = {
            "step / float32": times["float32 step"],
            "step / best float32": best["step"],
            "step / best float32 pass": best["pass"],
            "step / our pass": times[f"{label} pass"],
        }
        if "bfloat16 step" in times:
            beside["step / bfloat16"] = times["bfloat16 step"]
        ratios = {what: ratio(step, base) for what, base in beside.items()}
        peak = held[f"{label} step"]["peak"]
        ratios["memory / float32"] = peak / held["float32 step"]["peak"]
        ratios["memory / float32 pass"] = peak / held["float32 pass"]["peak"]
        ratios["memory / our pass"] = peak / held[f"{label} pass"]["peak"]
        found[label] = ratios
    return found


def best_of(times: dict[str, list[float]], what: str) -> list[float]:
    """The faster float32 of each round."""
    return [min(pair) for pair in zip(times[f"float32 {what}"], times[f"medium {what}"], strict=True)]


def ratio(taken: list[float], base: list[float]) -> float:
    return statistics.median(t / b for t, b in zip(taken, base, strict=True))


def multiplies_bfloat16() -> bool:
    """Elsewhere bfloat16 is computed in float32 after a conversion, and slower than it."""
    info = Path("/proc/cpuinfo")
    return info.exists() and any(flag in info.read_text() for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    results = _results.load("integer_training", chosen.out)
    print(f"{_results.machine()['kind']}, kernels {describe()['kernels']}, {chosen.threads} thread(s)")
    if not multiplies_bfloat16():
        print("bfloat16: skipped, this processor does not multiply it")
    for name in chosen.models:
        results[name] = found = measure(name, chosen.rounds)
        print(f"\n{name}")
        for label, taken in found["median_ms"].items():
            state, peak = (found["memory"][label][part] / 2**20 for part in ("state", "peak"))
            print(f"  {label:16s}{taken:9.1f} ms   state {state:7.1f} MB   peak {peak:7.1f} MB")
        for label in WIDTHS:
            print(f"  {label}  " + "   ".join(f"{what} {value:.2f}" for what, value in found[label].items()))
        print("  goals   " + "   ".join(f"{what} <= {value:.2f}" for what, value in GOALS[name].items()))
        results |= {"goals": GOALS, "kernels": describe()["kernels"], "bfloat16": multiplies_bfloat16()}
        _results.save("integer_training", results, chosen.out)


if __name__ == "__main__":
    main()
