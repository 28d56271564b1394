"""A product of floats by one weight, prepared once: what stays the same in all calls lies where C reads it.

The same numbers as `Native.quantize` and `Native.values`, bit for bit. With few rows the product itself takes
less time than checking and converting its operands in Python.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from bitsmith.kernels.native import FLOATS, Native, Product, parameters
from bitsmith.kernels.operands import Weight
from bitsmith.numerics.calibrate import SMALLEST_STEP


class PreparedProduct:
    """(m, k) float32, contiguous, on the CPU, finite -> (m, n) float32. Codes of the floats as `quantize` has
    them: dynamic, a scale for each row, where ``scale`` (1,) is not given."""

    def __init__(
        self,
        library: Native,
        weight: Weight,
        bias: Tensor | None,
        *,
        low: int,
        high: int,
        scale: Tensor | None = None,
        zero_point: int = 0,
        asymmetric: bool = False,
    ) -> None:
        self.n, self.k = weight.shape
        dynamic = scale is None
        product, self._kept = parameters(weight, bias)
        product.a_row, product.a_column, product.a_kind = self.k, 1, int(low >= 0)
        product.out_kind, product.out_row = FLOATS, self.n
        product.zero = 0 if dynamic and asymmetric else zero_point
        if not (dynamic and asymmetric) and not zero_point and low < 0:
            product.column_sum = None  # nothing to put right
        self._template = bytes(product)
        self._scale = None if scale is None else scale.float().reshape(1).contiguous()
        self._zero = torch.tensor([zero_point], dtype=torch.int32)
        self._of_rows = dynamic and asymmetric
        self._options = (int(dynamic), int(asymmetric))
        self._grid = (low, high, 0.0, SMALLEST_STEP)
        self._quantize, self._multiply = library.function("quantize"), library.function("product")

    def __call__(self, x: Tensor) -> Tensor:
        m, threads = x.shape[0], torch.get_num_threads()
        out = torch.empty(m, self.n)
        scratch = torch.empty(m * (self.k + 8), dtype=torch.uint8)  # scales, zero points, codes
        scales = scratch.data_ptr()
        zeros, codes = scales + 4 * m, scales + 8 * m
        product = Product.from_buffer_copy(self._template)
        if self._scale is None:
            product.row_scale = scales
            product.row_zero = zeros if self._of_rows else None
        else:
            rows = self._scale.expand(m).contiguous()
            product.row_scale = rows.data_ptr()
            scales, zeros = product.row_scale, self._zero.data_ptr()
        self._quantize(x.data_ptr(), m, self.k, *self._options, scales, zeros, *self._grid, codes, threads)
        product.m, product.a, product.out, product.threads = m, codes, out.data_ptr(), threads
        if self._multiply(ctypes.addressof(product)):
            raise MemoryError("no memory for a product of integers")
        return out
