"""The settings of one training phase: the recipe's `train:` section as a frozen dataclass.

Ranges are declared once, in RANGES; names of strategies come from the dict literals of the files that
implement them. `batch_size` is what one optimizer step sees: `accumulation` splits it into micro-batches, so
that a memory setting does not change the training (BatchNorm statistics excepted, which are per micro-batch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from bitsmith.errors import RecipeError, listing, nearest
from bitsmith.train.modes import INTEGER_OPTIMIZERS, MODES, PARTS, check_mode
from bitsmith.train.optimizer import OPTIMIZERS
from bitsmith.train.precision import PRECISIONS
from bitsmith.train.schedule import SCHEDULES

DEVICES = ("auto", "cpu", "cuda")

CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": tuple(OPTIMIZERS),
    "schedule": tuple(SCHEDULES),
    "precision": PRECISIONS,
    "device": DEVICES,
    "mode": tuple(MODES),
    "integer_optimizer": tuple(INTEGER_OPTIMIZERS),
    "parts": tuple(PARTS),
}

# name -> (lowest, highest, whether both ends are allowed, as text)
RANGES: dict[str, tuple[float, float, str]] = {
    "epochs": (0, math.inf, "a whole number >= 0"),
    "batch_size": (1, math.inf, "a whole number >= 1"),
    "accumulation": (1, math.inf, "a whole number >= 1"),
    "seed": (0, 2**63 - 1, "a whole number >= 0"),
    "learning_rate": (1e-12, 1e6, "a number above 0"),
    "range_learning_rate_factor": (0.0, 1e6, "a number >= 0"),
    "weight_decay": (0.0, 1e6, "a number >= 0"),
    "warmup": (0.0, 1.0, "a share of the steps in 0..1"),
    "cooldown": (0.0, 1.0, "a share of the steps in 0..1"),
    "gradient_clip": (0.0, math.inf, "a gradient norm above 0, or 0 for none"),
    "distillation": (0.0, 1.0, "a weight in 0..1"),
    "temperature": (1e-3, 1e3, "a number in 0.001..1000"),
    "label_smoothing": (0.0, 0.999, "a share in 0..0.999"),
    "ema": (0.0, 0.999999, "a decay below 1, or 0 for none"),
    "gradients": (4, 8, "a whole number of bits from 4 to 8"),
    "directions": (1, math.inf, "a whole number >= 1"),
    "epsilon": (1e-6, 1.0, "a share of each tensor's size in 0.000001..1"),
}


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Shares are of the optimizer steps of this phase."""

    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    range_learning_rate_factor: float = 1.0  # quantizer ranges train at learning_rate times this
    schedule: str = "cosine"
    warmup: float = 0.05
    cooldown: float = 0.2  # of "wsd": the share that decays at the end
    gradient_clip: float = 0.0
    accumulation: int = 1
    precision: str = "float32"
    distillation: float = 0.0  # weight of the teacher; the labels keep 1 - distillation
    temperature: float = 2.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    seed: int = 0
    device: str = "auto"
    mode: str = "float"  # what trains: train.modes
    integer_optimizer: str = "adam"
    gradients: int = 8  # bits, of mode integer
    parts: str = "scales"  # what mode zeroth_order moves
    directions: int = 1  # of one step of mode zeroth_order
    epsilon: float = 0.02  # how far it looks, in the size of each tensor

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in CHOICES:
                _check_choice(field.name, value, CHOICES[field.name])
            else:
                _check_range(field.name, value, whole=isinstance(field.default, int))
        if self.accumulation > self.batch_size:
            raise RecipeError(
                "a batch cannot be split into more parts than it has rows",
                where="train.accumulation",
                got=self.accumulation,
                expected=f"at most batch_size = {self.batch_size}",
            )
        if self.warmup + self.cooldown > 1 and self.schedule == "wsd":
            raise RecipeError(
                "warm-up and cooldown are more than all steps",
                where="train.warmup",
                got=f"{self.warmup} + {self.cooldown}",
                expected="a sum of at most 1",
            )
        check_mode(self)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = nearest(str(value), choices, count=1)
        raise RecipeError(
            f"there is no such {name}",
            where=f"train.{name}",
            got=value,
            expected=listing(choices),
            remedy=f"Did you mean {close[0]}?" if close else "",
        )


def _check_range(name: str, value: object, *, whole: bool) -> None:
    low, high, text = RANGES[name]
    kinds = (int,) if whole else (int, float)
    # bool is an int, and `epochs: true` is a slip of the pen
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise RecipeError("this value is out of range", where=f"train.{name}", got=value, expected=text)


def resolve_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "PyTorch sees no CUDA device",
            where="train.device",
            got=name,
            expected="a machine with a CUDA build of PyTorch and a GPU",
            remedy="Use device: cpu or auto",
        )
    return torch.device(name)
