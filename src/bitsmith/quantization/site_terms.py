"""site_terms: terms of the loss that need activations, added where the activation is.

    L = L_task + strength * error(a, reference)

The term's value is never computed in training: `approximate` returns its first argument as it is, and in
backward adds d error / d a to what arrives. So it is the plain sum under eager and compiled forwards,
activation checkpointing alike, where a value collected in forward and added to the loss would be recomputed,
lost or summed twice.

Besides what methods with such terms need: the float model beside the quantized one, a layer's output in
float, and where outputs are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from bitsmith.errors import SiteError
from bitsmith.numerics.output_error import output_error_gradient
from bitsmith.quantization.layers import CONVOLUTIONS, SWAPS_BY_QUANT, QuantEmbedding, weight_of


def approximate(
    y: Tensor, a: Tensor, reference: Tensor, strength: Tensor, loss: str, level: str | None = "a"
) -> Tensor:
    """``y`` itself; in backward ``a`` gets strength * d output_error(a, reference) / d a.

    a, reference: y, or others. level: which of the two is the level, "a" or "reference", or None; see
    numerics.output_error. strength is 0-D and carries the share of the step's rows that this micro-batch is.
    """
    # Dynamo traces no function that is given one tensor twice.
    own, other = (None if t is y else t for t in (a, reference))
    result: Tensor = _Approximated.apply(y, own, other, strength, loss, level)
    return result


class _Approximated(Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        y: Tensor,
        a: Tensor | None,
        reference: Tensor | None,
        strength: Tensor,
        loss: str,
        level: str | None,
    ) -> Tensor:
        ctx.save_for_backward(y, a, reference, strength)
        ctx.loss, ctx.level = loss, level
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        y, own, other, strength = ctx.saved_tensors
        a, reference = y if own is None else own, y if other is None else other
        level = {"a": a, "reference": reference, None: None}[ctx.level]
        slope = output_error_gradient(a, reference, level, ctx.loss, strength).to(a.dtype)
        return (g + slope, None, *[None] * 4) if own is None else (g, slope, *[None] * 4)


def float_output(layer: Any, x: Tensor) -> Tensor:
    """What a quantized layer with a weight would return for ``x`` in float, as a function of its weight
    alone."""
    x, weight = x.detach(), weight_of(layer)
    if isinstance(layer, QuantEmbedding):
        return layer._rows(x, weight)
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(layer, CONVOLUTIONS):
        return layer._conv_forward(x, weight, bias)
    return F.linear(x, weight, bias)


def float_copy(model: nn.Module) -> nn.Module:
    """A copy of a prepared model without its quantizers, in eval mode; its parameters become buffers, so that
    no optimizer finds them while a checkpoint still does."""
    memo: dict[int, Any] = {}
    for layer in model.modules():
        for operand in SWAPS_BY_QUANT.get(type(layer), ()):
            memo[id(getattr(layer, f"{operand}_quantizer"))] = None
    copied = copy.deepcopy(model, memo).eval()
    buffers: dict[int, Tensor] = {}  # tied ones stay tied
    for module in copied.modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            tensor = None if parameter is None else buffers.setdefault(id(parameter), parameter.data)
            module.register_buffer(name, tensor)
    return copied


class Output(NamedTuple):
    """A tensor that something puts out. module: in the quantized model and its float copy alike; operand:
    which argument of that module it is, None for what the module returns; at: the module here that returns
    it."""

    name: str
    module: str
    operand: int | None
    at: nn.Module


def layer_outputs(model: nn.Module) -> dict[str, Output]:
    """The quantized activations of a model, by site; of a layer with its weight alone quantized what it
    returns, by the layer's name and `.output`."""
    found: dict[str, Output] = {}
    for name, layer in model.named_modules():
        operands = SWAPS_BY_QUANT.get(type(layer), ())
        live = {o: q for o in operands if (q := getattr(layer, f"{o}_quantizer")) and not q.bits.in_float}
        inputs = [operand for operand in operands if operand != "weight"]
        for place, operand in enumerate(inputs):
            if operand in live:
                found[live[operand].name] = Output(live[operand].name, name, place, live[operand])
        if list(live) == ["weight"]:
            output = f"{name}.output" if name else "output"
            found[output] = Output(output, name, None, layer)
    return found


def block_outputs(model: nn.Module, every: bool = False) -> dict[str, Output]:
    """What blocks return, by their names: the outermost members of a Sequential or ModuleList that hold at
    least two quantized layers and are no such list themselves; with ``every`` all modules that hold a
    quantized layer.

    Raises SiteError for a model without blocks.
    """
    found: dict[str, Output] = {}
    lists = nn.Sequential | nn.ModuleList
    members = {id(child) for m in model.modules() if isinstance(m, lists) for child in m.children()}
    for name, module in model.named_modules():
        layers = sum(type(m) in SWAPS_BY_QUANT for m in module.modules())
        block = id(module) in members and not isinstance(module, lists) and layers >= 2
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and ((layers and every) or (block and not inside)):
            found[name] = Output(name, name, None, module)
    if not found:
        raise SiteError(
            "this model has no blocks",
            where=type(model).__name__,
            expected="members of a Sequential or ModuleList with at least two quantized layers each",
            remedy="Name modules, or take the outputs of layers",
        )
    return found


def watch(model: nn.Module, outputs: Sequence[Output], seen: list[Tensor | None]) -> None:
    """Have every forward of ``model`` leave these outputs in ``seen``, in their order; all None before.

    A list, as a compiled forward would be compiled anew for a dict whose keys come and go.
    """

    def hook(at: int, output: Output) -> Callable[..., None]:
        def look(module: nn.Module, arguments: tuple[Tensor, ...], returned: Any) -> None:
            if seen[at] is not None:
                raise SiteError(
                    "this runs several times in a forward, so no single tensor is its output",
                    where=output.name,
                    remedy="Leave it out with `sites`",
                )
            found = returned if output.operand is None else arguments[output.operand]
            seen[at] = found[0] if isinstance(found, tuple) else found

        return look

    for at, output in enumerate(outputs):
        model.get_submodule(output.module).register_forward_hook(hook(at, output))
