"""How fast the forms of a language model read a prompt (prefill) and write what follows (decode), one row.

All forms take turns in every round: each reads the same prompt with an empty cache and writes the tokens that
it finds likeliest, one step each. A file of ONNX has no cache, and is not here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.bench.rounds import in_turn, percentile
from bitsmith.tasks.reading import reader, reads_one_by_one


@dataclass
class Written:
    """Seconds of each prompt, and of each step in all rounds."""

    prompts: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


@torch.inference_mode()
def measure_writing(
    models: Mapping[str, nn.Module], prompt: Tensor, steps: int, rounds: int
) -> dict[str, Written]:
    """``prompt`` (1, T) and ``steps`` more tokens, ``rounds`` times after one to warm up."""
    found = {name: Written() for name in models}
    names = list(models)
    for turn in range(-1, rounds):
        for name in in_turn(names, turn):
            into = found[name] if turn >= 0 else Written()
            read = reader(models[name], 1, prompt.shape[1] + steps)
            tokens = prompt
            for seconds in (into.prompts, *[into.steps] * steps):
                started = time.perf_counter()
                tokens = read(tokens).argmax(-1, keepdim=True)
                seconds.append(time.perf_counter() - started)
    return found


def describe_writing(
    models: Mapping[str, nn.Module], timed: Mapping[str, Written], prompt: Tensor, steps: int
) -> dict[str, Any]:
    """The figures of each model: tokens a second, percentiles of a step, times of float32's."""
    found: dict[str, Any] = {}
    for name, one in timed.items():
        found[name] = {
            "cache": reads_one_by_one(models[name]),
            "prefill_per_s": prompt.shape[1] / statistics.median(one.prompts),
            "decode_per_s": 1 / statistics.median(one.steps),
            "step_ms": {f"p{q}": 1e3 * percentile(one.steps, q) for q in (50, 95, 99)},
        }
        if "float32" in timed:
            for key in ("prompts", "steps"):
                pairs = zip(getattr(timed["float32"], key), getattr(one, key), strict=True)
                speedup = statistics.median(theirs / ours for theirs, ours in pairs)
                found[name][{"prompts": "prefill_speedup", "steps": "decode_speedup"}[key]] = speedup
    return {"prompt": prompt.shape[1], "written": steps, "models": found}
