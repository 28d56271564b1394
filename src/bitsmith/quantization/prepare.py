"""prepare: from a float model to one whose tensors are sites.

Layers are swapped in place. Nothing is skipped in silence: a glob that matches no site is an error with the
nearest names, and the coverage lists every parameter that stays in float with the reason.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from bitsmith.errors import SchemeError, SiteError, listing, nearest
from bitsmith.numerics.blocks import group_count
from bitsmith.numerics.grid import TABLE_BITS, TABLES
from bitsmith.quantization.coverage import Coverage, coverage
from bitsmith.quantization.layers import (
    CONVOLUTIONS,
    SWAPS,
    SWAPS_BY_QUANT,
    QuantConvTranspose2d,
    QuantMatMul,
    weight_of,
)
from bitsmith.quantization.quantizer import Quantizer, sites
from bitsmith.quantization.rows import observe_weight
from bitsmith.quantization.scheme import FLOAT, Scheme
from bitsmith.quantization.target import Target, get_target

FIRST_LAST_BITS = 8


def prepare(
    model: nn.Module,
    weights: Scheme | None = None,
    activations: Scheme | None = None,
    *,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    target: str | Target = "native",
    first_last_bits: int | None = FIRST_LAST_BITS,
    check_pairs: bool = True,
    swaps: Mapping[type[nn.Module], type[nn.Module]] | None = None,
) -> Coverage:
    """Swap the layers of ``model`` for quantized ones, in place, and calibrate the weights.

    weights, activations: the scheme of every weight and of every input of a multiplying layer; None leaves
    them in float. overrides: glob on site names -> fields of Scheme, the last match wins; they also free the
    first and the last layer, which otherwise get ``first_last_bits`` (None: no such rule), on grid auto where
    a table of levels has no such width. check_pairs: False where a search decides the widths, which then has
    to find pairs that the target multiplies. Activations need `calibrate` before the first forward.

    swaps: more float classes and the quantized class of each: ``{Conv1D: QuantTransposedLinear}`` for the
    linear layers of transformers' GPT-2, which keep their weight as (in, out), or ``{MyLinear: QuantLinear}``
    for a subclass whose forward is its parent's. Such a layer computes as its quantized class does, whatever
    its own forward was; its parameters keep names and shapes, so that checkpoints still load.

    Raises SiteError (no quantizable layer; a glob that matches nothing; prepared twice; a swap for a class
    that is none of ours), SchemeError, TargetError.
    """
    target = get_target(target)
    kinds = _kinds(swaps or {})
    if sites(model):
        raise SiteError(
            "this model is prepared already", remedy="Prepare a fresh float model, or commit another plan"
        )
    operands = list(_operands(model, kinds))
    if not operands:
        raise SiteError(
            "this model has no layer to quantize",
            where=type(model).__name__,
            expected="at least one nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding or "
            "bitsmith MatMul",
            remedy="Put products that live in forward() into such modules, or name other classes in swaps",
        )
    schemes, pinned = _schemes(operands, weights, activations, overrides or {}, first_last_bits)
    made: dict[str, Quantizer | None] = {}
    for operand in operands:  # all of them, before anything is changed: an error leaves the model as it was
        scheme = schemes[operand.site]
        if scheme is None or scheme.is_float:
            made.setdefault(operand.site, None)
            continue
        target.check(operand.site, operand.kind, scheme, operand.swap.__name__.removeprefix("Quant"))
        if operand.site in made:
            continue
        quantizer = made[operand.site] = _quantizer(operand, scheme, target)
        quantizer.pinned = operand.site in pinned
        if operand.kind == "weight":
            quantizer.calibrate(*observe_weight(quantizer, operand.weight))
    if check_pairs:
        _check_pairs(operands, schemes, target)
    for operand in operands:
        operand.layer.__class__ = operand.swap
        setattr(operand.layer, f"{operand.name}_quantizer", made[operand.site])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fast path in eval mode reads the weights of linear1 and linear2 past their quantizers.
            module.activation_relu_or_gelu = 0
    model.bitsmith_target = target.name  # type: ignore[assignment]
    return coverage(model)


def _kinds(swaps: Mapping[type[nn.Module], type[nn.Module]]) -> dict[type[nn.Module], type[nn.Module]]:
    """Float class -> quantized class, ours and those of the user."""
    for kind, swap in swaps.items():
        if swap not in SWAPS_BY_QUANT:
            raise SiteError(
                "this is no quantized layer of Bitsmith's",
                where=f"swaps.{kind.__name__}",
                got=getattr(swap, "__name__", repr(swap)),
                expected=listing(known.__name__ for known in SWAPS_BY_QUANT),
            )
    return {kind: swap for kind, (swap, _) in SWAPS.items()} | dict(swaps)


def _check_pairs(operands: list[Operand], schemes: Mapping[str, Scheme | None], target: Target) -> None:
    """Refuse a layer whose two widths the target does not multiply; its operands stand beside each other."""
    for first, second in pairwise(operands):
        if first.layer is not second.layer:
            continue
        found = (schemes[first.site], schemes[second.site])
        widths = tuple(FLOAT if scheme is None else scheme.bits for scheme in found)
        target.check_pair(first.site, second.site, (widths[0], widths[1]))


class Operand(NamedTuple):
    """One operand of a layer, and its site: a tied weight is one site, named after its first layer; and the
    quantized class that the layer will have."""

    site: str
    name: str
    layer: Any
    swap: type[nn.Module]

    @property
    def kind(self) -> str:
        return "weight" if self.name == "weight" else "activation"

    @property
    def weight(self) -> torch.Tensor:
        """The layer's weight, channels first."""
        return weight_of(self.layer, self.swap)


def _operands(model: nn.Module, kinds: Mapping[type[nn.Module], type[nn.Module]]) -> Iterator[Operand]:
    """Every operand that can be a site. Subclasses are left alone: their forward may not use the weight as
    their parent does (nn.MultiheadAttention's out_proj is one); so is an embedding with ``max_norm``, whose
    forward changes the weight, and a transposed convolution in groups, whose channels lie on two axes."""
    owners: dict[int, str] = {}
    for layer_name, layer in model.named_modules():
        swap = kinds.get(type(layer))
        if swap is None or getattr(layer, "max_norm", None) is not None:
            continue
        if swap is QuantConvTranspose2d and layer.groups > 1:
            continue
        for operand in SWAPS_BY_QUANT[swap]:
            site = f"{layer_name}.{operand}" if layer_name else operand
            if operand == "weight":
                site = owners.setdefault(id(layer.weight), site)
            yield Operand(site, operand, layer, swap)


def _schemes(
    operands: list[Operand],
    weights: Scheme | None,
    activations: Scheme | None,
    overrides: Mapping[str, Mapping[str, Any]],
    first_last_bits: int | None,
) -> tuple[dict[str, Scheme | None], set[str]]:
    """The scheme of every site: defaults, then first and last layer, then overrides in their order; and the
    sites whose width was asked for one by one, by either of the two: a search leaves those alone."""
    with_weights = [operand.layer for operand in operands if operand.kind == "weight"]
    ends = [with_weights[0], with_weights[-1]] if with_weights and first_last_bits else []
    schemes: dict[str, Scheme | None] = {}
    pinned: set[str] = set()
    for operand in operands:
        scheme = weights if operand.kind == "weight" else activations
        if first_last_bits and scheme is not None and not scheme.is_float and operand.layer in ends:
            table = scheme.grid in TABLES and first_last_bits not in TABLE_BITS
            grid = "auto" if table else scheme.grid
            schemes[operand.site] = scheme.replace(operand.site, bits=first_last_bits, grid=grid)
            pinned.add(operand.site)
        else:
            schemes.setdefault(operand.site, scheme)
    for pattern, changes in overrides.items():
        matched = fnmatch.filter(schemes, pattern)
        if not matched:
            close = nearest(pattern, schemes)
            raise SiteError(
                "this pattern matches no site",
                where=f"overrides.{pattern}",
                remedy=f"Name a site of this model, such as {listing(close or list(schemes)[:3])}, or remove "
                "the pattern",
            )
        for name in matched:
            default = Scheme(bits=FLOAT) if schemes[name] is None else schemes[name]
            assert default is not None
            schemes[name] = default.replace(name, **changes)
            if "bits" in changes:
                pinned.add(name)
    return schemes, pinned


def _quantizer(operand: Operand, scheme: Scheme, target: Target) -> Quantizer:
    """The quantizer of one operand, its number of scales and their shape."""
    name, kind = operand.site, operand.kind
    scheme.check_kind(kind, name)
    if kind == "activation":
        if scheme.granularity == "channel":
            if operand.swap is QuantMatMul:
                raise SchemeError(
                    "a MatMul operand has no channels",
                    where=f"{name}.granularity",
                    got="channel",
                    expected="tensor or token",
                )
            if operand.swap in CONVOLUTIONS:
                ones, channels = (1,) * (operand.weight.ndim - 2), int(operand.layer.in_channels)
                return Quantizer(name, kind, scheme, channels=channels, view=(-1, *ones), axis=1)
            return Quantizer(name, kind, scheme, channels=operand.weight.shape[1], view=(-1,), axis=-1)
        if scheme.granularity == "group":
            if scheme.range != "dynamic":
                raise SchemeError(
                    "groups of activations have dynamic ranges only",
                    where=f"{name}.range",
                    got=scheme.range,
                    expected="dynamic",
                )
        return Quantizer(name, kind, scheme)
    weight = operand.weight
    seq = "seq" in target.weight_grids and not (
        target.name == "onnxruntime" and scheme.granularity == "group"
    )
    if scheme.granularity == "channel":
        view: tuple[int, ...] = (-1, *(1,) * (weight.ndim - 1))
        return Quantizer(name, kind, scheme, channels=weight.shape[0], view=view, seq_allowed=seq)
    if scheme.granularity == "group":
        assert scheme.group_size is not None
        length = weight[0].numel()
        if length % scheme.group_size and target.name == "onnxruntime":
            raise SchemeError(
                f"{length} input values do not split into groups of {scheme.group_size}",
                where=name,
                remedy=f"Choose group_size {_divisors(length)}, or granularity: channel",
            )
        groups = group_count(length, scheme.group_size)
        return Quantizer(
            name, kind, scheme, channels=weight.shape[0] * groups, view=(-1, groups, 1), seq_allowed=seq
        )
    return Quantizer(name, kind, scheme, seq_allowed=seq)


def _divisors(length: int) -> str:
    fits = [str(d) for d in range(2, length + 1) if length % d == 0]
    return ", ".join(fits[:-1]) + " or " + fits[-1] if len(fits) > 1 else "".join(fits)


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float = 0.0, range_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: weights with decay; biases and norms (one axis) without; ranges and zero
    points with ``range_factor`` times the learning rate and no decay; bit-widths that train without decay."""
    ranges = {id(p) for q in sites(model).values() for p in q.parameters(recurse=False)}
    widths = {id(p) for q in sites(model).values() for p in q.bits.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "others": [], "ranges": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in ranges:
            groups["ranges"].append(parameter)
        elif id(parameter) in widths or name.endswith("logits") or parameter.ndim <= 1:
            groups["others"].append(parameter)
        else:
            groups["weights"].append(parameter)
    settings = {"weights": (1.0, weight_decay), "others": (1.0, 0.0), "ranges": (range_factor, 0.0)}
    return [
        {
            "params": parameters,
            "lr": learning_rate * settings[name][0],
            "weight_decay": settings[name][1],
            "name": name,
        }
        for name, parameters in groups.items()
        if parameters
    ]
