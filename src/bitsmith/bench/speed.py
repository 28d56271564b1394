"""Speed of one model in all its forms: latency of one input, throughput of a batch, memory of a process.

All forms take turns in every round, each round beginning with another, so that whatever else the machine does
falls on all of them alike; figures are medians and percentiles, and the ratio to float32 is the median of the
rounds' own ratios. Nothing is asserted about the machine: on a busy one only ratios mean something.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.bench.contenders import NAMES, Predict, contender, data_for
from bitsmith.bench.memory import peak_memory
from bitsmith.bench.rounds import in_turn, percentile
from bitsmith.bench.writing import describe_writing, measure_writing
from bitsmith.errors import RecipeError
from bitsmith.kernels.choose import describe
from bitsmith.recipe.environment import environment
from bitsmith.tasks import TextData

SINGLES = 5  # inputs of batch 1 in a round
TOKENS = 32  # written by a language model in a round
WARM = 3  # calls before anything is measured


def bench_run(
    path: Path,
    *,
    batch_size: int = 64,
    rounds: int = 20,
    data: str | None = None,
    factory: str | None = None,
    memory: bool = True,
    tokens: int = TOKENS,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The figures of a run directory or a native model, as plain values for JSON.

    ``data``: instead of the run's test split; ``factory``: what builds the model where it is code.
    ``memory``: also measure that, in a process for each form. ``tokens``: what a language model writes, after
    what is left of a test sequence for a prompt. ``tell`` hears what is being done. Raises
    FormatError, RecipeError, DataError.
    """
    for option, value in (("--batch-size", batch_size), ("--rounds", rounds), ("--tokens", tokens)):
        if value < 1:
            raise RecipeError("nothing would be measured", where=option, got=value, expected="1 or more")
    examples = data_for(path, data)
    rows = torch.arange(max(batch_size, SINGLES)) % len(examples.test_x)
    batch = examples.inputs(examples.test_x[rows])
    of_text = isinstance(examples, TextData)
    opened = {name: contender(path, name, factory) for name in NAMES}
    known = {name: one for name, one in opened.items() if not isinstance(one, str)}
    tell(f"measuring {', '.join(known)}")
    timed = measure(known, batch, batch_size, rounds)
    each = batch[0].numel() if of_text else 1
    models = {name: summary(timed[name], timed.get("float32"), batch_size * each) for name in known}
    written = _written(known, batch, tokens, rounds, tell) if of_text else None
    if memory:
        for name, found in models.items():
            tell(f"memory of {name}")
            found["memory"] = peak_memory(path, name, batch[:batch_size], factory)
    return {
        "version": 1,
        "path": str(path),
        "data": examples.name,
        "unit": "tokens" if of_text else examples.unit,
        "per_input": each,
        "batch_size": batch_size,
        "rounds": rounds,
        "calls": rounds * SINGLES,
        "models": models,
        **({} if written is None else {"generation": written}),
        "not_measured": {name: why for name, why in opened.items() if isinstance(why, str)},
        "environment": environment() | describe(),
    }


def _written(
    known: Mapping[str, Predict], batch: Tensor, tokens: int, rounds: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    models = {name: model for name, model in known.items() if isinstance(model, nn.Module)}
    steps = min(tokens, batch.shape[1] // 2)
    prompt = batch[:1, : batch.shape[1] - steps]
    tell(f"writing {steps} tokens after {prompt.shape[1]}")
    return describe_writing(models, measure_writing(models, prompt, steps, rounds), prompt, steps)


@torch.inference_mode()
def measure(
    models: Mapping[str, Predict], batch: Tensor, batch_size: int, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """(seconds of single inputs, seconds of batches) of each model; `SINGLES` and one in a round."""
    singles = [batch[i : i + 1] for i in range(SINGLES)]
    many = batch[:batch_size]
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    for predict in models.values():
        for _ in range(WARM):
            predict(singles[0])
            predict(many)
    names = list(models)
    for turn in range(rounds):
        for name in in_turn(names, turn):
            one, of_batch = found[name]
            one.extend(_seconds(models[name], x) for x in singles)
            of_batch.append(_seconds(models[name], many))
    return found


def _seconds(predict: Predict, x: Tensor) -> float:
    started = time.perf_counter()
    predict(x)
    return time.perf_counter() - started


def summary(
    timed: tuple[list[float], list[float]], baseline: tuple[list[float], list[float]] | None, count: int
) -> dict[str, Any]:
    """Latency in milliseconds, throughput in ``count`` a batch's seconds, and both as times of float32's."""
    singles, batches = timed
    found: dict[str, Any] = {
        "latency_ms": {f"p{q}": 1e3 * percentile(singles, q) for q in (50, 95, 99)},
        "throughput": count / statistics.median(batches),
    }
    if baseline is not None:
        for key, own, other in zip(("latency", "throughput"), timed, baseline, strict=True):
            ratios = [theirs / mine for mine, theirs in zip(own, other, strict=True)]
            found[f"{key}_speedup"] = statistics.median(ratios)
    return found
