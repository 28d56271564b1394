"""The compiled library, called through ctypes on the memory of tensors: it knows nothing of torch's ABI.

Tensors are on the CPU and their shapes are checked here, as the C code checks nothing. A call releases the
GIL; the library uses as many threads as torch does.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitsmith.kernels.geometry import Geometry
from bitsmith.kernels.operands import (
    MOST_BLOCK,
    MOST_INPUTS,
    Activations,
    Codes,
    Step,
    Weight,
    by_panel,
    weight_parameters,
)
from bitsmith.kernels.processor import InstructionSet
from bitsmith.numerics.calibrate import SMALLEST_STEP

_SUMS, FLOATS, _CODES, _NIBBLES = range(4)


class _Image(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in Geometry.FIELDS]


def _fields(*groups: tuple[str, type]) -> list[tuple[str, type]]:
    return [(name, kind) for names, kind in groups for name in names.split()]


class Product(ctypes.Structure):
    """`product` of c/kernels.h."""

    _fields_ = _fields(
        ("m n k group", c_int64),
        ("a", c_void_p),
        ("a_row a_column a_kind a_low", c_int64),
        ("picture w", c_void_p),
        ("bits factor low", c_int64),
        ("offset column_sum scale row_scale bias row_zero", c_void_p),
        ("zero out_kind accumulate", c_int64),
        ("out", c_void_p),
        ("out_row", c_int64),
        ("out_scale out_half", c_float),
        ("out_zero out_low out_high threads", c_int64),
    )


class Native:
    """A library built for one instruction set."""

    def __init__(self, path: Path, instruction_set: InstructionSet) -> None:
        """Raises OSError where the file is no library of ours."""
        self.name, self.path = instruction_set, path
        try:
            library = ctypes.CDLL(str(path))
            signatures: dict[str, tuple[Any, str]] = {
                "product": (ctypes.c_int, "p"),
                "packed_bytes": (c_int64, "iiii"),
                "pack": (None, "piiiiiiippi"),
                "unpack": (None, "piiiip"),
                "decode": (None, "piiiip"),
                "encode": (None, "piip"),
                "quantize": (None, "piiiippffffpi"),
                "update": (None, "ppiiiii"),
                "move": (None, "pppppiiifffiiiiiiipi"),
                "rows": (None, "ppiip"),
                "stochastic": (None, "ppiiiiffppi"),
                "aim": (None, "ppppppiiiffppi"),
            }
            kinds = {"p": c_void_p, "i": c_int64, "f": c_float}
            self._c: dict[str, Any] = {}
            for name, (result, arguments) in signatures.items():
                function = getattr(library, f"bitsmith_{name}")
                function.restype, function.argtypes = result, [kinds[kind] for kind in arguments]
                self._c[name] = function
        except AttributeError as error:
            raise OSError(f"{path} lacks a function ({error})") from None

    def function(self, name: str) -> Any:
        """A function of the library, which checks nothing."""
        return self._c[name]

    def pack(
        self,
        codes: Tensor,
        bits: int,
        *,
        group_size: int | None = None,
        offset: Tensor | int = 0,
        half: bool = False,
        scale: Tensor | None = None,
    ) -> Weight:
        """Codes (n, k), uint8 from 0 (or int8 at 8 bits, which are shifted by 128) with any strides,
        packed."""
        n, k = codes.shape
        size = max(1, min(group_size or k, k))
        flip = 0
        if codes.dtype == torch.int8:
            flip, offset = 128, offset - 128
        data = torch.empty(self._c["packed_bytes"](n, k, size, bits), dtype=torch.uint8)
        sums = torch.zeros(-(-n // 16), max(1, -(-k // size)), 16, dtype=torch.int32)
        self._c["pack"](
            pointer(codes, torch.uint8, torch.int8),
            *codes.stride(),
            n,
            k,
            size,
            bits,
            flip,
            pointer(data),
            pointer(sums),
            torch.get_num_threads(),
        )
        plain = sums.permute(0, 2, 1).reshape(-1, sums.shape[1])[:n]
        scales = None if scale is None else by_panel(scale.float() * (0.5 if half else 1.0))
        return Weight(
            (n, k), bits, size, data, *weight_parameters(codes, size, offset, half, plain), scale=scales
        )

    def unpack(self, weight: Weight) -> Tensor:
        """The codes from 0: uint8 (n, k)."""
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        n, k = weight.shape
        self._c["unpack"](pointer(weight.data), n, k, weight.group_size, weight.bits, pointer(codes))
        return codes

    def decode(self, stream: Tensor, bits: int, count: int, start: int = 0) -> Tensor:
        """``count`` codes of a dense bit stream (numerics.pack), from bit ``start``: uint8 (count,), from
        0."""
        if not 0 <= start + bits * count <= 8 * stream.numel():
            raise ValueError(f"{count} codes of {bits} bits from bit {start} leave {stream.numel()} bytes")
        codes = torch.empty(count, dtype=torch.uint8)
        self._c["decode"](pointer(stream, torch.uint8), stream.numel(), start, bits, count, pointer(codes))
        return codes

    def encode(self, codes: Tensor, bits: int) -> Tensor:
        """The inverse: codes (count,) from 0, uint8, known to fit, as a dense bit stream of whole bytes."""
        stream = torch.empty((len(codes) * bits + 7) // 8, dtype=torch.uint8)
        given = codes.contiguous()
        self._c["encode"](pointer(given, torch.uint8), len(codes), bits, pointer(stream))
        return stream

    def sums(self, x: Activations, weight: Weight, out: Tensor | None = None) -> Tensor:
        """The integers (m, n), int32; added to ``out`` where given."""
        assert weight.groups == 1
        made = torch.empty(x.shape[0], weight.shape[0], dtype=torch.int32) if out is None else out
        if made.shape != (x.shape[0], weight.shape[0]) or not made.is_contiguous():
            raise ValueError(f"out {tuple(made.shape)} does not hold {(x.shape[0], weight.shape[0])}")
        pointer(made, torch.int32)
        return self._product(x, weight, made, None, _SUMS, accumulate=out is not None)

    def values(self, x: Activations, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """The values (m, n), float32."""
        made = torch.empty(x.shape[0], weight.shape[0])
        return self._product(x, weight, made, bias, FLOATS)

    def codes(self, x: Activations, weight: Weight, to: Codes, bias: Tensor | None = None) -> Tensor:
        """The values as codes: (m, n), or (m, (n + 1) // 2) bytes."""
        n = weight.shape[0]
        made = torch.empty(x.shape[0], (n + 1) // 2 if to.packed else n, dtype=to.dtype)
        return self._product(x, weight, made, bias, _NIBBLES if to.packed else _CODES, to)

    def _product(
        self,
        x: Activations,
        w: Weight,
        out: Tensor,
        bias: Tensor | None,
        kind: int,
        to: Codes | None = None,
        accumulate: bool = False,
        geometry: Geometry | None = None,
    ) -> Tensor:
        k, m = w.shape[1], out.shape[0]
        found = x.shape if geometry is None else (m, geometry.inputs)
        if found != (m, k):
            raise ValueError(f"activations {found} do not meet a weight {w.shape}")
        if x.packed and (x.codes.shape[1] != (k + 1) // 2 or x.codes.stride(1) != 1):
            raise ValueError(f"{k} codes of 4 bits are {(k + 1) // 2} bytes of a row, side by side")
        if geometry is not None:
            geometry.check(x.codes)
        if k > MOST_INPUTS:
            raise ValueError(f"{k} inputs could overflow a sum of 32 bits; at most {MOST_INPUTS}")
        if not k:
            return _without_inputs(x, w, out, bias, to, accumulate)
        p, kept = parameters(w, bias if kind != _SUMS else None)
        p.m = m
        p.a = pointer(x.codes, torch.int8, torch.uint8)
        p.a_row, p.a_column = (0, 0) if geometry else x.codes.stride()
        p.a_kind = 2 if x.packed else int(x.codes.dtype == torch.uint8)
        p.a_low = x.packed[1] if x.packed else 0
        if kind != _SUMS:
            if w.scale is None:
                raise ValueError("this weight has no scale")
            rows = None if x.row_scale is None else x.row_scale.reshape(-1).expand(m)
            p.row_scale = _parameter(rows, torch.float32, m, kept)
        if isinstance(x.zero_point, int):
            p.zero = x.zero_point
        else:
            p.row_zero = _parameter(x.zero_point, torch.int32, m, kept)
        if not (p.row_zero or p.zero or p.a_kind == 1):
            p.column_sum = None
        if geometry is not None:
            image = _Image(*geometry.numbers())
            p.picture = ctypes.addressof(image)
        p.out_kind, p.accumulate, p.out, p.out_row = kind, accumulate, pointer(out), out.stride(0)
        if to is not None:
            p.out_scale, p.out_half, p.out_zero = to.scale, to.half, to.zero_point
            p.out_low, p.out_high = to.low, to.high
        p.threads = torch.get_num_threads()
        if self._c["product"](ctypes.addressof(p)):
            raise MemoryError("no memory for a product of integers")
        return out

    def convolve(
        self, x: Activations, weight: Weight, geometry: Geometry, bias: Tensor | None = None
    ) -> Tensor:
        """A convolution of codes (batch, height, width, channels), contiguous but for a slice of channels,
        with one zero point; weight (n, taps y * taps x * channels). (batch * rows * columns, n): float32
        values where the weight has a scale, else int32."""
        kind, dtype = (_SUMS, torch.int32) if weight.scale is None else (FLOATS, torch.float32)
        out = torch.empty(geometry.row_count(x.codes), weight.shape[0], dtype=dtype)
        return self._product(x, weight, out, bias, kind, geometry=geometry)

    def rows(self, image: Tensor, geometry: Geometry, first: int, count: int) -> Tensor:
        """Rows [first, first + count) of a convolution's matrix, of the image's dtype."""
        geometry.check(image)
        if not 0 <= first <= first + count <= geometry.row_count(image):
            raise ValueError(f"rows {first} to {first + count} of {geometry.row_count(image)}")
        made = torch.empty(count, geometry.inputs, dtype=image.dtype)
        numbers = _Image(*geometry.numbers())
        self._c["rows"](
            ctypes.addressof(numbers), pointer(image, torch.int8, torch.uint8), first, count, pointer(made)
        )
        return made

    def quantize(
        self,
        x: Tensor,
        low: int,
        high: int,
        *,
        scale: Tensor | None = None,
        zero_point: int = 0,
        half: float = 0.0,
        asymmetric: bool = False,
    ) -> Activations:
        """Codes of x (m, k); a scale, and on an ``asymmetric`` grid a zero point, for each row where
        ``scale`` (1,) is not given."""
        m, k = x.shape
        values = x.float().contiguous()
        codes = torch.empty(m, k, dtype=torch.uint8 if low >= 0 else torch.int8)
        dynamic = scale is None
        scales = torch.empty(m) if scale is None else scale.float().reshape(1).contiguous()
        zeros = torch.full((m if dynamic else 1,), zero_point, dtype=torch.int32)
        self._c["quantize"](
            pointer(values),
            m,
            k,
            dynamic,
            asymmetric,
            pointer(scales),
            pointer(zeros),
            low,
            high,
            half,
            SMALLEST_STEP,
            pointer(codes),
            torch.get_num_threads(),
        )
        return Activations(codes, zeros if dynamic and asymmetric else zero_point, scales)

    def update(self, codes: Tensor, step: Tensor, seed: int, low: int, high: int) -> None:
        """In place: int8 codes <- clamp(floor(codes - step + noise), low, high), step float32 in codes."""
        if codes.shape != step.shape or not (codes.is_contiguous() and step.is_contiguous()):
            raise ValueError("codes and step must have one shape and be contiguous")
        self._c["update"](
            pointer(codes, torch.int8),
            pointer(step, torch.float32),
            codes.numel(),
            seed,
            low,
            high,
            torch.get_num_threads(),
        )

    def move(
        self,
        codes: Tensor,
        d: Tensor,
        step: Step,
        momentum: tuple[Tensor, Tensor] | None = None,
        residual: Tensor | None = None,
    ) -> tuple[int, int]:
        """In place: int8 codes (r, k) by a step d, float32, in codes, with momentum (int8 (r, k), bfloat16
        scales (r, blocks)) and residual (int8, 1/127 of a code); all of it as `TorchPath.move` has it.
        (values that the range cut off, codes that moved)."""
        r, k = codes.shape
        m, scale = (None, None) if momentum is None else momentum
        blocks = (r, -(-k // step.block))
        given = [t for t in (codes, d, m, scale, residual) if t is not None]
        wrong = any(t.shape != (blocks if t is scale else (r, k)) or not t.is_contiguous() for t in given)
        if wrong or not 1 <= step.block <= MOST_BLOCK:
            raise ValueError("codes, step and state must have one shape and be contiguous")
        counts = torch.zeros(2, dtype=torch.int64)
        self._c["move"](
            pointer(codes, torch.int8),
            None if m is None else pointer(m, torch.int8),
            None if scale is None else pointer(scale, torch.bfloat16),
            None if residual is None else pointer(residual, torch.int8),
            pointer(d, torch.float32),
            r,
            k,
            step.block,
            step.keep,
            1 - step.keep,
            step.carry,
            step.low,
            step.high,
            step.clip,
            step.nearest,
            *step.seeds,
            pointer(counts),
            torch.get_num_threads(),
        )
        return int(counts[0]), int(counts[1])


def parameters(w: Weight, bias: Tensor | None) -> tuple[Product, list[Tensor]]:
    """A product with all that a weight gives to it, and the memory that it reads."""
    (n, k), kept = w.shape, [w.data]
    p = Product(n=n, k=k, group=w.group_size, w=pointer(w.data), bits=w.bits, factor=w.factor, low=w.low)
    each = -(-n // 16) * w.groups * 16
    p.offset = _parameter(w.offset, torch.int32, each, kept)
    p.scale = _parameter(w.scale, torch.float32, each, kept)
    p.column_sum = _parameter(w.column_sum, torch.int32, each, kept)
    p.bias = _parameter(bias, torch.float32, n, kept)
    return p, kept


def _parameter(values: Tensor | None, dtype: torch.dtype, count: int, kept: list[Tensor]) -> int | None:
    if values is None:
        return None
    if values.numel() != count:
        raise ValueError(f"{values.numel()} parameters where the product takes {count}")
    kept.append(values.to(dtype).contiguous())
    return kept[-1].data_ptr()


def pointer(tensor: Tensor, *dtypes: torch.dtype) -> int:
    """The address of a tensor on the CPU, of one of these dtypes."""
    if tensor.device.type != "cpu":
        raise ValueError(f"the kernels run on the CPU, got a tensor on {tensor.device}")
    if dtypes and tensor.dtype not in dtypes:
        raise ValueError(f"a tensor of {tensor.dtype} where {' or '.join(map(str, dtypes))} is read")
    return tensor.data_ptr()


def _without_inputs(
    x: Activations, w: Weight, out: Tensor, bias: Tensor | None, to: Codes | None, accumulate: bool
) -> Tensor:
    from bitsmith.kernels.torch_path import encode

    if accumulate:
        return out
    if out.dtype == torch.int32:
        return out.zero_()
    values = torch.zeros(x.shape[0], w.shape[0]) + (0.0 if bias is None else bias)
    return out.copy_(values if to is None else encode(values, to))
