"""Categorical bit-widths: a distribution over candidate widths, and what a forward makes of it.

The noise is drawn outside the forward, so that a repeated forward (activation checkpointing, a second pass)
is the same one. Nothing here knows of a budget: a method moves the logits, draws, and decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.quantization.bits import BitWidth, Width
from bitsmith.quantization.scheme import FLOAT

MODES = ("sampled", "argmax", "mixed", "real")
ONE = ("sampled", "argmax")  # modes with one row in play


class Categorical(BitWidth):
    """A distribution over candidate widths: softmax(gain * logits / temperature).

    mode, what the forward does with it:
        sampled   one row, drawn by `draw` with Gumbel noise; 1 in forward, the logits' gradient in backward
        argmax    the likeliest row; 1 in forward, in backward p times what `sampled` has: straight-through
        mixed     all rows, weighted by the noisy probabilities
        real      one grid at the mean width: level bounds and 1/scale are means over the rows

    gain: how many times as fast as a weight a logit moves under an optimizer that normalizes gradients.
    """

    temperature: Tensor
    noise: Tensor
    pull: Tensor
    decided: Tensor

    def __init__(self, candidates: Sequence[int], mode: str = "sampled", gain: float = 20.0) -> None:
        super().__init__()
        self.mode, self.gain, self.blended = mode, gain, mode == "real"
        count = len(candidates)
        self.logits = nn.Parameter(torch.zeros(count))
        self.register_buffer("candidates", torch.tensor(candidates, dtype=torch.float32))
        start = [count - 1] if mode in ONE else range(count)
        self.register_buffer("rows", torch.tensor(list(start)))
        self.register_buffer("temperature", torch.ones(1))
        self.register_buffer("noise", torch.zeros(count))
        pull = gain * (torch.eye(count)[-1] - 1 / count)
        self.register_buffer("pull", pull)  # d log p / d logits of the row drawn
        self.register_buffer("decided", torch.zeros(1))
        self._is_decided = False  # what the buffer says, where forward can branch on it

    def probabilities(self, noisy: bool = False) -> Tensor:
        """(K,), differentiable; with groups (G, K)."""
        scores = self.gain * self.logits
        return torch.softmax((scores + self.noise if noisy else scores) / self.temperature, -1)

    def logits_by_group(self) -> tuple[Tensor, ...]:
        """The logits of each group of channels, (K,); the tensor is one."""
        return (self.logits,)

    @property
    def share(self) -> Tensor | None:  # type: ignore[override]
        if self._is_decided:
            return None
        if self.mode not in ONE:
            return self.probabilities(noisy=True)
        return _Drawn.apply(self.logits, self.pull, None)

    def expected(self) -> Tensor:
        """Mean of the candidates, free of noise; the width itself once decided."""
        if self._is_decided:
            return self.candidates.index_select(0, self.rows[:1]).squeeze(0)
        return self.probabilities() @ self.candidates

    def take(self, row: Tensor, pull: Tensor) -> None:
        """Have the row drawn for each group (G,) in play; pull: (G, >= K)."""
        self.rows.copy_(row)
        self.pull.copy_(pull[0, : len(self.pull)])

    def entropy(self) -> Tensor:
        """Of the distribution free of noise, in nats, differentiable; with groups their mean."""
        p = self.probabilities()
        return -(p * p.clamp(min=1e-12).log()).sum(-1).mean()

    @torch.no_grad()
    def commit(self, bits: Width) -> None:
        """Decide for a candidate: a fixed width from now on."""
        self.rows.fill_(self.candidates.tolist().index(bits))
        self.decided.fill_(1.0)
        self._is_decided, self.in_float = True, bits == FLOAT

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._is_decided = bool(self.decided)
        self.in_float = self._is_decided and self.whole() == FLOAT


class GroupCategorical(Categorical):
    """A distribution over the candidates for each group of consecutive output channels; logits are (G, K).

    sizes: channels of each group. The modes are those of `Categorical`, group by group.
    """

    group: Tensor  # (C,): of each channel

    def __init__(
        self, candidates: Sequence[int], sizes: Sequence[int], mode: str = "sampled", gain: float = 20.0
    ) -> None:
        super().__init__(candidates, mode, gain)
        self.logits = nn.Parameter(self.logits.detach().repeat(len(sizes), 1))
        self.noise, self.pull = self.noise.repeat(len(sizes), 1), self.pull.repeat(len(sizes), 1)
        self.rows = self.rows.unsqueeze(1).repeat(1, sum(sizes))
        self.register_buffer("group", torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)))

    def logits_by_group(self) -> tuple[Tensor, ...]:
        return self.logits.unbind()

    @property
    def share(self) -> Tensor | None:  # type: ignore[override]
        if self._is_decided:
            return None
        if self.mode not in ONE:
            return self.probabilities(noisy=True).index_select(0, self.group).T
        return _Drawn.apply(self.logits, self.pull, self.group)

    def expected(self) -> Tensor:
        """(C,), free of noise; the widths themselves once decided."""
        if self._is_decided:
            return self.candidates.index_select(0, self.rows[0])
        return (self.probabilities() @ self.candidates).index_select(0, self.group)

    def take(self, row: Tensor, pull: Tensor) -> None:
        self.rows.copy_(row.index_select(0, self.group))
        self.pull.copy_(pull[:, : self.pull.shape[1]])

    @torch.no_grad()
    def commit(self, bits: Width) -> None:
        """Decide for a candidate, or for one per channel."""
        candidates = self.candidates.tolist()
        each = [bits] * len(self.group) if isinstance(bits, int) else bits
        self.rows[0] = torch.tensor([candidates.index(b) for b in each], device=self.rows.device)
        self.decided.fill_(1.0)
        self._is_decided, self.in_float = True, bits == FLOAT


def scores_of(widths: Sequence[Categorical], temperature: Tensor, padding: Tensor | float) -> Tensor:
    """gain * logits / temperature of all widths and groups, one row each, differentiable; (rows, K) with the
    ``padding`` added: -inf where a row has fewer candidates."""
    logits = [row for width in widths for row in width.logits_by_group()]
    together = torch.stack if len({len(row) for row in logits}) == 1 else _padded
    return together(logits) * (widths[0].gain / temperature) + padding


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


@torch.no_grad()
def draw(widths: Sequence[Categorical], noise: Tensor, temperature: Tensor, padding: Tensor | float) -> None:
    """What the next forward uses, from exponential ``noise`` (rows, K): at ``temperature`` the Gumbel noise
    -log(noise), or the candidates drawn with it. All widths at once, so that a step costs few operations
    however many sites there are."""
    for width in widths:
        width.temperature.copy_(temperature)
    counts = [width.noise.numel() // width.noise.shape[-1] for width in widths]
    mode = widths[0].mode
    if mode not in ONE:
        for width, own in zip(widths, noise.log().neg().split(counts), strict=True):
            width.noise.copy_(own[:, : width.noise.shape[-1]].view(width.noise.shape))
        return
    p = torch.softmax(scores_of(widths, temperature, padding), 1)
    drawn = (p / noise if mode == "sampled" else p).argmax(
        1
    )  # log p + Gumbel noise is largest where p / noise is
    pull = torch.zeros_like(p).scatter_(1, drawn.unsqueeze(1), 1.0).sub_(p)
    pull.mul_(widths[0].gain / temperature)
    if mode == "argmax":
        pull.mul_(p.gather(1, drawn.unsqueeze(1)))
    for width, row, own in zip(widths, drawn.split(counts), pull.split(counts), strict=True):
        width.take(row, own)


class _Drawn(torch.autograd.Function):
    """p / p.detach() of the row drawn: 1, with the gradient of log p, which is known since the draw. With
    groups as each channel sees it: ones (1, C), and a group receives the sum over its channels."""

    @staticmethod
    def forward(ctx, logits: Tensor, pull: Tensor, group: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pull, group)
        return logits.new_ones(1) if group is None else logits.new_ones(1, len(group))

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        pull, group = ctx.saved_tensors
        if group is not None:
            g = g.new_zeros(len(pull)).index_add(0, group, g[0]).unsqueeze(1)
        return g * pull, None, None
