"""Directions for training without gradients: random numbers that are computed from a key, never stored.

Element i of a direction is a function of the key and of i alone, so that a direction can be made again at
any time, in pieces, in any order, on any device. A generator gives its numbers in one order only, and the
same seed other numbers on another device. Words are 32 bits of murmur3's finalizer, as in
`rounding.hash_uniform`, of ``start + i * stride``: with a stride of its own no key's sequence is another
one's, shifted.

    normal   N(0, 1), cut at 4.9: two numbers of one word by Box and Muller, from 2^16 radii and angles
    signs    -1 or 1, each with probability 1/2: 32 numbers of one word
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 2**16  # elements made at a time: what lives meanwhile stays in the cache. A block starts a pair anew
GOLDEN, WORD = 0x9E3779B97F4A7C15, 2**64 - 1

Key = tuple[int, int]


def key(*numbers: int) -> Key:
    """(start, odd stride) of a sequence, from any integers: a seed, a step, a tensor. Splitmix64."""
    state = 0
    for number in numbers:
        state = ((state ^ (number & WORD)) + GOLDEN) & WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
        state ^= state >> 31
    start, stride = state & 0xFFFFFFFF, (state >> 32) | 1
    return start - 2**31, stride - 2**31


def words(of: Key, index: Tensor) -> Tensor:
    """32 bits for each index, an int32 tensor, which is overwritten."""
    start, stride = of
    h = index.mul_(stride).add_(start)
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        h.bitwise_xor_((h >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
    return h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))


def uniform(of: Key, index: Tensor) -> Tensor:
    """Float32 in [0, 1) for each index, an int32 tensor, which is overwritten: 24 bits of its word."""
    return (words(of, index) >> 8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)


def uniform_run(of: Key, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """`uniform` of the elements ``first`` to ``first + count``."""
    return uniform(of, torch.arange(first, first + count, dtype=torch.int32, device=device))


def normal(of: Key, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """Elements ``first``, a multiple of BLOCK, to ``first + count``, at most a block: float32 (count,)."""
    half = (count + 1) // 2
    h = words(of, torch.arange(first // 2, first // 2 + half, dtype=torch.int32, device=device))
    radius = (h & 0xFFFF).float().add_(0.5).mul_(2.0**-16).log_().mul_(-2).sqrt_()
    angle = (h >> 16).float().mul_(math.pi * 2.0**-15)
    return torch.cat([angle.cos().mul_(radius), angle.sin_().mul_(radius)])[:count]


def signs(of: Key, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """As `normal`, of -1 and 1."""
    at = torch.arange(first // 32, (first + count + 31) // 32, dtype=torch.int32, device=device)
    octets = words(of, at).view(torch.uint8).to(torch.int32)
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return ((bits & 1) * 2.0 - 1).index_select(0, octets).view(-1)[:count]  # the fastest way to unpack bits


def steps(of: Key, index: Tensor, size: float) -> Tensor:
    """Whole numbers for each index, an int32 tensor, which is overwritten: a sign times ``size``, rounded up
    with the probability that makes its mean ``size``. int16; the mean of their square is `energy`."""
    h = words(of, index)
    whole = math.floor(size)
    above = 2**31 - round((size - whole) * 2**31)  # of |h|, beyond which it is rounded up
    if above > 2**31 - 1:
        found = torch.zeros_like(h, dtype=torch.int16)
    else:
        found = (h >= above).to(torch.int16).sub_((h < -above).to(torch.int16))
    return found.add_((h >= 0).to(torch.int16).mul_(2).sub_(1), alpha=whole) if whole else found


def energy(size: float) -> float:
    """The mean of the square of `steps` of ``size``."""
    whole = math.floor(size)
    return whole**2 + (2 * whole + 1) * (size - whole)


Noise = Callable[[Key, int, int, torch.device | None], Tensor]
NOISES: dict[str, Noise] = {"normal": normal, "signs": signs}
REACH = {"normal": 4.9, "signs": 1.0}  # no element is larger
