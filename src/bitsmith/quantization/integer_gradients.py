"""The two backward products of integer layers, and stochastic codes of gradients.

    dX (t, k) = sum over n of dY (t, n) s_w (n, group of k) w (n, k)        w, x: codes
    dW (n, k) = sum over t of dY (t, n) s_x (t) (x (t, k) - z (t))

Each sum runs over an axis on which one operand has scales of its own: they are folded into dY first, and what
comes out is quantized with one scale for each row of the result (of an image: for each image), symmetric, to
8 or 4 bits. Groups of weights are a product each, as their scales differ within the sum. Rounding is
stochastic, so that expectations are right: 2112.10769 shows that nearest rounding of gradients is not enough,
and that in the forward the noise only hurts. The noise is a hash of a seed and an index, hence the same in
recomputation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmith.errors import TrainingDiverged
from bitsmith.kernels.choose import Backend
from bitsmith.kernels.convolution import MOST_PIXELS, input_gradient, weight_gradient
from bitsmith.kernels.operands import MOST_INPUTS, Activations, Weight
from bitsmith.kernels.training import stochastic
from bitsmith.numerics.hadamard import hadamard_tokens
from bitsmith.numerics.rounding import mix
from bitsmith.quantization.integer_codes import grid_of, matrix_shape, scales_of, unsigned_codes
from bitsmith.quantization.integer_layers import ConvGeometry, PackedWeight

INPUT, WEIGHT, SIGNS, COLUMNS = range(4)  # what a seed is for


@dataclass(frozen=True)
class WeightGradient:
    """The gradient of a weight's values, made in pieces where they are asked for. ``block(start, stop)``:
    float32 (stop - start, inputs) of these rows, or where ``rows`` (r,) names some, of these among them."""

    block: Callable[[int, int], Tensor]
    rows: Tensor | None = None


def stochastic_codes(
    x: Tensor,
    bits: int,
    seed: int,
    backend: Backend,
    where: str = "",
    factor: Tensor | None = None,
    *,
    by_column: bool = False,
) -> Activations:
    """x (m, k) times ``factor`` (k,) as codes of -(2^(bits-1) - 1) .. 2^(bits-1) - 1 with a scale for each
    row, so that the expectation over seeds is x; ``by_column``: factor (m,), a scale for each column, and
    turned: the rows of what comes (k, m) are the columns of x. Raises TrainingDiverged where x is not
    finite."""
    codes, scale = stochastic(backend, x, 2 ** (bits - 1) - 1, seed, factor, by_column=by_column)
    if not bool(torch.isfinite(scale).all()):
        raise TrainingDiverged(
            "the gradient is not finite", where=where, remedy="Lower the learning rate, or go back a step"
        )
    return Activations(codes, 0, scale)


def linear_input_gradient(
    g: Tensor, weight: PackedWeight, bits: int, seed: int, backend: Backend, where: str, start: int = 0
) -> Tensor:
    """dX (m, inputs) of g = dY (m, rows), float32, the rows being those of the weight from ``start`` on, a
    multiple of eight."""
    width, low, _, half = grid_of(weight)
    rows, inputs = g.shape[1], matrix_shape(weight)[1]
    scales, size = scales_of(weight)[start : start + rows], weight.form.group_size or inputs
    codes = unsigned_codes(weight, backend, start, start + rows)
    whole = rows <= MOST_INPUTS and scales.shape[1] == 1
    made = g.new_empty(0) if whole else g.new_zeros(len(g), inputs)
    for piece, first in enumerate(range(0, rows, MOST_INPUTS)):  # no sum of 32 bits may wrap
        part = slice(first, first + MOST_INPUTS)
        for group in range(scales.shape[1]):
            columns = slice(group * size, (group + 1) * size)
            key = mix(seed, INPUT, piece, group)
            x = stochastic_codes(g[:, part], bits, key, backend, where, scales[part, group])
            turned = codes[part, columns].t()
            ones = torch.ones(len(turned), 1)
            operand = backend.pack(turned, width, offset=low, half=half != 0, scale=ones)
            found = backend.values(x, operand)
            if whole:
                return found
            made[:, columns] += found
    return made


def linear_weight_gradient(
    g: Tensor,
    x: Activations,
    grid: tuple[int, int],
    bits: int,
    hadamard: bool,
    seed: int,
    backend: Backend,
    where: str,
) -> WeightGradient:
    """dW of g = dY (m, rows) and the codes x (m, inputs), ``grid``: (their width, the lowest), with their
    scales (m,) or (1,). ``hadamard``: both operands transformed over tokens, and quantized after it."""
    assert x.row_scale is not None
    factor: Tensor | None = x.row_scale.reshape(-1).expand(len(g))
    zero = x.zero_point
    if hadamard:
        signs = mix(seed, SIGNS)
        g, factor = hadamard_tokens(g * x.row_scale.reshape(-1, 1), signs), None
        offsets = zero.reshape(-1, 1) if isinstance(zero, Tensor) else zero
        columns = hadamard_tokens(x.codes.float() - offsets, signs).t().contiguous()
        other = stochastic_codes(columns, bits, mix(seed, COLUMNS), backend, where)
        assert other.row_scale is not None
        codes, step, zero = other.codes.t(), other.row_scale[:, None], 0
        grid = (8, -128)
    else:
        codes, step = x.codes, torch.ones(x.shape[1], 1)
    d = stochastic_codes(g, bits, mix(seed, WEIGHT), backend, where, factor, by_column=True)
    assert d.row_scale is not None
    scale: Tensor = d.row_scale
    pieces = range(0, d.shape[1], MOST_INPUTS)
    moved = zero if isinstance(zero, int) else 0
    operands = [_pack_columns(codes[p : p + MOST_INPUTS], grid, moved, step, backend) for p in pieces]

    def block(start: int, stop: int) -> Tensor:
        rows = d.codes[start:stop]
        found = [
            backend.values(Activations(rows[:, first : first + MOST_INPUTS], 0, scale[start:stop]), operand)
            for first, operand in zip(pieces, operands, strict=True)
        ]
        total = found[0] if len(found) == 1 else torch.stack(found).sum(0)
        if isinstance(zero, Tensor):  # sum over t of d (n, t) z (t), the same for all inputs
            total -= (rows.float() @ zero.float() * scale[start:stop])[:, None]
        return total

    return WeightGradient(block)


def _pack_columns(codes: Tensor, grid: tuple[int, int], zero: int, scale: Tensor, backend: Backend) -> Weight:
    """Codes (m, inputs) as the weight (inputs, m) of a product over tokens."""
    bits, low = grid
    if low == -128:
        return backend.pack(codes.t(), 8, offset=-zero, scale=scale)
    counted = (codes.view(torch.int8) - low).view(torch.uint8)
    return backend.pack(counted.t(), bits, offset=low - zero, scale=scale)


def conv_input_gradient(
    g: Tensor,
    weight: PackedWeight,
    geometry: ConvGeometry,
    padding: tuple[int, int],
    size: tuple[int, int],
    bits: int,
    seed: int,
    backend: Backend,
    where: str,
) -> Tensor:
    """dX (batch, in, *size) of g = dY (batch, out, height, width)."""
    _, low, _, half = grid_of(weight)
    codes = unsigned_codes(weight, backend).view(torch.int8) + low
    step = 1.0
    if half:  # levels are halves: twice as many steps, half as long
        codes, step = 2 * codes + 1, 0.5
    folded = g * (scales_of(weight)[:, 0] * step).view(1, -1, 1, 1)
    e = stochastic_codes(folded.reshape(len(g), -1), bits, mix(seed, INPUT), backend, where)
    assert e.row_scale is not None
    stride, dilation = geometry.stride, geometry.dilation
    made = input_gradient(
        backend,
        e.codes.view(g.shape),
        codes.view(weight.shape),
        size,
        (stride[0], stride[1]),
        padding,
        (dilation[0], dilation[1]),
        geometry.groups,
    )
    return made * e.row_scale.view(-1, 1, 1, 1)


def conv_weight_gradient(
    g: Tensor,
    x: Activations,
    weight: PackedWeight,
    geometry: ConvGeometry,
    padding: tuple[int, int],
    bits: int,
    seed: int,
    backend: Backend,
    where: str,
) -> WeightGradient:
    """dW of g = dY (batch, out, height, width) and the codes x (batch, in, ...) with a scale for each image,
    or one for all."""
    assert x.row_scale is not None
    batch, out, pixels = g.shape[0], g.shape[1], g.shape[2] * g.shape[3]
    folded = (g * x.row_scale.view(-1, 1, 1, 1)).transpose(0, 1).reshape(out, -1)
    d = stochastic_codes(folded, bits, mix(seed, WEIGHT), backend, where)
    assert d.row_scale is not None
    codes = d.codes.view(out, batch, *g.shape[2:]).transpose(0, 1)
    stride, dilation = geometry.stride, geometry.dilation
    total = torch.zeros(weight.shape)
    images = max(1, MOST_PIXELS // max(pixels, 1))
    for first in range(0, batch, images):
        part = slice(first, first + images)
        total += weight_gradient(
            backend,
            codes[part],
            Activations(x.codes[part], x.zero_point),
            (weight.shape[2], weight.shape[3]),
            (stride[0], stride[1]),
            padding,
            (dilation[0], dilation[1]),
            geometry.groups,
        )
    made = total.view(out, -1) * d.row_scale[:, None]
    return WeightGradient(lambda start, stop: made[start:stop])
