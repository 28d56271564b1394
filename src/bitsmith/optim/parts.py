"""Which tensors of a model a forward-only optimizer moves.

    part         of a prepared model                          of a packed one (`finalize`, `load`)
    weights      latent float weights of quantized layers     their codes
    scales       learned ranges, zero points, level tables    scales of weights and of activations
    biases       of quantized layers                          of packed layers
    others       parameters of all other modules: norms       the same, and weights left in float
    transforms   what quantization.smoothing has added        nothing: it was folded

A model with both kinds of layers, as `pack_rest` makes it, trains those that are not packed.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from bitsmith.errors import SiteError, listing, matching
from bitsmith.quantization.finalize import pack_layer
from bitsmith.quantization.integer_layers import (
    FloatWeight,
    FrozenQuantizer,
    IntegerLayer,
    IntegerMatMul,
    PackedWeight,
)
from bitsmith.quantization.layers import QuantLayer
from bitsmith.quantization.quantizer import Quantizer, check_calibrated
from bitsmith.quantization.smoothing import transformations

PARTS = ("weights", "scales", "biases", "others", "transforms")
LIGHT = ("*q_proj", "*v_proj", "*query", "*value")  # what ZeroQAT's light variant trains

Found = dict[str, dict[str, Tensor | PackedWeight]]  # part -> name -> what is moved


def trained_parts(model: nn.Module, layers: Sequence[str] | None, parts: Sequence[str]) -> Found:
    """What of ``model`` the ``parts`` name, in the layers whose names match a glob of ``layers`` (None: all).

    Raises SiteError where nothing is left to train, or a glob matches no layer.
    """
    live = {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    packed = {name: m for name, m in model.named_modules() if isinstance(m, IntegerLayer)}
    of: dict[str, Any] = dict(live or packed)
    if not of:
        raise SiteError(
            "this model has no quantized layer to train",
            where=f"ZerothOrder({type(model).__name__})",
            remedy="Call bs.prepare or bs.load first, or pass model.parameters()",
        )
    chosen = list(of) if layers is None else matching("layers", layers, of, "layer")
    found: Found = {part: {} for part in PARTS if part in parts}
    seen: set[int] = set()

    def add(part: str, name: str, tensor: Any) -> None:
        trains = not isinstance(tensor, nn.Parameter) or tensor.requires_grad or not live
        if tensor is None or not trains or id(tensor) in seen:
            return
        seen.add(id(tensor))  # also of a part that nobody asked for: a tensor belongs to one
        if part in found:
            found[part][name] = tensor

    for name in chosen:
        for own, parameter in transformations(of[name]).items():
            add("transforms", f"{name}.{own}", parameter)
        (_add_prepared if live else _add_packed)(add, name, of[name])
    if layers is None:
        inside = {id(inner) for layer in (*live.values(), *packed.values()) for inner in layer.modules()}
        for name, module in model.named_modules():
            if id(module) not in inside:
                for own, parameter in module.named_parameters(name, recurse=False):
                    add("others", own, parameter)
    found = {part: tensors for part, tensors in found.items() if tensors}
    if not found:
        raise SiteError(
            "there is nothing to train",
            where=f"ZerothOrder({type(model).__name__})",
            got=f"parts {listing(parts)} of {len(chosen)} layers",
            remedy="Name other parts or layers, or let their parameters require a gradient",
        )
    return found


def _add_prepared(add: Any, name: str, layer: Any) -> None:
    add("weights", f"{name}.weight", getattr(layer, "weight", None))
    add("biases", f"{name}.bias", getattr(layer, "bias", None))
    for inner_name, inner in layer.named_modules(prefix=name):
        if isinstance(inner, Quantizer):
            for own, parameter in inner.named_parameters(inner_name, recurse=False):
                add("scales", own, parameter)  # clipping was seen before, among the transforms


def _add_packed(add: Any, name: str, layer: Any) -> None:
    if not isinstance(layer, IntegerMatMul):
        weight = layer.weight
        if isinstance(weight, FloatWeight):
            add("others", f"{name}.weight.values", weight.values)
        else:
            add("weights", f"{name}.weight", weight)
            add("scales", f"{name}.weight.scale", weight.scale)
        add("biases", f"{name}.bias", getattr(layer, "bias", None))
    for inner_name, inner in layer.named_modules(prefix=name):
        if isinstance(inner, FrozenQuantizer):
            add("scales", f"{inner_name}.scale", inner.scale)


def pack_rest(model: nn.Module, train: Sequence[str] = LIGHT) -> list[str]:
    """Pack every quantized layer of a prepared ``model`` that no glob of ``train`` matches, in place, and
    freeze whatever else it has but these layers' weights; the names of the layers that still train.

    So only the chosen layers hold float weights, and memory is about that of the packed model. `finalize`
    packs the rest afterwards. Raises SiteError where a glob matches no layer, or a site is not calibrated.
    """
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    check_calibrated(model)
    default = tuple(train) == LIGHT
    patterns = [p for p in train if not default or fnmatch.filter(layers, p)]
    kept = matching("train", patterns, layers, "layer") if patterns else []
    if not kept:
        raise SiteError(
            "no layer has one of these names",
            where="pack_rest",
            got=listing(train),
            remedy=f"Name layers of this model in train, such as {listing(list(layers)[:3])}",
        )
    shared = {id(layers[name].weight) for name in kept if hasattr(layers[name], "weight")}
    weights: dict[int, Any] = {}
    model.requires_grad_(False)
    for name, layer in layers.items():
        if name in kept:
            for parameter in layer.parameters():
                parameter.requires_grad_(True)
        elif id(getattr(layer, "weight", None)) not in shared:  # tied to one that trains: it stays in float
            parent, _, child = name.rpartition(".")
            setattr(
                model.get_submodule(parent), child, pack_layer(layer, None, weights).train(layer.training)
            )
    return kept
