"""Packed layers that multiply integers: the input becomes codes, which `kernels` multiplies by packed ones.

    y = (sum over k of (a - z) (c - z_w + half)) * s_w * s + b

The codes are those of `integer_layers`, the values too, but for the order in which this epilogue rounds;
there floats on the same grids are multiplied. `run_on_kernels` changes the class of layers whose grids
products take; nothing else of a model changes, and it is saved as before. The first forward packs the
weight a second time, as kernels read it: a model that is only looked at costs nothing. Any forward that is
not for them (another device or dtype, training, a gradient of the input, compiling, somebody who watches
the quantizer) is that of `integer_layers`. Not here: embeddings, which look rows up, and products of two
activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.kernels.choose import Backend, best
from bitsmith.kernels.convolution import convolve
from bitsmith.kernels.native import Native
from bitsmith.kernels.operands import MOST_INPUTS, Activations, Weight, by_panel
from bitsmith.kernels.prepared import PreparedProduct
from bitsmith.numerics.calibrate import range_of
from bitsmith.numerics.grid import GRIDS
from bitsmith.quantization.integer_layers import (
    FloatWeight,
    FrozenQuantizer,
    IntegerConv,
    IntegerLinear,
    PackedWeight,
)

# A product of integers takes the bytes of an image tap by tap. Where these meet few filters that takes longer
# than floats do, unless the image is so small that unpacking the weight is what counts there.
NARROW, SMALL = 256, 2048  # channels in times out; pixels of a batch


@dataclass(frozen=True)
class Operands:
    """What a layer is multiplied by, as one backend packed it: a weight and a bias for each width of its
    channels, ascending; ``order`` brings the outputs back into that of the channels."""

    backend: Backend
    runs: tuple[tuple[Weight, Tensor | None], ...]
    order: Tensor | None
    made_of: tuple[tuple[Tensor, int], ...]  # buffers, and how often they had been written to
    prepared: PreparedProduct | None = None  # of a Linear layer whose channels have one width

    def outputs(self, product: Callable[[Weight, Tensor | None], Tensor], axis: int) -> Tensor:
        """``product`` of all runs, channels along ``axis``."""
        made = [product(weight, bias) for weight, bias in self.runs]
        return made[0] if self.order is None else torch.cat(made, axis).index_select(axis, self.order)


class _WithOperands(nn.Module):
    """What both layers share: operands, made when they are first needed and whenever a buffer has changed."""

    weight: PackedWeight | FloatWeight
    input: FrozenQuantizer | None
    bias: Tensor | None
    _operands: Operands | None = None

    def operands(self) -> Operands | None:
        """None where the numbers are not those of a product of integers."""
        buffers, made = self._numbers(), self._operands
        if made is None or not _same(made.made_of, buffers):
            if not _in_range(self, buffers):
                made = None
            elif made is not None and _same(_codes_of(self, made), self._stored_codes()):
                made = _rescaled(self, made, buffers)
            else:
                made = _pack(self, best(), buffers)
            self._operands = made
        return made

    def _stored_codes(self) -> list[Tensor]:
        """What the packed form of the weight is made of; scales and biases lie beside it."""
        assert isinstance(self.weight, PackedWeight)
        return [t for t in (self.weight.codes, self.weight.zero_point) if t is not None]

    def _numbers(self) -> list[Tensor]:
        """`buffers()`, without a walk through modules."""
        owners = (self._modules["weight"], self._modules["input"], self)
        return [b for owner in owners for b in owner._buffers.values() if b is not None]  # type: ignore[union-attr]

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles leave the packed form out: another process may have another backend.
        return {name: value for name, value in self.__dict__.items() if name != "_operands"}


class KernelLinear(_WithOperands, IntegerLinear):
    """`IntegerLinear` by integers, where that is possible."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        operands = self.operands() if _takes(self, x) and x.shape[-1] == self.in_features else None
        if operands is None:
            return IntegerLinear.forward(self, x)
        if operands.prepared is not None:
            y = operands.prepared(x.reshape(-1, self.in_features).contiguous())
            return y.view(*x.shape[:-1], self.out_features)
        backend = operands.backend
        codes = activation_codes(self.input, x.reshape(-1, self.in_features), backend)
        y = operands.outputs(lambda weight, bias: backend.values(codes, weight, bias), 1)
        return y.view(*x.shape[:-1], self.out_features)


class KernelConv(_WithOperands, IntegerConv):
    """`IntegerConv` of two axes and one group by integers, where that is possible."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W'), in the memory format of x."""
        padding = self.padding_of(x) if _takes(self, x) and self.pays(x) else None
        operands = None if padding is None else self.operands()
        if operands is None or padding is None:
            return IntegerConv.forward(self, x)
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        image = x.permute(0, 2, 3, 1) if last else x
        found = activation_codes(
            self.input, image.reshape(image.shape[0] * image.shape[1], -1), operands.backend
        )
        codes = found.codes.view(image.shape)
        operand = Activations(codes.permute(0, 3, 1, 2) if last else codes, found.zero_point, found.row_scale)
        g: Any = self.geometry

        def product(weight: Weight, bias: Tensor | None) -> Tensor:
            kernel = (self.weight.shape[2], self.weight.shape[3])
            return convolve(operands.backend, operand, [weight], kernel, g.stride, padding, g.dilation, bias)

        y = operands.outputs(product, 1)
        return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def pays(self, x: Tensor) -> bool:
        """Whether integers are the faster way. torch's never are: it has no product that reads an image."""
        wide = self.weight.shape[0] * self.weight.shape[1] >= NARROW
        return (wide or x.numel() <= SMALL * self.weight.shape[1]) and isinstance(best(), Native)

    def padding_of(self, x: Tensor) -> tuple[int, int] | None:
        """Rows and columns of zeros around an image; None where x is none that this layer takes."""
        shape, given, dilation = self.weight.shape, self.geometry.padding, self.geometry.dilation
        if x.ndim != 4 or x.shape[1] != shape[1]:
            return None
        reach = [dilation[i] * (shape[2 + i] - 1) for i in (0, 1)]
        if isinstance(given, str):
            found = (0, 0) if given == "valid" else (reach[0] // 2, reach[1] // 2)
        else:
            found = (given[0], given[1])
        fits = all(x.shape[2 + i] + 2 * found[i] > reach[i] for i in (0, 1))
        return found if fits else None


def run_on_kernels(model: nn.Module) -> list[str]:
    """Let layers of a packed model multiply integers where their grids allow it, in place; their names."""
    found = []
    for name, layer in model.named_modules():
        if type(layer) is IntegerLinear and _grids_allow(layer):
            layer.__class__ = KernelLinear
        elif type(layer) is IntegerConv and _grids_allow(layer) and _plain(layer):
            layer.__class__ = KernelConv
        if isinstance(layer, _WithOperands):
            found.append(name)
    return found


def forget_operands(model: nn.Module) -> None:
    """Let go of what the layers of ``model`` packed for kernels: the next forward packs their weights
    anew."""
    for layer in model.modules():
        if isinstance(layer, _WithOperands):
            layer._operands = None


def _grids_allow(layer: IntegerLinear | IntegerConv) -> bool:
    weight, quantizer = layer.weight, layer.input
    if not isinstance(weight, PackedWeight) or quantizer is None:
        return False
    stored, form = weight.form, quantizer.form
    grids = stored.grid if isinstance(stored.grid, tuple) else (stored.grid,)
    shared = ("tensor", "token") if form.dynamic and isinstance(layer, IntegerLinear) else ("tensor",)
    return (
        math.prod(weight.shape[1:]) <= MOST_INPUTS
        and min(weight.shape) > 0
        and set(grids) <= set(GRIDS)  # no tables
        and form.grid in GRIDS
        and form.grid != "seq"  # half steps
        and isinstance(form.bits, int)
        and form.granularity in shared
    )


def _plain(layer: IntegerConv) -> bool:
    """Two axes, one group, as many zeros on one side as on the other, scales that no group of inputs has."""
    g, shape, stored = layer.geometry, layer.weight.shape, layer.weight
    assert isinstance(stored, PackedWeight)
    if len(shape) != 4 or g.groups != 1 or g.padding_mode != "zeros" or stored.form.group_size is not None:
        return False
    uneven = any(g.dilation[i] * (shape[2 + i] - 1) % 2 for i in (0, 1))
    return not (g.padding == "same" and uneven)


def _takes(layer: _WithOperands, x: Tensor) -> bool:
    """Whether this forward is one for the kernels, whatever the numbers are."""
    quantizer = layer._modules["input"]  # as nn.Module's own attribute, which is looked for in three places
    if torch.compiler.is_compiling() or _traced() or quantizer is None or layer.training:
        return False
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
    plain = plain and isinstance(layer._modules["weight"], PackedWeight)
    if not plain or torch.is_autocast_enabled("cpu") or (x.requires_grad and torch.is_grad_enabled()):
        return False
    if quantizer._forward_hooks or quantizer._forward_pre_hooks:  # somebody wants to see its values
        return False
    return math.isfinite(x.sum().item())  # a code has no NaN to pass on


def _traced() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def _in_range(layer: _WithOperands, buffers: list[Tensor]) -> bool:
    """Whether the stored numbers are such as products take: on the CPU, in float32, a zero point that is a
    code."""
    floats = [tensor for tensor in buffers if tensor.is_floating_point()]
    if any(t.device.type != "cpu" for t in buffers) or any(t.dtype != torch.float32 for t in floats):
        return False
    quantizer = layer.input
    assert quantizer is not None
    one = [t for t in (quantizer.scale, quantizer.zero_point) if t is not None]
    if any(t.numel() != 1 for t in one):
        return False
    _, (low, high, _), _ = quantizer.form.runs[0]
    zero = 0.0 if quantizer.zero_point is None else float(quantizer.zero_point)
    return zero.is_integer() and (zero == 0 or low <= zero <= high)


def _pack(layer: _WithOperands, backend: Backend, buffers: list[Tensor]) -> Operands:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, PackedWeight)
    form, rows = weight.form, weight.shape[0]
    length, start = math.prod(weight.shape[1:]), 0

    scale, zero_points = _by_channel(weight.scale, rows), weight.zero_points()
    zeros = None if zero_points is None else _by_channel(zero_points, rows).to(torch.int32)
    runs = []
    for bits, (low, _, half), at in form.runs:
        count = length * (rows if isinstance(at, slice) else len(at))
        if type(weight) is PackedWeight:
            codes = backend.decode(weight.codes, bits, count, start).view(-1, *weight.shape[1:])
        else:  # one that unpacks in a way of its own
            codes = (weight.integers()[at] - low).to(torch.uint8)
        start += bits * count
        if codes.ndim == 4:
            codes = codes.permute(0, 2, 3, 1)  # as rows of the unfolded image lie
        packed = backend.pack(
            codes.flatten(1),
            bits,
            group_size=form.group_size,
            offset=low if zeros is None else low - zeros[at],
            half=half != 0,
            scale=scale[at],
        )
        runs.append((packed, None if bias is None else bias[at]))
    order = None if len(runs) == 1 else torch.cat([at for *_, at in form.runs]).argsort()
    made_of = tuple((tensor, _writes(tensor)) for tensor in buffers)
    prepared = _prepared(layer, backend, *runs[0]) if order is None else None
    return Operands(backend, tuple(runs), order, made_of, prepared)


def _prepared(
    layer: _WithOperands, backend: Backend, weight: Weight, bias: Tensor | None
) -> PreparedProduct | None:
    """None where a layer is no Linear, or its scale is one that is found in all rows at once."""
    quantizer = layer.input
    assert quantizer is not None
    form, scale, zero_point = quantizer.form, quantizer.scale, quantizer.zero_point
    dynamic = form.dynamic and form.granularity == "token"
    if not (isinstance(layer, IntegerLinear) and isinstance(backend, Native)) or (
        scale is None and not dynamic
    ):
        return None
    _, (low, high, _), _ = form.runs[0]
    return PreparedProduct(
        backend,
        weight,
        bias,
        low=low,
        high=high,
        scale=None if dynamic else scale,
        zero_point=0 if zero_point is None or dynamic else int(zero_point.item()),
        asymmetric=form.grid == "asymmetric",
    )


def _rescaled(layer: _WithOperands, made: Operands, buffers: list[Tensor]) -> Operands:
    """``made`` with the scales and biases of now: where only they train, no weight is packed anew."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, PackedWeight)
    scale, runs = _by_channel(weight.scale, weight.shape[0]), []
    for (packed, _), (*_, at) in zip(made.runs, weight.form.runs, strict=True):
        by = by_panel(scale[at].float() / packed.factor)  # of half steps levels count double
        runs.append((replace(packed, scale=by), None if bias is None else bias[at]))
    made_of = tuple((tensor, _writes(tensor)) for tensor in buffers)
    prepared = None if made.prepared is None else _prepared(layer, made.backend, *runs[0])
    return replace(made, runs=tuple(runs), made_of=made_of, prepared=prepared)


def _codes_of(layer: _WithOperands, made: Operands) -> tuple[tuple[Tensor, int], ...]:
    """Of what ``made`` was made of, the entries of `_stored_codes`."""
    stored = layer._stored_codes()
    return tuple(entry for entry in made.made_of if any(entry[0] is tensor for tensor in stored))


def _by_channel(values: Tensor, rows: int) -> Tensor:
    """A parameter of a weight as (rows, groups)."""
    return (values.reshape(1, 1) if values.numel() == 1 else values.reshape(rows, -1)).expand(rows, -1)


def activation_codes(quantizer: FrozenQuantizer | None, x: Tensor, backend: Backend) -> Activations:
    """The codes of ``quantizer`` for x (m, k)."""
    assert quantizer is not None
    form, scale, zero_point = quantizer.form, quantizer.scale, quantizer.zero_point
    _, (low, high, half), _ = form.runs[0]
    asymmetric = form.grid == "asymmetric"
    if form.dynamic and form.granularity == "token":
        return backend.quantize(x, low, high, asymmetric=asymmetric)
    if scale is None:
        scale, zero_point = range_of(x, [0, 1], low, high, half, asymmetric)
    zero = 0 if zero_point is None else int(zero_point.item())
    return backend.quantize(x, low, high, scale=scale, zero_point=zero)


def _same(made_of: tuple[tuple[Tensor, int], ...], buffers: list[Tensor]) -> bool:
    if len(made_of) != len(buffers):
        return False
    for (then, writes), now in zip(
        made_of, buffers, strict=True
    ):  # in every forward: all() takes twice as long
        if then is not now or writes != _writes(now):
            return False
    return True


def _writes(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
