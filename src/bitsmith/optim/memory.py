"""Bytes that training holds from step to step: codes, scales, optimizer state, and what stayed float."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from bitsmith.optim.optimizer import IntegerOptimizer
from bitsmith.optim.zeroth_order import ZerothOrder
from bitsmith.quantization.integer_codes import matrix_shape
from bitsmith.quantization.integer_layers import PackedWeight, packed_layers
from bitsmith.quantization.integer_training import int_layers


@dataclass(frozen=True)
class StateBytes:
    """weights: how many there are in integer or packed layers. float_state: of the float optimizer; buffers:
    of float layers, such as BatchNorm's."""

    weights: int
    codes: int
    scales: int
    optimizer: int
    float_parameters: int
    float_state: int
    buffers: int

    @property
    def per_weight(self) -> float:
        """Bytes of codes, scales and optimizer state for each weight; float32 with Adam has 16, gradients
        included."""
        return (self.codes + self.scales + self.optimizer) / max(self.weights, 1)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(value for name, value in vars(self).items() if name != "weights")


def state_bytes(model: nn.Module, optimizer: IntegerOptimizer | ZerothOrder) -> StateBytes:
    """Count every tensor of a model that trains on integers, or of a packed one that trains by forward
    passes, and of its optimizer, shared ones once."""
    layers = int_layers(model) or packed_layers(model)
    held = [getattr(layer, "weight", None) for layer in layers.values()]
    weights = {id(weight): weight for weight in held if isinstance(weight, PackedWeight)}.values()
    codes, scales = [w.codes for w in weights], [w.scale for w in weights]
    parameters, own = list(model.parameters()), {id(t) for t in (*codes, *scales)}
    beside = optimizer.float_optimizer if isinstance(optimizer, IntegerOptimizer) else None
    inner = [] if beside is None else beside.state.values()
    return StateBytes(
        weights=sum(rows * inputs for rows, inputs in map(matrix_shape, weights)),
        codes=_bytes(codes),
        scales=_bytes(scales),
        optimizer=_bytes(optimizer.tensors().values()),
        float_parameters=_bytes(parameters),
        float_state=_bytes(v for state in inner for v in state.values() if isinstance(v, Tensor)),
        buffers=_bytes(b for b in model.buffers() if id(b) not in own),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())
