"""A small pre-norm vision transformer (Dosovitskiy et al. 2021, 2010.11929) for the 8x8 digits.

Unlike torchvision's, query, key and value are separate layers and both attention products are `MatMul`
modules, so that every multiplying operation has sites of its own (F.scaled_dot_product_attention would hide
two of them). For a small set and few epochs: mean pooling instead of a class token, patches that overlap
(CvT, Wu et al. 2021, 2103.15808), and position embeddings that start large. On the digits, 20 epochs, the
overlap was worth about one point, and the start at 0.5 instead of the usual 0.02 about three. Names follow
transformers where it has them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitsmith.quantization.layers import MatMul
from bitsmith.tasks.normalize import Normalize


class Attention(nn.Module):
    """Multi-head self-attention; (N, tokens, width) in and out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.scores = MatMul()
        self.context = MatMul()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        weights = (self.scores(query, key.transpose(-2, -1)) * self.scale).softmax(-1)
        return self.proj(self.context(weights, value).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(N, tokens, width) -> (N, heads, tokens, width / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    """down(GELU(up x)); (..., width) in and out."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.activation = nn.GELU()
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """Attention, then MLP, each behind its norm and beside a residual; (N, tokens, width) in and out."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """(N, C, size, size) -> logits (N, classes)."""

    def __init__(
        self,
        normalize: Normalize,
        classes: int,
        size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        margin = patch // 2
        self.patch_embedding = nn.Conv2d(
            normalize.mean.numel(), width, patch + 2 * margin, stride=patch, padding=margin
        )
        self.position_embedding = nn.Parameter(torch.empty(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.position_embedding, std=0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.patch_embedding(self.normalize(images))
        tokens = patches.flatten(2).transpose(1, 2) + self.position_embedding
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits
