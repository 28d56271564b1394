"""Bit-widths: how many bits a site has.

A bit-width is a small module that answers two questions for its quantizer, and quantizes nothing itself:

    expected()          the expected bits, differentiable: what the cost model reads
    rows, share         which of the quantizer's K rows (one per candidate width) are in play, as an int64
                        tensor (R,), and with which weight each, as a tensor (R,); share is None where the
                        weight is a constant 1

    fixed               R = 1, share None
    sampled             R = 1, share = p_k / p_k.detach(): 1 in forward, and the logits' gradient in backward
    fractional          R = 2 neighbours, share = (1 - fraction, fraction)
    mixed               R = K, share = softmax(logits / temperature)
    real-valued         the same, ``blended``: one grid at the mean width

A weight's output channels may have widths of their own: then rows and share are (R, C), column c for
channel c, and expected() is (C,). A fixed width per channel needs no rows to choose from: it is one row
whose candidate is (1, C), as low, high and scale of a row are per channel anyway.

R is fixed by the class, so that a compiled forward has one graph; *which* rows is data, in a buffer, drawn
or moved outside forward. `commit(bits)` decides: afterwards the width is fixed, but every tensor keeps its
shape (optimizer state, averages and checkpoints stay valid). Decided for 32, a site is in float: `in_float`
is set, and its quantizer returns what it is given.
Only the fixed width is here; each method brings its own next to its paper's formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.quantization.scheme import FLOAT

Width = int | tuple[int, ...]  # of a site: one, or one per output channel of a weight


def one_or_each(bits: int | Sequence[int]) -> Width:
    """The width that all channels share, else the tuple of them."""
    if isinstance(bits, int):
        return bits
    return bits[0] if len(set(bits)) == 1 else tuple(bits)


def mean_width(bits: Width) -> float:
    """The width, or the mean over the channels, which hold a share of the weight's elements each."""
    return bits if isinstance(bits, int) else sum(bits) / len(bits)


def in_words(bits: Width) -> str:
    """A width for people: "4", "float", or "2-8, 3.4 on average"."""
    bits = one_or_each(bits)
    if isinstance(bits, int):
        return "float" if bits == FLOAT else str(bits)
    return f"{min(bits)}-{max(bits)}, {mean_width(bits):.2g} on average"


class BitWidth(nn.Module):
    """What a quantizer asks of a bit-width. Buffers: candidates (K,) float32, rows (R,) or (R, C) int64.

    in_float: whether it is decided for 32. What the buffers say, where forward can branch on it; so a
    bit-width sets it in `commit` and when its state is loaded.
    """

    candidates: Tensor
    rows: Tensor
    share: Tensor | None
    blended = False  # one grid between the rows instead of a mean of their values
    in_float = False

    def expected(self) -> Tensor:
        """Expected bits: a scalar, or (C,) where channels have widths of their own."""
        raise TypeError(f"{type(self).__name__} must say its expected bits")

    def commit(self, bits: Width) -> None:
        """Decide for the candidate ``bits``, or for one per channel; what is in play afterwards is this
        alone."""
        raise TypeError(f"{type(self).__name__} must say how it commits")

    def whole(self) -> Width:
        """The expected bits in whole numbers."""
        bits: int | list[int] = self.expected().int().tolist()
        return one_or_each(bits)

    @property
    def per_channel(self) -> bool:
        """Whether channels have widths of their own."""
        return self.rows.ndim > 1 or self.candidates.ndim > 1


class FixedBits(BitWidth):
    """An integer width, chosen among K candidates (one, if only one is given), or one width per channel."""

    share = None

    def __init__(self, bits: int | Sequence[int], candidates: Sequence[int] | None = None) -> None:
        super().__init__()
        bits = one_or_each(bits)
        self.register_buffer(
            "candidates",
            torch.tensor([bits] if candidates is None else list(candidates), dtype=torch.float32),
        )
        self.register_buffer("rows", torch.tensor([candidates.index(bits) if candidates else 0]))
        self.in_float = bits == FLOAT

    def expected(self) -> Tensor:
        """The width itself, or (C,)."""
        return self.candidates.index_select(0, self.rows).squeeze(0)

    @torch.no_grad()
    def commit(self, bits: Width) -> None:
        """Move to the row of ``bits``; a single-row width takes the new width, or widths, into its row."""
        if len(self.candidates) > 1:
            self.rows.fill_(self.candidates.tolist().index(bits))
        elif isinstance(bits, int) and self.candidates.ndim == 1:
            self.candidates.fill_(bits)
        else:
            self.candidates = self.candidates.new_tensor([bits])
        self.in_float = bits == FLOAT

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self.in_float = self.whole() == FLOAT


class Allocated(FixedBits):
    """An integer width that an allocation moves among the candidates while training; bits of a method's."""
