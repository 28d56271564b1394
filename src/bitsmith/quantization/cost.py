"""cost: from the bits of all sites to bit operations, bytes and average bits.

One model of the cost serves searching (bits may be tensors: every figure is differentiable) and reporting
(bits are integers: every figure is exact). It counts everything: scales, zero points, tables of levels,
padding to whole bytes, biases (also those that folding a BatchNorm leaves behind), float leftovers. Plan
bytes are the payload bytes of the file.

    BOPs = sum over layers of MACs * bits of one operand * bits of the other; a float operand counts 32
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.numerics.grid import level_count
from bitsmith.quantization.bits import Width
from bitsmith.quantization.layers import SWAPS_BY_QUANT, QuantMatMul, weight_of
from bitsmith.quantization.liveness import Liveness, liveness
from bitsmith.quantization.quantizer import Quantizer, sites
from bitsmith.quantization.scheme import FLOAT
from bitsmith.quantization.target import Target, get_target
from bitsmith.quantization.trace import trace

FLOAT_BYTES = 4

# site -> bits: int, float or a scalar tensor; of channels with widths of their own a sequence or tensor (C,)
Bits = Mapping[str, Any]


def times(count: int, bits: Any) -> Any:
    """Sum of the bits of ``count`` elements or products; where channels have widths of their own, each has
    its even share of them."""
    if isinstance(bits, tuple | list):
        whole, rest = divmod(count * sum(bits), len(bits))
        return whole + rest / len(bits) if rest else whole
    return count * (bits.mean() if isinstance(bits, Tensor) and bits.ndim else bits)


def is_whole(bits: Any) -> bool:
    """Whether these are widths of a plan, not expectations of a search."""
    return all(
        isinstance(b, int | float) and b == int(b)
        for b in (bits if isinstance(bits, tuple | list) else [bits])
    )


def is_float(bits: Any) -> bool:
    """Whether this is the width of a site in float; an expectation of a search never is."""
    return isinstance(bits, int | float) and bits == FLOAT


@dataclass(frozen=True)
class LayerCost:
    """One product of two operands, per sample, or a lookup.

    operands: the names of its two sites (sites that stay in float have no quantizer and count 32 bits); of an
    embedding, which multiplies nothing, the second is "".
    weight_elements, weight_scales, weight_zero_points: 0 for a MatMul, and for a tied weight the second time.
    weight_table: the grid, where it is a table of levels (numerics.grid.TABLES), else "".
    activation_elements: site -> elements of the tensor. activation_scales: site -> scales and zero points
    that the file has of it, unless it is in float. part_of: the MACs of the whole layer, where this is the
    part of one group of its output channels (channel_groups).
    """

    name: str
    kind: str
    macs: int
    operands: tuple[str, str]
    weight_elements: int
    weight_scales: int
    weight_zero_points: int
    bias_elements: int
    activation_elements: Mapping[str, int]
    weight_shape: tuple[int, ...] = ()
    part_of: int = 0
    activation_scales: Mapping[str, int] = field(default_factory=dict)
    weight_table: str = ""

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that it has."""
        return tuple(site for site in self.operands if site)

    def is_held_by(self, target: Target, first: Any, second: Any) -> bool:
        """Whether ``target`` multiplies operands of these widths; a lookup needs no product."""
        return len(self.sites) < 2 or target.multiplies(first, second)

    @property
    def layer_macs(self) -> int:
        """MACs of the whole layer: what a table of costs goes by."""
        return self.part_of or self.macs


@dataclass(frozen=True)
class CostModel:
    """The cost of a prepared model as a function of the bits of its sites.

    float_macs: multiply-accumulates outside every site; other_bytes: parameters and buffers that no quantized
    layer owns, after folding; float_bytes: the float model's; live:
    which activations exist at the same time.
    """

    layers: tuple[LayerCost, ...]
    present: Mapping[str, Width]
    float_macs: int
    other_bytes: int
    float_bytes: int
    target: Target
    live: Liveness = field(default_factory=Liveness)

    def bops(self, bits: Bits) -> Any:
        """Bit operations per sample; differentiable in the bits."""
        total: Any = self.float_macs * FLOAT * FLOAT
        for layer in self.layers:
            first, second = (bits.get(site, FLOAT) for site in layer.operands)
            total = total + times(layer.macs, first) * second
        return total

    @cached_property
    def elements(self) -> tuple[int, int]:
        """Elements of all weights, and of all operands that are activations."""
        weights = sum(layer.weight_elements for layer in self.layers)
        return weights, sum(sum(layer.activation_elements.values()) for layer in self.layers)

    @property
    def bops_float(self) -> int:
        """Bit operations of the float model: every operand at 32 bits."""
        return (sum(layer.macs for layer in self.layers) + self.float_macs) * FLOAT * FLOAT

    def weight_bytes(self, bits: Bits) -> Any:
        """Bytes of all that the file stores; exact for integers, with codes at bits / 8 for tensors."""
        total: Any = self.other_bytes
        for layer in self.layers:
            total = total + self.layer_bytes(layer, bits) + self.range_bytes(layer, bits)
        return total

    def range_bytes(self, layer: LayerCost, bits: Bits) -> int:
        """Bytes of the scales and zero points of a layer's activations."""
        counts = layer.activation_scales.items()
        return FLOAT_BYTES * sum(count for site, count in counts if not is_float(bits.get(site, FLOAT)))

    def layer_bytes(self, layer: LayerCost, bits: Bits) -> Any:
        """Bytes of a layer's weight, scales, zero points, table of levels and bias."""
        width = bits.get(layer.operands[0], FLOAT) if layer.weight_elements else FLOAT
        fixed: Any = FLOAT_BYTES * layer.bias_elements
        if is_float(width):
            return fixed + FLOAT_BYTES * layer.weight_elements
        fixed += FLOAT_BYTES * layer.weight_scales
        if layer.weight_table:
            fixed = fixed + FLOAT_BYTES * level_count(layer.weight_table, width)
        if not is_whole(width):
            return fixed + times(layer.weight_elements + layer.weight_zero_points, width) / 8
        width = int(width) if isinstance(width, float) else width
        for count in (layer.weight_elements, layer.weight_zero_points):  # zero points are stored like codes
            held = self.target.weight_bits(count, width) / 8
            fixed += held if layer.part_of else math.ceil(held)
        return fixed

    def activation_bytes(self, bits: Bits) -> Any:
        """Peak bytes of the activations that live at one time, per sample; exact for integers."""
        return self.live.peak_bytes(bits)

    def average_bits(self, bits: Bits, kind: str) -> Any:
        """Mean bits over the elements of all weights ("weight") or of all operands that are activations."""
        total: Any = 0
        elements = 0
        for layer in self.layers:
            counts = (
                {layer.operands[0]: layer.weight_elements} if kind == "weight" else layer.activation_elements
            )
            for site, count in counts.items():
                total = total + times(count, bits.get(site, FLOAT))
                elements += count
        return total / max(elements, 1)

    def report(self, bits: Bits | None = None) -> dict[str, Any]:
        """The ``cost`` part of metrics.json, with an entry per layer; by default for the model's own bits."""
        bits = self.present if bits is None else bits
        return {
            "bops": self.bops(bits),
            "bops_float": self.bops_float,
            "weight_bytes": self.weight_bytes(bits),
            "weight_bytes_float": self.float_bytes,
            "activation_bytes": self.activation_bytes(bits),
            "activation_bytes_float": self.activation_bytes({}),
            "average_weight_bits": self.average_bits(bits, "weight"),
            "average_activation_bits": self.average_bits(bits, "activation"),
            "float_macs": self.float_macs,
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "macs": layer.macs,
                    "weight_bits": bits.get(layer.operands[0], FLOAT) if layer.kind != "MatMul" else None,
                    "activation_bits": bits.get(layer.operands[1], FLOAT) if layer.operands[1] else None,
                    "operand_bits": [bits.get(site, FLOAT) if site else None for site in layer.operands],
                    "weight_elements": layer.weight_elements,
                    "weight_bytes": self.layer_bytes(layer, bits),
                    "bops": times(layer.macs, bits.get(layer.operands[0], FLOAT))
                    * bits.get(layer.operands[1], FLOAT),
                }
                for layer in self.layers
            ],
        }


def measure(model: nn.Module, example: Any, target: str | Target | None = None) -> CostModel:
    """The cost model of a prepared ``model``, from one forward of ``example`` (a batch, or a tuple of them).

    Raises SiteError where a quantizer is never called.
    """
    found = trace(model, example)
    modules = dict(model.named_modules(remove_duplicate=False))
    quantizers = sites(model)
    layers: list[LayerCost] = []
    counted: set[int] = set()
    for entry in found.layers.values():
        layer = modules[entry.name]
        first, *others = (f"{entry.name}.{o}" if entry.name else o for o in SWAPS_BY_QUANT[type(layer)])
        second = others[0] if others else ""
        operands, shape = (first, second), torch.Size()
        elements = scales = zero_points = bias = 0
        table = ""
        if not isinstance(layer, QuantMatMul):
            shape = weight_of(layer).shape
            has_bias = getattr(layer, "bias", None) is not None
            bias = shape[0] if has_bias or entry.name in found.folds else 0
            quantizer: Quantizer | None = layer.weight_quantizer
            if quantizer is not None:
                operands = (quantizer.name, second)  # a tied weight answers to its first name
            if id(layer.weight) not in counted:
                counted.add(id(layer.weight))
                elements = layer.weight.numel()
                if quantizer is not None:
                    scales = quantizer.range.shape[1]
                    zero_points = scales if quantizer.has_zero_point() else 0
                    table = quantizer.scheme.grid if quantizer.table is not None else ""
        layers.append(
            LayerCost(
                entry.name,
                entry.kind,
                entry.macs,
                operands,
                elements,
                scales,
                zero_points,
                bias,
                entry.operands,
                tuple(shape),
                activation_scales={s: _stored(quantizers[s]) for s in entry.operands if s in quantizers},
                weight_table=table,
            )
        )
    own = {id(t) for q in quantizers.values() for t in (*q.parameters(), *q.buffers())}
    # The state dict, not buffers(): what a model makes anew from its arguments is in no file.
    plain = {
        name: t
        for name, t in model.state_dict(keep_vars=True).items()
        if isinstance(t, Tensor) and id(t) not in own and not _is_counter(t)
    }
    # By owner, as a module that we do not quantize keeps a weight in float that a quantized layer shares.
    packed = {id(modules[name]) for name in (*found.layers, *found.folds.values())}
    kept = {id(t): t for name, t in plain.items() if id(modules[name.rpartition(".")[0]]) not in packed}
    return CostModel(
        layers=tuple(layers),
        present={name: q.bits.whole() for name, q in quantizers.items()},
        float_macs=found.float_macs,
        other_bytes=_bytes(kept),
        float_bytes=_bytes({id(t): t for t in plain.values()}),
        target=get_target(target if target is not None else getattr(model, "bitsmith_target", "native")),
        live=liveness(model, example, found.folds.values()),
    )


def _stored(quantizer: Quantizer) -> int:
    """Scales and zero points in the file; a dynamic activation has its zero points alone there."""
    return quantizer.range.shape[1] * ((quantizer.scheme.range != "dynamic") + quantizer.has_zero_point())


def _bytes(tensors: Mapping[int, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _is_counter(tensor: Tensor) -> bool:
    """BatchNorm's num_batches_tracked: a training counter that no file for inference holds."""
    return tensor.dtype == torch.int64 and tensor.ndim == 0
