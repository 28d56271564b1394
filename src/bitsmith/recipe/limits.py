"""Budgets as the command line says them (`bops=0.02`), and the search that a recipe asks for.

`quantization.budget.Budget` knows what a limit means; here is only how a kind is named and found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bitsmith.errors import BudgetError, RecipeError, listing, nearest
from bitsmith.quantization.budget import Budget
from bitsmith.quantization.cost_kinds import AVERAGES, SHARES
from bitsmith.recipe.schema import Recipe

KINDS = (*SHARES, *AVERAGES)
CANDIDATES = (1, 2, 3, 4, 6, 8)  # of a recipe that searches nothing
SEARCH = "budget_search"


def parse_limits(items: Iterable[str], where: str = "--budget") -> dict[str, float]:
    """``["bops=0.02", "average_weight_bits=4"]`` as kind -> limit. Raises BudgetError."""
    found: dict[str, float] = {}
    for item in items:
        kind, equals, text = item.partition("=")
        if not equals:
            raise BudgetError(
                "this budget has no limit", where=where, got=item, remedy=f"Write {where} bops=0.02"
            )
        check_kind(kind.strip(), where)
        if kind.strip() in found:
            raise BudgetError("this budget is given twice", where=where, got=item, remedy="Keep one of them")
        found[kind.strip()] = parse_number(text, f"{where} {kind.strip()}")
    return found


def parse_number(text: str, where: str) -> float:
    """A limit. Raises BudgetError where it is no number."""
    try:
        return float(text)
    except ValueError:
        raise BudgetError(
            "this is no limit",
            where=where,
            got=text.strip() or "nothing",
            expected="a number above 0",
            remedy="Up to 1 is a share of the float model, above absolute; averages are bits",
        ) from None


def check_kind(kind: str, where: str) -> None:
    """Refuse a kind of cost that there is not, with the nearest name. Raises BudgetError."""
    if kind in KINDS or (kind.startswith("table:") and len(kind) > len("table:")):
        return
    near = nearest(kind, KINDS, 1)
    raise BudgetError(
        "there is no such kind of budget",
        where=where,
        got=kind or "nothing",
        expected=listing((*KINDS, "table:NAME")),
        remedy=f"Did you mean {near[0]}?" if near else "",
    )


def budget_of(limits: Mapping[str, float]) -> dict[str, Any]:
    """Kind -> limit as a recipe writes a budget; checked. Raises BudgetError."""
    plain: dict[str, Any] = {kind: limit for kind, limit in limits.items() if kind in KINDS}
    tables = [
        {"table": kind.removeprefix("table:"), "limit": limit}
        for kind, limit in limits.items()
        if kind not in KINDS
    ]
    budget = plain | ({"tables": tables} if tables else {})
    Budget.from_dict(budget)
    return budget


def search_options(recipe: Recipe) -> dict[str, Any] | None:
    """The options of the recipe's budget search; None where it has none."""
    return next((entry[SEARCH] for entry in recipe.methods if SEARCH in entry), None)


def with_budget(recipe: Recipe, budget: Mapping[str, Any]) -> Recipe:
    """``recipe`` with the budget of its search replaced as a whole. Raises RecipeError without a search."""
    if search_options(recipe) is None:
        raise RecipeError(
            "this recipe searches nothing that a budget could change",
            where="methods",
            got=listing(name for entry in recipe.methods for name in entry)
            if recipe.methods
            else "no method",
            expected=f"a {SEARCH}",
            remedy=f"Add --set 'methods=[{SEARCH}]'; the budget of each run is filled in",
        )
    methods = [
        {name: {**options, "budget": dict(budget)} if name == SEARCH else options}
        for entry in recipe.methods
        for name, options in entry.items()
    ]
    return recipe.model_copy(update={"methods": methods})


def without_search(recipe: Recipe) -> Recipe:
    """``recipe`` with every width as its schemes ask for it, and no method."""
    return recipe.model_copy(update={"methods": []})
