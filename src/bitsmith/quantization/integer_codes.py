"""The codes of a packed weight as training reads and writes them: some rows at a time, in place.

The stream of `PackedWeight.codes` (numerics.pack) is all that there is of a weight: what a step changes is
what a file holds. A row is an output channel, flattened. Eight rows always begin and end at a whole byte, so
that chunks of eight rows are written without a look at their neighbours. Here too: what belongs to groups,
spread over a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitsmith.kernels.choose import Backend
from bitsmith.kernels.operands import Weight
from bitsmith.quantization.integer_layers import PackedWeight

CHUNK = 2**17  # values of a weight that are floats at one moment
ALIGNED = 8  # rows


def matrix_shape(weight: PackedWeight) -> tuple[int, int]:
    """(rows, inputs): output channels and what each multiplies."""
    return weight.shape[0], math.prod(weight.shape[1:])


def grid_of(weight: PackedWeight) -> tuple[int, int, int, float]:
    """(bits, low, high, half) of a weight of one width."""
    (bits, (low, high, half), _), *_ = weight.form.runs
    return bits, low, high, half


def scales_of(weight: PackedWeight) -> Tensor:
    """(rows, groups), a view of the weight's scales."""
    return weight.scale.view(weight.shape[0], -1)


def rows_at_once(inputs: int) -> int:
    """Rows of a chunk, a multiple of eight."""
    return max(CHUNK // max(inputs, 1) // ALIGNED, 1) * ALIGNED


def unsigned_codes(weight: PackedWeight, backend: Backend, start: int = 0, stop: int | None = None) -> Tensor:
    """Codes from 0 of the rows start to stop, start a multiple of eight: uint8 (rows, inputs)."""
    rows, inputs = matrix_shape(weight)
    stop = rows if stop is None else min(stop, rows)
    bits = grid_of(weight)[0]
    found = backend.decode(weight.codes, bits, (stop - start) * inputs, start * inputs * bits)
    return found.view(stop - start, inputs)


def read_rows(weight: PackedWeight, backend: Backend, at: slice | Tensor) -> Tensor:
    """Signed codes of a chunk of rows, or of the rows of an index (r,): int8 (r, inputs)."""
    bits, low, _, _ = grid_of(weight)
    rows, inputs = matrix_shape(weight)
    if isinstance(at, slice):
        found = unsigned_codes(weight, backend, at.start, at.stop)
    elif inputs * bits % 8:
        found = unsigned_codes(weight, backend)[at]
    else:
        stream = weight.codes.view(rows, -1)[at].reshape(-1)
        found = backend.decode(stream, bits, len(at) * inputs).view(-1, inputs)
    return found.view(torch.int8) + low  # of 8 bits it wraps to what is meant


def write_rows(weight: PackedWeight, backend: Backend, at: slice | Tensor, codes: Tensor) -> None:
    """The inverse: int8 (r, inputs) within the grid."""
    bits, low, _, _ = grid_of(weight)
    rows, inputs = matrix_shape(weight)
    if isinstance(at, Tensor) and inputs * bits % 8:
        every = unsigned_codes(weight, backend)
        every[at] = (codes - low).view(torch.uint8)
        weight.codes.copy_(backend.encode(every.reshape(-1), bits))
        return
    stream = backend.encode((codes - low).view(torch.uint8).reshape(-1), bits)
    if isinstance(at, slice):
        first = at.start * inputs * bits // 8
        weight.codes[first : first + len(stream)] = stream
    else:
        weight.codes.view(rows, -1)[at] = stream.view(len(at), -1)


def operand(weight: PackedWeight, backend: Backend, start: int = 0, stop: int | None = None) -> Weight:
    """The weight, or its rows start to stop, as a product of integers reads it, with its scales."""
    bits, low, _, half = grid_of(weight)
    return backend.pack(
        unsigned_codes(weight, backend, start, stop),
        bits,
        group_size=weight.form.group_size,
        offset=low,
        half=half != 0,
        scale=scales_of(weight)[start:stop],
    )


def spread(values: Tensor, inputs: int, group_size: int | None) -> Tensor:
    """(r, groups) as what broadcasts against (r, inputs)."""
    if group_size is None:
        return values
    return values.repeat_interleave(group_size, 1)[:, :inputs]
