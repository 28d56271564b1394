"""The methods that a recipe can name, and how its arguments become objects.

A method is listed here by one line, and nowhere else above `methods/`; its options are the parameters of its
constructor, so a recipe cannot say what Python could not. The line is text and the class is imported when a
recipe asks for it, so that the package works without any one method's file.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from bitsmith.errors import RecipeError, listing, nearest
from bitsmith.methods.method import Method
from bitsmith.recipe.composition import check_composition

METHODS: dict[str, str] = {  # recipe key -> "file.Class" in bitsmith.methods
    "budget_search": "budget_search.BudgetSearch",
    "fractional_bits": "fractional_bits.FractionalBits",
    "output_approximation": "output_approximation.OutputApproximation",
    "progressive_bits": "progressive_bits.ProgressiveBits",
    "sharpness": "sharpness.Sharpness",
    "weight_anchor": "weight_anchor.WeightAnchor",
}


def method_class(name: str) -> Callable[..., Method]:
    """The class behind a recipe key."""
    module, _, attribute = METHODS[name].rpartition(".")
    return getattr(importlib.import_module(f"bitsmith.methods.{module}"), attribute)


def check_methods(entries: Sequence[dict[str, dict[str, Any]]], source: str) -> None:
    """Refuse an entry that is not one known method with known options, and methods that do not go together.
    Raises RecipeError."""
    for index, entry in enumerate(entries):
        where = f"{source}, methods.{index}"
        if len(entry) != 1:
            raise RecipeError(
                "each entry is one method",
                where=where,
                got=", ".join(entry) or "nothing",
                expected="one name with its options",
                remedy="Start a new list entry, with a dash, for each method",
            )
        (name, options), *_ = entry.items()
        if name not in METHODS:
            near = nearest(name, METHODS, 1)
            raise RecipeError(
                "there is no such method",
                where=where,
                got=name,
                expected=listing(METHODS) if METHODS else "an empty list, as this version has no methods yet",
                remedy=f"Did you mean {near[0]}?"
                if near
                else "Remove it for plain quantization-aware training",
            )
        known = [key for key in inspect.signature(method_class(name)).parameters if key != "example"]
        for key in options:
            if key not in known:
                near = nearest(key, known, 1)
                raise RecipeError(
                    "there is no such option",
                    where=f"{where}.{name}",
                    got=key,
                    expected=f"one of {listing(known)}" if known else "no options",
                    remedy=f"Did you mean {near[0]}?" if near else "Remove it",
                )
        _check_required(method_class(name), options, f"{where}.{name}")
    check_composition(entries, source)


def _check_required(kind: Callable[..., Method], options: dict[str, Any], where: str) -> None:
    """Refuse a method that lacks an option without a default. Raises RecipeError."""
    for key, parameter in inspect.signature(kind).parameters.items():
        if parameter.default is parameter.empty and key not in options and key != "example":
            raise RecipeError(
                "this option must be given",
                where=f"{where}.{key}",
                expected="a budget, such as {bops: 0.05}" if key == "budget" else "a value",
            )


def build_methods(entries: Sequence[dict[str, dict[str, Any]]], example: Tensor) -> list[Method]:
    """The methods of a checked recipe, in its order; one that counts costs is given the ``example``."""
    methods = []
    for entry in entries:
        for name, options in entry.items():
            made = method_class(name)
            given = {"example": example} if "example" in inspect.signature(made).parameters else {}
            methods.append(made(**given, **options))
    return methods
