"""A small decoder-only language model in the manner of Llama (Touvron et al. 2023, 2302.13971).

Pre-norm blocks with RMSNorm, rotary positions (2104.09864) and SwiGLU (2002.05202), no bias anywhere.
Module names are those of transformers' `LlamaModel` and the rotary halves lie as there, so that weights go
from one to the other by name (its `model.` prefix taken off). Unlike there, both products of attention are
`MatMul` modules with sites of their own; keys and values of what was read are held outside of the model, in
a `Memory` of fixed size that is written to in place. Where ``saves_codes`` is set
(quantization.integer_blocks), attention is one operation and keeps int8 codes for backward, and so does
SwiGLU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.quantization.integer_blocks import from_codes, swiglu
from bitsmith.quantization.layers import MatMul

THETA = 10000.0  # of the slowest rotation
EPSILON = 1e-5  # of RMSNorm


@dataclass
class Memory:
    """Keys, turned to their positions, and values of ``length`` tokens that were read: for each block
    (N, heads, room, width / heads), of which the first ``length`` positions count."""

    blocks: list[tuple[Tensor, Tensor]]
    length: int = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch alone."""
        self.blocks = [(keys[list(rows)], values[list(rows)]) for keys, values in self.blocks]


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions; (N, T, width) in and out."""

    saves_codes = False  # while training

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.scores = MatMul()
        self.context = MatMul()
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        later: Tensor | None,
        past: tuple[Tensor, Tensor, int] | None = None,
    ) -> Tensor:
        """cos, sin: (T, width / heads); later: (T, S + T), true where a key comes after its query; past: a
        block of a `Memory` and S, the tokens in it, to which those of x are added."""
        read = [layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        if self._at_once() and past is None and later is not None:
            by_head = [y.unflatten(-1, (self.heads, -1)) for y in read]
            return self.o_proj(from_codes(functools.partial(attend, cos=cos, sin=sin), *by_head).flatten(2))
        query, key, value = (self._split(y) for y in read)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past is not None:
            *stores, start = past
            end = start + x.shape[1]
            for store, new in zip(stores, (key, value), strict=True):
                store[:, :, start:end] = new
            key, value = (store[:, :, :end] for store in stores)
        scores = self.scores(query, key.transpose(-2, -1)) * self.scale
        if later is not None:
            scores.masked_fill_(later, float("-inf"))
        weights = scores.softmax(-1)
        return self.o_proj(self.context(weights, value).transpose(1, 2).flatten(2))

    def _at_once(self) -> bool:
        """Nothing looks at scores and context, and memory counts."""
        plain = type(self.scores) is MatMul and type(self.context) is MatMul
        return self.saves_codes and plain and torch.is_grad_enabled()

    def _split(self, x: Tensor) -> Tensor:
        """(N, T, width) -> (N, heads, T, width / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Causal attention with rotary positions, (N, T, heads, D) in and out."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (2104.09864, eq. 34) of (..., T, D): entry i and entry i + D/2 make a pair."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def rotary_tables(context: int, size: int) -> tuple[Tensor, Tensor]:
    """cos and sin (context, size) of position · THETA^(-2i/size), the same for both halves of ``size``."""
    frequencies = THETA ** (-torch.arange(0, size, 2).float() / size)
    angles = torch.outer(torch.arange(context).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) · up x); (..., width) in and out."""

    saves_codes = False

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(from_codes(swiglu, gate, up) if self.saves_codes else swiglu(gate, up))


class Block(nn.Module):
    """Attention, then MLP, each behind its norm and beside a residual; (N, T, width) in and out."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width, eps=EPSILON)
        self.self_attn = Attention(width, heads)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=EPSILON)
        self.mlp = MLP(width, hidden)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        later: Tensor | None,
        past: tuple[Tensor, Tensor, int] | None = None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, later, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Tokens (N, T) int64 -> logits of the next token at every position (N, T, vocab_size); T <= context."""

    cos: Tensor
    sin: Tensor
    later: Tensor

    def __init__(
        self, vocab_size: int, width: int, depth: int, heads: int, hidden: int, context: int, tied: bool
    ) -> None:
        super().__init__()
        self.vocab_size, self.context, self.heads = vocab_size, context, heads
        self.embed_tokens = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=EPSILON)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        # Constants of the architecture: weights from elsewhere have no such entries.
        cos, sin = rotary_tables(context, width // heads)
        later = torch.ones(context, context, dtype=torch.bool).triu(1)
        for name, table in (("cos", cos), ("sin", sin), ("later", later)):
            self.register_buffer(name, table, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # What is added to the residual stream starts smaller, the more there is of it (GPT-2).
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = parameter.shape[1] ** -0.5 / ((2 * depth) ** 0.5 if writes else 1.0)
                nn.init.normal_(parameter, std=std)

    def memory(self, rows: int, room: int | None = None) -> Memory:
        """An empty one, for ``rows`` rows of up to ``room`` tokens, by default as many as the model has
        positions for."""
        like, positions = self.norm.weight, min(room or self.context, self.context)
        shape = (rows, self.heads, positions, like.numel() // self.heads)
        return Memory([(like.new_empty(shape), like.new_empty(shape)) for _ in self.layers])

    def forward(self, tokens: Tensor, memory: Memory | None = None) -> Tensor:
        """With a memory tokens come after those in it, to which they are added; only the logits after the
        last of them are given: (N, 1, vocab_size). Raises DataError where all are more than the positions."""
        start = 0 if memory is None else memory.length
        end = start + tokens.shape[1]
        room = self.context if memory is None else memory.blocks[0][0].shape[2]
        if end > room:
            raise DataError(
                "the sequence is longer than the model's positions",
                where="byte_llama",
                got=end,
                expected=f"at most {room} tokens",
                remedy="Give the data a shorter context, or the model a longer one",
            )
        x = self.embed_tokens(tokens)
        cos, sin = self.cos[start:end], self.sin[start:end]
        later = self.later[start:end, :end] if memory is None or end - start > 1 else None
        for i, block in enumerate(self.layers):
            x = block(x, cos, sin, later, None if memory is None else (*memory.blocks[i], start))
        if memory is not None:
            memory.length, x = end, x[:, -1:]
        logits: Tensor = self.lm_head(self.norm(x))
        return logits
