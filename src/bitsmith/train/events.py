"""Scalars for TensorBoard, where it is installed; it is an extra, and slow to import, so only on demand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

MISSING = "no TensorBoard events: the package is not installed. Run: pip install 'bitsmith[tensorboard]'"

POINTS_PER_EPOCH = 200  # of the loss; more cannot be told apart on a screen


class Events:
    """Writes one phase's scalars into a folder of event files; ``note`` says why nothing is written."""

    def __init__(self, directory: Path | None, first_step: int) -> None:
        self.note = ""
        self._writer: Any = None
        if directory is None:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations inside tensorboard and protobuf
                from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.note = MISSING
            return
        directory.mkdir(parents=True, exist_ok=True)
        # purge_step hides what an interrupted run wrote beyond the checkpoint that we resume from
        self._writer = SummaryWriter(str(directory), purge_step=first_step)

    def epoch(self, record: dict[str, Any], losses: list[float]) -> None:
        """One epoch: the loss of its steps (thinned) and every number of its history record."""
        if self._writer is None:
            return
        first = record["step"] - len(losses)
        for index in range(0, len(losses), max(1, len(losses) // POINTS_PER_EPOCH)):
            self._writer.add_scalar("step/loss", losses[index], first + index + 1)
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"epoch/{name}", value, record["step"])
            elif isinstance(value, dict):
                for key, number in value.items():
                    self._writer.add_scalar(f"{name}/{key}", number, record["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
