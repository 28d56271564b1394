"""Layers with quantized operands. Each is the PyTorch layer it replaces, its own parameters and names kept,
so that a float checkpoint loads into the prepared model and back; only quantizers are added beside them.

`prepare` makes them: it changes the class of a layer that stands in the model, so that parameters, hooks,
ties and every reference to the layer stay what they were. A quantizer that is None leaves its operand in
float. MatMul is a product of two activations as a module (the two of attention), because only a module can
carry sites; a function call inside a forward cannot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

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


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Site -> the weight that is quantized there; a tied one under its site's name."""
    return {
        layer.weight_quantizer.name: layer.weight
        for layer in model.modules()
        if isinstance(layer, (QuantLinear, QuantConv1d, QuantConv2d)) and layer.weight_quantizer is not None
    }


SWAPS_BY_QUANT: dict[type[nn.Module], tuple[str, ...]] = dict(SWAPS.values())


class SiteOperand(NamedTuple):
    """One operand of a prepared layer: its site's name, which a tied weight has from its first layer; the
    quantizer there, None in float."""

    site: str
    kind: str
    quantizer: Quantizer | None

    @property
    def in_float(self) -> bool:
        """Left in float by its scheme, or decided for 32 bits."""
        return self.quantizer is None or self.quantizer.bits.in_float


def layer_operands(model: nn.Module) -> Iterator[tuple[SiteOperand, SiteOperand]]:
    """The two operands of every prepared layer: weight and input, or left and right."""
    owners: dict[int, str] = {}
    for name, layer in model.named_modules():
        found = []
        for operand in _operands(layer):
            quantizer: Quantizer | None = getattr(layer, f"{operand}_quantizer")
            site = f"{name}.{operand}" if name else operand
            if quantizer is not None:
                site = quantizer.name
            elif operand == "weight":
                site = owners.setdefault(id(layer.weight), site)
            found.append(SiteOperand(site, "weight" if operand == "weight" else "activation", quantizer))
        if found:
            yield found[0], found[1]


def _operands(layer: nn.Module) -> tuple[str, ...]:
    return next((names for kind, names in SWAPS_BY_QUANT.items() if isinstance(layer, kind)), ())


def drop_float(model: nn.Module) -> None:
    """Take away the quantizers of sites that are decided for 32 bits: what is left is what ``bits: 32``
    would have prepared."""
    for layer in list(model.modules()):
        for operand in _operands(layer):
            quantizer: Quantizer | None = getattr(layer, f"{operand}_quantizer")
            if quantizer is not None and quantizer.bits.in_float:
                setattr(layer, f"{operand}_quantizer", None)


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode; afterwards each is in its own again (a frozen BatchNorm, too)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
