"""expected_peak: the peak of the activation bytes as a function of how sites share their widths.

A tensor that several sites read is as wide as the widest of them, so its expected size comes from the product
of the sites' cumulative distributions. The peak is the largest of the moments' expected sums (a lower bound
of the expected peak, and exact where every site has one width).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitsmith.quantization.liveness import Liveness
from bitsmith.quantization.scheme import FLOAT


class ExpectedPeak:
    """live: the tensors; row: free site -> its row of p; widths: site -> its widths; width: columns of p."""

    def __init__(
        self, live: Liveness, row: Mapping[str, int], widths: Mapping[str, tuple[int, ...]], width: int
    ) -> None:
        free = [
            (
                at,
                [row[s] for s in t.sites if s in row],
                max((widths[s][0] for s in t.sites if s not in row), default=1),
            )
            for at, t in enumerate(live.tensors)
            if any(s in row for s in t.sites)
        ]
        fixed = {s: b[0] for s, b in widths.items() if s not in row}
        values = sorted({b for s in row for b in widths[s]} | set(fixed.values())) or [1]
        number, readers = len(row), max((len(r) for _, r, _ in free), default=1)
        # at_most[s, k, v]: candidate k of site s is at most values[v]; the last row is below everything.
        at_most = torch.zeros(number + 1, width, len(values), dtype=torch.float64)
        at_most[number] = 1
        for site, i in row.items():
            for k, b in enumerate(widths[site]):
                at_most[i, k] = torch.tensor([float(b <= v) for v in values])
        self.at_most = at_most
        self.readers = torch.tensor([[*r, *[number] * (readers - len(r))] for _, r, _ in free]).view(
            -1, readers
        )
        floor = torch.tensor([[v >= least for v in values] for *_, least in free]).double()
        size = torch.tensor([[live.tensors[at].bytes_at(v) for v in values] for at, *_ in free]).double()
        self.floor, self.size = floor.view(-1, len(values)), size.view(-1, len(values))
        place = {at: i for i, (at, *_) in enumerate(free)}
        self.alive = torch.zeros(max(len(live.moments), 1), len(free), dtype=torch.float64)
        self.constant = torch.zeros(len(self.alive), dtype=torch.float64)
        for m, moment in enumerate(live.moments):
            for at in moment:
                if at in place:
                    self.alive[m, place[at]] = 1
                else:
                    self.constant[m] += live.tensors[at].bytes_at(
                        max((fixed.get(s, FLOAT) for s in live.tensors[at].sites), default=FLOAT)
                    )

    def peak(self, rows: Tensor) -> Tensor:
        """rows (S + 1, width), the last one-hot for fixed operands -> expected peak bytes, a scalar."""
        if self.alive.device != rows.device or self.alive.dtype != rows.dtype:
            for name in ("at_most", "floor", "size", "alive", "constant"):
                setattr(self, name, getattr(self, name).to(rows))
            self.readers = self.readers.to(rows.device)
        below = torch.bmm(rows.unsqueeze(1), self.at_most).squeeze(1)  # P(bits of s <= v)
        below = (
            below.index_select(0, self.readers.flatten()).view(*self.readers.shape, -1).prod(1) * self.floor
        )
        steps = self.size[:, 1:] - self.size[:, :-1]
        expected = self.size[:, -1] - (below[:, :-1] * steps).sum(1)  # sum by parts of size * P(widest = v)
        return torch.addmv(self.constant, self.alive, expected).max()
