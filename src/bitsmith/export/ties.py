"""Rounding ties: telling a float32 sum in another order from a model that is another one.

Two runtimes add the same products in different orders, so that their sums differ in the last bits. Where one
lies within a hair of the border between two codes, the activation rounds to the neighbour, and everything
behind it moves by whole steps: rare (one activation in ten million), but with 200,000 activations an image,
as in a ResNet-20, half of the 8-bit rows. Such a row is told from a wrong one by its *first* activation site
whose codes differ: all codes before it are equal, the ones that differ there do so by one, and the reference
lay within ``TIE`` steps of the border. A wrong scale, code or kernel fails that at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.quantization.integer_layers import FrozenQuantizer, packed_layers
from bitsmith.quantization.quantizer import Quantizer

TIE = 1e-3  # of a step: float32 sums differ by about 1e-4 steps on grids of 8 bits


@dataclass
class Probe:
    """What one forward showed, in the order in which it came: activations in steps, and layer outputs.

    steps: site -> (x / scale - half before rounding, the same after it); only sites with one stored scale.
    outputs: layer -> (its output, how many sites had come before it). rows: of the input.
    """

    steps: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    outputs: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    rows: int = 0


@torch.no_grad()
def probe(model: nn.Module, x: Tensor) -> Probe:
    """Watch a prepared or packed model on ``x``; a module that is called twice shows its first call."""
    seen = Probe(rows=len(x))
    with _hooks(model, seen):
        model(x)
    return seen


def values_of(model: nn.Module, seen: Probe) -> dict[str, Tensor]:
    """The quantized activations that ``seen`` shows, as values."""
    scales = dict(_scales(model).values())
    return {site: (after + scales[site][1]) * scales[site][0] for site, (_, after) in seen.steps.items()}


@contextmanager
def _hooks(model: nn.Module, seen: Probe) -> Iterator[None]:
    scales, layers = _scales(model), {layer: name for name, layer in packed_layers(model).items()}

    def at_site(quantizer: nn.Module, inputs: Any, output: Tensor) -> None:
        site, (scale, half) = scales[quantizer]
        seen.steps.setdefault(site, (inputs[0] / scale - half, output / scale - half))

    def at_layer(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.outputs.setdefault(layers[layer], (output, len(seen.steps)))  # type: ignore[index]

    handles = [q.register_forward_hook(at_site) for q in scales]
    handles += [layer.register_forward_hook(at_layer) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scales(model: nn.Module) -> dict[nn.Module, tuple[str, tuple[Tensor, float]]]:
    """Activation quantizers with one stored scale: module -> (site, (scale, half))."""
    found: dict[nn.Module, tuple[str, tuple[Tensor, float]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and module.kind == "activation" and not module.bits.in_float:
            at = module.levels()
            if module.scheme.range != "dynamic" and at.scale.numel() == 1:
                found[module] = (module.name, (at.scale, at.half))
        elif isinstance(module, FrozenQuantizer) and module.scale is not None and module.scale.numel() == 1:
            found[module] = (name, (module.scale, module.form.runs[0][1][2]))
    return found


def first_differences(reference: Probe, got: dict[str, Tensor], model: nn.Module) -> tuple[Tensor, Tensor]:
    """Per row: index of the first site whose codes differ (the number of sites, if none), and whether every
    difference there is a tie. ``got``: site -> values, out of ``model``'s file; missing sites are passed."""
    scales = dict(_scales(model).values())
    rows = reference.rows
    first = torch.full((rows,), len(reference.steps))
    tied = torch.ones(rows, dtype=torch.bool)
    for index, (site, (before, after)) in enumerate(reference.steps.items()):
        if site not in got or got[site].numel() != after.numel():
            continue
        scale, half = scales[site]
        values = got[site].reshape(after.shape)  # a runtime may see the tokens of all rows as one axis
        apart = by_row((values / scale - half - after).abs(), rows)
        differs = ~(apart < 0.5)  # not a number differs too
        to_border = by_row(((before - before.floor()) - 0.5).abs(), rows)
        excused = (to_border <= TIE) & (apart < 1.5)
        new = differs.any(1) & (first == len(reference.steps))
        first[new] = index
        tied[new] = (excused | ~differs).all(1)[new]
    return first, tied


def by_row(values: Tensor, rows: int) -> Tensor:
    """(rows, n): what belongs to each row of the input. Some models put rows and tokens into one axis (OPT's
    MLP); what does not depend on the input (embedded positions) belongs to every row."""
    if len(values) % rows == 0:
        return values.reshape(rows, -1)
    return values.reshape(1, -1).expand(rows, -1)
