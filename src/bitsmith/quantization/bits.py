"""Bit-widths: how many bits a site has.

A bit-width is a small module that answers two questions for its quantizer, and quantizes nothing itself:

    expected()          the expected bits, a differentiable scalar: what the cost model reads
    rows, share         which of the quantizer's K rows (one per candidate width) are in play, as an int64
                        tensor (R,), and with which weight each, as a tensor (R,); share is None where the
                        weight is a constant 1

    fixed               R = 1, share None
    sampled             R = 1, share = p_k / p_k.detach(): 1 in forward, and the logits' gradient in backward
    fractional          R = 2 neighbours, share = (1 - fraction, fraction)
    mixed               R = K, share = softmax(logits / temperature)
    real-valued         the same, ``blended``: one grid at the mean width

R is fixed by the class, so that a compiled forward has one graph; *which* rows is data, in a buffer, drawn
or moved outside forward. `commit(bits)` decides: afterwards the width is fixed, but every tensor keeps its
shape (optimizer state, averages and checkpoints stay valid).
Only the fixed width is here; each method brings its own next to its paper's formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BitWidth(nn.Module):
    """What a quantizer asks of a bit-width. Buffers: candidates (K,) float32, rows (R,) int64."""

    candidates: Tensor
    rows: Tensor
    share: Tensor | None
    blended = False  # one grid between the rows instead of a mean of their values

    def expected(self) -> Tensor:
        """Expected bits, a scalar."""
        raise TypeError(f"{type(self).__name__} must say its expected bits")

    def commit(self, bits: int) -> None:
        """Decide for the candidate ``bits``; what is in play afterwards is this row alone."""
        raise TypeError(f"{type(self).__name__} must say how it commits")


class FixedBits(BitWidth):
    """An integer width, chosen among K candidates (one, if only one is given)."""

    share = None

    def __init__(self, bits: int, candidates: Sequence[int] | None = None) -> None:
        super().__init__()
        candidates = list(candidates or [bits])
        self.register_buffer("candidates", torch.tensor(candidates, dtype=torch.float32))
        self.register_buffer("rows", torch.tensor([candidates.index(bits)]))

    def expected(self) -> Tensor:
        """The width itself."""
        return self.candidates.index_select(0, self.rows).squeeze(0)

    @torch.no_grad()
    def commit(self, bits: int) -> None:
        """Move to the row of ``bits``; a single-row width takes the new width into its row."""
        if len(self.candidates) == 1:
            self.candidates.fill_(bits)
        else:
            self.rows.fill_(self.candidates.tolist().index(bits))
