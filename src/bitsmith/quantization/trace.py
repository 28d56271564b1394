"""trace: run the model once and write down what a plan's cost and `finalize` need to know.

Per quantized layer: multiply-accumulates, sizes of its operands, how often it ran; which BatchNorm can be
folded into which layer; and the products that no site covers (a scaled_dot_product_attention in a user's
model, a float layer), which cost 32 x 32 bits. The whole model's MACs come from PyTorch's own FLOP counter,
the sites' from shapes; what is left over is the difference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bitsmith.errors import SiteError
from bitsmith.quantization.layers import QuantConv1d, QuantConv2d, QuantLinear, QuantMatMul
from bitsmith.quantization.quantizer import sites


@dataclass
class LayerTrace:
    """A quantized layer in a forward of one sample. macs: multiply-accumulates; operands: site -> size."""

    name: str
    kind: str
    macs: int = 0
    calls: int = 0
    operands: dict[str, int] = field(default_factory=dict)


@dataclass
class Trace:
    """What one forward showed, per sample. folds: layer -> the BatchNorm that alone reads its output."""

    layers: dict[str, LayerTrace]
    folds: dict[str, str]
    float_macs: int


@torch.no_grad()
def trace(model: nn.Module, example: Any) -> Trace:
    """Run ``model`` on ``example`` (a batch, or a tuple of arguments) in eval mode.

    Raises SiteError for a site that is never called.
    """
    arguments = example if isinstance(example, tuple) else (example,)
    samples = arguments[0].shape[0]
    names = {id(m): n for n, m in model.named_modules()}
    layers: dict[str, LayerTrace] = {}
    consumers = _Consumers()
    producers: dict[int, str] = {}
    readers: dict[str, str] = {}
    called: set[str] = set()

    def after_layer(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name = names[id(layer)]
        entry = layers.setdefault(name, LayerTrace(name, type(layer).__name__.removeprefix("Quant")))
        entry.calls += 1
        entry.macs += _macs(layer, inputs, output)
        for operand, tensor in _operands(layer, inputs):
            site = f"{name}.{operand}" if name else operand
            entry.operands[site] = entry.operands.get(site, 0) + tensor
        producers[id(output)] = name
        consumers.watch(output)

    def before_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in producers:
            readers[producers[id(inputs[0])]] = names[id(norm)]

    hooks = []
    for module in model.modules():
        if isinstance(module, (QuantLinear, QuantConv1d, QuantConv2d, QuantMatMul)):
            hooks.append(module.register_forward_hook(after_layer))
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            hooks.append(module.register_forward_pre_hook(before_norm))
    quantizers = sites(model)
    for name, quantizer in quantizers.items():
        hooks.append(quantizer.register_forward_pre_hook(lambda _, __, name=name: called.add(name)))
    was_training = model.training
    model.eval()
    try:
        with FlopCounterMode(display=False) as flops, consumers:
            output = model(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    dead = [name for name in quantizers if name not in called]
    if dead:
        raise SiteError(
            "the quantizer of this site was never called",
            where=dead[0],
            remedy="The model bypasses this layer: set its bits to 32 in overrides, or remove it",
        )
    for entry in layers.values():
        entry.macs //= samples
    returned = {id(t) for t in torch.utils._pytree.tree_leaves(output)}
    folds = {
        producer: norm
        for producer, norm in readers.items()
        if layers[producer].calls == 1 and consumers.uses(producer, producers, returned) == 1
    }
    total = flops.get_total_flops() // 2 // samples
    return Trace(layers, folds, max(total - sum(entry.macs for entry in layers.values()), 0))


class _Consumers(TorchDispatchMode):
    """Counts the operators that read the tensors it watches; it keeps them alive, so that ids stay theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, Tensor] = {}
        self.reads: dict[int, int] = {}

    def watch(self, tensor: Tensor) -> None:
        self.watched[id(tensor)] = tensor
        self.reads[id(tensor)] = 0

    def uses(self, producer: str, producers: dict[int, str], returned: set[int]) -> int:
        """How often the output of ``producer`` is read; being the model's own output counts."""
        return sum(self.reads[i] + (i in returned) for i, name in producers.items() if name == producer)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs)):
            if id(leaf) in self.reads:
                self.reads[id(leaf)] += 1
        return func(*args, **(kwargs or {}))


def _macs(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    if isinstance(layer, QuantMatMul):
        return output.numel() * inputs[0].shape[-1]
    if isinstance(layer, QuantLinear):
        return output.numel() * layer.in_features
    return output.numel() * layer.weight[0].numel()  # type: ignore[index]


def _operands(layer: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[str, int]]:
    """(operand, elements per sample); a weight counts once."""
    if isinstance(layer, QuantMatMul):
        return [("left", inputs[0][0].numel()), ("right", inputs[1][0].numel())]
    return [("input", inputs[0][0].numel())]
