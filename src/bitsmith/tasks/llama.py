"""A small decoder-only language model in the manner of Llama (Touvron et al. 2023, 2302.13971).

Pre-norm blocks with RMSNorm, rotary positions (2104.09864) and SwiGLU (2002.05202), no bias anywhere.
Module names are those of transformers' `LlamaModel` and the rotary halves lie as there, so that weights go
from one to the other by name (its `model.` prefix taken off). Unlike there, both products of attention are
`MatMul` modules with sites of their own, and there is no cache of keys and values: a sampled token costs a
whole forward, which is little at this size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.quantization.layers import MatMul

THETA = 10000.0  # of the slowest rotation
EPSILON = 1e-5  # of RMSNorm


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions; (N, T, width) in and out."""

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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, later: Tensor) -> Tensor:
        """cos, sin: (T, width / heads); later: (T, T), true where a key comes after its query."""
        query, key, value = (self._split(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        scores = self.scores(query, key.transpose(-2, -1)) * self.scale
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return self.o_proj(self.context(weights, value).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(N, T, width) -> (N, heads, T, width / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


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

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then MLP, each behind its norm and beside a residual; (N, T, width) in and out."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width, eps=EPSILON)
        self.self_attn = Attention(width, heads)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=EPSILON)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, later: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, later)
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
        self.vocab_size, self.context = vocab_size, context
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

    def forward(self, tokens: Tensor) -> Tensor:
        """Raises DataError where T is more than the positions."""
        length = tokens.shape[1]
        if length > self.context:
            raise DataError(
                "the sequence is longer than the model's positions",
                where="byte_llama",
                got=length,
                expected=f"at most {self.context} tokens",
                remedy="Give the data a shorter context, or the model a longer one",
            )
        x = self.embed_tokens(tokens)
        cos, sin, later = self.cos[:length], self.sin[:length], self.later[:length, :length]
        for block in self.layers:
            x = block(x, cos, sin, later)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits
