"""Run directories of fractional bits and of their curriculum, made up: build_run's with learned widths."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.report.runs import build_run, write

DECIDED = 80  # steps with real widths; the run has 400
LEARNED = {"conv2.weight": [3.25], "conv2.input": [5.3], "conv3.weight": [3.0], "conv4.input": [2.75]}


def build_fractional(
    directory: Path,
    *,
    learned: Mapping[str, Sequence[float]] = LEARNED,
    stored: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A finished run whose sites learned these widths on the way down from 8 bits, and are stored as
    ``stored`` says, or else as build_run's plan has it."""
    run = build_run(directory, **options)
    plan = json.loads((run / "plan.json").read_text())
    for site, bits in (stored or {}).items():
        plan["sites"][site]["bits"] = bits
    history = json.loads((run / "history.json").read_text())
    history["learned_bits"] = learned
    history["traces"] = [{"step": step, **scalars(step, learned)} for step in range(1, DECIDED + 1)]
    write(run / "plan.json", plan)
    write(run / "history.json", history)
    return run


def build_progressive(directory: Path, schedule: Sequence[float] = (8, 5.5, 4.25, 2)) -> Path:
    """A finished run that spent as many steps at each of these widths."""
    run = build_run(directory)
    history = json.loads((run / "history.json").read_text())
    history["traces"] = [
        {"step": step, "ProgressiveBits.bits": schedule[(step - 1) * len(schedule) // 400]}
        for step in range(1, 401)
    ]
    write(run / "history.json", history)
    return run


def scalars(step: int, learned: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """As train.traces records them of FractionalBits while it learns; activations do not move."""
    done = step / DECIDED
    means = {site: sum(each) / len(each) for site, each in learned.items()}
    found = {f"FractionalBits.bits.{site}": 8 - (8 - mean) * done for site, mean in means.items()}
    return {
        **found,
        "FractionalBits.average_weight_bits": 8 - 4.6 * done,
        "FractionalBits.average_activation_bits": 8.0,
        "FractionalBits.used_average_weight_bits": 1.04 - 0.04 * done,
        "FractionalBits.multiplier_average_weight_bits": 0.2 * done,
    }
