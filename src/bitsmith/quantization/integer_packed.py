"""To and from packed models: integer layers of what `bs.load` gives, and packed layers of what was trained.

    resume_integer     packed layers (of `finalize` or `bs.load`) -> integer layers, in place
    finalize_integer   integer layers -> packed layers, a copy; what `bs.save` writes

Codes and scales are the same bytes before and after: nothing is converted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bitsmith.errors import SiteError
from bitsmith.kernels.operands import MOST_INPUTS
from bitsmith.quantization.integer_blocks import save_floats
from bitsmith.quantization.integer_layers import (
    Form,
    FrozenQuantizer,
    IntegerConv,
    IntegerEmbedding,
    IntegerLayer,
    IntegerLinear,
    IntegerMatMul,
    PackedWeight,
    packed_layers,
)
from bitsmith.quantization.integer_prepare import (
    IntegerReport,
    check_widths,
    dynamic_range,
    kept_float,
    refusal,
    replace_layers,
    report,
    surroundings,
)
from bitsmith.quantization.integer_training import (
    IntConv2d,
    IntEmbedding,
    IntLayer,
    IntLinear,
    PassingQuantizer,
    int_layers,
)

AFFINE = ("symmetric", "balanced", "seq", "unsigned")  # grids of weights without zero points


def resume_integer(
    model: nn.Module,
    activations: int = 8,
    gradients: int = 8,
    *,
    hadamard: bool = False,
    keep_float: bool | Sequence[str] = False,
    save_codes: bool = True,
) -> IntegerReport:
    """Let a packed model (of `finalize`, `finalize_integer` or `bs.load`) train on, in place, on the codes
    that it has. Ranges of activations stay as stored; a layer without one gets ``activations`` bits per
    token.

    Products of two activations keep their grids and pass gradients straight through. Float parameters, such
    as those of norms, become trainable again. An embedding's ``padding_idx`` is in no file: that row trains.
    save_codes: as of `prepare_integer`.

    Raises SiteError for a model without packed layers, and for layers that have no integer form (tables of
    levels, weights with zero points or with widths per channel, ranges per group), all of them listed, unless
    ``keep_float`` names them: those stay as loaded, and frozen.
    """
    check_widths(8, activations, gradients)
    layers = packed_layers(model)
    if not layers:
        raise SiteError(
            "this model has no packed layer", where="resume_integer", remedy="Load one by bs.load"
        )
    reasons = {name: why for name, layer in layers.items() if (why := _no_integer_form(layer))}
    kept = kept_float(keep_float, list(reasons))
    if refused := {name: why for name, why in reasons.items() if name not in kept}:
        raise refusal(refused)
    made: dict[int, nn.Module] = {}
    notes = []
    for name, layer in layers.items():
        if name in reasons or not isinstance(layer, IntegerLinear | IntegerConv | IntegerEmbedding):
            continue
        weight = layer.weight
        assert isinstance(weight, PackedWeight)
        if weight.form.granularity == "tensor":  # the same scale, once for each channel
            _per_channel(weight)
        if isinstance(layer, IntegerEmbedding):
            made[id(layer)] = IntEmbedding(weight, gradients=gradients, name=name)
            continue
        bias = None if layer.bias is None else nn.Parameter(layer.bias.clone())
        image = isinstance(layer, IntegerConv)
        if layer.input is None:
            notes.append(f"  {name}: inputs had no range, and get {activations} bits as they come")
        input = layer.input or dynamic_range(activations, "symmetric", image)
        if isinstance(layer, IntegerLinear):
            more = {"hadamard": hadamard, "transposed": layer.transposed}
            made[id(layer)] = IntLinear(weight, input, bias, gradients=gradients, name=name, **more)
        else:
            made[id(layer)] = IntConv2d(weight, input, bias, layer.geometry, gradients=gradients, name=name)
    replace_layers(model, made)
    for layer in packed_layers(model).values():  # those that are left: gradients have to get through
        for quantizer in layer.children():
            if type(quantizer) is FrozenQuantizer:
                quantizer.__class__ = PassingQuantizer
    model.requires_grad_(True)  # norms and what else is float: packed models are frozen
    return report(model, (*notes, *(surroundings(model) if save_codes else ())))


@torch.no_grad()
def finalize_integer(model: nn.Module) -> nn.Module:
    """A copy of a model that trained on integers in which every integer layer is the packed one of inference,
    with the same codes and scales, in eval mode: what `bs.save` writes. BatchNorm stays a layer.

    Raises SiteError where there is no integer layer.
    """
    layers = int_layers(model)
    if not layers:
        raise SiteError(
            "this model has no layer that trains on integers",
            where="finalize_integer",
            remedy="Call prepare_integer(model) first",
        )
    memo: dict[int, Any] = {}  # deepcopy takes what it finds here for the copy, as in finalize
    weights = {id(layer.weight): copy.deepcopy(layer.weight) for layer in layers.values()}
    for layer in layers.values():
        memo[id(layer)] = _packed(layer, weights[id(layer.weight)])
    packed: nn.Module = copy.deepcopy(model, memo)
    for module in packed.modules():
        if isinstance(module, PassingQuantizer):
            module.__class__ = FrozenQuantizer  # type: ignore[assignment]
    save_floats(packed)
    return packed.requires_grad_(False).eval()


def _packed(layer: IntLayer, weight: PackedWeight) -> IntegerLayer:
    if isinstance(layer, IntEmbedding):
        return IntegerEmbedding(weight)
    assert isinstance(layer, IntLinear | IntConv2d)
    input, bias = copy.deepcopy(layer.input), None if layer.bias is None else layer.bias.detach().clone()
    if isinstance(layer, IntLinear):
        return IntegerLinear(weight, input, bias, layer.transposed)
    return IntegerConv(weight, input, bias, layer.geometry)


def _no_integer_form(layer: IntegerLayer) -> str:
    """Why a packed layer cannot train on; nothing, "", if it can, or holds no weight."""
    if isinstance(layer, IntegerMatMul):
        return ""
    weight = layer.weight
    if not isinstance(weight, PackedWeight):
        return "its weight is float"
    form = weight.form
    if not isinstance(form.bits, int) or form.grid not in AFFINE:
        return f"weights of {form}"
    if weight.zero_point is not None:
        return "its weights have zero points"
    if math.prod(weight.shape[1:]) > MOST_INPUTS:
        return f"more than {MOST_INPUTS} inputs could overflow a sum of 32 bits"
    if isinstance(layer, IntegerEmbedding):
        return ""
    if isinstance(layer, IntegerConv):
        if layer.kind != "conv" or len(weight.shape) != 4:
            return f"no integer form of a {layer.kind} over {len(weight.shape) - 2} axes"
        if form.group_size is not None or layer.geometry.padding_mode != "zeros":
            return "groups of weights, or padding other than zeros"
    return _no_integer_input(layer.input, isinstance(layer, IntegerConv))


def _no_integer_input(quantizer: FrozenQuantizer | None, image: bool) -> str:
    if quantizer is None:
        return ""
    form = quantizer.form
    by_rows = ("channel",) if image else ("token",)
    allowed = ("tensor", *by_rows) if form.dynamic else ("tensor",)
    fits = form.granularity in allowed and form.grid in ("symmetric", "balanced", "unsigned", "asymmetric")
    if not fits or (image and form.dynamic and form.grid == "asymmetric"):
        return f"inputs of {form}"
    return ""


def _per_channel(weight: PackedWeight) -> None:
    shape = (weight.shape[0], *(1,) * (len(weight.shape) - 1))
    weight.scale = weight.scale.reshape(1).expand(weight.shape[0]).clone().view(shape)
    weight.form = Form(weight.form.bits, weight.form.grid, "channel", None, weight.form.shape)
