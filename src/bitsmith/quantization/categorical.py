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

MODES = ("sampled", "mixed", "real")


class Categorical(BitWidth):
    """A distribution over candidate widths: softmax(gain * logits / temperature).

    mode, what the forward does with it:
        sampled   one row, drawn by `draw` with Gumbel noise; 1 in forward, the logits' gradient in backward
        mixed     all rows, weighted by the noisy probabilities
        real      one grid at the mean width: level bounds and log scale are means over the rows

    gain: how many times as fast as a weight a logit moves under an optimizer that normalizes gradients.
    """

    temperature: Tensor
    noise: Tensor
    decided: Tensor

    def __init__(self, candidates: Sequence[int], mode: str = "sampled", gain: float = 20.0) -> None:
        super().__init__()
        self.mode, self.gain, self.blended = mode, gain, mode == "real"
        count = len(candidates)
        self.logits = nn.Parameter(torch.zeros(count))
        self.register_buffer("candidates", torch.tensor(candidates, dtype=torch.float32))
        start = [count - 1] if mode == "sampled" else range(count)
        self.register_buffer("rows", torch.tensor(list(start)))
        self.register_buffer("temperature", torch.ones(1))
        self.register_buffer("noise", torch.zeros(count))
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
        if self.mode != "sampled":
            return self.probabilities(noisy=True)
        return _Drawn.apply(self.logits, self.rows, self.gain, self.temperature)

    def expected(self) -> Tensor:
        """Mean of the candidates, free of noise; the width itself once decided."""
        if self._is_decided:
            return self.candidates.index_select(0, self.rows[:1]).squeeze(0)
        return self.probabilities() @ self.candidates

    @torch.no_grad()
    def draw(self, noise: Tensor, temperature: Tensor, rows: Sequence[int]) -> None:
        """What the next forward uses: Gumbel ``noise`` (G, >= K), or the row drawn with it for each of G
        groups."""
        self.temperature.copy_(temperature)
        if self.mode == "sampled":
            self.rows.fill_(rows[0])
        else:
            self.noise.copy_(noise[0, : len(self.noise)])

    @torch.no_grad()
    def commit(self, bits: Width) -> None:
        """Decide for a candidate: a fixed width from now on."""
        self.rows.fill_(self.candidates.tolist().index(bits))
        self.decided.fill_(1.0)
        self._is_decided = True

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._is_decided = bool(self.decided)


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
        self.noise = self.noise.repeat(len(sizes), 1)
        self.rows = self.rows.unsqueeze(1).repeat(1, sum(sizes))
        self.register_buffer("group", torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)))

    def logits_by_group(self) -> tuple[Tensor, ...]:
        return self.logits.unbind()

    @property
    def share(self) -> Tensor | None:  # type: ignore[override]
        if self._is_decided:
            return None
        if self.mode != "sampled":
            return self.probabilities(noisy=True).index_select(0, self.group).T
        return _DrawnByGroup.apply(self.logits, self.rows, self.group, self.gain, self.temperature)

    def expected(self) -> Tensor:
        """(C,), free of noise; the widths themselves once decided."""
        if self._is_decided:
            return self.candidates.index_select(0, self.rows[0])
        return (self.probabilities() @ self.candidates).index_select(0, self.group)

    @torch.no_grad()
    def draw(self, noise: Tensor, temperature: Tensor, rows: Sequence[int]) -> None:
        self.temperature.copy_(temperature)
        if self.mode == "sampled":
            self.rows[0] = torch.tensor(rows, device=self.rows.device).index_select(0, self.group)
        else:
            self.noise.copy_(noise[:, : self.noise.shape[1]])

    @torch.no_grad()
    def commit(self, bits: Width) -> None:
        """Decide for a candidate, or for one per channel."""
        candidates = self.candidates.tolist()
        each = [bits] * len(self.group) if isinstance(bits, int) else bits
        self.rows[0] = torch.tensor([candidates.index(b) for b in each], device=self.rows.device)
        self.decided.fill_(1.0)
        self._is_decided = True


class _Drawn(torch.autograd.Function):
    """p / p.detach() of the row drawn: 1, with the gradient of log p = gain * logits / t - logsumexp."""

    @staticmethod
    def forward(ctx, logits: Tensor, rows: Tensor, gain: float, temperature: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(logits, rows, temperature)
        ctx.gain = gain
        return logits.new_ones(1)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        logits, rows, temperature = ctx.saved_tensors
        slope = g * (ctx.gain / temperature)
        p = torch.softmax(logits * (ctx.gain / temperature), 0)
        return (p * -slope).index_add(0, rows, slope), None, None, None


class _DrawnByGroup(torch.autograd.Function):
    """`_Drawn` of each group, seen by each channel: ones (1, C); a group receives the sum over its
    channels."""

    @staticmethod
    def forward(ctx, logits: Tensor, rows: Tensor, group: Tensor, gain: float, temperature: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(logits, rows, group, temperature)
        ctx.gain = gain
        return logits.new_ones(1, len(group))

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        logits, rows, group, temperature = ctx.saved_tensors
        rate = ctx.gain / temperature
        p = torch.softmax(logits * rate, 1)
        slope = g[0] * rate  # of each channel
        own = torch.zeros_like(logits).index_put((group, rows[0]), slope, accumulate=True)
        return own - p * own.sum(1, keepdim=True), None, None, None, None
