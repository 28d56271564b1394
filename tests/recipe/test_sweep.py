"""What a sweep decides before and between its runs; the runs themselves are tests/cli/test_sweep.py."""

from pathlib import Path

import pytest
import torch

from bitsmith.errors import BudgetError, FormatError, RecipeError
from bitsmith.recipe import load_recipe
from bitsmith.recipe.sweep import around, parse_budgets, sweep

SEARCH = "methods=[{budget_search: {budget: {bops: 0.02}, candidates: [2, 4, 8]}}]"


def test_budgets_are_numbers_between_commas() -> None:
    assert parse_budgets(" 0.02, 0.05,3e6,") == [0.02, 0.05, 3e6]
    with pytest.raises(BudgetError, match="no budget to sweep over"):
        parse_budgets(" , ")
    with pytest.raises(BudgetError, match="got 5%"):
        parse_budgets("5%")


def test_seen_from_a_plan_what_is_lost_counts_more_than_what_is_gained() -> None:
    scores = {"a": torch.tensor([0.8, 0.2, 0.0]), "b": torch.tensor([0.3, 0.1])}
    values = around({"a": [2, 4, 8], "b": [2, 8]}, scores, {"a": 4, "b": 8})
    assert values["a"].tolist() == pytest.approx([-0.6, 0.0, 0.1])
    assert values["b"].tolist() == pytest.approx([-0.2, 0.0])


@pytest.mark.parametrize(
    ("budgets", "kind", "fragment"),
    [
        ([0.02, 0.0001], "bops", r"--budgets 0.0001: the cheapest plan costs"),
        ([-1.0], "bops", "--budgets -1: .*a number above 0"),
        ([0.5], "average_weight_bits", "--budgets 0.5: the cheapest plan costs"),
        ([0.02], "bop", "--kind: there is no such kind of budget; got bop"),
        ([], "bops", "no budget to sweep over"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    budgets: list[float], kind: str, fragment: str, tmp_path: Path
) -> None:
    recipe = load_recipe(None, ["quantize.overrides={}", SEARCH])
    with pytest.raises(BudgetError, match=fragment):
        sweep(recipe, budgets, tmp_path / "out", kind=kind)
    assert not (tmp_path / "out").exists()


def test_an_unknown_table_is_named(tmp_path: Path) -> None:
    recipe = load_recipe(None, ["quantize.overrides={}", SEARCH])
    with pytest.raises(FormatError, match="no such cost table; got energi"):
        sweep(recipe, [0.1], tmp_path / "out", kind="table:energi")


def test_a_recipe_without_a_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="searches nothing"):
        sweep(load_recipe(None, ["methods=[]"]), [0.02], tmp_path / "out")
