"""sensitivity: what each width of each site would cost in loss, from one backward per batch.

    S_l(b) = mean over samples of  sum over outputs of (g_l * (y_l(b) - y_l))^2

y_l(b) is layer l's output with one of its operands at b bits and all else in float, g_l the gradient of a
sample's loss there: a diagonal Fisher estimate of the loss that the error costs. All sites and widths share
the one backward.

Differences from Hessian-based scores (HAWQ and its kind): no second derivative and no power iteration, and
the error is measured at the layer's output, where it is what the next layer sees, not at the weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.quantization.layers import (
    CONVOLUTIONS,
    INPUTS_FIRST,
    SWAPS_BY_QUANT,
    QuantEmbedding,
    in_eval_mode,
    weight_of,
)
from bitsmith.quantization.quantizer import Quantizer
from bitsmith.quantization.scheme import FLOAT


def sensitivity(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Site -> score of each of its rows, (K,), in squared loss per sample; of all sites of a calibrated
    model.

    ``loss(outputs, targets)`` is a mean over the samples of a batch. A site with several rows (a method gave
    it candidates) has a score for each, and where channels of a weight have widths of their own, for each
    channel (K, C): an output channel sees its own weights alone. A tied weight has the sum over the layers
    that use it.
    """
    layers = {name: m for name, m in model.named_modules() if type(m) in SWAPS_BY_QUANT}
    scores: dict[str, Tensor] = {}
    samples = 0
    with in_eval_mode(model):
        for x, targets in batches:
            seen, outputs = _observe(model, layers, x)
            value = loss(outputs, targets) * len(x)
            found = [(name, *pair) for name, calls in seen.items() for pair in calls]
            gradients = torch.autograd.grad(value, [y for _, _, y in found], allow_unused=True)
            for (name, inputs, y), g in zip(found, gradients, strict=True):
                if g is not None:
                    _add_scores(scores, layers[name], inputs, y.detach(), g)
            samples += len(x)
    return {name: total / max(samples, 1) for name, total in scores.items()}


@torch.no_grad()
def output_errors(model: nn.Module, *inputs: Any, **keywords: Any) -> dict[str, Tensor]:
    """Site -> relative squared error of its layer's output at each of its rows, (K,), on one batch.

    |y(b) - y|^2 / |y|^2 with y the layer's float output for the inputs that it has in the quantized model,
    and y(b) that with one operand at b bits: what a site's width costs at this moment of a training. A tied
    weight has the sum over the layers that use it.
    """
    layers = {name: m for name, m in model.named_modules() if type(m) in SWAPS_BY_QUANT}
    scores: dict[str, Tensor] = {}
    with in_eval_mode(model):
        seen, _ = _observe(model, layers, *inputs, quantized=True, **keywords)
        for name, calls in seen.items():
            for operands, _ in calls:
                with without_quantizers([layers[name]]):
                    y = layers[name](*operands)
                _add_scores(scores, layers[name], operands, y, y.square().sum().clamp(min=1e-12).rsqrt())
    return scores


# Of how plans turn out that are trained (docs/findings.md), not of any theory.
EVENED = 0.5  # power of a site's level among the sites'
ADAPTED = 0.3  # share of a weight's score


def after_training(scores: Mapping[str, Tensor], weights: Collection[str]) -> dict[str, Tensor]:
    """``scores`` (site -> (K,), or of each channel (K, C)) made fit to choose widths for a model that will
    be trained; no longer losses. A score of 0, as that of 32 bits, stays so and is no part of a site's level.

    A score is the loss of a model that is rounded and left so. Training takes away most where most was lost:
    the levels of the sites (geometric means over their widths) move towards one another. And it moves
    ``weights`` to where their rounding costs little; what an activation's rounding lost stays lost.
    """
    fit = {}
    for name, row in scores.items():
        least = torch.finfo(row.dtype).tiny
        logs, whole = row.clamp(min=least).log(), row if row.ndim == 1 else row.sum(1)
        level = whole[whole > 0].log().mean() if bool(whole.any()) else whole.new_zeros(())
        fit[name] = torch.exp(logs - (1 - EVENED) * level) * (row > 0) * (ADAPTED if name in weights else 1.0)
    return fit


def _observe(
    model: nn.Module, layers: dict[str, Any], *arguments: Any, quantized: bool = False, **keywords: Any
) -> tuple[dict[str, list[tuple[tuple[Tensor, ...], Tensor]]], Tensor]:
    """One forward, in float unless ``quantized``: (inputs, output) of every call of every layer."""
    seen: dict[str, list[tuple[tuple[Tensor, ...], Tensor]]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_hook(
            lambda _, inputs, y, name=name: seen[name].append((tuple(i.detach() for i in inputs), y))
        )
        for name, layer in layers.items()
    ]
    try:
        with without_quantizers(() if quantized else layers.values()):
            outputs = model(*arguments, **keywords)
    finally:
        for handle in handles:
            handle.remove()
    return seen, outputs


@torch.no_grad()
def _add_scores(
    scores: dict[str, Tensor], layer: Any, inputs: tuple[Tensor, ...], y: Tensor, g: Tensor
) -> None:
    operands = SWAPS_BY_QUANT[type(layer)]
    for operand in operands:
        quantizer: Quantizer | None = getattr(layer, f"{operand}_quantizer")
        if quantizer is None:
            continue
        errors = []
        for row, width in enumerate(quantizer.bits.candidates.tolist()):
            changed = y  # in float, by definition
            if width != FLOAT:
                with without_quantizers([layer]):
                    changed = _output_at(layer, operand, quantizer, row, inputs)
            squares = (g * (changed - y)).square()
            if quantizer.bits.per_channel:
                errors.append(_by_channel(layer, squares, inputs))
            else:
                errors.append(squares.sum())
        total = torch.stack(errors)
        scores[quantizer.name] = scores[quantizer.name] + total if quantizer.name in scores else total


def _by_channel(layer: Any, squares: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """Sum of an output's squares by the channel of the weight that made each: (C,)."""
    if isinstance(layer, QuantEmbedding):
        sums = squares.sum(-1).flatten()
        return sums.new_zeros(layer.num_embeddings).index_add_(0, inputs[0].flatten(), sums)
    axis = 1 if isinstance(layer, CONVOLUTIONS) else squares.ndim - 1
    return squares.movedim(axis, 0).flatten(1).sum(1)


def _output_at(
    layer: Any, operand: str, quantizer: Quantizer, row: int, inputs: tuple[Tensor, ...]
) -> Tensor:
    """The layer's output with one operand at one row."""
    if operand == "weight":
        held = layer.weight.data
        changed = quantizer.at_row(weight_of(layer).data, row)
        try:
            layer.weight.data = changed.transpose(0, 1) if isinstance(layer, INPUTS_FIRST) else changed
            return layer(*inputs)
        finally:
            layer.weight.data = held
    place = operands_of(layer).index(operand)
    changed = quantizer.at_row(inputs[place], row)
    return layer(*inputs[:place], changed, *inputs[place + 1 :])


def operands_of(layer: Any) -> tuple[str, ...]:
    """The operands that a layer's forward is called with."""
    return tuple(o for o in SWAPS_BY_QUANT[type(layer)] if o != "weight")


@contextlib.contextmanager
def without_quantizers(layers: Iterable[Any]) -> Iterator[None]:
    """Inside, these layers compute in float."""
    taken = [
        (layer, f"{operand}_quantizer", getattr(layer, f"{operand}_quantizer"))
        for layer in layers
        for operand in SWAPS_BY_QUANT[type(layer)]
    ]
    try:
        for layer, name, _ in taken:
            setattr(layer, name, None)
        yield
    finally:
        for layer, name, quantizer in taken:
            setattr(layer, name, quantizer)
