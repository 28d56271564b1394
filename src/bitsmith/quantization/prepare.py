"""prepare: from a float model to one whose tensors are sites, and a report of what became of each parameter.

Layers are swapped in place. Nothing is skipped in silence: a glob that matches no site is an error with the
nearest names, and the coverage lists every parameter that stays in float with the reason.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from bitsmith.errors import SchemeError, SiteError, listing, nearest
from bitsmith.numerics.blocks import group_count
from bitsmith.quantization.bits import Width, in_words
from bitsmith.quantization.layers import SWAPS, SWAPS_BY_QUANT
from bitsmith.quantization.quantizer import Quantizer, sites
from bitsmith.quantization.rows import observe_weight
from bitsmith.quantization.scheme import FLOAT, Scheme
from bitsmith.quantization.target import Target, get_target

FIRST_LAST_BITS = 8
IN_FLOAT = "left in float by its scheme or plan"


@dataclass(frozen=True)
class Leftover:
    """A parameter (or a site) that stays in float, and why."""

    name: str
    elements: int
    reason: str


@dataclass(frozen=True)
class CoveredSite:
    """A quantized site, as the coverage shows it; bits: one width, or one per output channel."""

    name: str
    kind: str
    bits: Width
    grid: str
    granularity: str
    elements: int


@dataclass(frozen=True)
class Coverage:
    """What `prepare` did. Elements of weight sites and of leftovers sum to all parameters."""

    sites: tuple[CoveredSite, ...]
    leftovers: tuple[Leftover, ...]
    parameters: int

    @property
    def quantized_share(self) -> float:
        """Share of the parameters' elements that are quantized."""
        return sum(s.elements for s in self.sites) / max(self.parameters, 1)

    def to_dict(self) -> dict[str, Any]:
        """As coverage.json holds it."""
        return {
            "version": 1,
            "parameters": self.parameters,
            "quantized_share": self.quantized_share,
            "sites": [asdict(s) for s in self.sites],
            "leftovers": [asdict(x) for x in self.leftovers],
        }

    def __str__(self) -> str:
        width = max((len(site.name) for site in self.sites), default=4)
        why: dict[str, list[str]] = {}
        for left in self.leftovers:
            why.setdefault(left.reason, []).append(left.name)
        lines = [
            f"{len(self.sites)} sites; {self.quantized_share:.1%} of {self.parameters:,} parameters quantized"
        ]
        lines += [
            f"  {s.name:<{width}}  {in_words(s.bits)} bits  {s.grid}, per {s.granularity}" for s in self.sites
        ]
        lines += [f"  float: {reason} ({', '.join(names)})" for reason, names in why.items()]
        return "\n".join(lines)


def prepare(
    model: nn.Module,
    weights: Scheme | None = None,
    activations: Scheme | None = None,
    *,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    target: str | Target = "native",
    first_last_bits: int | None = FIRST_LAST_BITS,
    check_pairs: bool = True,
) -> Coverage:
    """Swap the layers of ``model`` for quantized ones, in place, and calibrate the weights.

    weights, activations: the scheme of every weight and of every input of a multiplying layer; None leaves
    them in float. overrides: glob on site names -> fields of Scheme, the last match wins; they also free the
    first and the last layer, which otherwise get ``first_last_bits`` (None: no such rule). check_pairs: False
    where a search decides the widths, which then has to find pairs that the target multiplies. Activations
    need `calibrate` before the first forward.

    Raises SiteError (no quantizable layer; a glob that matches nothing; prepared twice), SchemeError,
    TargetError.
    """
    target = get_target(target)
    if sites(model):
        raise SiteError(
            "this model is prepared already", remedy="Prepare a fresh float model, or commit another plan"
        )
    operands = list(_operands(model))
    if not operands:
        raise SiteError(
            "this model has no layer to quantize",
            where=type(model).__name__,
            expected="at least one nn.Linear, nn.Conv1d, nn.Conv2d or bitsmith MatMul",
            remedy="Put products that live in forward() into such modules",
        )
    schemes, pinned = _schemes(operands, weights, activations, overrides or {}, first_last_bits)
    made: dict[str, Quantizer | None] = {}
    for operand in operands:  # all of them, before anything is changed: an error leaves the model as it was
        scheme = schemes[operand.site]
        if operand.site in made or scheme is None or scheme.is_float:
            made.setdefault(operand.site, None)
            continue
        target.check(operand.site, operand.kind, scheme, type(operand.layer).__name__)
        quantizer = made[operand.site] = _quantizer(operand, scheme, target)
        quantizer.pinned = operand.site in pinned
        if operand.kind == "weight":
            quantizer.calibrate(*observe_weight(quantizer, operand.layer.weight))
    if check_pairs:
        _check_pairs(operands, schemes, target)
    for operand in operands:
        if type(operand.layer) in SWAPS:
            operand.layer.__class__ = SWAPS[type(operand.layer)][0]
        setattr(operand.layer, f"{operand.name}_quantizer", made[operand.site])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fast path in eval mode reads the weights of linear1 and linear2 past their quantizers.
            module.activation_relu_or_gelu = 0
    model.bitsmith_target = target.name  # type: ignore[assignment]
    return coverage(model)


def _check_pairs(operands: list[Operand], schemes: Mapping[str, Scheme | None], target: Target) -> None:
    """Refuse a layer whose two widths the target does not multiply; its operands stand beside each other."""
    for first, second in zip(operands[::2], operands[1::2], strict=True):
        found = (schemes[first.site], schemes[second.site])
        widths = tuple(FLOAT if scheme is None else scheme.bits for scheme in found)
        target.check_pair(first.site, second.site, (widths[0], widths[1]))


class Operand(NamedTuple):
    """One operand of a layer, and its site: a tied weight is one site, named after its first layer."""

    site: str
    name: str
    layer: Any

    @property
    def kind(self) -> str:
        return "weight" if self.name == "weight" else "activation"


def _operands(model: nn.Module) -> Iterator[Operand]:
    """Every operand that can be a site. Subclasses are left alone: their forward may not use the weight as
    their parent does (nn.MultiheadAttention's out_proj is one)."""
    owners: dict[int, str] = {}
    for layer_name, layer in model.named_modules():
        for operand in SWAPS[type(layer)][1] if type(layer) in SWAPS else ():
            site = f"{layer_name}.{operand}" if layer_name else operand
            if operand == "weight":
                site = owners.setdefault(id(layer.weight), site)
            yield Operand(site, operand, layer)


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
            schemes[operand.site] = scheme.replace(operand.site, bits=first_last_bits)
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
    name, kind, layer = operand.site, operand.kind, operand.layer
    if kind == "activation":
        if scheme.granularity == "channel":
            if isinstance(layer, nn.Linear):
                return Quantizer(name, kind, scheme, channels=layer.in_features, view=(-1,), axis=-1)
            if hasattr(layer, "in_channels"):
                ones = (1,) * (layer.weight.ndim - 2)
                return Quantizer(
                    name, kind, scheme, channels=int(layer.in_channels), view=(-1, *ones), axis=1
                )
            raise SchemeError(
                "a MatMul operand has no channels",
                where=f"{name}.granularity",
                got="channel",
                expected="tensor or token",
            )
        if scheme.granularity == "group":
            if scheme.range != "dynamic":
                raise SchemeError(
                    "groups of activations have dynamic ranges only",
                    where=f"{name}.range",
                    got=scheme.range,
                    expected="dynamic",
                )
        return Quantizer(name, kind, scheme)
    weight: torch.Tensor = layer.weight
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


def coverage(model: nn.Module) -> Coverage:
    """The coverage of a prepared model."""
    covered: list[CoveredSite] = []
    leftovers: list[Leftover] = []
    done: set[int] = set()
    own = {id(p) for q in sites(model).values() for p in q.parameters()}
    for layer_name, layer in model.named_modules():
        for operand in SWAPS_BY_QUANT.get(type(layer), ()):
            quantizer: Quantizer | None = getattr(layer, f"{operand}_quantizer")
            name = f"{layer_name}.{operand}" if layer_name else operand
            in_float = quantizer is None or quantizer.bits.in_float
            if in_float and operand != "weight":
                leftovers.append(Leftover(name, 0, IN_FLOAT))
            if quantizer is None or in_float or (operand == "weight" and id(layer.weight) in done):
                continue
            elements = layer.weight.numel() if operand == "weight" else 0
            if operand == "weight":
                done.add(id(layer.weight))
            covered.append(
                CoveredSite(
                    name,
                    quantizer.kind,
                    quantizer.bits.whole(),
                    quantizer.grid_name(),
                    quantizer.scheme.granularity,
                    elements,
                )
            )
    total = sum(s.elements for s in covered)
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done or id(parameter) in own:
                continue
            done.add(id(parameter))
            name = f"{module_name}.{parameter_name}" if module_name else parameter_name
            leftovers.append(Leftover(name, parameter.numel(), _reason(module, parameter_name)))
            total += parameter.numel()
    return Coverage(tuple(covered), tuple(leftovers), total)


def _reason(module: nn.Module, parameter_name: str) -> str:
    kind = type(module).__name__
    if parameter_name == "bias" and type(module) in SWAPS_BY_QUANT:
        return "biases stay in float: added once per output, not multiplied"
    if type(module) in SWAPS_BY_QUANT:
        return IN_FLOAT
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "BatchNorm, folded into the layer before it at finalize where it can be"
    if "Norm" in kind:
        return f"{kind}: normalisation stays in float"
    parents = [base.__name__ for base in SWAPS if isinstance(module, base)]
    if parents:
        return f"{kind} is a subclass of {parents[0]} whose forward may use the weight differently"
    if isinstance(module, nn.MultiheadAttention):
        return f"no quantized form of {kind}: write it with nn.Linear and bitsmith.MatMul"
    return f"no quantized form of {kind}"


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
