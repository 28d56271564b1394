"""Packing: integer codes of 1 to 8 bits as a dense stream of bytes, and back.

The layout is one rule for all widths: code number i, as the unsigned integer ``code - low``, takes the bits
[i * bits, (i + 1) * bits) of a little-endian bit stream, so that eight codes always fill ``bits`` whole bytes
and nothing is padded but the last byte. At 2, 4 and 8 bits this is byte for byte how ONNX stores INT2, INT4
and INT8 when ``low`` is 0 (ONNX's signed types hold two's complement instead). One routine serves every
width; libraries that keep one unpacker a width are no faster, as both are bound by memory.

Codes of several widths are runs, one width each, that follow one another in the same bit stream: a run may
begin within a byte, and again nothing is padded but the last byte.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    return pack_bytes(unsigned.to(torch.uint8), bits)


def pack_bytes(unsigned: Tensor, bits: int) -> Tensor:
    """``pack`` of codes (count,), uint8, that count from 0 and are known to fit: a few passes over bytes."""
    together = 8 // bits if 8 % bits == 0 else 8  # codes that fill whole bytes
    tuples = torch.nn.functional.pad(unsigned, (0, -len(unsigned) % together)).view(-1, together)
    stream = torch.zeros(len(tuples), together * bits // 8, dtype=torch.uint8, device=unsigned.device)
    for i in range(together):
        byte, shift = divmod(i * bits, 8)
        stream[:, byte] |= tuples[:, i] << shift
        if shift + bits > 8:
            stream[:, byte + 1] |= tuples[:, i] >> (8 - shift)
    return stream.reshape(-1)[: packed_size(len(unsigned), bits)].clone()


def unpack(packed: Tensor, bits: int, count: int, low: int) -> Tensor:
    """The inverse of ``pack``: int16 (count,), as unsigned 8-bit codes do not fit int8."""
    if packed.numel() != packed_size(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, got {packed.numel()}"
        )
    if bits == 8:
        return packed.to(torch.int16) + low
    stream = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).reshape(-1, bits)
    words = torch.zeros(len(stream), dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        words |= stream[:, byte].long() << (8 * byte)
    codes = torch.empty(len(words), 8, dtype=torch.int16, device=packed.device)
    for i in range(8):
        codes[:, i] = (words >> (i * bits)) & (2**bits - 1)
    return codes.reshape(-1)[:count] + low


def pack_runs(runs: Sequence[tuple[Tensor, int, int]]) -> Tensor:
    """Runs of (codes, bits, low), see ``pack``, one behind the other without a gap: uint8 (n,)."""
    parts = [(pack(codes, bits, low), codes.numel() * bits) for codes, bits, low in runs]
    total = sum(length for _, length in parts)
    stream = torch.zeros((total + 7) // 8 + 1, dtype=torch.int16, device=parts[0][0].device)
    start = 0
    for stored, length in parts:
        first, shift = divmod(start, 8)
        shifted = stored.to(torch.int16) << shift  # 15 bits at most
        stream[first : first + len(stored)] |= shifted & 255
        stream[first + 1 : first + 1 + len(stored)] |= shifted >> 8
        start += length
    return stream[:-1].to(torch.uint8)


def unpack_runs(packed: Tensor, runs: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """The inverse of ``pack_runs``, given (bits, count, low) of each run: int16 (count,) each."""
    total = sum(bits * count for bits, count, _ in runs)
    if packed.numel() != (total + 7) // 8:
        raise ValueError(f"{total} bits of codes take {(total + 7) // 8} bytes, got {packed.numel()}")
    found, start = [], 0
    for bits, count, low in runs:
        first, shift = divmod(start, 8)
        size = packed_size(count, bits)
        piece = packed[first : first + size]
        if shift:
            following = torch.nn.functional.pad(packed[first + 1 : first + 1 + size], (0, 1))[:size]
            piece = (piece >> shift) | (following << (8 - shift))
        found.append(unpack(piece, bits, count, low))
        start += bits * count
    return found


def unpack_at(packed: Tensor, start: Tensor, bits: Tensor | int, low: Tensor | int) -> Tensor:
    """The codes whose bits begin at ``start`` (int64, any shape) of a stream, each of ``bits``: int16. For a
    few rows of a large table, of which nothing else is unpacked."""
    first = start >> 3
    after = (first + 1).clamp(max=packed.numel() - 1)  # a code lies in two bytes at most
    word = packed[first].int() | (packed[after].int() << 8)
    mask = (1 << bits) - 1
    return (((word >> (start & 7)) & mask) + low).to(torch.int16)
