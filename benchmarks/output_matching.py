"""Output matching: what weights that match the float model's outputs are worth, by themselves and as a start.

    python benchmarks/output_matching.py                                # the byte model, 3 seeds; resumes
    python benchmarks/output_matching.py --task resnet20 --parts rounding
    python benchmarks/output_matching.py --table                        # what has been measured so far

    rounding  to nearest, GPTQ, GPTAQ, Qronos and output matching before nearest and GPTQ, on the same calibration
              samples and grids; divergence (KL) from the float model and loss on samples apart, processor time
    start     the validation loss along the same 400 steps of training from nearest, GPTQ and matching, 8-bit
              activations; and from matching in a schedule of 279 steps, 30 % fewer; g64: groups of 64 inputs,
              weights alone, against the float model trained as long; distilled: learning from the float model's
              outputs alone, and the divergence from them along the steps, so that what training adds to the float
              model does not count

The models are those of _float_models.py. GPTAQ's authors take a quarter of its correction (alpha=0.25 in their code),
their paper all of it: both run, and the table shows the better one, by the figure that is shown.
"""

from __future__ import annotations

import copy
import math
import time
from typing import Any

from _float_models import Unit, cell, measure_parts, measured
from torch import nn

from bitsmith.post_training.post_train import post_train
from bitsmith.train.config import TrainConfig
from bitsmith.train.loop import Progress, train

CONTENDERS: dict[str, dict[str, Any]] = {  # name -> options of post_train
    "nearest": {"rounding": "nearest", "matching": False},
    "gptq": {"matching": False},
    "gptaq": {"rounding": "gptaq", "matching": False},
    "gptaq 1/4": {"rounding": "gptaq", "matching": False, "correction": 0.25},
    "qronos": {"rounding": "qronos", "matching": False},
    "matching, nearest": {"rounding": "nearest"},
    "matching, gptq": {},
}
POINTS: dict[
    str, tuple[int, int | None, int | None]
] = {  # name -> bits of weights, values in a group, activations
    "W4": (4, None, None),
    "W3": (3, None, None),
    "W2": (2, None, None),
    "W4g64": (4, 64, None),
    "W3g64": (3, 64, None),
    "W2g64": (2, 64, None),
    "W4A4": (4, None, 4),
}
FEWER = ", 279 steps"
STARTS = ("nearest", "gptq", "matching, gptq", "matching, gptq" + FEWER)
DISTILLED = " distilled"
START_POINTS = ("W3", "W2", "W3" + DISTILLED, "W2" + DISTILLED, "W4g64", "W3g64", "W2g64")
SEEN = (0, 25, 50, 100, 200, 400)  # steps after which part start looks
TASKS = ("byte_llama", "aidreams260k", "resnet20")


def prepared(unit: Unit, point: str, activations: int | None = None) -> nn.Module:
    """A calibrated copy at the widths of a point."""
    bits, group, inputs = POINTS[point]
    return unit.prepared(bits, inputs or activations, group)


# ---- rounding


def jobs_rounding(task: str) -> list[tuple[str, str]]:
    """(contender, point); groups of 64 inputs are for language models."""
    points = [name for name, (_, group, _) in POINTS.items() if group is None or task != "resnet20"]
    return [(contender, point) for point in points for contender in CONTENDERS]


def one_rounding(unit: Unit, contender: str, point: str) -> dict[str, Any]:
    """One rounding."""
    model = prepared(unit, point)
    started = time.process_time()
    facts = post_train(model, unit.model, unit.batches, **CONTENDERS[contender])
    seconds = time.process_time() - started
    layers = sum(not fact.left for fact in facts)
    return {**unit.judged(model), "seconds_per_layer": seconds / layers, "layers": layers}


def table_rounding(units: list[dict[str, Any]], task: str) -> None:
    """KL and loss (accuracy of images) by contender and point, and the time against GPTQ's."""
    shown = ["kl", "loss"] + (["accuracy"] if task == "resnet20" else [])
    points = list(dict.fromkeys(point for _, point in jobs_rounding(task)))
    names = [name for name in CONTENDERS if name != "gptaq 1/4"]
    floats = [unit["float"]["loss"] for unit in units if "float" in unit]
    if floats:
        print(f"\nrounding, {task}: the float model's loss is {cell(floats)}")
    for key in shown:
        print(f"{key:<20}" + "".join(f"{point:>22}" for point in points))
        for name in names:
            both = [name, "gptaq 1/4"] if name == "gptaq" else [name]
            cells = []
            for point in points:
                found = [values for each in both if (values := measured(units, "rounding", each, point, key))]
                best = min(
                    found, key=lambda v: (-1 if key == "accuracy" else 1) * sum(v) / len(v), default=[]
                )
                cells.append(cell(best))
            print(f"{name:<20}" + "".join(f"{one:>22}" for one in cells))
    print("time a layer / GPTQ's" + "".join(f"{point:>12}" for point in points))
    for name in names:
        ratios = []
        for point in points:
            own, base = (measured(units, "rounding", n, point, "seconds_per_layer") for n in (name, "gptq"))
            ratios.append(f"{sum(own) / sum(base):.2f}" if own and len(own) == len(base) else "-")
        print(f"{name:<21}" + "".join(f"{one:>12}" for one in ratios))


# ---- as the start of training


def jobs_start(task: str) -> list[tuple[str, str]]:
    """(start, point) of the byte model."""
    if task != "byte_llama":
        return []
    return [("float", "trained on"), *((start, point) for point in START_POINTS for start in STARTS)]


def one_start(unit: Unit, start: str, point: str) -> dict[str, Any]:
    """400 steps of training, or 279 with a whole schedule, and the validation loss on the way."""
    epochs, rows = (3, 1488) if start.endswith(FEWER) else (4, 1600)
    share, point = (1.0 if point.endswith(DISTILLED) else 0.5), point.removesuffix(DISTILLED)

    def loss() -> float:
        return unit.judged(model)["kl"] if share == 1 else float(data.validate(model)["loss"])

    data, seen = unit.data, {}
    if start == "float":
        model = copy.deepcopy(unit.model)
    else:
        model = prepared(unit, point, None if POINTS[point][1] else 8)
        post_train(model, unit.model, unit.batches, **CONTENDERS[start.removesuffix(FEWER)])

    def look(now: Progress) -> None:
        if (now.step in SEEN or now.step == now.steps) and str(now.step) not in seen:
            seen[str(now.step)] = loss()
            model.train()

    seen["0"] = loss()
    config = TrainConfig(
        epochs=epochs,
        batch_size=16,
        learning_rate=1e-3,
        gradient_clip=1.0,
        distillation=share,
        seed=unit.seed,
    )
    train(model, data.train_x[:rows], data.train_y[:rows], config, teacher=unit.model, progress=look)
    return {**unit.judged(model), "losses": seen}


def table_start(units: list[dict[str, Any]], task: str) -> None:
    """Validation losses by step, when the loss is reached that nearest ends with, perplexity over the float's."""
    for point in START_POINTS if jobs_start(task) else ():
        figure = "divergence from the float model" if point.endswith(DISTILLED) else "validation loss"
        print(f"\nstart, {task}, {point}: {figure} after so many steps")
        print(
            f"{'start':<26}"
            + "".join(f"{step:>20}" for step in SEEN)
            + f"{'the end':>20}{'reaches nearest':>20}{'ppl':>20}"
        )
        for start in STARTS:
            key, base = f"start {start} {point}", f"start nearest {point}"
            both = [u["points"] for u in units if key in u["points"] and base in u["points"]]
            cells = [cell([v for p in both if (v := p[key]["losses"].get(str(s)))]) for s in SEEN]
            cells.append(cell([list(p[key]["losses"].values())[-1] for p in both]))
            ends = [reached(p[key]["losses"], p[base]["losses"][str(SEEN[-1])]) for p in both]
            print(
                f"{start:<26}"
                + "".join(f"{one:>20}" for one in [*cells, cell(ends, ".0f"), over(units, key)])
            )
    if jobs_start(task):
        print(f"the float model trained as long: {over(units, 'start float trained on')}")


def over(units: list[dict[str, Any]], key: str) -> str:
    """Test perplexity above the float model's, in %."""
    found = [u["points"][key]["loss"] - u["float"]["loss"] for u in units if key in u["points"]]
    return cell([100 * (math.exp(gap) - 1) for gap in found], "+.1f")


def reached(losses: dict[str, float], goal: float) -> float:
    """The step at which a loss is reached, between two looks interpolated; the last one where it never is."""
    before = 0
    for step in map(int, losses):
        if losses[str(step)] <= goal:
            fall = losses[str(before)] - losses[str(step)]
            share = (losses[str(before)] - goal) / fall if fall > 0 else 0.0
            return before + (step - before) * share
        before = step
    return float(before)


PARTS = {
    "rounding": (jobs_rounding, one_rounding, table_rounding),
    "start": (jobs_start, one_start, table_start),
}

if __name__ == "__main__":
    measure_parts("output_matching", __doc__, PARTS, TASKS)
