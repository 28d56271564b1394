"""Runs that train codes (`train.mode`): from the prepared model to codes, and to files as they are.

The prepared model is calibrated and rounded as in every run, and becomes codes before the first step. It
stays as it was: what is counted and planned is read from it, never a weight. After the last step the codes
are delivered; nothing is rounded again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import FormatError, SiteError
from bitsmith.optim import IntegerOptimizer, ZerothOrder, state_bytes
from bitsmith.quantization.finalize import finalize, freeze
from bitsmith.quantization.integer_layers import (
    FloatWeight,
    IntegerConv,
    IntegerLinear,
    PackedWeight,
    packed_layers,
    packed_sites,
)
from bitsmith.quantization.integer_packed import finalize_integer, resume_integer
from bitsmith.quantization.integer_training import int_layers
from bitsmith.recipe.directory import load_stage, stage_path
from bitsmith.recipe.schema import Recipe

START = "start"  # the stage that holds the prepared model, of which the codes' layers are put together again


def trains_codes(recipe: Recipe) -> bool:
    """Whether a run of ``recipe`` trains codes."""
    return recipe.train.mode != "float"


def codes_of(recipe: Recipe, prepared: nn.Module, example: Tensor) -> nn.Module:
    """What trains instead of ``prepared``: a packed copy, in mode integer with integer layers.

    What the recipe leaves in float is frozen in mode integer. Raises SiteError, listing them, where layers
    have no integer form.
    """
    packed = finalize(prepared, example)
    if recipe.train.mode != "integer":
        return packed
    layers = packed_layers(packed).items()
    in_float = [name for name, layer in layers if isinstance(getattr(layer, "weight", None), FloatWeight)]
    try:
        resume_integer(packed, gradients=recipe.train.gradients, keep_float=in_float)
    except SiteError as error:
        raise SiteError(
            error.what,
            where="train.mode: integer",
            got=error.got,
            remedy="Change their schemes by quantize.overrides (bits: 32 freezes them in float), or write "
            "train.mode: zeroth_order",
        ) from None
    return packed


def packed_of(model: nn.Module, prepared: nn.Module) -> nn.Module:
    """The packed model of what `codes_of` gave, with the very codes that it has now."""
    if not int_layers(model):
        return model.requires_grad_(False).eval()
    packed = finalize_integer(model)
    for name, layer in packed_layers(packed).items():
        given: Any = prepared.get_submodule(name)
        if isinstance(layer, IntegerLinear | IntegerConv) and freeze(given.input_quantizer) is None:
            layer.input = None  # trained with 8 bits, and delivered as it was asked for: in float
    return packed


def weight_codes(model: nn.Module) -> dict[str, Tensor]:
    """Site -> packed codes of every weight, copied."""
    return {name: site.codes.clone() for name, site in _weights(model).items()}


def told(recipe: Recipe, model: nn.Module, start: Mapping[str, Tensor], per_weight: float) -> dict[str, Any]:
    """The ``training`` part of metrics.json: the mode, shares of all codes that ``changed`` since ``start``
    and that are ``saturated``, at an end of their grid (before training, too), bytes of state a weight."""
    count = changed = ends = before = 0
    for name, site in _weights(model).items():
        codes, first = site.integers(), PackedWeight(start[name], site.form, site.scale).integers()
        for _, (low, high, _), at in site.form.runs:
            now, then = codes[at], first[at]
            count, changed = count + now.numel(), changed + int((now != then).sum())
            ends += int(((now == low) | (now == high)).sum())
            before += int(((then == low) | (then == high)).sum())
    frozen = [name for name, layer in packed_layers(model).items() if hasattr(layer, "weight")]
    return {
        "mode": recipe.train.mode,
        "codes": count,
        "changed": changed / max(count, 1),
        "saturated": ends / max(count, 1),
        "saturated_before": before / max(count, 1),
        "state_bytes_per_weight": per_weight,
        "frozen": frozen if recipe.train.mode == "integer" else [],
    }


def state_per_weight(model: nn.Module, optimizer: Any) -> float:
    """Bytes of codes, scales and optimizer state for each weight; the optimizer lets go of the model."""
    assert isinstance(optimizer, IntegerOptimizer | ZerothOrder)
    found = state_bytes(model, optimizer).per_weight
    if isinstance(optimizer, IntegerOptimizer):
        optimizer.detach()
    return found


def with_gradients(packed: nn.Module) -> nn.Module:
    """A copy of a packed model that passes gradients and keeps its codes: what attacks follow."""
    model = copy.deepcopy(packed)
    resume_integer(model, keep_float=True)
    for layer in int_layers(model).values():
        layer.trainable = False
    return model.eval()


def reopened(path: Path, recipe: Recipe, prepared: nn.Module, example: Tensor) -> nn.Module:
    """The packed model of a finished run in ``path``, from its checkpoint. Raises FormatError."""
    stage = load_stage(path, "qat")
    if stage is None:
        raise FormatError(
            "there is no such checkpoint",
            where=str(stage_path(path, "qat")),
            expected="what a finished `bitsmith run` leaves behind",
            remedy="Finish the run with --resume",
        )
    with torch.no_grad():
        model = codes_of(recipe, prepared, example)
        model.load_state_dict(stage[0])
    return packed_of(model, prepared)


def _weights(model: nn.Module) -> dict[str, PackedWeight]:
    return {name: site for name, site in packed_sites(model).items() if isinstance(site, PackedWeight)}
