"""`--dry-run`: what a recipe would quantize, what the result would cost, and how long it would take.

Sites and costs are exact: the model is really prepared. Time is measured, not modelled: the real loop runs a
few steps of each training, and the median step is multiplied by the number of steps. Memory is the process's
own peak during those steps. Nothing is written.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from typing import Any

import torch
from torch import nn

from bitsmith.quantization import measure, plan_of
from bitsmith.quantization.coverage import coverage
from bitsmith.recipe import competition, outliers, rounding
from bitsmith.recipe.job import quantize, read_inputs
from bitsmith.recipe.schema import Recipe
from bitsmith.recipe.threads import enough_threads
from bitsmith.tasks import Examples
from bitsmith.train import Progress, TrainConfig, train

STEPS = 12  # timed steps of each training; the first are warm-up
WARM_UP = 4


def predict(recipe: Recipe) -> dict[str, Any]:
    """Sites, leftovers, cost, seconds and peak memory of the job, as plain data."""
    data, model = read_inputs(recipe)
    with enough_threads(model, data.example(), recipe.train.batch_size):
        return _predict(recipe, data, model)


def _predict(recipe: Recipe, data: Examples, model: nn.Module) -> dict[str, Any]:
    seconds = {"float": 0.0}
    if recipe.float_train is not None:
        seconds["float"] = _seconds(copy.deepcopy(model), data, recipe.float_train)
    outliers.split(recipe, model, data)
    teacher = copy.deepcopy(model)
    covered, methods = quantize(recipe, model, data)
    rounding.check(recipe, model, teacher, data)
    search = competition.searcher(methods)
    if search is not None:  # shown is the plan that it starts from
        competition.start(search, model, data, recipe.train.seed)
        covered = coverage(competition.nearest_rounding(search, model))
    plan = plan_of(model) if search is None else search.plan()
    cost = measure(model, data.example()).report(plan.bits)
    seconds["qat"] = _seconds(model, data, recipe.train, methods=methods, teacher=teacher)
    if search is not None:
        seconds["uniform"] = seconds["qat"]  # its competitor takes about as long
    return {
        "version": 1,
        "model": recipe.model.name,
        "data": {
            "name": data.name,
            "unit": data.unit,
            "train": len(data.train_x),
            "val": len(data.val_x),
            "test": len(data.test_x),
        },
        "target": recipe.target,
        "searches": search is not None,
        "sites": [{"name": name, **site} for name, site in plan.to_dict()["sites"].items()],
        "leftovers": covered.to_dict()["leftovers"],
        "parameters": covered.parameters,
        "quantized_share": covered.quantized_share,
        "cost": cost,
        "steps": {"float": _steps(data, recipe.float_train), "qat": _steps(data, recipe.train)},
        "time": {**seconds, "total": sum(seconds.values())},
        "peak_memory_bytes": peak_memory(),
    }


def _steps(data: Examples, config: TrainConfig | None) -> int:
    return 0 if config is None else config.epochs * -(-len(data.train_x) // config.batch_size)


def _seconds(model: nn.Module, data: Examples, config: TrainConfig, **others: Any) -> float:
    """Predicted seconds of one training: median step times steps, and one validation an epoch."""
    if config.epochs == 0:
        return 0.0
    rows = min(len(data.train_x), STEPS * config.batch_size)
    trial = dataclasses.replace(config, epochs=-(-STEPS * config.batch_size // rows))
    ticks: list[float] = []

    def tick(now: Progress) -> None:
        if now.record is None:  # the end of an epoch is no step
            ticks.append(time.perf_counter())

    train(
        model, data.train_x[:rows], data.train_y[:rows], trial, augment=data.augment, progress=tick, **others
    )
    gaps = torch.tensor(ticks).double().diff()[WARM_UP:]
    started = time.perf_counter()
    if len(data.val_x):
        data.validate(model.cpu())
    validation = time.perf_counter() - started
    return _steps(data, config) * float(gaps.median()) + config.epochs * validation


def peak_memory() -> int | None:
    """The most memory that this process has held, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
