"""Fractional bit-widths: a real number of bits that trains, between two whole widths (FraQAT and its kin).

    mixed     (1 - f) Q_n(x) + f Q_n+1(x)        n = ceil(b) - 1, f = b - n in (0, 1]
    sampled   Q_n(x) or Q_n+1(x), the latter with the probability f, drawn outside the forward
    argmax    Q at the nearer of the two
    real      one grid with a real number of steps: 2^b levels, its bounds and 1/scale between the rows'

n lies *below* b, so that a whole b has a gradient too: that of leaving it.

Where one grid is in play (sampled, argmax) the derivative is that of the error as it falls with the width:
Q_b(x) - x is proportional to 2^-b, so dQ/db = -ln 2 (Q_b(x) - x). The straight-through form of the same
choice, <g, Q_n+1 - Q_n>, costs a second quantization; the unbiased one, +-<g, Q_k - x> / p_k, has a variance
that grows as 1 / f.

`Stepped` is a real width that does not train: FraQAT's curriculum (2510.14823) moves it from row to row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.quantization.bits import BitWidth, FixedBits, Width

MODES = ("sampled", "argmax", "mixed", "real")


class Fractional(BitWidth):
    """b of the tensor, or one for each group of consecutive output channels, within the candidates' ends.

    candidates: whole widths without a gap, ascending. start: b of all groups, a number or (G,). sizes:
    channels of each group; none for a width of the whole tensor. rate: how many times as fast as a weight a
    width moves, under an optimizer that normalizes gradients.

    After each optimizer step `move` has to be called.
    """

    offset: nn.Parameter
    start: Tensor
    below: Tensor  # the whole width below b, of each channel or (1,)
    decided: Tensor
    group: Tensor | None  # (C,): of each channel

    def __init__(
        self,
        candidates: Sequence[int],
        start: float | Tensor,
        *,
        sizes: Sequence[int] = (),
        mode: str = "mixed",
        rate: float = 20.0,
    ) -> None:
        super().__init__()
        groups = max(len(sizes), 1)
        self.mode, self.rate, self.blended = mode, rate, mode == "real"
        self.offset = nn.Parameter(torch.zeros(groups))
        self.register_buffer("start", torch.as_tensor(start, dtype=torch.float32).expand(groups).clone())
        self.register_buffer("candidates", torch.tensor(list(candidates), dtype=torch.float32))
        self.ends = (float(candidates[0]), float(candidates[-1]))
        each = torch.arange(groups).repeat_interleave(torch.tensor(sizes)) if sizes else None
        self.register_buffer("group", each)
        in_play = 2 if mode in ("mixed", "real") else 1
        self.register_buffer(
            "rows", torch.zeros(in_play, *([sum(sizes)] if sizes else []), dtype=torch.int64)
        )
        self.register_buffer("below", self.candidates[:1].repeat(max(sum(sizes), 1)))
        self.register_buffer("decided", torch.zeros(1))
        self._is_decided = False  # what the buffer says, where forward can branch on it
        move([self], torch.full((groups,), 0.5))

    def _each(self, by_group: Tensor) -> Tensor:
        """(G,) as each channel sees it: (C,), or (1,) of the tensor."""
        return by_group if self.group is None else by_group.index_select(0, self.group)

    @property
    def share(self) -> Tensor | None:  # type: ignore[override]
        if self._is_decided:
            return None
        if len(self.rows) == 1:
            return _Halving.apply(self.offset, self.group, self.rate)
        f = self._each(torch.add(self.start, self.offset, alpha=self.rate)) - self.below
        if self.blended:
            f = torch.exp2(f) - 1  # between 2^n and 2^(n+1) levels there are 2^b
        return torch.cat([1 - f, f]) if self.group is None else torch.stack([1 - f, f])

    def expected(self) -> Tensor:
        """b itself, a scalar or (C,); the width once decided."""
        if self._is_decided:
            return self.candidates.index_select(0, self.rows[0].view(-1)).view(self.rows[0].shape)
        b = self._each(real([self]))
        return b.squeeze(0) if self.group is None else b

    def take(self, offset: Tensor, below: Tensor, rows: Tensor) -> None:
        """What `move` found, of each group (G,): offset, the whole width below, the (lower) row in play."""
        if self._is_decided:
            return
        self.offset.copy_(offset)
        if len(self.rows) == 1:
            self.rows.copy_(self._each(rows).view(self.rows.shape))
            return
        self.below.copy_(self._each(below))
        both = torch.stack([rows, (rows + 1).clamp_(max=len(self.candidates) - 1)])
        self.rows.copy_(
            (both if self.group is None else both.index_select(1, self.group)).view(self.rows.shape)
        )

    @torch.no_grad()
    def commit(self, bits: Width) -> None:
        """Decide for a candidate, or for one per channel: a fixed width from now on."""
        candidates = self.candidates.tolist()
        each = [bits] if isinstance(bits, int) else bits
        rows = torch.tensor([candidates.index(b) for b in each], device=self.rows.device)
        self.rows[0] = rows if self.group is not None else rows[0]
        self.decided.fill_(1.0)
        self._is_decided = True

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._is_decided = bool(self.decided)


def real(widths: Sequence[Fractional]) -> Tensor:
    """b of all groups of all widths, (T,), differentiable."""
    offset = torch.cat([width.offset for width in widths])
    return torch.add(torch.cat([width.start for width in widths]), offset, alpha=widths[0].rate)


@torch.no_grad()
def move(widths: Sequence[Fractional], noise: Tensor) -> None:
    """Keep every b within its ends and put the rows in play beside it; ``noise`` (T,), uniform, draws them.
    All widths, of the same ends, at once: a step costs few operations however many sites there are."""
    (low, high), mode = widths[0].ends, widths[0].mode
    start = torch.cat([width.start for width in widths])
    b = torch.add(start, torch.cat([width.offset for width in widths]), alpha=widths[0].rate).clamp_(
        low, high
    )
    below = (b.ceil() - 1).clamp_(low, high - 1)
    rows = below - low
    if mode in ("sampled", "argmax"):
        rows += b - below > noise if mode == "sampled" else b - below >= 0.5
    counts = [len(width.offset) for width in widths]
    parts = (part.split(counts) for part in ((b - start) / widths[0].rate, below, rows.long()))
    for width, *own in zip(widths, *parts, strict=True):
        width.take(*own)


class _Halving(torch.autograd.Function):
    """1 for each channel, (1, C), or (1,): the share of a grid whose error halves with each bit of b."""

    @staticmethod
    def forward(ctx, offset: Tensor, group: Tensor | None, rate: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(group)
        ctx.slope, ctx.shape = -math.log(2) * rate, offset.shape
        return torch.ones_like(offset) if group is None else offset.new_ones(1, len(group))

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        (group,) = ctx.saved_tensors
        if group is not None:
            g = g.new_zeros(ctx.shape).index_add(0, group, g[0])
        return g * ctx.slope, None, None


class Stepped(FixedBits):
    """A width that a schedule moves from one of ``stops``, whole or not, to the next; its plan has the whole
    width below."""

    def __init__(self, stops: Sequence[float]) -> None:
        super().__init__(1, range(1, len(stops) + 1))
        self.candidates.copy_(torch.tensor(stops))
