"""What every measurement here shares: who begins a round, and ranks of what was measured."""

from __future__ import annotations

from collections.abc import Sequence


def in_turn(names: Sequence[str], turn: int) -> list[str]:
    """All of them, each round beginning with another."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def percentile(values: Sequence[float], q: int) -> float:
    """The smallest value that is not below ``q`` percent of all (nearest rank)."""
    return sorted(values)[max(0, -(-q * len(values) // 100) - 1)]
