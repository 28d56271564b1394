"""Shapes, operands and the definition of a product of integers, for the tests of kernels."""

import torch
from hypothesis import strategies as st
from torch import Tensor

SIZES = st.one_of(st.integers(0, 70), st.sampled_from([1, 16, 31, 32, 33, 127, 128, 129]))
SHAPES = st.tuples(
    st.one_of(st.integers(0, 30), st.sampled_from([241, 250])),  # more rows than one block takes
    st.one_of(SIZES, st.sampled_from([1023, 1024, 1025, 2100])),  # more inputs than one chunk
    SIZES,
)
FILLS = st.sampled_from(["random", "lowest", "highest"])


def filled(shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype, fill: str, seed: int) -> Tensor:
    """Codes low..high: drawn, or all at one end."""
    if fill != "random":
        return torch.full(shape, low if fill == "lowest" else high, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def integers(a: Tensor, w: Tensor) -> Tensor:
    """Sums over k of a (m, k) w (n, k), by int64: int32."""
    return (a.long() @ w.long().t()).to(torch.int32)
