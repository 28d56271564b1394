"""Moving a float tensor along directions that are made as they are needed, and back without a trace.

In floats (w + d) - d is not w, and a copy of w would be the memory that training without gradients is to
save. So the tensor lives on a lattice: multiples of a power of two h, at most 2^24 of them to either side,
between which sums and differences of float32 are exact. A perturbation is rounded to the lattice, and
taking it back gives the same bits, however often. The price is paid once: values are rounded to multiples
of h, about 2^-22 of the largest. MeZO (2305.17333) and ZeroQAT (2509.00031) restore up to rounding and
drift.

Updates are rounded to the lattice stochastically, so that steps far below h count in the mean, which plain
float32 addition does not give. Pieces of `noise.BLOCK` elements are worked on at a time: no direction
is ever there as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitsmith.errors import SchemeError
from bitsmith.numerics.noise import BLOCK, NOISES, REACH, Key, uniform_run

EXACT = {torch.float32: 24, torch.float64: 53}  # bits of a sum of integers that stays exact
ROOM = 2  # bits that a tensor may grow by before its lattice is made coarser
OFFSETS = 4096  # places where a dither may begin
LEAST = 8  # multiples of h that a unit of perturbation has to be, or rounding would spoil its direction


class Term(NamedTuple):
    """A direction and how much of it."""

    key: Key
    amount: float


def spacing(tensor: Tensor, reach: float) -> float:
    """The h of a tensor whose elements are to be moved by up to ``reach`` and to have room to grow."""
    least, most = tensor.detach().aminmax() if tensor.numel() else (0.0, 0.0)
    largest = max(-float(least), float(most))
    return _spacing(largest, reach, tensor.dtype, ROOM)


def _spacing(largest: float, reach: float, dtype: torch.dtype, room: int) -> float:
    span = max(largest + reach, torch.finfo(torch.float32).tiny * 2.0**60)
    return 2.0 ** (math.ceil(math.log2(span)) + room - EXACT[dtype])


def check(where: str, tensor: Tensor) -> None:
    """Raise SchemeError for a tensor that cannot be moved exactly."""
    if tensor.dtype not in EXACT:
        raise SchemeError(
            "weights of this type cannot be moved and restored exactly",
            where=where,
            got=str(tensor.dtype).removeprefix("torch."),
            expected="float32 or float64, or the codes of a packed layer",
            remedy="Call .float() on what is to be trained",
        )
    in_memory_order(where, tensor)


def in_memory_order(where: str, tensor: Tensor) -> Tensor:
    """All elements as one axis, sharing memory; channels_last too. SchemeError where there are gaps."""
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda axis: (-strides[axis], axis))
    flat = tensor.detach().permute(order)
    if not flat.is_contiguous():
        raise SchemeError(
            "this tensor does not lie in one piece", where=where, remedy="Call .contiguous() on it"
        )
    return flat.view(-1)


def snap(flat: Tensor, h: float) -> None:
    """Round flat (n,) to multiples of h."""
    for first in range(0, flat.numel(), BLOCK):
        flat[first : first + BLOCK].div_(h).round_().mul_(h)


def perturb(flat: Tensor, h: float, size: float, key: Key, times: int, noise: str) -> None:
    """flat (n,), on the lattice, += times * h * round(size * u / h)."""
    for first in range(0, flat.numel(), BLOCK):
        piece = flat[first : first + BLOCK]
        direction = _direction(piece, key, first, noise)
        _add_step(piece, direction, size, h, times, noise)


def update(
    flat: Tensor,
    h: float,
    size: float,
    back: Key,
    terms: Sequence[Term],
    rounding: Key,
    noise: str,
    decay: float = 0.0,
) -> float:
    """flat (n,) += sum of amount * u over terms - decay * flat, rounded stochastically to multiples of h,
    after the perturbation along ``back``, the direction of one of the terms, is added: it takes back L-'s,
    and is made once for both. Returns h, or a coarser one where the tensor has outgrown it.
    """
    largest, count = 0.0, flat.numel()
    # The same dither for all pieces, begun at another place in each: uniform for every element, and cheap.
    dither = uniform_run(rounding, 0, min(BLOCK, count) + OFFSETS, flat.device).to(flat.dtype)
    starts = uniform_run((rounding[1], rounding[0] | 1), 0, -(-count // BLOCK)).mul_(OFFSETS).long().tolist()
    for first, start in zip(range(0, count, BLOCK), starts, strict=True):
        piece = flat[first : first + BLOCK]
        total = dither[start : start + len(piece)].clone()
        for term in terms:
            direction = _direction(piece, term.key, first, noise)
            total.add_(direction, alpha=term.amount / h)
            if term.key == back:
                _add_step(piece, direction, size, h, 1, noise)
        if decay:
            total.add_(piece, alpha=-decay / h)
        piece.add_(total.floor_(), alpha=h)
        least, most = piece.aminmax()
        largest = max(largest, -float(least), float(most))
    reach = reach_of(size, noise)
    if largest + reach <= 2.0 ** EXACT[flat.dtype] * h:
        return h
    h = max(h, _spacing(largest, reach, flat.dtype, ROOM))
    snap(flat, h)
    return h


def _direction(piece: Tensor, key: Key, first: int, noise: str) -> Tensor:
    return NOISES[noise](key, first, len(piece), piece.device).to(piece.dtype)


def _add_step(piece: Tensor, direction: Tensor, size: float, h: float, times: int, noise: str) -> None:
    """piece += times * h * round(size * direction / h); ``direction`` may be overwritten."""
    if noise == "signs":  # one step for all
        piece.add_(direction, alpha=times * h * round(size / h))
    else:
        piece.add_(direction.mul_(size / h).round_(), alpha=times * h)


def reach_of(size: float, noise: str) -> float:
    """How far `perturb` moves an element at most."""
    return size * REACH[noise]
