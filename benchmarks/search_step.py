"""What searching costs: time of a budget search's step over the step of fixed-width QAT of the same model.

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
from pathlib import Path
from typing import Any

import _results
import torch
from overhead import digits_cnn, resnet20

from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.quantization import Scheme, calibrate, parameter_groups, prepare

MODELS = {"digits CNN": (digits_cnn, 200), "ResNet-20": (resnet20, 8)}
CANDIDATES = {3: (2, 4, 8), 7: (2, 3, 4, 5, 6, 7, 8)}
MODES = ("sampled", "mixed", "real")


def step_of(make: Callable[[], Any], candidates: tuple[int, ...] | None, mode: str) -> Callable[[], None]:
    """One training step of fixed 4-bit QAT (candidates None), or of a search."""
    torch.manual_seed(0)
    model, x, loss = make()
    prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=4))
    search = None
    if candidates is not None:
        search = BudgetSearch({"bops": 0.03}, x[:1], candidates=candidates, mode=mode, search_share=1.0)
        search.attach(model)
    calibrate(model, [x])
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-4), fused=True)
    done = 0

    def step() -> None:
        nonlocal done
        optimizer.zero_grad(set_to_none=True)
        loss(model(x)).backward()
        if search is not None:
            search.penalty().backward()
        optimizer.step()
        if search is not None:
            search.after_step(done, 1_000_000)
        done += 1

    return step


def measure(name: str) -> dict[str, Any]:
    """Fixed width and every search in turns."""
    make, rounds = MODELS[name]
    steps = {"fixed": step_of(make, None, "")}
    for count, candidates in CANDIDATES.items():
        for mode in MODES:
            steps[f"{mode}, {count} candidates"] = step_of(make, candidates, mode)
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
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = _results.load("search_step", options.out)
    print(f"{_results.machine()['kind']}, one thread")
    for name in MODELS:
        if options.cases in name:
            results[name] = measure(name)
            for key, r in results[name].items():
                print(
                    f"{name:<12}{key:<24}{r['ms']:>9.2f} ms{r['ratio']:>8.3f}{r['median_ratio']:>8.3f}",
                    flush=True,
                )
            _results.save("search_step", results, options.out)


if __name__ == "__main__":
    main()
