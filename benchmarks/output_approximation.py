"""Output approximation while training: the term of the loss, and the widths allocated by it.

    python benchmarks/output_approximation.py                                # the byte model, 3 seeds; resumes
    python benchmarks/output_approximation.py --task digits_vit --parts term
    python benchmarks/output_approximation.py --table                        # what has been measured so far

    term      against self, teacher and blocks' outputs, against plain training of 200 steps; both with distillation,
              and both without ("alone")
    widths    allocated by errors measured while training (once, again and again, greedily, by evolution), against
              uniform widths and budget search, at equal average bits of weights, activations at 8; 200 steps

The models are those of _float_models.py. Of arithmetic the table shows exact match: questions answered right.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from _float_models import Unit, cell, measure_parts, measured
from torch import nn

from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.methods.output_approximation import OutputApproximation
from bitsmith.quantization import Scheme, calibrate, measure, plan_of, prepare, reestimate_batchnorm, sites
from bitsmith.tasks.classification import to_float
from bitsmith.train.config import TrainConfig
from bitsmith.train.loop import train

TASKS = ("byte_llama", "arithmetic", "digits_vit", "resnet20")

# ---- a term of the loss

TERMS: dict[str, dict[str, Any] | None] = {  # name -> options of OutputApproximation
    "plain": None,
    "self": {},
    "teacher": {"against": "teacher"},
    "blocks": {"against": "teacher", "layers": "block"},
    "blocks, 1": {"against": "teacher", "layers": "block", "strength": 1.0},
    "teacher, cosine": {"against": "teacher", "loss": "cosine"},
    "teacher, as it is": {"against": "teacher", "normalise": False},
}
TERM_POINTS = {"W4A8": (4, 8), "W3A8": (3, 8), "W2A8": (2, 8), "W4A4": (4, 4), "W3A3": (3, 3), "W2A2": (2, 2)}
ALONE = ", alone"  # neither the term's model nor the baseline's has distillation
STEPS = 200


def jobs_term(task: str) -> list[tuple[str, str]]:
    """(term, point), the points that tell methods apart first."""
    return [(term + how, point) for point in reversed(TERM_POINTS) for how in ("", ALONE) for term in TERMS]


def one_term(unit: Unit, term: str, point: str) -> dict[str, Any]:
    """STEPS of training, with the term or without it."""
    options = TERMS[term.removesuffix(ALONE)]
    model = unit.prepared(*TERM_POINTS[point], calibrated=False)
    methods = [] if options is None else [OutputApproximation(**options)]
    for method in methods:
        method.attach(model)
    calibrate(model, unit.batches)
    return trained(unit, model, methods, 0.0 if term.endswith(ALONE) else 0.5)


RATES = {
    "byte_llama": (16, 1e-3),
    "arithmetic": (128, 1e-3),
    "digits_vit": (64, 2e-3),
    "resnet20": (128, 2e-3),
}


def trained(unit: Unit, model: nn.Module, methods: list[Any], distillation: float = 0.5) -> dict[str, Any]:
    """STEPS of training, and how the model is judged then."""
    (size, rate), x, y = RATES[unit.task], unit.data.train_x, unit.data.train_y
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(unit.seed))
    rows = order[: size * STEPS // 4]
    epochs = round(STEPS * size / len(rows))  # there may be fewer
    config = TrainConfig(
        epochs=epochs,
        batch_size=size,
        learning_rate=rate,
        gradient_clip=1.0,
        distillation=distillation,
        seed=unit.seed,
    )
    started = time.process_time()
    train(model, x[rows], y[rows], config, methods=methods, teacher=unit.model)
    seconds = time.process_time() - started
    if unit.task == "resnet20":
        reestimate_batchnorm(model, [to_float(x[rows[:2048]])])
    found = {**unit.judged(model), "seconds": seconds}
    if unit.task == "arithmetic":
        found["exact_match"] = unit.data.evaluate(model, unit.x, unit.y)["exact_match"]
    return found


def table_term(units: list[dict[str, Any]], task: str) -> None:
    """Loss or exact match, and in pairs the gain over plain training and the time over its."""
    key = "exact_match" if task == "arithmetic" else "loss"
    for how in ("", ALONE):
        base, terms = "plain" + how, [term + how for term in TERMS]
        print(
            f"\nterm{how}, {task}: {key}; below, the gain in loss over plain training, in pairs; the time over its"
        )
        print(f"{'':<26}" + "".join(f"{point:>22}" for point in TERM_POINTS))
        for term in terms:
            cells = [cell(measured(units, "term", term, point, key)) for point in TERM_POINTS]
            print(f"{term:<26}" + "".join(f"{one:>22}" for one in cells))
        for term in terms[1:]:
            cells = [
                cell(paired(units, "term", term, base, point, lambda x, y: y["loss"] - x["loss"]))
                for point in TERM_POINTS
            ]
            times = [
                r
                for point in TERM_POINTS
                for r in paired(units, "term", term, base, point, lambda x, y: x["seconds"] / y["seconds"])
            ]
            print(f"{term:<26}" + "".join(f"{one:>22}" for one in [*cells, cell(times, ".2f")]))


def paired(
    units: list[dict[str, Any]],
    part: str,
    contender: str,
    base: str,
    point: str,
    compare: Callable[[dict[str, Any], dict[str, Any]], float],
) -> list[float]:
    """A contender compared with a baseline, in the units that have both."""
    found = []
    for unit in units:
        own, other = (unit["points"].get(f"{part} {name} {point}") for name in (contender, base))
        if own and other:
            found.append(compare(own, other))
    return found


# ---- widths

ALLOCATIONS: dict[str, dict[str, Any] | None] = {  # name -> options of OutputApproximation
    "uniform": None,
    "search": None,
    "exact": {},
    "exact, again": {"every": 0.1},
    "greedy": {"allocation": "greedy"},
    "evolutionary": {"allocation": "evolutionary"},
}
AVERAGES = {"3.0": 3.0, "2.5": 2.5}


def jobs_widths(task: str) -> list[tuple[str, str]]:
    """(contender, average bits); there is no uniform plan of 2.5."""
    jobs = [(name, point) for point in AVERAGES for name in ALLOCATIONS]
    return [job for job in jobs if job != ("uniform", "2.5")]


def one_widths(unit: Any, name: str, point: str) -> dict[str, Any]:
    """STEPS of training, the widths of the weights decided on the way."""
    model, options = copy.deepcopy(unit.model), ALLOCATIONS[name]
    uniform = name == "uniform"
    overrides = {"*.input": {"bits": 8}, "*.left": {"bits": 8}, "*.right": {"bits": 8}}
    overrides = {k: v for k, v in overrides.items() if k == "*.input" or unit.task != "resnet20"}
    prepare(
        model, Scheme(bits=3 if uniform else 8, granularity="channel"), Scheme(bits=8), overrides=overrides
    )
    # the average over weights that are not pinned to 8 bits is asked for, so that uniform 3 bits meet it
    cost = measure(model, unit.batches[0][:1])
    free = [name for name, q in sites(model).items() if q.kind == "weight"][1:-1]
    plan = dict(cost.present) | dict.fromkeys(free, AVERAGES[point])
    budget = {"average_weight_bits": cost.average_bits(plan, "weight")}
    methods: list[Any] = []
    if name == "search":
        methods = [BudgetSearch(budget, unit.batches[0][:1], candidates=(2, 3, 4, 6, 8), seed=unit.seed)]
    elif options is not None:
        methods = [
            OutputApproximation(unit.batches[0][:1], strength=0.0, budget=budget, seed=unit.seed, **options)
        ]
    for method in methods:
        method.attach(model)
    calibrate(model, unit.batches)
    found = trained(unit, model, methods)
    average = measure(model, unit.batches[0][:1]).average_bits(plan_of(model).bits, "weight")
    return {**found, "average": average, "target": budget["average_weight_bits"]}


def table_widths(units: list[dict[str, Any]], task: str) -> None:
    """Loss by contender and average."""
    print(f"\nwidths, {task}: test loss at an average of so many bits a weight")
    print(f"{'':<20}" + "".join(f"{point:>22}" for point in AVERAGES))
    for name in ALLOCATIONS:
        cells = [cell(measured(units, "widths", name, point, "loss")) for point in AVERAGES]
        print(f"{name:<20}" + "".join(f"{one:>22}" for one in cells))


PARTS = {"term": (jobs_term, one_term, table_term), "widths": (jobs_widths, one_widths, table_widths)}

if __name__ == "__main__":
    measure_parts("output_approximation", __doc__, PARTS, TASKS)
