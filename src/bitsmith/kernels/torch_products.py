"""Ways to multiply bytes exactly with what torch has: a (m, k) int8 times b (n, k) int8, as int32.

Which of them is exact, and which fast, depends on the processor and on the build of torch: some add pairs of
products in 16 bits and saturate, silently. So each is tried here against int64 on operands that would
betray it, and only those that pass are timed (choose.py keeps the answer).
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

EXACT_INPUTS = 1024  # 128 * 127 * 1024 < 2^24: sums of floats are exact

ByteProduct = Callable[[Tensor, Tensor], Tensor]


def by_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """torch._int_mm: oneDNN's int8 product with VNNI; a slow loop without.

    The stride of an axis of length 1 may be anything, and as a leading dimension oneDNN refuses it, which
    torch 2.13 does not notice: the result is what the memory held (pytorch issue 195066). So strides are
    set here.
    """
    (m, k), n = a.shape, len(b)
    left, right = a.contiguous().as_strided((m, k), (k, 1)), b.contiguous()
    return torch._int_mm(left, right.as_strided((k, n), (n, 1) if k == 1 else (1, k)))


def by_float_blocks(a: Tensor, b: Tensor) -> Tensor:
    """float32 products over at most 1024 inputs at a time, exact on every processor."""
    sums = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32)
    for x, w in zip(a.split(EXACT_INPUTS, 1), b.split(EXACT_INPUTS, 1), strict=True):
        sums += torch.mm(x.float(), w.float().t()).to(torch.int32)
    return sums


def by_quantized_linear(a: Tensor, b: Tensor) -> Tensor:
    """torch's quantized linear with scale 1, exact for codes of at most 7 bits even where pairs saturate."""
    operators = torch.ops.quantized
    sums = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x, w in zip(a.split(EXACT_INPUTS, 1), b.split(EXACT_INPUTS, 1), strict=True):
            codes = torch._make_per_tensor_quantized_tensor(w.contiguous(), 1.0, 0)
            packed = operators.linear_prepack(codes, None)
            operator = operators.linear_with_input_q_dq_qweight_dq_output_fp32
            sums += operator(x.float().contiguous(), 1.0, 128, packed).to(torch.int32)
    return sums


PRODUCTS: dict[str, ByteProduct] = {
    "int_mm": by_int_mm,
    "quantized_linear": by_quantized_linear,
    "float_blocks": by_float_blocks,
}


def is_exact(product: ByteProduct, bits: int) -> bool:
    """Whether ``product`` is right for int8 activations and codes of ``bits`` (those of 8 bits are moved to
    be signed), at the extremes and at random, over odd shapes; an error of its is a no."""
    generator = torch.Generator().manual_seed(bits)
    low, high = (-128, 127) if bits == 8 else (0, 2**bits - 1)
    for m, k, n in ((1, 1, 2), (3, 2, 1), (1, 64, 16), (5, 33, 7), (33, 257, 65), (2, 1500, 18)):
        drawn = (
            torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator),
            torch.randint(low, high + 1, (n, k), dtype=torch.int8, generator=generator),
        )
        extremes = (
            (torch.full((m, k), x, dtype=torch.int8), torch.full((n, k), w, dtype=torch.int8))
            for x, w in itertools.product((-128, 127), (low, high))
        )
        for a, b in itertools.chain([drawn], extremes):
            try:
                found = product(a, b)
            except (RuntimeError, NotImplementedError, AttributeError):
                return False
            if not torch.equal(found.long(), a.long() @ b.long().t()):
                return False
    return True


def seconds(product: ByteProduct, m: int, k: int = 256, n: int = 256, rounds: int = 3) -> float:
    """The least time of a few rounds."""
    a, b = torch.ones(m, k, dtype=torch.int8), torch.ones(n, k, dtype=torch.int8)
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        product(a, b)
        taken.append(time.perf_counter() - start)
    return min(taken)


def fastest(bits: int) -> str:
    """The fastest exact product for codes of ``bits``, by name; a way that takes ten times the float
    products' time is not timed twice."""
    best, least = "float_blocks", seconds(by_float_blocks, 64)
    for name in ("int_mm", "quantized_linear"):
        if not is_exact(PRODUCTS[name], bits):
            continue
        taken = seconds(PRODUCTS[name], 64)
        if taken < least:
            best, least = name, taken
    return best
