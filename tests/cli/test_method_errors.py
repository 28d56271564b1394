"""What a user can get wrong about methods, plans and overrides is one line, too: where, what, what to do."""

from pathlib import Path

import pytest

from tests.cli import test_errors as errors
from tests.cli.conftest import Bitsmith

# overrides of the quick run, and what the line must say
METHODS = {
    "two methods in one entry": (["methods=[{a: {}, b: {}}]"], ["methods.0", "a, b", "a dash"]),
    "missing plan": (["methods=[]", "plan=nowhere.json"], ["nowhere.json", "no such plan", "Check the path"]),
    "overrides that were written for another model": (
        ["quantize.overrides={conv2.*: {bits: 4}}", "model=digits_vit"],
        ["quantize.overrides.conv2.*", "matches no site", "such as", "--set quantize.overrides={}"],
    ),
    "method": (["methods=[budget_serch: {}]"], ["methods.0", "budget_serch", "Did you mean budget_search?"]),
    "method without its budget": (["methods=[budget_search]"], ["methods.0.budget_search.budget", "bops"]),
    "method option": (
        ["methods=[budget_search: {budget: {bops: 0.1}, candidate: [2, 4]}]"],
        ["methods.0.budget_search", "candidate", "Did you mean candidates?"],
    ),
    "budget that is no mapping": (["methods=[budget_search: {budget: 0.1}]"], ["budget", "{bops: 0.05}"]),
    "candidates that are no list": (
        ["methods.0.budget_search.candidates=4"],
        ["budget_search.candidates", "4", "at least two widths"],
    ),
    "a candidate between 8 and 32": (
        ["methods.0.budget_search.candidates=[2, 16]"],
        ["budget_search.candidates", "16", "1 to 8, or 32 to leave a site in float"],
    ),
    "float among real-valued widths": (
        ["methods.0.budget_search.candidates=[2, 32]", "methods.0.budget_search.mode=real"],
        ["budget_search.mode", "real", "sampled or mixed", "leave 32 out"],
    ),
    "float among groups of channels": (
        ["methods.0.budget_search.candidates=[2, 32]", "methods.0.budget_search.channel_groups=2"],
        ["budget_search.channel_groups", "2", "in float as a whole", "leave 32 out"],
    ),
    "candidates out of range": (["methods.0.budget_search.candidates=[2, 9]"], ["candidates", "9", "1 to 8"]),
    "impossible budget": (["methods.0.budget_search.budget={bops: 0.001}"], ["cheapest plan", "held up by"]),
    "a plan and a search": (["plan=plan.json"], ["plan", "budget_search", "--set methods=[]"]),
}


@pytest.mark.parametrize(("overrides", "fragments"), METHODS.values(), ids=METHODS)
def test_a_wrong_method_or_plan_is_one_line(
    overrides: list[str], fragments: list[str], bitsmith: Bitsmith, tmp_path: Path
) -> None:
    errors.test_a_wrong_recipe_is_one_line(overrides, fragments, bitsmith, tmp_path)
