"""finalize: a trained model becomes a packed one, with codes for exactly the bits that were trained.

The trained model is left as it is: a copy is made in which every quantized layer is a packed one
(integer_layers), so that the two can be compared. BatchNorm behind a quantized layer is folded here, once,
into scale and bias: s <- s * gamma / sigma leaves the codes untouched (a negative gamma gives a negative
scale), where the usual way (fold into the weight, then quantize) gives codes that were never trained.
It stays a float layer where the weight has one scale for the tensor, or is tied (quantization.trace).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import SiteError
from bitsmith.numerics.blocks import from_groups
from bitsmith.quantization.integer_layers import (
    ConvGeometry,
    FloatWeight,
    Folded,
    Form,
    FrozenQuantizer,
    IntegerConv,
    IntegerConvTranspose,
    IntegerEmbedding,
    IntegerLayer,
    IntegerLinear,
    IntegerMatMul,
    PackedWeight,
)
from bitsmith.quantization.layers import (
    CONVOLUTIONS,
    QuantConvTranspose2d,
    QuantEmbedding,
    QuantLayer,
    QuantMatMul,
    QuantTransposedLinear,
    weight_of,
)
from bitsmith.quantization.quantizer import Quantizer, check_calibrated
from bitsmith.quantization.smoothing import transformations
from bitsmith.quantization.trace import trace

BatchNorm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def finalize(model: nn.Module, example: Any) -> nn.Module:
    """A packed copy of a prepared model, in eval mode; ``example`` is one batch of its inputs.

    Raises SiteError where nothing is quantized, a site was never calibrated, or smoothing is not folded yet.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    if not layers:
        raise SiteError(
            "this model has no quantized layer", where="finalize", remedy="Call bs.prepare(model, ...) first"
        )
    check_calibrated(model)
    if learned := transformations(model):
        raise SiteError(
            "smoothing is not part of a packed layer",
            where=next(iter(learned)),
            remedy="Call fold(model) of bitsmith.quantization.smoothing first",
        )
    norms = {name: model.get_submodule(norm) for name, norm in trace(model, example).folds.items()}
    # deepcopy takes what it finds in its memo for the copy: that is the whole swap.
    memo: dict[int, Any] = {id(norm): Folded(name) for name, norm in norms.items()}
    weights: dict[int, PackedWeight | FloatWeight] = {}
    for name, layer in layers.items():
        memo[id(layer)] = pack_layer(layer, norms.get(name), weights)
    packed: nn.Module = copy.deepcopy(model, memo)
    return packed.requires_grad_(False).eval()


def pack_layer(layer: QuantLayer, norm: Any, weights: dict[int, PackedWeight | FloatWeight]) -> IntegerLayer:
    """One layer packed, with ``norm`` folded into it; ``weights`` holds what tied layers share."""
    if isinstance(layer, QuantMatMul):
        return IntegerMatMul(freeze(layer.left_quantizer), freeze(layer.right_quantizer))
    factor, bias = (None, None) if isinstance(layer, QuantEmbedding) else _fold(layer, norm)
    if id(layer.weight) not in weights:
        weights[id(layer.weight)] = pack_weight(weight_of(layer), layer.weight_quantizer, factor)
    weight = weights[id(layer.weight)]
    if isinstance(layer, QuantEmbedding):
        return IntegerEmbedding(weight)
    input = freeze(layer.input_quantizer)
    if not isinstance(layer, CONVOLUTIONS):
        return IntegerLinear(weight, input, bias, isinstance(layer, QuantTransposedLinear))
    border = tuple(layer._reversed_padding_repeated_twice) if layer.padding_mode != "zeros" else ()
    geometry = ConvGeometry(
        layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode, border
    )
    if isinstance(layer, QuantConvTranspose2d):
        return IntegerConvTranspose(weight, input, bias, geometry, layer.output_padding)
    return IntegerConv(weight, input, bias, geometry)


def pack_weight(
    weight: Tensor, quantizer: Quantizer | None, factor: Tensor | None = None
) -> PackedWeight | FloatWeight:
    """Codes and scales of a weight (out, ...); ``factor`` (out,) float64 goes into the scales."""
    weight = weight.detach()
    if quantizer is None or quantizer.bits.in_float:
        return FloatWeight(_times(weight, factor, weight.ndim))
    form = form_of(quantizer, tuple(weight.shape))
    codes, (scale, zero_point) = quantizer.codes(weight), quantizer.stored_range(weight)
    if form.group_size is not None:
        codes = from_groups(codes, weight, flatten=True)
    stored = zero_point if quantizer.has_zero_point() else None
    levels = quantizer.levels().table
    return PackedWeight.from_codes(codes, form, _times(scale, factor, scale.ndim), stored, levels)


def freeze(quantizer: Quantizer | None) -> FrozenQuantizer | None:
    """An activation quantizer as plain numbers; None in float."""
    if quantizer is None or quantizer.bits.in_float:
        return None
    form, at = form_of(quantizer), quantizer.levels()
    zero_point = at.zero_point.clone() if quantizer.has_zero_point() else None
    return FrozenQuantizer(form, None if form.dynamic else at.scale.clone(), zero_point)


def form_of(quantizer: Quantizer, shape: tuple[int, ...] | None = None) -> Form:
    """How the site of a quantizer is stored."""
    scheme, grids = quantizer.scheme, list(quantizer.grids().values())
    dynamic = scheme.range == "dynamic" and quantizer.kind == "activation"
    return Form(
        bits=quantizer.levels().bits,
        grid=grids[0] if len(set(grids)) == 1 else tuple(grids),  # type: ignore[arg-type]
        granularity=scheme.granularity,
        group_size=scheme.group_size,
        shape=shape,
        dynamic=dynamic,
        axis=quantizer.axis if dynamic and scheme.granularity == "channel" else 0,
    )


def _fold(layer: Any, norm: Any) -> tuple[Tensor | None, Tensor | None]:
    """(gamma / sigma (out,) float64, bias (out,)) of a layer and the BatchNorm behind it."""
    bias = None if layer.bias is None else layer.bias.detach().clone()
    if norm is None:
        return None, bias
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
    shift = shift * factor
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return factor, shift.float()


def _times(values: Tensor, factor: Tensor | None, ndim: int) -> Tensor:
    """values (out, ...) times factor (out,), rounded once."""
    if factor is None:
        return values.clone()
    return (values.double() * factor.view(-1, *[1] * (ndim - 1))).float()
