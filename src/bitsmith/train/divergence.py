"""Where a NaN or an infinity came from: looked for only once a loss is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import TrainingDiverged

REMEDY = "Lower train.learning_rate, or set train.gradient_clip: 1"


def first_non_finite_module(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Qualified name of the first module to return a value that is not finite when ``forward`` runs.

    Modules end from the inside out, so the innermost one is named; None if all outputs are finite.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if not found and not all(torch.isfinite(t).all() for t in _tensors(output)):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name or "model")) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def loss_diverged(
    model: nn.Module,
    inputs: Iterable[Tensor],
    forward: Callable[[], object],
    loss: float,
    step: int,
    steps: int,
) -> TrainingDiverged:
    """The error for a loss that is not finite at ``step`` (from 0), with the module that it began in."""
    if not all(torch.isfinite(x).all() for x in inputs if x.is_floating_point()):
        culprit, remedy = "the input batch itself is not finite", "Check the data and the augmentation"
    elif module := first_non_finite_module(model, forward):
        culprit, remedy = f"the first module whose output is not finite is {module}", REMEDY
    else:
        culprit, remedy = "all outputs of the model are finite, so the loss function made it", REMEDY
    return TrainingDiverged(
        f"the loss is {loss}; {culprit}", where=f"train step {step + 1} of {steps}", remedy=remedy
    )


def check_parameters(model: nn.Module, step: int, steps: int) -> None:
    """Raise TrainingDiverged for a parameter that is not finite: such weights must not be saved."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise TrainingDiverged(
                f"parameter {name} is not finite", where=f"train step {step} of {steps}", remedy=REMEDY
            )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in _tensors(item)]
    return []
