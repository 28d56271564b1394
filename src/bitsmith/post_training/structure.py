"""structure: one forward of the float model, and what it shows of the layers that are to be rounded.

In which order they run; which share their input, and so their Hessian; which write into a residual stream,
with what lies between (BatchNorm) and behind (the norm that reads the sum); and how many rows of input each
sees. All of it is read off the tensors themselves, by identity: names and classes of the model do not matter.
Not here: the two streams and their sums (streams).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitsmith.quantization.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
    in_eval_mode,
)
from bitsmith.quantization.quantizer import Quantizer

WITH_WEIGHTS = (QuantLinear, QuantConv1d, QuantConv2d)
ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass
class Writer:
    """A layer whose output is a summand. batchnorm: between it and the addition; norm: reads the sum, 'rms'
    (a mean of squares), 'layer' (a variance) or none."""

    batchnorm: str | None = None
    norm: str | None = None


@dataclass
class Structure:
    """groups: layers of one input, in the order of execution; of one forward, by layer: calls, rows and bytes
    of all that `streams.look` may keep; left: layers that are not handled, and why."""

    groups: list[tuple[str, ...]] = field(default_factory=list)
    writers: dict[str, Writer] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


class Additions(TorchDispatchMode):
    """Calls ``found(name, other summand, sum)`` where a tensor that was given to ``expect`` is added to
    another of its shape. Of two such tensors the later one counts: the other layer is settled by then."""

    def __init__(self, found: Callable[[str, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.found = found
        self.expected: dict[
            int, tuple[str, Any]
        ] = {}  # by id, with a weak reference: an id may be used again

    def expect(self, name: str, tensor: Tensor) -> None:
        """Wait for ``tensor``, the output of the layer ``name``; what that gave before is forgotten."""
        self.expected = {key: value for key, value in self.expected.items() if value[0] != name}
        self.expected[id(tensor)] = (name, weakref.ref(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ADDITIONS or kwargs or not isinstance(args[1], Tensor):
            return func(*args, **(kwargs or {}))
        name, other = None, args[0]
        for key, (waiting, reference) in reversed(self.expected.items()):  # of two, the one that ran last
            mine, its = args if key == id(args[0]) else args[::-1]
            if key == id(mine) and reference() is mine and mine.shape == its.shape:
                name, other = waiting, its
                break
        if name is not None:
            self.expected = {k: v for k, v in self.expected.items() if k not in map(id, args)}
        if name is not None and func is torch.ops.aten.add_.Tensor:
            other = other.clone()  # it may be the one that the sum is written into
        total = func(*args)
        if name is not None:
            self.found(name, other, total)
        return total


@torch.no_grad()
def structure_of(model: nn.Module, float_model: nn.Module, example: Any) -> Structure:
    """The structure of a prepared ``model``, from a forward of the ``float_model`` that it was made from."""
    shape = Structure()
    layers = _handled(model, shape)
    found = {name: float_model.get_submodule(name) for name in layers}
    names = {id(module): name for name, module in found.items()}
    norms = {id(m): n for n, m in float_model.named_modules() if isinstance(m, BatchNorm)}
    outputs: dict[int, tuple[str, Any]] = {}  # of layers and of their BatchNorm: id -> (layer, reference)
    sums: dict[int, tuple[str, Any]] = {}
    groups: dict[tuple[Any, ...], list[str]] = {}
    seen: list[tuple[Any, int]] = []  # inputs, and a number for each

    def added(name: str, other: Tensor, total: Tensor) -> None:
        shape.writers.setdefault(name, Writer()).batchnorm = between.get(name)
        sums[id(total)] = (name, weakref.ref(total))

    between: dict[str, str] = {}
    additions = Additions(added)

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not arguments or not isinstance(arguments[0], Tensor):
            return
        x = arguments[0]
        name, reference = sums.get(id(x), ("", None))
        if reference is not None and reference() is x and "Norm" in type(module).__name__:
            if not isinstance(module, BatchNorm):
                kind = "rms" if "RMS" in type(module).__name__ else "layer"
                shape.writers[name].norm = shape.writers[name].norm or kind

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if id(module) in names:
            name, x = names[id(module)], arguments[0]
            number = next((n for reference, n in seen if reference() is x), len(seen))
            if number == len(seen):
                seen.append((weakref.ref(x), number))
            if name not in shape.calls:
                groups.setdefault((number, *_signature(layers[name].input_quantizer)), []).append(name)
            shape.calls[name] = shape.calls.get(name, 0) + 1
            shape.rows[name] = shape.rows.get(name, 0) + _row_count(module, output)
            kept = x.nbytes + 3 * output.nbytes  # with the other summand and the sum
            shape.bytes[name] = shape.bytes.get(name, 0) + kept
            outputs[id(output)] = (name, weakref.ref(output))
            between.pop(name, None)
            additions.expect(name, output)
        elif id(module) in norms and isinstance(arguments[0], Tensor):
            name, reference = outputs.get(id(arguments[0]), ("", None))
            if reference is not None and reference() is arguments[0]:
                between[name] = norms[id(module)]
                additions.expect(name, output)

    hooks = [m.register_forward_hook(after) for m in float_model.modules()]
    hooks += [m.register_forward_pre_hook(before) for m in float_model.modules()]
    try:
        with in_eval_mode(float_model), additions:
            float_model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for hook in hooks:
            hook.remove()
    for name in [name for name in layers if name not in shape.calls]:
        shape.left[name] = "the model never calls it"
    for members in groups.values():
        together = tuple(name for name in members if name not in shape.writers)
        shape.groups += [together] if together else []
        shape.groups += [(name,) for name in members if name in shape.writers]
    return shape


def _row_count(layer: nn.Module, output: Tensor) -> int:
    """Rows of input of one call: output positions."""
    channels = output.shape[-1] if isinstance(layer, nn.Linear) else output.shape[1]
    return output.numel() // max(channels, 1)


def _handled(model: nn.Module, shape: Structure) -> dict[str, Any]:
    """The layers that are to be rounded; the others go to ``shape.left``."""
    layers: dict[str, Any] = {}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, layer in model.named_modules():
        if isinstance(layer, QuantConvTranspose2d):
            shape.left[name] = "a transposed convolution: it is rounded to nearest"
        if not isinstance(layer, WITH_WEIGHTS):
            continue
        quantizer = layer.weight_quantizer
        if quantizer is None or quantizer.bits.in_float:
            shape.left[name] = "its weight is left in float"
        elif owners[id(layer.weight)] > 1:
            shape.left[name] = "its weight is tied: it is rounded to nearest"
        elif not isinstance(layer, nn.Linear) and layer.groups > 1:
            shape.left[name] = f"a convolution of {layer.groups} groups: it is rounded to nearest"
        else:
            layers[name] = layer
    return layers


def _signature(quantizer: Quantizer | None) -> tuple[Any, ...]:
    """Equal where two input quantizers give equal results."""
    if quantizer is None or quantizer.bits.in_float:
        return ()
    at = quantizer.levels()
    if quantizer.scheme.range == "dynamic":
        return quantizer.scheme, at.low, at.high, at.half
    numbers = (at.scale.flatten().tolist(), at.zero_point.flatten().tolist())
    return (*map(tuple, numbers), at.low, at.high, at.half)
