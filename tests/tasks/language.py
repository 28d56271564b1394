"""Language models small enough to be checked by hand, and tokenizers for them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

SIZE = 128  # of the vocabulary: ASCII


class Ascii:
    """One token a character."""

    vocab_size = SIZE

    def encode(self, text: str) -> list[int]:
        return list(text.encode("ascii"))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("ascii")


class Pieces:
    """The longest known piece first, so that a space and the word after it are one token."""

    pieces = (" b", " ", "a", "b", "c")
    vocab_size = len(pieces)

    def encode(self, text: str) -> list[int]:
        found = []
        while text:
            piece = next(p for p in self.pieces if text.startswith(p))
            found.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.pieces[t] for t in tokens)


def probability(before: int, after: int) -> float:
    """p(after | before) of Bigram: weights 1..11 over their sum."""
    return weight(before, after) / sum(weight(before, token) for token in range(SIZE))


def weight(before: int, after: int) -> int:
    return 1 + (7 * before + 3 * after + before * after) % 11


def log_probability(text: str, first: int) -> float:
    """Σ ln p of the characters of ``text`` from index ``first`` on."""
    return sum(math.log(probability(ord(text[i - 1]), ord(text[i]))) for i in range(first, len(text)))


class Bigram(nn.Module):
    """(N, T) -> (N, T, SIZE): logits whose softmax is `probability`, however they are shifted."""

    def __init__(self) -> None:
        super().__init__()
        table = [[math.log(weight(a, b)) + a for b in range(SIZE)] for a in range(SIZE)]
        self.register_buffer("table", torch.tensor(table))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


class Next(nn.Module):
    """Surely writes the next character of ASCII: after "a" comes "b"."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 9.0 * nn.functional.one_hot((tokens + 1) % SIZE, SIZE)


class History(nn.Module):
    """A causal model in which all tokens before count, and their places; remembers the longest row it saw."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(SIZE, 16, generator=generator))
        self.head = nn.Parameter(torch.randn(16, SIZE, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.longest = 0

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        self.longest = max(self.longest, length)
        places = 1 + torch.arange(length).unsqueeze(-1)
        states = (self.embedding[tokens] * places.cos()).cumsum(1) / places.sqrt()
        return self.dropout(states) @ self.head


@torch.no_grad()
def slowly(model: nn.Module, prompt: Sequence[int], continuation: Sequence[int]) -> float:
    """ln p of the continuation, token by token, each from a forward of its own."""
    before, total = list(prompt), 0.0
    for token in continuation:
        row = model(torch.tensor([before]))[0, -1].double()
        total += float(row[token] - row.logsumexp(0))
        before.append(token)
    return total
