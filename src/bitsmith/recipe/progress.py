"""What a running job tells whoever watches: one small event, handed to a callback.

The command line draws it; a notebook or a test may collect it. Nothing here prints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

STAGES = {
    "data": "read data and build the model",
    "float": "train the float baseline",
    "post_training": "quantize after training",
    "qat": "train the quantized model",
    "uniform": "train the uniform competitor",
    "export": "export and verify",
    "shift": "measure what is delivered",
    "report": "write the report",
}


@dataclass(frozen=True)
class Event:
    """``done`` of ``total`` units of ``stage`` (a key of STAGES or a title); finished when they are equal."""

    stage: str
    done: int = 1
    total: int = 1
    values: dict[str, float] = field(default_factory=dict)  # such as loss, accuracy
    note: str = ""  # a sentence worth keeping on the screen

    @property
    def finished(self) -> bool:
        return self.done >= self.total


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Watch nothing."""
