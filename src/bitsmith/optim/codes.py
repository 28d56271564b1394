"""Moving packed weights, which are codes alone: forward-only training without a float weight.

A perturbation is whole codes, d = +-n with n the size of the perturbation rounded stochastically (QuZO,
2502.12346). It is added while a forward unpacks the weight, and never written: clamping to the grid needs
no undoing, and what is stored stays as it was until a step is decided, whatever interrupts it. A step
reads, moves and packs some codes at a time. Random numbers are made for the codes at hand, also for single
rows of an embedding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.numerics.noise import BLOCK, Key, steps, uniform
from bitsmith.numerics.pack import pack, packed_size, unpack
from bitsmith.optim.lattice import Term
from bitsmith.quantization.integer_layers import PackedWeight, pack_codes
from bitsmith.quantization.integer_products import forget_operands

RESIDUAL = 254  # an int8 residual counts in codes / 254: half a code is 127
MOST = 512  # codes that a step goes at most: more than any grid has, and int16 holds it


@dataclass(frozen=True)
class Move:
    """A perturbation by ``size`` codes in the mean, along the direction of ``key`` (sign 1) or against it."""

    key: Key
    size: float
    sign: int


class _Moved(PackedWeight):
    """A packed weight as it is unpacked, moved."""

    move: Move

    def integers(self) -> Tensor:
        codes = super().integers()
        rows = codes.view(len(codes), -1)
        low, high = _bounds(self, codes.device)
        for at in _pieces(self.shape):
            first = at.start * rows.shape[1]
            index = torch.arange(first, first + rows[at].numel(), dtype=torch.int32, device=codes.device)
            step = steps(self.move.key, index, self.move.size).view(rows[at].shape)
            rows[at].add_(step, alpha=self.move.sign).clamp_(_of(low, at), _of(high, at))
        return codes

    def _looked_up(self, packed: Tensor, length: int, index: Tensor) -> Tensor:
        codes = super()._looked_up(packed, length, index)
        if packed is not self.codes:
            return codes
        at = index[:, None] * length + torch.arange(length, device=index.device)
        step = steps(self.move.key, at.to(torch.int32), self.move.size)
        low, high = (_of(bound, index) for bound in _bounds(self, codes.device))
        return codes.add_(step, alpha=self.move.sign).clamp_(low, high)


@contextlib.contextmanager
def moved(model: nn.Module, moves: Mapping[PackedWeight, Move]) -> Iterator[None]:
    """Inside, these weights of ``model`` are unpacked as their moves make them; what is stored is not
    touched."""
    try:
        for weight, move in moves.items():
            weight.__class__, weight.move = _Moved, move  # type: ignore[assignment]
        forget_operands(model)
        yield
    finally:
        for weight in moves:
            weight.__class__ = PackedWeight
            weight.__dict__.pop("move", None)
        forget_operands(model)


@torch.no_grad()
def update(
    weight: PackedWeight, size: float, terms: Sequence[Term], rounding: Key, residual: Tensor | None = None
) -> tuple[int, int]:
    """codes += the sum over terms of amount * d, in codes, rounded stochastically; with a ``residual`` (int8,
    numel) to nearest, and what was cut off is carried to the next step. Returns (codes that changed, codes
    that the end of the grid held back).
    """
    changed = held = 0
    low, high = _bounds(weight, weight.codes.device)
    if len(weight.form.runs) > 1:  # runs begin within bytes: the weight is taken whole
        codes = weight.integers()
        rows = codes.view(len(codes), -1)
        for at in _pieces(weight.shape):
            wanted = rows[at] + _step(rows[at], at.start * rows.shape[1], size, terms, rounding, residual)
            new = wanted.clamp(_of(low, at), _of(high, at))
            changed, held = changed + _differ(new, rows[at]), held + _differ(new, wanted)
            rows[at] = new
        weight.codes.copy_(pack_codes(codes, weight.form))
        return changed, held
    bits = weight.form.runs[0][0]
    for first in range(0, weight.shape.numel(), BLOCK):  # a multiple of 8: whole bytes at every width
        count = min(BLOCK, weight.shape.numel() - first)
        stored = weight.codes[first * bits // 8 : first * bits // 8 + packed_size(count, bits)]
        piece = unpack(stored, bits, count, int(low))
        wanted = piece + _step(piece, first, size, terms, rounding, residual)
        new = wanted.clamp(low, high)
        if moved_here := _differ(new, piece):
            stored.copy_(pack(new, bits, int(low)))
        changed, held = changed + moved_here, held + _differ(new, wanted)
    return changed, held


def _step(
    like: Tensor, first: int, size: float, terms: Sequence[Term], rounding: Key, residual: Tensor | None
) -> Tensor:
    """Whole codes to go, int16 in the shape of ``like``, whose first element is number ``first``."""
    index = torch.arange(first, first + like.numel(), dtype=torch.int32, device=like.device)
    total = torch.zeros(like.numel(), device=like.device)
    for term in terms:
        total.add_(steps(term.key, index.clone(), size), alpha=term.amount)
    if residual is None:
        whole = total.add_(uniform(rounding, index)).floor_()
    else:
        carried = residual[first : first + like.numel()]
        whole = total.add_(carried, alpha=1 / RESIDUAL).round()
        carried.copy_(total.sub_(whole).mul_(RESIDUAL).round_())
    return whole.clamp_(-MOST, MOST).to(torch.int16).view(like.shape)


def _differ(a: Tensor, b: Tensor) -> int:
    return int((a != b).sum())


def _bounds(weight: PackedWeight, device: torch.device) -> tuple[Any, Any]:
    """Lowest and highest code: integers, or int16 (out, 1) where channels have widths of their own."""
    runs = weight.form.runs
    if len(runs) == 1:
        low, high, _ = runs[0][1]
        return low, high
    found = torch.empty(2, weight.shape[0], 1, dtype=torch.int16, device=device)
    for _, (low, high, _), at in runs:
        found[0, at], found[1, at] = low, high
    return found[0], found[1]


def _of(bound: Any, rows: Any) -> Any:
    return bound[rows] if isinstance(bound, Tensor) else bound


def _pieces(shape: Any) -> Iterator[slice]:
    """Rows of a weight, about BLOCK elements at a time."""
    each = max(1, BLOCK // max(math.prod(shape[1:]), 1))
    for first in range(0, shape[0], each):
        yield slice(first, min(first + each, shape[0]))
