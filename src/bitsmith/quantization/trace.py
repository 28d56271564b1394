"""trace: run the model once and write down what a plan's cost and `finalize` need to know.

Per quantized layer: multiply-accumulates, sizes of its operands, how often it ran; which BatchNorm can be
folded into which layer; and the products that no site covers (a scaled_dot_product_attention in a user's
model, a float layer), which cost 32 x 32 bits. The whole model's MACs come from PyTorch's own FLOP counter,
the sites' from shapes; what is left over is the difference.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bitsmith.errors import SiteError
from bitsmith.quantization.layers import (
    CONVOLUTIONS,
    WITH_WEIGHTS,
    QuantConvTranspose2d,
    QuantEmbedding,
    QuantMatMul,
    QuantTransposedLinear,
    in_eval_mode,
    weight_of,
)
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
    """What one forward showed, per sample. folds: layer -> the BatchNorm that can be folded into it, because
    it alone reads its output; not where the weight has one scale for the tensor, or is tied."""

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
    modules: dict[str, Any] = dict(model.named_modules())
    names = {id(m): n for n, m in modules.items()}
    layers: dict[str, LayerTrace] = {}
    consumers = _Consumers()
    producers: dict[int, str] = {}
    readers: dict[str, str] = {}
    norm_calls: Counter[str] = Counter()
    called: set[str] = set()

    def after_layer(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name = names[id(layer)]
        entry = layers.setdefault(name, LayerTrace(name, _kind(layer)))
        entry.calls += 1
        entry.macs += _macs(layer, inputs, output)
        for operand, tensor in _operands(layer, inputs):
            site = f"{name}.{operand}" if name else operand
            entry.operands[site] = entry.operands.get(site, 0) + tensor.numel() // samples
        producers[id(output)] = name
        consumers.watch(output)

    def before_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        norm_calls[names[id(norm)]] += 1
        if id(inputs[0]) in producers:
            layer = modules[producers[id(inputs[0])]]
            # Of a Linear's (N, T, C) a BatchNorm1d normalises T, which is not the axis of its weight.
            if isinstance(layer, CONVOLUTIONS) or inputs[0].ndim == 2:
                readers[producers[id(inputs[0])]] = names[id(norm)]

    hooks = []
    for module in model.modules():
        if isinstance(module, (*WITH_WEIGHTS, QuantMatMul)):
            hooks.append(module.register_forward_hook(after_layer))
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            hooks.append(module.register_forward_pre_hook(before_norm))
    quantizers = sites(model)
    for name, quantizer in quantizers.items():
        hooks.append(quantizer.register_forward_pre_hook(lambda _, __, name=name: called.add(name)))
    try:
        with in_eval_mode(model), _unfused(), FlopCounterMode(display=False) as flops, consumers:
            output = model(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    dead = [name for name in quantizers if name not in called]
    if dead:
        raise SiteError(
            "the quantizer of this site was never called",
            where=dead[0],
            remedy="The model bypasses this layer: set its bits to 32 in overrides, or remove it",
        )
    for entry in layers.values():
        entry.macs //= samples
    weight_uses = Counter(id(m.weight) for m in modules.values() if hasattr(m, "weight"))
    returned = {id(t) for t in torch.utils._pytree.tree_leaves(output)}
    folds = {
        producer: norm
        for producer, norm in readers.items()
        if layers[producer].calls == norm_calls[norm] == consumers.uses(producer, producers, returned) == 1
        and _can_fold(modules[producer], modules[norm], weight_uses)
    }
    total = flops.get_total_flops() // 2 // samples
    return Trace(layers, folds, max(total - sum(entry.macs for entry in layers.values()), 0))


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """Inside, attention and recurrent layers run as the products they consist of: the counter misses their
    fused forms (nn.MultiheadAttention's fast path, oneDNN's LSTM)."""
    mha = torch.backends.mha
    mkldnn: Any = torch.backends.mkldnn  # its flags() would warn of TF32 and set more than this one
    fast, fused = mha.get_fastpath_enabled(), mkldnn.enabled
    mha.set_fastpath_enabled(False)
    mkldnn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(fast)
        mkldnn.enabled = fused


def _can_fold(layer: Any, norm: Any, weight_uses: Counter[int]) -> bool:
    """Whether gamma / sigma, one factor per output channel, can go into scales that are the layer's own."""
    if not isinstance(layer, WITH_WEIGHTS) or isinstance(layer, QuantEmbedding):
        return False
    if weight_uses[id(layer.weight)] > 1 or norm.running_var is None:
        return False
    quantizer = layer.weight_quantizer
    return quantizer is None or quantizer.bits.in_float or quantizer.scheme.granularity != "tensor"


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


def _kind(layer: nn.Module) -> str:
    """What a layer is to those who count: how its weight lies is of no matter there."""
    if isinstance(layer, QuantTransposedLinear):
        return "Linear"
    return type(layer).__name__.removeprefix("Quant")


def _macs(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    if isinstance(layer, QuantEmbedding):
        return 0
    if isinstance(layer, QuantMatMul):
        return output.numel() * inputs[0].shape[-1]
    if isinstance(layer, QuantConvTranspose2d):  # each input meets the whole kernel, wherever it lands
        return inputs[0].numel() * layer.weight[0].numel()
    return output.numel() * weight_of(layer)[0].numel()


def _operands(layer: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[str, Tensor]]:
    """(operand, activation) of a layer."""
    if isinstance(layer, QuantMatMul):
        return [("left", inputs[0]), ("right", inputs[1])]
    return [] if isinstance(layer, QuantEmbedding) else [("input", inputs[0])]
