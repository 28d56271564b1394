"""coverage: what became of each parameter of a prepared model: quantized, or left in float and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from bitsmith.quantization.bits import Width, in_words
from bitsmith.quantization.layers import SWAPS, SWAPS_BY_QUANT
from bitsmith.quantization.quantizer import Quantizer, sites

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
    if getattr(module, "max_norm", None) is not None:
        return f"{kind} with max_norm changes its weight in forward"
    if isinstance(module, nn.ConvTranspose2d) and module.groups > 1:
        return f"no quantized form of {kind} in groups"
    if kind == "Conv1D":  # transformers', by its name: to import it takes seconds
        return "no quantized form of Conv1D unless named: swaps={Conv1D: QuantTransposedLinear}"
    parents = [base.__name__ for base in SWAPS if isinstance(module, base)]
    if parents:
        return f"{kind} is a subclass of {parents[0]} whose forward may use the weight differently"
    if isinstance(module, nn.MultiheadAttention):
        return f"no quantized form of {kind}: write it with nn.Linear and bitsmith.MatMul"
    return f"no quantized form of {kind}"
