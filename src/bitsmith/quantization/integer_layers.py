"""Packed layers: what a trained model becomes at `finalize`, and what a loaded file is made of.

Buffers only, no parameters and no training code: weight codes and their zero points at their true width
(numerics.pack), scales, float biases, and activation quantizers frozen to their numbers. A buffer's name is
its site's name plus `.codes`, `.scale`, `.zero_point` or `.levels`. Forward dequantizes the weight and calls
the same float operator as training, with the same numerics; so it equals the trained forward bit for bit
(BatchNorm folding aside). Weights are unpacked anew in every forward: that keeps the memory small, and costs
a pass over the weights; of an embedding only the rows that are looked up.
Making these layers from trained ones lives in finalize, from a file in export.native.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.numerics.affine import dequantize, quantize
from bitsmith.numerics.blocks import Granularity, from_groups, shared_axes, to_groups
from bitsmith.numerics.calibrate import range_of
from bitsmith.numerics.grid import Grid, bounds
from bitsmith.numerics.pack import pack_runs, unpack, unpack_at, unpack_runs
from bitsmith.quantization.bits import Width, in_words


@dataclass(frozen=True)
class Form:
    """What a reader must know of a site besides its tensors.

    bits: one width, or one for each output channel of a weight; grid: one, or then one for each of these
    widths, ascending. shape: of a weight. dynamic: an activation whose scale, and on an asymmetric grid zero
    point, is found in each tensor as it comes, over all of it, over its last axis (token, group) or over all
    axes but ``axis`` (channel).
    """

    bits: Width
    grid: Grid | tuple[Grid, ...]
    granularity: Granularity
    group_size: int | None = None
    shape: tuple[int, ...] | None = None
    dynamic: bool = False
    axis: int = 0

    @property
    def runs(self) -> list[tuple[int, tuple[int, int, float], Any]]:
        """(width, bounds of its grid, index of the channels that have it), ascending: one run for one
        width."""
        if isinstance(self.bits, int):
            assert isinstance(self.grid, str)
            return [(self.bits, bounds(self.grid, self.bits), slice(None))]
        widths = sorted(set(self.bits))
        grids = dict(
            zip(widths, self.grid if isinstance(self.grid, tuple) else [self.grid] * len(widths), strict=True)
        )
        each = torch.tensor(self.bits)
        return [(b, bounds(grids[b], b), (each == b).nonzero().flatten()) for b in widths]

    def __str__(self) -> str:
        size = f" of {self.group_size}" if self.group_size else ""
        grid = self.grid if isinstance(self.grid, str) else " and ".join(dict.fromkeys(self.grid))
        return (
            f"{in_words(self.bits)} bits, {grid}, per {self.granularity}{size}" + ", dynamic" * self.dynamic
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; defaults left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value not in (None, False, 0)
        }


class PackedWeight(nn.Module):
    """A weight as codes: ``forward()`` gives it back as float32 values. Tied layers share one."""

    codes: Tensor  # uint8, numerics.pack
    scale: Tensor  # float32, broadcasts against the weight's blocks
    zero_point: Tensor | None  # uint8, one for each scale, packed like the codes and at their width
    levels: Tensor | None  # float32 (n,), of a grid that is a table: what the codes index

    def __init__(
        self,
        codes: Tensor,
        form: Form,
        scale: Tensor,
        zero_point: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> None:
        """``codes``: packed bytes of ``form.shape`` stored codes; ``zero_point``: of as many as scales."""
        super().__init__()
        assert form.shape is not None
        self.form, self.shape = form, torch.Size(form.shape)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("levels", levels)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        form: Form,
        scale: Tensor,
        zero_point: Tensor | None,
        levels: Tensor | None = None,
    ) -> PackedWeight:
        """Pack integer codes of the weight's shape, and zero points of the scale's, the channels of the least
        width first."""
        zero_points = None if zero_point is None else pack_codes(zero_point, form)
        return cls(pack_codes(codes, form), form, scale, zero_points, levels)

    def integers(self) -> Tensor:
        """The stored codes, int16 in the weight's shape."""
        return self._unpacked(self.codes, self.shape)

    def zero_points(self) -> Tensor | None:
        """The zero points, float32 in the shape of the scale."""
        return None if self.zero_point is None else self._unpacked(self.zero_point, self.scale.shape).float()

    def _unpacked(self, packed: Tensor, shape: torch.Size) -> Tensor:
        runs, length = self.form.runs, math.prod(shape[1:])
        rows = [shape[0] if isinstance(at, slice) else len(at) for *_, at in runs]
        found = unpack_runs(
            packed, [(b, n * length, low) for (b, (low, _, _), _), n in zip(runs, rows, strict=True)]
        )
        if len(runs) == 1:
            return found[0].view(shape)
        codes = found[0].new_empty(shape)
        for values, (*_, at) in zip(found, runs, strict=True):
            codes[at.to(codes.device)] = values.view(-1, *shape[1:])
        return codes

    def _looked_up(self, packed: Tensor, length: int, index: Tensor) -> Tensor:
        """Of what holds ``length`` codes a channel those of the channels ``index`` (N,): (N, length)."""
        rows = self.shape[0]
        if isinstance(self.form.bits, int) and self.form.bits * length % 8 == 0:  # whole bytes for each
            width, (lowest, *_), _ = self.form.runs[0]
            found = packed.view(rows, -1).index_select(0, index)
            return unpack(found.view(-1), width, len(index) * length, lowest).view(-1, length)
        bits, low, start = torch.empty(3, rows, dtype=torch.int64)
        for width, (lowest, *_), at in self.form.runs:
            bits[at], low[at] = width, lowest
        order = torch.cat([torch.arange(rows)[at] for *_, at in self.form.runs])
        size = bits[order] * length
        start[order] = size.cumsum(0) - size
        bits, low, start = (t.to(index.device).index_select(0, index)[:, None] for t in (bits, low, start))
        return unpack_at(packed, start + bits * torch.arange(length, device=index.device), bits, low)

    def half_step(self) -> Tensor | float:
        """What the grid adds to a code, for all channels or each."""
        runs = self.form.runs
        if len({half for _, (*_, half), _ in runs}) == 1:
            return runs[0][1][2]
        halves = torch.zeros(self.shape[0], device=self.scale.device)
        for _, (*_, half), at in runs:
            halves[at.to(halves.device)] = half
        return halves.view(self.scale.shape)

    def forward(self) -> Tensor:
        return self._values(self.integers(), self.scale, self.half_step(), self.zero_points())

    def rows(self, index: Tensor) -> Tensor:
        """``forward()[index]`` (N, length) for the channels ``index`` (N,) of a weight of two axes: only they
        are unpacked. Raises IndexError for a channel that there is not."""

        def of(values: Tensor) -> Tensor:
            return values if values.ndim == 1 else values.index_select(0, index)

        half, zero_points, scale = self.half_step(), self.zero_point, of(self.scale)
        if zero_points is not None:
            if self.scale.ndim == 1:
                zero_points = self.zero_points()
            else:
                found = self._looked_up(zero_points, self.scale[0].numel(), index)
                zero_points = found.view(scale.shape).float()
        codes = self._looked_up(self.codes, self.shape[1], index)
        return self._values(codes, scale, of(half) if isinstance(half, Tensor) else half, zero_points)

    def _values(
        self, codes: Tensor, scale: Tensor, half: Tensor | float, zero_points: Tensor | None
    ) -> Tensor:
        zero_point = 0.0 if zero_points is None else zero_points
        codes = codes.float() if self.levels is None else self.levels[codes.long()]
        if self.form.group_size is None:
            return dequantize(codes, scale, half, zero_point)
        blocks = to_groups(codes, self.form.group_size, flatten=True)
        return from_groups(dequantize(blocks, scale, half, zero_point), codes, flatten=True)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.form}"


def pack_codes(codes: Tensor, form: Form) -> Tensor:
    """Codes or zero points of a weight, channels first, as one stream: uint8 (n,)."""
    return pack_runs([(codes[at], bits, low) for bits, (low, _, _), at in form.runs])


class FloatWeight(nn.Module):
    """A weight that stayed in float in a layer whose input is quantized."""

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.shape = values.shape
        self.register_buffer("values", values)

    def forward(self) -> Tensor:
        return self.values

    def rows(self, index: Tensor) -> Tensor:
        """Some of them, as `PackedWeight.rows`."""
        return self.values.index_select(0, index)


class FrozenQuantizer(nn.Module):
    """An activation quantizer with fixed numbers: (..., features) float -> representable float."""

    scale: Tensor | None  # None where dynamic
    zero_point: Tensor | None

    def __init__(self, form: Form, scale: Tensor | None, zero_point: Tensor | None = None) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: Tensor) -> Tensor:
        _, (low, high, half), _ = self.form.runs[0]
        grouped = self.form.group_size is not None
        v = to_groups(x, self.form.group_size, flatten=False) if grouped else x  # type: ignore[arg-type]
        scale, found = self.scale, self.zero_point
        if scale is None:
            axes = shared_axes(v.ndim, self.form.granularity, self.form.axis)
            scale, found = range_of(v, axes, low, high, half, self.form.grid == "asymmetric")
        zero_point = 0.0 if found is None else found
        values = dequantize(quantize(v, scale, low, high, half, zero_point), scale, half, zero_point)
        return from_groups(values, x, flatten=False) if grouped else values

    def extra_repr(self) -> str:
        return str(self.form)


class IntegerLinear(nn.Module):
    """``x @ W.T + b`` with packed W: (..., in_features) -> (..., out_features). ``transposed``: it stands for
    a layer that keeps its weight as (in, out); the codes are (out, in) all the same."""

    kind = "linear"
    bias: Tensor | None

    def __init__(
        self,
        weight: PackedWeight | FloatWeight,
        input: FrozenQuantizer | None,
        bias: Tensor | None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.weight, self.input, self.transposed = weight, input, transposed
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.input is None else self.input(x)
        return F.linear(x, self.weight(), self.bias)


@dataclass(frozen=True)
class ConvGeometry:
    """The numbers of a convolution that are not tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str = "zeros"
    border: tuple[int, ...] = ()  # F.pad's argument, for the other padding modes


class IntegerConv(nn.Module):
    """A convolution over one or two axes with packed weights (out, in/groups, *kernel)."""

    kind = "conv"
    bias: Tensor | None

    def __init__(
        self,
        weight: PackedWeight | FloatWeight,
        input: FrozenQuantizer | None,
        bias: Tensor | None,
        geometry: ConvGeometry,
    ) -> None:
        super().__init__()
        self.weight, self.input, self.geometry = weight, input, geometry
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        g = self.geometry
        x = x if self.input is None else self.input(x)
        padding: Any = g.padding
        if g.padding_mode != "zeros":
            x, padding = F.pad(x, g.border, mode=g.padding_mode), 0
        convolve: Any = F.conv1d if len(self.weight.shape) == 3 else F.conv2d
        return convolve(x, self.weight(), self.bias, g.stride, padding, g.dilation, g.groups)


class IntegerConvTranspose(IntegerConv):
    """A transposed convolution over two axes of one group with packed weights (out, in, *kernel)."""

    kind = "conv_transpose"

    def __init__(
        self,
        weight: PackedWeight | FloatWeight,
        input: FrozenQuantizer | None,
        bias: Tensor | None,
        geometry: ConvGeometry,
        output_padding: tuple[int, ...],
    ) -> None:
        super().__init__(weight, input, bias, geometry)
        self.output_padding = output_padding

    def forward(self, x: Tensor) -> Tensor:
        g, more = self.geometry, self.output_padding
        x, padding = x if self.input is None else self.input(x), cast(tuple[int, ...], g.padding)
        weight, bias = self.weight().transpose(0, 1), self.bias
        return F.conv_transpose2d(x, weight, bias, g.stride, padding, more, g.groups, g.dilation)


class IntegerEmbedding(nn.Module):
    """Rows of a packed table: indices (...) -> (..., embedding_dim). Only the rows looked up are unpacked."""

    kind = "embedding"

    def __init__(self, weight: PackedWeight | FloatWeight) -> None:
        super().__init__()
        self.weight = weight
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.rows(x.reshape(-1)).view(*x.shape, self.embedding_dim)


class IntegerMatMul(nn.Module):
    """The product of two activations, ``left @ right``, each on its own grid (or in float)."""

    kind = "matmul"

    def __init__(self, left: FrozenQuantizer | None, right: FrozenQuantizer | None) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        left = left if self.left is None else self.left(left)
        right = right if self.right is None else self.right(right)
        return left @ right


class Folded(nn.Identity):
    """Where a BatchNorm was, before it was folded into the layer ``into``."""

    def __init__(self, into: str) -> None:
        super().__init__()
        self.into = into

    def extra_repr(self) -> str:
        return f"into {self.into}"


IntegerLayer = IntegerLinear | IntegerConv | IntegerEmbedding | IntegerMatMul


def packed_layers(model: nn.Module) -> dict[str, IntegerLayer]:
    """The packed layers of a model by qualified name, each module once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, IntegerLayer)}


def packed_sites(model: nn.Module) -> dict[str, PackedWeight | FrozenQuantizer]:
    """The packed sites of a model by site name; a tied weight under its first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedWeight | FrozenQuantizer)}
