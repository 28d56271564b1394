"""Which methods of one recipe go together; those that do not are refused before anything is trained.

Their order decides nothing: a run calls each hook in the order of `Method.turn`. What is refused here has no
meaning in any order. A loop of one's own meets the same at the latest when it runs: bits have one owner per
site, and one method a second pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitsmith.errors import RecipeError

Entries = Sequence[Mapping[str, Mapping[str, Any]]]

# widths are not final when training begins
UNDECIDED = ("budget_search", "fractional_bits", "progressive_bits")


def check_composition(entries: Entries, source: str) -> None:
    """Refuse methods that cannot be meant together. Raises RecipeError, one line."""
    methods = {name: options for entry in entries for name, options in entry.items()}
    names = [name for entry in entries for name in entry]
    where = f"{source}, methods"
    for name in methods:
        if names.count(name) > 1:
            raise RecipeError(
                "a method works once in a run",
                where=where,
                got=f"{name}, {names.count(name)} times",
                remedy="Keep one of them; its options may name the sites that it is for",
            )
    deciding = deciders(methods)
    if len(deciding) > 1:
        raise RecipeError(
            "these methods decide widths, and a run has one plan",
            where=where,
            got=" and ".join(deciding),
            remedy=_remedy(deciding),
        )
    searching = [name for name in deciding if name != "progressive_bits"]
    if methods.get("weight_anchor", {}).get("requantize") and searching:
        raise RecipeError(
            "weights that are stored on the grid in play have no error there, so nothing says which width is "
            "worth its cost",
            where=f"{where}.weight_anchor.requantize",
            got=f"true with {searching[0]}",
            remedy="Set requantize: false, or train the found plan: plan: its plan.json",
        )


def deciders(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of methods with their options those that decide widths, in their order."""
    allocates = "output_approximation" if methods.get("output_approximation", {}).get("budget") else ""
    return [name for name in methods if name in UNDECIDED or name == allocates]


def _remedy(deciding: Sequence[str]) -> str:
    if "output_approximation" in deciding:
        other = next(name for name in deciding if name != "output_approximation")
        return f"Leave out output_approximation's budget: {other} decides"
    return "Keep one of them"
