"""Optimizers that move integer codes: `IntegerSGD`, `IntegerSign`, `IntegerAdam`."""

from bitsmith.optim.integer import IntegerAdam, IntegerSGD, IntegerSign
from bitsmith.optim.memory import StateBytes, state_bytes
from bitsmith.optim.optimizer import IntegerOptimizer

__all__ = ["IntegerAdam", "IntegerOptimizer", "IntegerSGD", "IntegerSign", "StateBytes", "state_bytes"]
