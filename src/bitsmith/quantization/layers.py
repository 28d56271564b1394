"""Layers with quantized operands. Each is the PyTorch layer it replaces, its own parameters and names kept,
so that a float checkpoint loads into the prepared model and back; only quantizers are added beside them.

`prepare` makes them: it changes the class of a layer that stands in the model, so that parameters, hooks,
ties and every reference to the layer stay what they were. A quantizer that is None leaves its operand in
float. MatMul is a product of two activations as a module (the two of attention), because only a module can
carry sites; a function call inside a forward cannot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.quantization.quantizer import Quantizer


class MatMul(nn.Module):
    """``left @ right``: (..., n, k) @ (..., k, m) -> (..., n, m)."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """The product, in float."""
        return torch.matmul(left, right)


class QuantLinear(nn.Linear):
    """nn.Linear with quantized weight and input."""

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        weight_quantizer, input_quantizer = self.weight_quantizer, self.input_quantizer
        weight = self.weight if weight_quantizer is None else weight_quantizer(self.weight)
        return F.linear(x if input_quantizer is None else input_quantizer(x), weight, self.bias)


class QuantConv1d(nn.Conv1d):
    """nn.Conv1d with quantized weight and input."""

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, L) -> (N, C', L')."""
        weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        return self._conv_forward(
            x if self.input_quantizer is None else self.input_quantizer(x), weight, self.bias
        )


class QuantConv2d(nn.Conv2d):
    """nn.Conv2d with quantized weight and input."""

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        return self._conv_forward(
            x if self.input_quantizer is None else self.input_quantizer(x), weight, self.bias
        )


class QuantMatMul(MatMul):
    """MatMul with both operands quantized."""

    left_quantizer: Quantizer | None
    right_quantizer: Quantizer | None

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """The product of the quantized operands."""
        left = left if self.left_quantizer is None else self.left_quantizer(left)
        return torch.matmul(left, right if self.right_quantizer is None else self.right_quantizer(right))


QuantLayer = QuantLinear | QuantConv1d | QuantConv2d | QuantMatMul

# Float class -> its quantized form, and the operands that become sites.
SWAPS: dict[type[nn.Module], tuple[type[nn.Module], tuple[str, ...]]] = {
    nn.Linear: (QuantLinear, ("weight", "input")),
    nn.Conv1d: (QuantConv1d, ("weight", "input")),
    nn.Conv2d: (QuantConv2d, ("weight", "input")),
    MatMul: (QuantMatMul, ("left", "right")),
}
