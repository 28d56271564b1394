"""The numbers of methods (multipliers, temperatures) over the steps, thinned while they come.

However long a run is, at most MOST steps are kept, evenly spread, and the last one. Nothing is read from a
GPU until the rows are asked for. What is kept depends on the steps alone, so a resumed run keeps the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOST = 200  # more cannot be told apart on a screen
Entry = tuple[int, tuple[str, ...], Tensor]


class Traces:
    """Steps (counted from 1) and the 0-D tensors told there."""

    def __init__(self) -> None:
        self._every = 1
        self._kept: list[Entry] = []
        self._last: Entry | None = None

    def add(self, step: int, scalars: Mapping[str, Tensor]) -> None:
        """Tell the numbers of ``step``; none where no method has any left that changes."""
        if not scalars:
            return
        self._last = step, tuple(scalars), torch.stack([value.detach() for value in scalars.values()])
        if (step - 1) % self._every == 0:
            self._kept.append(self._last)
        if len(self._kept) == MOST:  # one place is for the last step
            self._every *= 2
            self._kept = [entry for entry in self._kept if (entry[0] - 1) % self._every == 0]

    def rows(self) -> list[dict[str, Any]]:
        """One {"step": …, name: number} for each step kept."""
        entries = list(self._kept)
        if self._last is not None and self._last[0] != entries[-1][0]:
            entries.append(self._last)
        return [
            {"step": step, **dict(zip(names, values.tolist(), strict=True))}
            for step, names, values in entries
        ]

    def state_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        return {"every": self._every, "rows": self.rows()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self._every = state["every"]
        entries = [_entry(row) for row in state["rows"]]
        self._kept = [entry for entry in entries if (entry[0] - 1) % self._every == 0]
        self._last = entries[-1] if entries else None


def _entry(row: Mapping[str, Any]) -> Entry:
    names: Sequence[str] = [name for name in row if name != "step"]
    return row["step"], tuple(names), torch.tensor([row[name] for name in names])
