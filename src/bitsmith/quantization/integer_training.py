"""Layers that train on integers: their weights are codes and scales, and nothing else, at any moment.

    forward     x -> codes, per token as they come (nearest);  y = sum over k of x w by integers, times scales
    saved       the codes of x (two in a byte up to 4 bits) and their scales
    backward    dX and dW from stochastic codes of dY (integer_gradients)
    update      dW goes to ``sink`` inside backward and is gone afterwards: no set of gradients ever exists

A weight is the `PackedWeight` that inference has, at the same name and in the same bytes, and an input has
the same `FrozenQuantizer`; so nothing is converted before a model is saved, nor when it trains on. Float are
biases, which are parameters as ever, scales, and what flows between layers. Making these layers is
integer_prepare's work, moving their codes that of `optim`.

Differences from the well-known implementations: torchao's prototype keeps int8 weights and multiplies
bfloat16; Jetfire (2403.12422) keeps a master weight; TinyEngine (2206.15472) has integers forward and floats
backward. Rounding of activations is passed straight through: a range found in the tensor itself clips
nothing. Where the range is a stored number, what lies at its ends gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bitsmith.errors import SiteError
from bitsmith.kernels.choose import Backend, best
from bitsmith.kernels.convolution import convolve, pack_filters
from bitsmith.kernels.operands import Activations, pack_nibbles, unpack_nibbles
from bitsmith.quantization.integer_codes import grid_of, operand, scales_of, unsigned_codes
from bitsmith.quantization.integer_gradients import (
    WeightGradient,
    conv_input_gradient,
    conv_weight_gradient,
    linear_input_gradient,
    linear_weight_gradient,
)
from bitsmith.quantization.integer_layers import ConvGeometry, FrozenQuantizer, PackedWeight
from bitsmith.quantization.integer_products import activation_codes

NIBBLE = 4  # bits


class IntLayer(nn.Module):
    """What the three layers share.

    gradients: bits of dY in both products. sink: what takes the gradient of the weight, an integer
    optimizer's; trainable False freezes the codes. seed: of the noise in the next backward, set by the
    optimizer for each step. Neither is part of copies, pickles and files.
    """

    weight: PackedWeight
    sink: Callable[[WeightGradient], None] | None
    name: str

    def _begin(self, weight: PackedWeight, gradients: int, name: str) -> None:
        self.weight, self.gradients, self.name = weight, gradients, name
        self.trainable, self.sink, self.seed = True, None, 0

    def _anchor(self) -> Tensor | None:
        """What makes autograd call backward where neither x nor a bias needs a gradient."""
        wanted = self.trainable and torch.is_grad_enabled()
        return torch.empty(0, requires_grad=True) if wanted else None

    def _give(self, gradient: WeightGradient) -> None:
        if self.sink is None:
            raise SiteError(
                "nothing takes the gradient of this layer's codes",
                where=self.name,
                remedy="Make an integer optimizer for the model, such as bitsmith.optim.IntegerSGD(model, "
                "lr=...), or set trainable = False",
            )
        self.sink(gradient)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sink": None}

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"gradients of {self.gradients} bits" if self.trainable else "frozen"


class IntLinear(IntLayer):
    """``x @ W.T + b`` by integers: (..., in_features) -> (..., out_features)."""

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: PackedWeight,
        input: FrozenQuantizer,
        bias: nn.Parameter | None,
        *,
        gradients: int = 8,
        hadamard: bool = False,
        transposed: bool = False,
        name: str = "",
    ) -> None:
        """``hadamard``: dW's operands go through a randomised transform over 16 tokens; ``transposed``: it
        stands for a layer that keeps its weight as (in, out)."""
        super().__init__()
        self._begin(weight, gradients, name)
        self.input, self.hadamard, self.transposed = input, hadamard, transposed
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.bias, self._anchor(), self)


class IntConv2d(IntLayer):
    """A convolution over two axes by integers, zeros as padding: (N, C, H, W) -> (N, C', H', W'). A token is
    an image: it has one scale."""

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: PackedWeight,
        input: FrozenQuantizer,
        bias: nn.Parameter | None,
        geometry: ConvGeometry,
        *,
        gradients: int = 8,
        name: str = "",
    ) -> None:
        super().__init__()
        self._begin(weight, gradients, name)
        self.input, self.geometry = input, geometry
        self.register_parameter("bias", bias)

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns of zeros on each side."""
        given, kernel, dilation = self.geometry.padding, self.weight.shape[2:], self.geometry.dilation
        if isinstance(given, str):
            reach = [0 if given == "valid" else dilation[i] * (kernel[i] - 1) for i in (0, 1)]
            return reach[0] // 2, reach[1] // 2
        return given[0], given[1]

    def forward(self, x: Tensor) -> Tensor:
        return _Conv2d.apply(x, self.bias, self._anchor(), self)


class IntEmbedding(IntLayer):
    """Rows of a table of codes: indices (...) -> (..., embedding_dim). Only rows that are looked up become
    floats, and only they are updated."""

    def __init__(
        self, weight: PackedWeight, *, padding_idx: int | None = None, gradients: int = 8, name: str = ""
    ) -> None:
        super().__init__()
        self._begin(weight, gradients, name)
        self.padding_idx = padding_idx
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return _Embedding.apply(x, self._anchor(), self)


class PassingQuantizer(FrozenQuantizer):
    """A frozen quantizer that passes gradients straight through: of what stays packed in a model that trains
    (products of activations, layers without an integer form)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach() + (x - x.detach())  # + 0: the very values


def int_layers(model: nn.Module) -> dict[str, IntLayer]:
    """The integer layers of a model by qualified name, each module once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, IntLayer)}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, anchor: Tensor | None, layer: IntLinear) -> Tensor:
        backend = best()
        codes, kept = codes_of(x, layer.input, backend)
        y = backend.values(codes, operand(layer.weight, backend), bias)
        ctx.layer, ctx.shape = layer, x.shape
        keep(ctx, codes, kept)
        return y.view(*x.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer, backend = ctx.layer, best()
        g = dy.reshape(-1, layer.out_features).float()
        x = kept_codes(ctx, layer.input, (len(g), layer.in_features))
        settings = (layer.gradients, layer.seed, backend, layer.name)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = linear_input_gradient(g, layer.weight, *settings)
            dx = inside(dx, x.codes, layer.input).view(ctx.shape)
        if layer.trainable:
            grid = range_of(layer.input)
            layer._give(linear_weight_gradient(g, x, grid[:2], settings[0], layer.hadamard, *settings[1:]))
        return dx, g.sum(0) if ctx.needs_input_grad[1] else None, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, anchor: Tensor | None, layer: IntConv2d) -> Tensor:
        backend, weight, g = best(), layer.weight, layer.geometry
        found = _encode(layer.input, x.reshape(len(x), -1), backend)
        bits, low, _, half = grid_of(weight)
        filters = pack_filters(
            backend,
            unsigned_codes(weight, backend).view(weight.shape),
            bits,
            groups=g.groups,
            offset=low,
            half=half != 0,
            scale=scales_of(weight)[:, 0],
        )
        kernel, padding = (weight.shape[2], weight.shape[3]), layer.padding
        scale = found.row_scale
        assert scale is not None
        if len(scale) == len(x):  # of each image: of each of its pixels
            reach = [g.dilation[i] * (kernel[i] - 1) for i in (0, 1)]
            size = [(x.shape[2 + i] + 2 * padding[i] - reach[i] - 1) // g.stride[i] + 1 for i in (0, 1)]
            scale = scale.repeat_interleave(size[0] * size[1])
        operand = Activations(found.codes.view(x.shape), found.zero_point, scale)
        stride, dilation = (g.stride[0], g.stride[1]), (g.dilation[0], g.dilation[1])
        y = convolve(backend, operand, filters, kernel, stride, padding, dilation, bias)
        ctx.layer, ctx.shape = layer, x.shape
        keep(ctx, found, _narrow(found, layer.input))
        return y.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer, backend, shape = ctx.layer, best(), ctx.shape
        g, weight, geometry = dy.float(), layer.weight, layer.geometry
        found = kept_codes(ctx, layer.input, (len(g), shape[1] * shape[2] * shape[3]))
        x = Activations(found.codes.view(shape), found.zero_point, found.row_scale)
        settings = (layer.gradients, layer.seed, backend, layer.name)
        dx = None
        if ctx.needs_input_grad[0]:
            size = (shape[2], shape[3])
            dx = conv_input_gradient(g, weight, geometry, layer.padding, size, *settings)
            dx = inside(dx, x.codes, layer.input)
        if layer.trainable:
            layer._give(conv_weight_gradient(g, x, weight, geometry, layer.padding, *settings))
        return dx, g.sum((0, 2, 3)) if ctx.needs_input_grad[1] else None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, layer: IntEmbedding) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer.weight.rows(x.reshape(-1)).view(*x.shape, layer.embedding_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        """Rows are looked up, not multiplied: their gradients are sums of dY, which need no codes."""
        layer, (x,) = ctx.layer, ctx.saved_tensors
        index, g = x.reshape(-1), dy.reshape(-1, layer.embedding_dim).float()
        if layer.padding_idx is not None:
            real = index != layer.padding_idx
            index, g = index[real], g[real]
        rows, inverse = index.unique(return_inverse=True)
        sums = torch.zeros(len(rows), layer.embedding_dim).index_add_(0, inverse, g)
        if layer.trainable and len(rows):
            layer._give(WeightGradient(lambda start, stop: sums[start:stop], rows))
        return None, None, None


def range_of(quantizer: FrozenQuantizer) -> tuple[int, int, int]:
    """(bits, low, high) of inputs."""
    (bits, (low, high, _), _), *_ = quantizer.form.runs
    return bits, low, high


def _encode(quantizer: FrozenQuantizer, x: Tensor, backend: Backend) -> Activations:
    """Codes of x (m, k), a row of which is what has a scale of its own where ranges are dynamic."""
    form = quantizer.form
    if form.dynamic and form.granularity in ("token", "channel"):
        _, low, high = range_of(quantizer)
        found = backend.quantize(x, low, high, asymmetric=form.grid == "asymmetric")
    else:
        found = activation_codes(quantizer, x, backend)
    scale = found.row_scale
    assert scale is not None
    total = x.sum(1)
    if not bool(torch.isfinite(total).all()):  # a code has no NaN to pass on: the scale has
        scale = scale + total * 0
    return Activations(found.codes, found.zero_point, scale)


def codes_of(x: Tensor, quantizer: FrozenQuantizer, backend: Backend) -> tuple[Activations, Tensor]:
    """Codes of the rows of x and what is kept of them: one set for all layers that read this very tensor, of
    which each would else save its own. What is no result of autograd's may change unseen, and is not
    asked."""
    known = getattr(x, "_codes", None)
    key = (quantizer.form, x._version) if x.grad_fn is not None and quantizer.form.dynamic else None
    if known is not None and known[0] == key:
        return known[1], known[2]
    found = _encode(quantizer, x.reshape(-1, x.shape[-1]), backend)
    kept = _narrow(found, quantizer)
    if key is not None:
        x._codes = (key, found, kept)  # type: ignore[attr-defined]
    return found, kept


def _narrow(x: Activations, quantizer: FrozenQuantizer) -> Tensor:
    bits, low, _ = range_of(quantizer)
    return pack_nibbles(x.codes, low) if bits <= NIBBLE else x.codes


def keep(ctx: Any, x: Activations, codes: Tensor, *others: Tensor) -> None:
    """Save for backward what `codes_of` gave, and other tensors."""
    zero = x.zero_point if isinstance(x.zero_point, Tensor) else None
    ctx.zero_point = 0 if isinstance(x.zero_point, Tensor) else x.zero_point
    ctx.save_for_backward(codes, x.row_scale, zero, *others)


def kept_codes(ctx: Any, quantizer: FrozenQuantizer, shape: tuple[int, int]) -> Activations:
    """The codes (m, k) that `keep` has saved."""
    codes, scale, zero, *_ = ctx.saved_tensors
    bits, low, _ = range_of(quantizer)
    codes = unpack_nibbles(codes, shape[1], low) if bits <= NIBBLE else codes.view(shape)
    return Activations(codes, ctx.zero_point if zero is None else zero, scale)


def inside(dx: Tensor, codes: Tensor, quantizer: FrozenQuantizer) -> Tensor:
    """dX, 0 where a stored range has clipped x; but 0 is the lowest code of what is never negative."""
    if quantizer.form.dynamic:
        return dx
    _, low, high = range_of(quantizer)
    codes = codes.view(dx.shape)
    clipped = codes == high
    if quantizer.form.grid != "unsigned":
        clipped |= codes == low
    return dx.masked_fill(clipped, 0.0)
