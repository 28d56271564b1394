"""Two bit-widths of the kinds that methods bring: one sampled row, and all rows mixed."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitsmith.quantization import BitWidth


class Sampled(BitWidth):
    """One row at a time, drawn outside forward; share is 1 and carries the gradient of log p of the row."""

    def __init__(self, candidates: Sequence[int]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(candidates)))
        self.register_buffer("candidates", torch.tensor(candidates, dtype=torch.float32))
        self.register_buffer("rows", torch.tensor([len(candidates) - 1]))

    @property
    def share(self) -> Tensor:  # type: ignore[override]
        p = self.logits.softmax(0).index_select(0, self.rows)
        return p / p.detach()

    def expected(self) -> Tensor:
        return self.logits.softmax(0) @ self.candidates

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        self.rows.copy_(torch.multinomial(self.logits.softmax(0), 1, generator=generator))

    @torch.no_grad()
    def commit(self, bits: int) -> None:
        row = self.candidates.tolist().index(bits)
        self.rows.fill_(row)
        self.logits.fill_(-100.0)[row] = 100.0


class Mixed(BitWidth):
    """All rows at once."""

    def __init__(self, candidates: Sequence[int]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(candidates)))
        self.register_buffer("candidates", torch.tensor(candidates, dtype=torch.float32))
        self.register_buffer("rows", torch.arange(len(candidates)))

    @property
    def share(self) -> Tensor:  # type: ignore[override]
        return self.logits.softmax(0)

    def expected(self) -> Tensor:
        return self.logits.softmax(0) @ self.candidates
