"""What a run does around a method that searches: a good start, a uniform competitor, and who is delivered.

The dearest (b, b) plan within the same budget always trains for the same steps, without the search. The
validation split decides who is delivered; both are measured on the test split, which decides nothing.
"""

from __future__ import annotations

import copy
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bitsmith.methods import Method
from bitsmith.quantization import commit, sites
from bitsmith.quantization.allocate import uniform_plan
from bitsmith.quantization.bits import Width, in_words
from bitsmith.quantization.budget import BudgetCost
from bitsmith.quantization.cost_table import CostTable
from bitsmith.quantization.sensitivity import after_training, sensitivity
from bitsmith.recipe.schema import Recipe
from bitsmith.tasks import Data, evaluate
from bitsmith.tasks.dataset import to_float

SCORED = 512  # training images of the sensitivity that the search starts from
BATCH = 128


@dataclass
class Outcome:
    """What the search and its competitor came to. budget: one entry per budget, for the delivered plan;
    tables: those that the budgets name."""

    winner: str
    searched: dict[str, Any]
    uniform: dict[str, Any] | None
    budget: list[dict[str, Any]]
    tables: tuple[CostTable, ...] = ()


def searcher(methods: Sequence[Method]) -> Any:
    """The method that decides bits under a budget, or None."""
    return next((method for method in methods if hasattr(method, "start_at")), None)


def start(search: Any, model: nn.Module, data: Data, seed: int) -> None:
    """Start the search from one backward per batch of training images, drawn at random."""
    rows = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(seed))[:SCORED]
    batches = [(to_float(data.train_x[part]), data.train_y[part]) for part in rows.split(BATCH)]
    weights = [name for name, quantizer in sites(model).items() if quantizer.kind == "weight"]
    scores = after_training(sensitivity(model, batches, F.cross_entropy), weights)
    search.start_at({name: -score for name, score in scores.items()})


def nearest_rounding(search: Any, model: nn.Module) -> nn.Module:
    """The model rounded to the plan that the search starts at: its post-training quantization."""
    rounded = copy.deepcopy(model)
    commit(rounded, search.plan())
    return rounded


def uniform_recipe(recipe: Recipe, search: Any) -> tuple[Recipe, dict[str, Width]]:
    """The competitor's recipe: the same without the search, and the uniform plan's widths."""
    bits = uniform_plan(search.cost)
    overrides: Mapping[str, dict[str, Any]] = {glob.escape(name): {"bits": b} for name, b in bits.items()}
    quantize = recipe.quantize.model_copy(update={"overrides": {**recipe.quantize.overrides, **overrides}})
    methods = [entry for entry in recipe.methods if "budget_search" not in entry]
    return recipe.model_copy(update={"quantize": quantize, "methods": methods}), bits


def standing(model: nn.Module, data: Data) -> dict[str, float]:
    """How a contender stands: on the test split, and on the validation split that decides (the training
    split where there is none)."""
    test = evaluate(model, data.test_x, data.test_y)
    x, y = (data.val_x, data.val_y) if len(data.val_x) else (data.train_x, data.train_y)
    validation = evaluate(model, x, y)
    return {
        "accuracy": test["accuracy"],
        "validation_accuracy": validation["accuracy"],
        "validation_loss": validation["loss"],
    }


def is_ahead(
    uniform: Mapping[str, Any],
    searched: Mapping[str, Any],
    cost: BudgetCost,
    widths: Mapping[str, Width],
    bits: Mapping[str, Width],
) -> bool:
    """Whether the uniform plan is delivered: more accurate on the validation split; as accurate, as happens
    on a small split, and of a lower loss there; alike in both and not dearer."""
    ours, theirs = (
        (standing["validation_accuracy"], -standing["validation_loss"]) for standing in (searched, uniform)
    )
    if ours != theirs:
        return theirs > ours
    return all(cost.exact(widths)[kind] <= used for kind, used in cost.exact(bits).items())


def budget_entries(search: Any, bits: Mapping[str, Width]) -> list[dict[str, Any]]:
    """The ``budget`` part of metrics.json: kind, limit and use of every budget, absolute; a table's unit."""
    used, tables = search.cost.exact(bits), search.cost.tables
    return [
        {"kind": kind, "limit": limit, "used": used[kind]}
        | ({"unit": tables[kind].unit} if kind in tables else {})
        for kind, limit in zip(search.cost.kinds, search.cost.limits.tolist(), strict=True)
    ]


def describe_uniform(bits: Mapping[str, Width], search: Any) -> str:
    """The width of a uniform plan in words, such as "3 x 3" or "float x float"."""
    widths = sorted({in_words(bits[name]) for name in search.widths})
    return " or ".join(f"{b} x {b}" for b in widths)
