"""Checks of the options that methods share: one clear line for a wrong one, with its name and a remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitsmith.errors import SchemeError, listing, nearest

KINDS = {"both": ("weight", "activation"), "weights": ("weight",), "activations": ("activation",)}  # of sites


def check_choice(where: str, value: Any, choices: Sequence[str]) -> None:
    """Raise SchemeError with the nearest name unless ``value`` is one of ``choices``."""
    if value not in choices:
        near = nearest(str(value), choices, 1)
        raise SchemeError(
            f"there is no such {where.rpartition('.')[2]}",
            where=where,
            got=value,
            expected=listing(choices),
            remedy=f"Did you mean {near[0]}?" if near else "",
        )


def check_value(where: str, value: Any, holds: bool, expected: str) -> None:
    """Raise SchemeError unless ``holds``; ``expected`` says of what kind a good value is."""
    if not holds:
        raise SchemeError("this value is out of range", where=where, got=value, expected=expected)


def is_number(value: Any) -> bool:
    """A real number, not a flag."""
    return isinstance(value, int | float) and not isinstance(value, bool)
