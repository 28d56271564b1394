"""The public names: few, pinned, and each of them there.

A name joins or leaves this list in a commit that says so in CHANGELOG.md.
"""

import ast

import pytest

import bitsmith
from tests.architecture.package import PACKAGE, tree

NAMES = [
    "BitsmithError",
    "Budget",
    "BudgetSearch",
    "MatMul",
    "Method",
    "Plan",
    "Scheme",
    "Target",
    "allocate",
    "calibrate",
    "commit",
    "finalize",
    "load",
    "measure",
    "parameter_groups",
    "plan_of",
    "prepare",
    "reestimate_batchnorm",
    "run",
    "save",
    "sites",
    "to_onnx",
    "verify",
]


def test_the_public_names_are_these() -> None:
    assert bitsmith.__all__ == NAMES
    assert len(NAMES) <= 25


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there_and_explained(name: str) -> None:
    thing = getattr(bitsmith, name)
    assert callable(thing), f"bitsmith.{name} is a {type(thing).__name__}: a submodule has taken its name"
    assert thing.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="prepair"):
        _ = bitsmith.prepair


def test_type_checkers_see_the_names_that_are_loaded_on_use() -> None:
    guarded = {
        (node.module, alias.name)
        for node in ast.walk(tree(PACKAGE / "__init__.py"))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bitsmith.")
        for alias in node.names
    }
    assert guarded == {(f"bitsmith.{home}", name) for home, names in bitsmith.HOMES.items() for name in names}
    assert {name for _, name in guarded} == set(NAMES)
