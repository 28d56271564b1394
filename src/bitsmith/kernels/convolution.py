"""Convolutions of integers: forward and both gradients, as products whose rows are read from the image.

Nothing of the size of the unfolded image is made: the library takes each block of rows from the image as it
multiplies it, and the gradient of the weights goes through the rows in pieces. Images are (batch, channels,
height, width), fastest in torch's channels_last; results come so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitsmith.kernels.choose import Backend
from bitsmith.kernels.geometry import Geometry
from bitsmith.kernels.operands import Activations, Weight

Pair = tuple[int, int]
PIECE = 4096  # rows at a time of the gradient of the weights
MOST_PIXELS = 2**17  # 128 * 128 * 2^17 = 2^31: no sum wraps


def pack_filters(
    backend: Backend,
    codes: Tensor,
    bits: int,
    *,
    groups: int = 1,
    offset: Tensor | int = 0,
    half: bool = False,
    scale: Tensor | None = None,
) -> list[Weight]:
    """Filters (out, in/groups, height, width), uint8 from 0 or int8, one weight a group of the convolution;
    offset and scale (out,), or one offset for all."""
    packed = []
    for at in torch.arange(len(codes)).chunk(groups):
        filters = codes[at].permute(0, 2, 3, 1).reshape(len(at), -1)
        shift = offset if isinstance(offset, int) else offset[at, None]
        scales = None if scale is None else scale[at, None]
        packed.append(backend.pack(filters, bits, offset=shift, half=half, scale=scales))
    return packed


def convolve(
    backend: Backend,
    x: Activations,
    filters: list[Weight],
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    bias: Tensor | None = None,
) -> Tensor:
    """(batch, out, height, width): float32 values where the filters have scales, else int32. ``x.codes``
    (batch, in, height, width) have one zero point, which is also what pads them."""
    assert isinstance(x.zero_point, int)
    images = _channels_last(x.codes)
    parts = images.chunk(len(filters), dim=3)
    size = (images.shape[1], images.shape[2])
    found, first = [], 0
    for image, weight in zip(parts, filters, strict=True):
        geometry = Geometry.forward(
            size, image.shape[3], images.shape[3], kernel, stride, padding, dilation, x.zero_point
        )
        own = None if bias is None else bias[first : first + weight.shape[0]]
        operand = Activations(image, x.zero_point, x.row_scale)
        made = backend.convolve(operand, weight, geometry, own)
        found.append(made.view(len(images), geometry.rows, geometry.columns, weight.shape[0]))
        first += weight.shape[0]
    return (found[0] if len(found) == 1 else torch.cat(found, 3)).permute(0, 3, 1, 2)


def input_gradient(
    backend: Backend,
    dy: Tensor,
    w: Tensor,
    size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """int32 (batch, in, *size) from dy (batch, out, height, width) and w (out, in/groups, height, width),
    int8."""
    gradients = _channels_last(dy)
    kernel = (w.shape[2], w.shape[3])
    found = []
    for part, filters in zip(gradients.chunk(groups, 3), w.chunk(groups), strict=True):
        image = part.contiguous()
        matrix = filters.permute(1, 2, 3, 0).reshape(w.shape[1], -1)
        geometry = Geometry.of_input_gradient(
            size, (image.shape[1], image.shape[2]), image.shape[3], kernel, stride, padding, dilation
        )
        made = backend.convolve(Activations(image), backend.pack(matrix, 8), geometry, None)
        found.append(made.view(len(image), *size, w.shape[1]))
    return (found[0] if groups == 1 else torch.cat(found, 3)).permute(0, 3, 1, 2)


def weight_gradient(
    backend: Backend,
    dy: Tensor,
    x: Activations,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """int32 (out, in/groups, *kernel) from dy (batch, out, height, width), int8, and the codes ``x`` of
    `convolve`. Raises ValueError above 2^17 pixels, whose sums could wrap."""
    assert isinstance(x.zero_point, int)
    images, gradients = _channels_last(x.codes), _channels_last(dy)
    pixels = gradients.shape[0] * gradients.shape[1] * gradients.shape[2]
    if pixels > MOST_PIXELS:
        raise ValueError(f"{pixels} pixels could overflow a sum of 32 bits; at most {MOST_PIXELS}")
    size = (images.shape[1], images.shape[2])
    found = []
    for part, image in zip(gradients.chunk(groups, 3), images.chunk(groups, 3), strict=True):
        rows = part.reshape(pixels, -1)
        geometry = Geometry.forward(
            size, image.shape[3], images.shape[3], kernel, stride, padding, dilation, x.zero_point
        )
        total = torch.zeros(rows.shape[1], geometry.inputs, dtype=torch.int32)
        for first in range(0, pixels, PIECE):
            piece = rows[first : first + PIECE]
            columns = backend.rows(image, geometry, first, len(piece))
            packed = backend.pack(columns.t(), 8, offset=-x.zero_point)
            backend.sums(Activations(piece.t()), packed, out=total)
        found.append(total.view(-1, *kernel, image.shape[3]).permute(0, 3, 1, 2))
    return torch.cat(found)


def _channels_last(codes: Tensor) -> Tensor:
    """(batch, height, width, channels), contiguous, of any (batch, channels, height, width)."""
    return codes.permute(0, 2, 3, 1).contiguous()
