"""Causal models that read tokens one after another, each of them once where that changes nothing.

A cache holds what attention needs of the tokens before: `Llama` has a memory of its own, models of
transformers have theirs. Both give what a forward over all tokens gives, within the rounding of floats, if
no token's numbers depend on a later one. Ranges that are found in several tokens at once (dynamic ones of a
tensor, a channel, or of the keys) do: such models, and those of which nothing is known, read everything again
for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitsmith.quantization.integer_layers import packed_sites
from bitsmith.quantization.quantizer import sites
from bitsmith.tasks.hub import CausalLM
from bitsmith.tasks.llama import Llama


class Reader(Protocol):
    """A batch of rows of one length in the course of being read."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Read (N, T) more tokens: the logits of the next one, (N, vocab_size)."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""


def reader(model: nn.Module, rows: int, room: int | None = None, *, cache: bool = True) -> Reader:
    """A reader of ``rows`` rows, of up to ``room`` tokens. cache: False to read all again for each token."""
    if cache and reads_one_by_one(model):
        if isinstance(model, Llama):
            return _WithMemory(model, rows, room)
        if isinstance(model, CausalLM):
            return _OfTransformers(model)
    return _Again(model)


def reads_one_by_one(model: nn.Module) -> bool:
    """Whether the numbers of a token are the same whatever comes after it."""
    packed, trained = packed_sites(model), sites(model)
    dynamic = {name: site.form.granularity for name, site in packed.items() if site.form.dynamic}
    for name, quantizer in trained.items():
        if quantizer.kind == "activation" and quantizer.scheme.range == "dynamic":
            dynamic[name] = quantizer.scheme.granularity
    return all(
        granularity in ("token", "group") and not name.endswith(".right")
        for name, granularity in dynamic.items()
    )


class _Again:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen = model, torch.empty(0, 0, dtype=torch.int64)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, tokens], 1) if self.seen.numel() else tokens
        logits: Tensor = self.model(self.seen)[:, -1]
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        self.seen = self.seen[list(rows)]


class _WithMemory:
    def __init__(self, model: Llama, rows: int, room: int | None) -> None:
        self.model, self.memory = model, model.memory(rows, room)

    def __call__(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens, self.memory)[:, -1]
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        self.memory.keep(rows)


class _OfTransformers:
    def __init__(self, model: CausalLM) -> None:
        self.model, self.past = model, None

    def __call__(self, tokens: Tensor) -> Tensor:
        logits, self.past = self.model.read(tokens, self.past)
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        past: Any = self.past
        if past is not None:
            past.batch_select_indices(torch.tensor(list(rows)))
