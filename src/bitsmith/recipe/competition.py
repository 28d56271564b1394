"""What a run does around a method that searches: a good start, a uniform competitor, and who is delivered.

The dearest (b, b) plan within the same budget always trains for the same steps, without the search. The
validation split decides who is delivered; both are measured on the test split, which decides nothing.
"""

from __future__ import annotations

import copy
import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bitsmith.methods import Method
from bitsmith.quantization import commit, sites
from bitsmith.quantization.allocate import uniform_plan
from bitsmith.quantization.bits import Width, in_words
from bitsmith.quantization.budget import BudgetCost
from bitsmith.quantization.cost_table import CostTable
from bitsmith.quantization.sensitivity import after_training, sensitivity
from bitsmith.recipe.schema import Recipe
from bitsmith.tasks import Examples
from bitsmith.train.distillation import cross_entropy

SCORED = 512  # training rows of the sensitivity that the search starts from
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


def start(search: Any, model: nn.Module, data: Examples, seed: int) -> None:
    """Start the search from one backward per batch of training rows, drawn at random."""
    batches = data.drawn(SCORED, seed, BATCH)
    weights = [name for name, quantizer in sites(model).items() if quantizer.kind == "weight"]
    scores = after_training(sensitivity(model, batches, cross_entropy), weights)
    search.start_at({name: -score for name, score in scores.items()})


def nearest_rounding(search: Any, model: nn.Module) -> nn.Module:
    """The model rounded to the plan that the search starts at: its post-training quantization."""
    rounded = copy.deepcopy(model)
    commit(rounded, search.plan())
    return rounded


def uniform_recipe(recipe: Recipe, search: Any) -> tuple[Recipe, dict[str, Width]]:
    """The competitor's recipe: the same without the search, and the uniform plan's widths."""
    bits = uniform_plan(search.cost)
    return at_widths(recipe, bits), bits


def at_widths(recipe: Recipe, bits: Mapping[str, Width]) -> Recipe:
    """The recipe without the search, its sites at these widths."""
    overrides: Mapping[str, dict[str, Any]] = {glob.escape(name): {"bits": b} for name, b in bits.items()}
    quantize = recipe.quantize.model_copy(update={"overrides": {**recipe.quantize.overrides, **overrides}})
    methods = [entry for entry in recipe.methods if "budget_search" not in entry]
    return recipe.model_copy(update={"quantize": quantize, "methods": methods})


def standing(model: nn.Module, data: Examples) -> dict[str, float]:
    """How a contender stands: on the test split, and on the validation split that decides (the training
    split where there is none)."""
    test = data.evaluate(model, data.test_x, data.test_y)
    validation = data.evaluate(model, *data.validation())
    return {
        **{name: test[name] for name in data.figures},
        **{f"validation_{name}": validation[name] for name in ("accuracy", "loss", data.figures[0])},
    }


def is_ahead(
    uniform: Mapping[str, Any],
    searched: Mapping[str, Any],
    cost: BudgetCost,
    widths: Mapping[str, Width],
    bits: Mapping[str, Width],
    rank: Callable[[Mapping[str, Any]], tuple[float, ...]],
) -> bool:
    """Whether the uniform plan is delivered: of the higher rank (`Examples.rank`); alike and not dearer."""
    ours, theirs = rank(searched), rank(uniform)
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
