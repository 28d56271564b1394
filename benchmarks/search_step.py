"""What widths that train cost: a step of budget search, fractional or progressive bits over one of fixed-width QAT.

    python benchmarks/search_step.py                 # all cases, eager; a few minutes
    python benchmarks/search_step.py --cases CNN

All steps (forward, backward, penalty, fused AdamW, the draw of the next widths) take turns in one process on one
thread. The ratio is that of the minima; beside it the median of the rounds' own ratios. Time nothing else on the
machine meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _results
import torch
from overhead import digits_cnn, resnet20

from bitsmith.methods import Method
from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.methods.fractional_bits import FractionalBits
from bitsmith.methods.progressive_bits import ProgressiveBits
from bitsmith.quantization import Scheme, calibrate, parameter_groups, prepare

MODELS = {"digits CNN": (digits_cnn, 200), "ResNet-20": (resnet20, 8)}
CANDIDATES = {3: (2, 4, 8), 7: (2, 3, 4, 5, 6, 7, 8)}
TARGET = {"average_weight_bits": 4.2, "average_activation_bits": 4.5}


def methods(example: torch.Tensor) -> dict[str, Callable[[], Method]]:
    """Name -> the method, in all that it can do to a step."""
    found: dict[str, Callable[[], Method]] = {}
    for count, candidates in CANDIDATES.items():
        for mode in ("sampled", "mixed", "real"):
            found[f"search, {mode}, {count} candidates"] = partial(
                BudgetSearch, {"bops": 0.03}, example, candidates=candidates, mode=mode, search_share=1.0
            )
    for per in ("tensor", "channel"):
        for mode in ("sampled", "argmax", "mixed", "real"):
            found[f"fractional, {mode}, {per}"] = partial(
                FractionalBits, example, target=TARGET, mode=mode, per=per, learn_share=1.0
            )
    found["progressive"] = partial(ProgressiveBits, tensors="both", schedule=[(8, 0.5)])
    return found


def step_of(make: Callable[[], Any], method: str) -> Callable[[], None]:
    """One training step of fixed 4-bit QAT (method "fixed"), or of a method."""
    torch.manual_seed(0)
    model, x, loss = make()
    prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=4))
    moved = None
    if method != "fixed":
        moved = methods(x[:1])[method]()
        moved.attach(model)
    calibrate(model, [x])
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-4), fused=True)
    done = 0

    def step() -> None:
        nonlocal done
        optimizer.zero_grad(set_to_none=True)
        loss(model(x)).backward()
        if moved is not None:
            penalty = moved.penalty()
            if penalty.requires_grad:
                penalty.backward()
        optimizer.step()
        if moved is not None:
            moved.after_step(done, 1_000_000)
        done += 1

    return step


def measure(name: str, wanted: str) -> dict[str, Any]:
    """Fixed width and every method in turns."""
    make, rounds = MODELS[name]
    names = ["fixed", *(key for key in methods(make()[1][:1]) if wanted in key)]
    steps = {key: step_of(make, key) for key in names}
    times: dict[str, list[float]] = {key: [] for key in steps}
    for turn in range(rounds + 2):
        for key, step in steps.items():
            started = time.perf_counter()
            step()
            if turn >= 2:
                times[key].append(time.perf_counter() - started)
    fixed = times["fixed"]
    return {
        key: {
            "ms": 1e3 * min(taken),
            "ratio": min(taken) / min(fixed),
            "median_ratio": statistics.median(t / f for t, f in zip(taken, fixed, strict=True)),
        }
        for key, taken in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="", help="only models whose name contains this")
    parser.add_argument("--methods", default="", help="only those whose name contains this")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = _results.load("search_step", options.out)
    print(f"{_results.machine()['kind']}, one thread")
    for name in MODELS:
        if options.cases in name:
            found = measure(name, options.methods)
            results.setdefault(name, {}).update(found)
            for key, r in found.items():
                print(
                    f"{name:<12}{key:<34}{r['ms']:>9.2f} ms{r['ratio']:>8.3f}{r['median_ratio']:>8.3f}",
                    flush=True,
                )
            _results.save("search_step", results, options.out)


if __name__ == "__main__":
    main()
