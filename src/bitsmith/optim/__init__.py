"""Optimizers that do without float weights: `IntegerSGD`, `IntegerSign` and `IntegerAdam` move codes inside
the backward pass, `ZerothOrder` needs no backward pass."""

from bitsmith.optim.integer import IntegerAdam, IntegerSGD, IntegerSign
from bitsmith.optim.memory import StateBytes, state_bytes
from bitsmith.optim.optimizer import IntegerOptimizer
from bitsmith.optim.zeroth_order import ZerothOrder

__all__ = [
    "IntegerAdam",
    "IntegerOptimizer",
    "IntegerSGD",
    "IntegerSign",
    "StateBytes",
    "ZerothOrder",
    "state_bytes",
]
