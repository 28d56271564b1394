"""Hypothesis strategies that several folders of tests share: widths, grids, shapes, tensors, codes."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.numerics.grid import GRIDS, bounds

bit_widths = st.integers(1, 8)
magnitudes = st.sampled_from([1e-30, 1e-6, 1.0, 300.0, 1e30])


@st.composite
def grids(draw: st.DrawFn, names: tuple[str, ...] = GRIDS) -> tuple[int, int, float]:
    """(low, high, half) of a grid that holds at least two levels."""
    name = draw(st.sampled_from(names))
    return bounds(name, draw(st.integers(2 if name == "balanced" else 1, 8)))


def shapes(dimensions: int = 4, most: int = 7) -> st.SearchStrategy[list[int]]:
    """Shapes with empty axes, and the empty shape of a scalar."""
    return st.lists(st.integers(0, most), max_size=dimensions)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...] | None = None, limit: float = 1e4) -> Tensor:
    """Finite float32 values: noise of one seed with drawn numbers (zeros, ties, extremes) strewn in."""
    size = draw(st.tuples(st.integers(1, 5), st.integers(1, 40))) if shape is None else shape
    x = torch.randn(size, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    special = draw(
        st.lists(st.floats(-limit, limit, width=32) | st.sampled_from([0.0, 0.5, -1.5, 2.5]), max_size=6)
    )
    for i, value in enumerate(special[: x.numel()]):
        x.view(-1)[(i * 7) % x.numel()] = value
    return x


@st.composite
def codes(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """(codes of any shape, bits, low), every code in low .. low + 2^bits - 1."""
    bits = draw(bit_widths)
    low = draw(st.sampled_from([0, -(2 ** (bits - 1)), 1 - 2 ** (bits - 1)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.int16, torch.int64, torch.float32]))
    return torch.randint(low, low + 2**bits, draw(shapes()), generator=generator).to(dtype), bits, low
