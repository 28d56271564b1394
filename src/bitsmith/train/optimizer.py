"""Optimizers by name, for the parameter groups of `quantization.parameter_groups`.

Each is torch's own in its fused form: the same formula in one call, which models of many small tensors notice
on a CPU. Optimizers that take a model, not parameters, are made in modes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import SGD, AdamW, Optimizer

ParameterGroup = dict[str, Any]


def adamw(groups: list[ParameterGroup]) -> Optimizer:
    """AdamW with torch's betas, 0.9 and 0.999."""
    return AdamW(groups, fused=True)


def sgd(groups: list[ParameterGroup]) -> Optimizer:
    """SGD with momentum 0.9, not Nesterov's."""
    return SGD(groups, momentum=0.9, fused=True)


OPTIMIZERS: dict[str, Callable[[list[ParameterGroup]], Optimizer]] = {"adamw": adamw, "sgd": sgd}
