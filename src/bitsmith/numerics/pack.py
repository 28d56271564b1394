"""Packing: integer codes of 1 to 8 bits as a dense stream of bytes, and back.

The layout is one rule for all widths: code number i, as the unsigned integer ``code - low``, takes the bits
[i * bits, (i + 1) * bits) of a little-endian bit stream, so that eight codes always fill ``bits`` whole bytes
and nothing is padded but the last byte. At 2, 4 and 8 bits this is byte for byte how ONNX stores INT2, INT4
and INT8 when ``low`` is 0 (ONNX's signed types hold two's complement instead). One routine serves every
width; libraries that keep one unpacker a width are no faster, as both are bound by memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int, low: int) -> Tensor:
    """Integer codes of any shape, each in [low, low + 2^bits), to uint8 (packed_size(count, bits),)."""
    unsigned = codes.detach().reshape(-1).to(torch.int16) - low
    if unsigned.numel() and not 0 <= int(unsigned.min()) <= int(unsigned.max()) < 2**bits:
        span = f"{int(codes.min())}..{int(codes.max())}"
        raise ValueError(f"codes {span} do not fit {bits} bits from {low}: they would spill into neighbours")
    eights = torch.nn.functional.pad(unsigned, (0, -unsigned.numel() % 8)).reshape(-1, 8)
    words = torch.zeros(len(eights), dtype=torch.int64, device=codes.device)
    for i in range(8):
        words |= eights[:, i].long() << (i * bits)
    stream = torch.empty(len(eights), bits, dtype=torch.uint8, device=codes.device)
    for byte in range(bits):
        stream[:, byte] = (words >> (8 * byte)) & 255
    return stream.reshape(-1)[: packed_size(unsigned.numel(), bits)].clone()


def unpack(packed: Tensor, bits: int, count: int, low: int) -> Tensor:
    """The inverse of ``pack``: int16 (count,), as unsigned 8-bit codes do not fit int8."""
    if packed.numel() != packed_size(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, got {packed.numel()}"
        )
    stream = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).reshape(-1, bits)
    words = torch.zeros(len(stream), dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        words |= stream[:, byte].long() << (8 * byte)
    codes = torch.empty(len(words), 8, dtype=torch.int16, device=packed.device)
    for i in range(8):
        codes[:, i] = (words >> (i * bits)) & (2**bits - 1)
    return codes.reshape(-1)[:count] + low
