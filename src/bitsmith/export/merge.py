"""Merging: one model of several that were adapted from the same base, each on data of its own.

    codes     c = R(c0 + mean_i (c_i - c0))             R: stochastic by a hash of seed and index, or nearest
    scales    s = s0 exp(mean_i ln(s_i / s0))
    others    mean (biases, norms); what nobody changed stays, to the last bit

It is federated averaging (1602.05629, one round, equal weights) in units of codes: with an even number of
copies half of the means that are no integers lie on a tie, so that rounding to nearest would favour even
codes; stochastic rounding is right on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bitsmith.errors import FormatError, check_choice
from bitsmith.export.delta import code_widths
from bitsmith.numerics.pack import pack, unpack
from bitsmith.numerics.rounding import hash_uniform, mix

ROUNDINGS = ("stochastic", "nearest")
Tensors = Mapping[str, Tensor]


def merged(
    text: bytes, base: Tensors, copies: Sequence[Tensors], rounding: str = "stochastic", seed: int = 0
) -> dict[str, Tensor]:
    """The tensors of the merged model; all models have the configuration ``text``."""
    check_choice("--rounding", rounding, ROUNDINGS)
    widths, found = code_widths(text), {}
    scales = {name.removesuffix("codes") + "scale" for name in widths}
    for number, name in enumerate(sorted(base)):
        start, others = base[name], [copy[name] for copy in copies]
        if all(torch.equal(start, other) for other in others):
            found[name] = start
        elif name in widths:
            noise = mix(seed, number) if rounding == "stochastic" else None
            found[name] = _codes(others, *widths[name], noise)
        elif name in scales:
            found[name] = _scales(start, others)
        elif start.is_floating_point():
            found[name] = torch.stack([other.double() for other in others]).mean(0).to(start.dtype)
        else:
            raise FormatError("these copies differ in what does not train", where=name)
    return found


def _codes(copies: Sequence[Tensor], bits: int, count: int, seed: int | None) -> Tensor:
    """The mean of the codes, which is that of their changes, added to the base."""
    mean = torch.zeros(count, dtype=torch.float64)
    for copy in copies:
        mean += unpack(copy, bits, count, 0)
    mean /= len(copies)
    if seed is None:
        return pack(mean.round().to(torch.int16), bits, 0)
    return pack((mean + hash_uniform(torch.tensor(seed), mean)).floor().to(torch.int16), bits, 0)


def _scales(base: Tensor, copies: Sequence[Tensor]) -> Tensor:
    """A scale keeps its sign (a folded BatchNorm's may be negative); of 0, without a logarithm, the mean."""
    ratios = torch.stack([copy.double() / base.double() for copy in copies])
    plain = torch.stack([copy.double() for copy in copies]).mean(0)
    sound = ((ratios > 0) & ratios.isfinite()).all(0)
    return torch.where(sound, base.double() * ratios.clamp(min=1e-300).log().mean(0).exp(), plain).float()
