"""Layers with quantized operands. Each is the PyTorch layer it replaces, its own parameters and names kept,
so that a float checkpoint loads into the prepared model and back; only quantizers are added beside them.

`prepare` makes them: it changes the class of a layer that stands in the model, so that parameters, hooks,
ties and every reference to the layer stay what they were. A quantizer that is None leaves its operand in
float. MatMul is a product of two activations as a module (the two of attention), because only a module can
carry sites; a function call inside a forward cannot. An embedding has one operand: its inputs are indices.

Channels are the first axis of a weight. Where a layer keeps it as (in, out, ...), as transformers' Conv1D and
transposed convolutions do, `weight_of` is the transposed view, and whatever looks at weights goes through it:
scales, widths per channel, groups of inputs, packing and cost are then those of any other layer, and the
parameter keeps the shape of its checkpoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import SiteError
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


class QuantTransposedLinear(nn.Module):
    """``x @ W + b`` with W (in, out), quantized weight and input: transformers' ``Conv1D``, the linear layer
    of GPT-2, and any other that keeps its weight so. `prepare` makes it where ``swaps`` names the float
    class: nothing here imports transformers. Turning the layer into an nn.Linear would take no class of its
    own, but its checkpoints would no longer load.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        weight: Tensor = self.weight.t()
        if self.weight_quantizer is not None:
            # As a packed weight lies, so that both sum in one order, and quantizers reduce along memory.
            weight = self.weight_quantizer(weight.clone(memory_format=torch.contiguous_format))
        return F.linear(x if self.input_quantizer is None else self.input_quantizer(x), weight, self.bias)

    def extra_repr(self) -> str:
        """Features, for print(model)."""
        return "in_features={}, out_features={}".format(*self.weight.shape)


class QuantEmbedding(nn.Embedding):
    """nn.Embedding with a quantized table. Rows are looked up and then quantized, each with its own scales:
    a step costs what the batch needs, not the vocabulary.

    The values are those of the quantized table, and so are the gradients, but for LSQ's gradient scale of a
    table with one scale, which counts the values that were looked up. ``padding_idx`` keeps its meaning, a
    row without gradient; on a grid without zero a row of zeros does not stay zero.
    """

    weight_quantizer: Quantizer | None

    def forward(self, x: Tensor) -> Tensor:
        """Indices (...) -> (..., embedding_dim)."""
        quantizer = self.weight_quantizer
        if quantizer is None:
            return super().forward(x)
        if not quantizer.row_by_row:
            return self._rows(x, quantizer(self.weight))
        index = x.reshape(-1)
        rows: Tensor = quantizer(self._rows(index, self.weight), index)
        return rows.view(*x.shape, self.embedding_dim)

    def _rows(self, x: Tensor, weight: Tensor) -> Tensor:
        frequency, sparse = self.scale_grad_by_freq, self.sparse
        return F.embedding(x, weight, self.padding_idx, scale_grad_by_freq=frequency, sparse=sparse)


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


class QuantConvTranspose2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d of one group with quantized weight and input. Its parameter is (in, out, *kernel),
    its codes are (out, in, *kernel). An ``output_size`` is nothing that a file could hold: it is refused.
    """

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W'). Raises SiteError for an ``output_size``."""
        if output_size is not None:
            raise SiteError(
                "a quantized transposed convolution has one output size",
                where=next((q.name for q in (self.weight_quantizer, self.input_quantizer) if q), ""),
                got=f"output_size {tuple(output_size)}",
                remedy="Give the layer an output_padding instead",
            )
        weight = self.weight.transpose(0, 1)
        if self.weight_quantizer is not None:
            # As a packed weight lies, so that both sum in one order, and quantizers reduce along memory.
            weight = self.weight_quantizer(weight.clone(memory_format=torch.contiguous_format))
        return self._conv_forward(
            x if self.input_quantizer is None else self.input_quantizer(x), weight, self.bias
        )

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """With a weight (out, in, *kernel), as nn.Conv2d's."""
        weight = weight.transpose(0, 1)
        stride, padding, more = self.stride, self.padding, self.output_padding
        return F.conv_transpose2d(x, weight, bias, stride, padding, more, 1, self.dilation)  # type: ignore[arg-type]


class QuantMatMul(MatMul):
    """MatMul with both operands quantized."""

    left_quantizer: Quantizer | None
    right_quantizer: Quantizer | None

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """The product of the quantized operands."""
        left = left if self.left_quantizer is None else self.left_quantizer(left)
        return torch.matmul(left, right if self.right_quantizer is None else self.right_quantizer(right))


CONVOLUTIONS = (QuantConv1d, QuantConv2d, QuantConvTranspose2d)  # channels of what comes and goes: axis 1
INPUTS_FIRST = (QuantTransposedLinear, QuantConvTranspose2d)  # a weight (in, out, ...)
WITH_WEIGHTS = (QuantLinear, QuantTransposedLinear, *CONVOLUTIONS, QuantEmbedding)
QuantLayer = (
    QuantLinear
    | QuantTransposedLinear
    | QuantConv1d
    | QuantConv2d
    | QuantConvTranspose2d
    | QuantEmbedding
    | QuantMatMul
)

# Float class -> its quantized form, and the operands that become sites.
SWAPS: dict[type[nn.Module], tuple[type[nn.Module], tuple[str, ...]]] = {
    nn.Linear: (QuantLinear, ("weight", "input")),
    nn.Conv1d: (QuantConv1d, ("weight", "input")),
    nn.Conv2d: (QuantConv2d, ("weight", "input")),
    nn.ConvTranspose2d: (QuantConvTranspose2d, ("weight", "input")),
    nn.Embedding: (QuantEmbedding, ("weight",)),
    MatMul: (QuantMatMul, ("left", "right")),
}
SWAPS_BY_QUANT: dict[type[nn.Module], tuple[str, ...]] = {
    **dict(SWAPS.values()),
    QuantTransposedLinear: ("weight", "input"),  # of no class that we could name without its package
}


def weight_of(layer: nn.Module, kind: type[nn.Module] | None = None) -> Tensor:
    """The weight of a layer as its quantizer sees it, channels first: the parameter, or its transposed view.
    ``kind``: the quantized class, of a layer that is not prepared yet."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.transpose(0, 1) if issubclass(kind or type(layer), INPUTS_FIRST) else weight


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Site -> the weight that is quantized there, as by `weight_of`; a tied one under its site's name."""
    return {
        layer.weight_quantizer.name: weight_of(layer)
        for layer in model.modules()
        if isinstance(layer, WITH_WEIGHTS) and layer.weight_quantizer is not None
    }


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


def layer_operands(model: nn.Module) -> Iterator[tuple[SiteOperand, ...]]:
    """The operands of every prepared layer: weight and input, left and right, or an embedding's weight."""
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
            yield tuple(found)


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
