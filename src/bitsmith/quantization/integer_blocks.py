"""What surrounds the products of integer training: saved for backward as int8 codes, the rest made again.

    forward     y = f(a, b, ...), as ever
    saved       a, b, ... as int8 codes with a scale for each of their last axes (a token, a token's head)
    backward    f is run once more on what the codes stand for, and its own gradient is taken there

so that of a norm, of SwiGLU and of attention no float tensor lives from forward to backward: neither
products, nor probabilities, nor rotated queries. The forward is the very one of before; the gradient is
f's own at a point that differs by at most 1/254 of each row's largest value, rounded to nearest. ActNN
(2104.14129) and GACT (2206.11357) save codes of *every* operation of a float network, rounded
stochastically; checkpointing (1604.06174) saves floats and runs layers again, products included. Inputs of
layers need nothing of this: integer layers keep codes of them anyway (integer_training), one set for all
layers that read one tensor.

`save_codes` puts it into a model: norms over the last axis, gated MLPs that it knows, and modules that
offer it by a flag ``saves_codes``; a ReLU keeps its signs, exactly. Attention of transformers' models is
tasks.attention_codes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bitsmith.kernels.choose import best

HIGH = 127  # of codes
NORMS = (nn.RMSNorm, nn.LayerNorm)
# Whose forward is down(act(gate x) * up x), by class name: they are other people's.
GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP")


def from_codes(function: Callable[..., Tensor], *inputs: Tensor, parameters: Sequence[Tensor] = ()) -> Tensor:
    """``function(*inputs)``, of which backward keeps the inputs (..., n) as int8 codes alone. parameters:
    what the function reads besides and what has a gradient. The function draws no random numbers."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    made: Tensor = _FromCodes.apply(function, len(inputs), *inputs, *parameters)
    return made


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (2002.05202), elementwise."""
    return F.silu(gate) * up


def save_codes(model: nn.Module) -> tuple[str, ...]:
    """Let norms, ReLUs, gated MLPs and attention keep codes instead of floats for backward; what they
    compute stays. The names of these modules, in order; those that did already are not among them."""
    changed = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if getattr(module, "saves_codes", None) is False:
            module.saves_codes = True
        elif "forward" in vars(module):  # ours already, or somebody else's
            continue
        elif type(module) is nn.ReLU and not module.inplace:
            module.forward = _ReLU.apply  # type: ignore[method-assign]
        elif isinstance(module, NORMS) or kind.endswith("RMSNorm"):
            module.forward = functools.partial(_norm, module)
        elif kind in GATED and all(hasattr(module, part) for part in ("gate_proj", "up_proj", "act_fn")):
            module.forward = functools.partial(_gated, module)
        else:
            continue
        changed.append(name)
    return tuple(changed)


def save_floats(model: nn.Module) -> None:
    """The inverse, as for files: no trace of `save_codes` is left."""
    for module in model.modules():
        if getattr(module, "saves_codes", None) is True:
            module.saves_codes = False  # type: ignore[assignment]
        forward = vars(module).get("forward")
        if forward == _ReLU.apply or getattr(forward, "func", None) in (_norm, _gated):
            del module.forward


class _FromCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], count: int, *tensors: Tensor) -> Tensor:
        inputs, saved, backend = tensors[:count], [], best()
        for x in inputs:
            found = backend.quantize(x.reshape(-1, x.shape[-1]), -HIGH, HIGH)
            assert found.row_scale is not None
            saved += [found.codes.view(x.shape), found.row_scale.view(*x.shape[:-1], 1)]
        ctx.function, ctx.count = function, count
        ctx.save_for_backward(*saved, *tensors[count:])
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        split = 2 * ctx.count
        inputs = [codes * scale for codes, scale in zip(saved[:split:2], saved[1:split:2], strict=True)]
        tensors = [*inputs, *saved[split:]]
        for x, wanted in zip(inputs, needed, strict=False):
            x.requires_grad_(wanted)
        with torch.enable_grad():
            y = ctx.function(*inputs)
        asked = [x for x, wanted in zip(tensors, needed, strict=True) if wanted]
        found = iter(torch.autograd.grad(y, asked, dy))
        return None, None, *(next(found) if wanted else None for wanted in needed)


class _ReLU(torch.autograd.Function):
    """A byte for each value says all that its gradient needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return F.relu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return dy * positive


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    forward = functools.partial(type(module).forward, module)
    return from_codes(forward, x, parameters=list(module.parameters(recurse=False)))


def _gated(module: Any, x: Tensor) -> Tensor:
    hidden = from_codes(lambda gate, up: module.act_fn(gate) * up, module.gate_proj(x), module.up_proj(x))
    down: Tensor = module.down_proj(hidden)
    return down
