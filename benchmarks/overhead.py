"""What quantization-aware training costs: time of a QAT step over the float step of the same model.

    python benchmarks/overhead.py                    # all cases; several minutes, most of them compiling
    python benchmarks/overhead.py --cases cnn        # cases whose name contains this

Three steps (forward, backward, fused AdamW) take turns in one process on one thread, so that a machine whose speed
drifts slows all: float, QAT, and QAT with the quantizer as plain autograd formulas instead of our Function. The
ratio is that of the minima; beside it the median of the rounds' own ratios and their spread (10th to 90th
percentile), and both for the plain formulas. Time nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import _results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.numerics import affine
from bitsmith.quantization import Scheme, calibrate, parameter_groups, prepare
from bitsmith.tasks import models


class LlamaBlock(nn.Module):
    """One decoder block: RMSNorm, causal attention, SwiGLU."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def llama() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """Three blocks of width 512, 4 x 256 tokens."""
    model = nn.Sequential(*[LlamaBlock(512, 8, 1408) for _ in range(3)])
    return model, torch.randn(4, 256, 512), lambda y: y.square().mean()


def resnet20() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """ResNet-20, 128 images of 32 x 32, channels last: the faster layout of both steps on a CPU."""
    labels = torch.arange(128) % 10
    model = models.build("resnet20").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(128, 3, 32, 32).to(memory_format=torch.channels_last)
    return model, x, lambda y: F.cross_entropy(y, labels)


def digits_cnn() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """The digits CNN, 64 images of 8 x 8."""
    labels = torch.arange(64) % 10
    return models.build("digits_cnn"), torch.rand(64, 1, 8, 8), lambda y: F.cross_entropy(y, labels)


@dataclass(frozen=True)
class Case:
    """One ratio and the bound that the project set itself."""

    make: Callable[[], tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]]
    weights: int
    activations: int | None
    compiled: bool
    rounds: int
    bound: float


CASES = {
    "llama stack W4, compiled": Case(llama, 4, None, True, 15, 1.05),
    "llama stack W4A8, compiled": Case(llama, 4, 8, True, 15, 1.12),
    "ResNet-20 W4A4, compiled": Case(resnet20, 4, 4, True, 15, 1.15),
    "ResNet-20 W4A4, eager": Case(resnet20, 4, 4, False, 15, 1.4),
    "digits CNN W4A4, eager": Case(digits_cnn, 4, 4, False, 300, 1.6),
}


def measure(case: Case) -> dict[str, Any]:
    """Time the three steps in turns."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x, loss = case.make()
    quantized = copy.deepcopy(model)
    activations = None if case.activations is None else Scheme(bits=case.activations)
    prepare(quantized, Scheme(bits=case.weights, granularity="channel"), activations, first_last_bits=None)
    calibrate(quantized, [x])
    steps = {
        "float": (_step(model, x, loss, case.compiled), affine.fake_quantize),
        "plain": (_step(copy.deepcopy(quantized), x, loss, case.compiled), plain),
        "qat": (_step(quantized, x, loss, case.compiled), affine.fake_quantize),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}

    def turn() -> None:
        for name, (step, quantize) in steps.items():
            with mock.patch.object(affine, "fake_quantize", quantize):
                started = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - started)

    started = time.perf_counter()
    for _ in range(3):
        turn()
    warm_up = time.perf_counter() - started
    for taken in times.values():
        taken.clear()
    for _ in range(case.rounds):
        turn()
    return {
        **{f"{name}_ms": 1e3 * min(taken) for name, taken in times.items()},
        **_ratio(times["qat"], times["float"]),
        "plain": _ratio(times["plain"], times["float"]),
        "bound": case.bound,
        "warm_up_seconds": warm_up,
    }


def _ratio(taken: list[float], base: list[float]) -> dict[str, Any]:
    """Ratio of the minima, median of the rounds' ratios, and the rounds' 10th and 90th percentile."""
    ratios = [t / b for t, b in zip(taken, base, strict=True)]
    tenths = statistics.quantiles(ratios, n=10)
    return {
        "ratio": min(taken) / min(base),
        "median_ratio": statistics.median(ratios),
        "spread": [tenths[0], tenths[-1]],
    }


def plain(
    x: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    half: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    exponent: Tensor | None = None,
    count: int = 1,
    **_: Any,
) -> Tensor:
    """numerics.affine.fake_quantize as LSQ is usually written: detach for rounding, autograd for the rest."""
    scale = scale if exponent is None else scale * torch.exp2(exponent)
    g = (high.clamp(min=1) * count).rsqrt()
    scale = (scale - scale.detach()) * g + scale.detach()
    u = torch.clamp(x / scale if half is None else x / scale - half, low, high)
    u = u + (u.round() - u).detach()
    return scale * (u if half is None else u + half)


def _step(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], compiled: bool
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-5), fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(forward(x)).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = _results.load("overhead", options.out)
    print(f"{_results.machine()['kind']}, one thread")
    print(
        f"{'case':<28}{'float ms':>9}{'QAT ms':>9}{'ratio':>7}{'median':>8}{'10-90 %':>12}{'bound':>7}"
        f"{'plain':>8}{'median':>8}"
    )
    for name, case in CASES.items():
        if options.cases in name:
            r = results[name] = measure(case)
            spread = f"{r['spread'][0]:.2f}-{r['spread'][1]:.2f}"
            print(
                f"{name:<28}{r['float_ms']:>9.2f}{r['qat_ms']:>9.2f}{r['ratio']:>7.3f}{r['median_ratio']:>8.3f}"
                f"{spread:>12}{r['bound']:>7.2f}{r['plain']['ratio']:>8.3f}{r['plain']['median_ratio']:>8.3f}",
                flush=True,
            )
            _results.save("overhead", results, options.out)


if __name__ == "__main__":
    main()
