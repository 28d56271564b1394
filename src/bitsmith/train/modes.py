"""What trains: float weights by gradients (the default), the integer codes of a packed model by gradients, or
what a packed model holds by forward passes alone. For each the settings that are its own, those that it has
no use for, and the optimizer.

Optimizers of codes take a model, not parameters: `integer` one of integer layers (`resume_integer`),
`zeroth_order` a packed one (`finalize`). Making these is the caller's work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitsmith.errors import RecipeError
from bitsmith.optim import IntegerAdam, IntegerOptimizer, IntegerSGD, IntegerSign, ZerothOrder
from bitsmith.quantization import parameter_groups
from bitsmith.train.optimizer import OPTIMIZERS

if TYPE_CHECKING:
    from bitsmith.train.config import TrainConfig

INTEGER_OPTIMIZERS: dict[str, type[IntegerOptimizer]] = {
    "adam": IntegerAdam,
    "sgd": IntegerSGD,
    "sign": IntegerSign,
}
PARTS: dict[str, tuple[str, ...]] = {  # train.parts -> optim.parts
    "scales": ("scales", "biases", "others"),
    "codes": ("weights",),
    "all": ("weights", "scales", "biases", "others"),
}
CODE_EPSILON = 0.5  # of a code: half of them move by one
OFF: dict[str, tuple[Any, ...]] = {"weight_decay": (0.0,), "device": ("cpu",)}  # as good as the default
NO_GRADIENTS = "no set of gradients is kept"
NO_WEIGHTS = "there is no float weight to average"
ON_CPU = "integer codes train on the CPU"


@dataclass(frozen=True)
class Mode:
    """keys: settings of this mode alone; rates: its usual learning rate, by the choice that it depends on;
    refused: setting -> why it has no place here."""

    keys: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


MODES: dict[str, Mode] = {
    "float": Mode(),
    "integer": Mode(
        keys=("integer_optimizer", "gradients"),
        rates={"adam": 1e-2, "sgd": 5e-2, "sign": 1e-3},
        refused={
            "optimizer": "train.integer_optimizer names the one that moves codes",
            "gradient_clip": NO_GRADIENTS,
            "accumulation": NO_GRADIENTS,
            "ema": NO_WEIGHTS,
            "precision": "products are of integers",
            "device": ON_CPU,
        },
    ),
    "zeroth_order": Mode(
        keys=("parts", "directions", "epsilon"),
        rates={"scales": 1e-2, "codes": 1e-2, "all": 1e-2},
        refused={
            "optimizer": "there is one that needs no gradients",
            "weight_decay": "scales, biases and norms do not decay, and codes cannot",
            "gradient_clip": "there is no gradient",
            "ema": NO_WEIGHTS,
            "precision": "the difference of two losses would drown in the rounding",
            "device": ON_CPU,
        },
    ),
}
KEYS = ("mode", *(key for mode in MODES.values() for key in mode.keys))


def usual_rate(train: Mapping[str, Any]) -> dict[str, float]:
    """{"learning_rate": ...} of the mode in a ``train:`` section; {} where the mode is float, or unknown."""
    mode = MODES.get(str(train.get("mode", "float")), MODES["float"])
    choice = str(train.get(mode.keys[0], next(iter(mode.rates)))) if mode.rates else ""
    return {"learning_rate": mode.rates[choice]} if choice in mode.rates else {}


def check_mode(config: TrainConfig) -> None:
    """Refuse what does not go with the mode. Raises RecipeError."""
    known = {one.name: (getattr(config, one.name), one.default) for one in fields(config)}
    for name, mode in MODES.items():
        for key in mode.keys:
            value, default = known[key]
            if name != config.mode and value != default:
                raise RecipeError(
                    f"this is a setting of mode {name}",
                    where=f"train.{key}",
                    got=value,
                    remedy=f"Write train.mode: {name}, or leave it out",
                )
    for key, why in MODES[config.mode].refused.items():
        value, default = known[key]
        assert default is not MISSING
        if value != default and value not in OFF.get(key, ()):
            raise RecipeError(
                f"not with mode {config.mode}: {why}",
                where=f"train.{key}",
                got=value,
                expected=default,
                remedy="Leave it out",
            )


def make_optimizer(
    model: nn.Module, config: TrainConfig, learning_rate: float | None = None
) -> torch.optim.Optimizer:
    """The optimizer that ``config`` asks for, at its peak rate or at ``learning_rate``.

    Learned ranges, and scales beside codes, train at the rate times ``range_learning_rate_factor``. Raises
    RecipeError where nothing of the model trains, SiteError where it does not have the form of the mode.
    """
    rate = config.learning_rate if learning_rate is None else learning_rate
    if config.mode == "integer":
        return INTEGER_OPTIMIZERS[config.integer_optimizer](
            model,
            rate,
            weight_decay=config.weight_decay,
            scale_rate=config.range_learning_rate_factor,
            seed=config.seed,
        )
    if config.mode == "zeroth_order":
        parts = PARTS[config.parts]
        rates, sizes = dict.fromkeys(parts, rate), dict.fromkeys(parts, config.epsilon)
        if "scales" in parts:
            rates["scales"] *= config.range_learning_rate_factor
        if "weights" in parts:
            sizes["weights"] = CODE_EPSILON
        return ZerothOrder(
            model,
            rates,
            sizes,
            directions=config.directions,
            unit="rms",
            normalize=True,
            residual="weights" in parts,
            parts=parts,
            seed=config.seed,
        )
    groups = parameter_groups(
        model,
        learning_rate=rate,
        weight_decay=config.weight_decay,
        range_factor=config.range_learning_rate_factor,
    )
    if not groups:
        raise RecipeError("the model has no parameter that trains", where="train")
    return OPTIMIZERS[config.optimizer](groups)
