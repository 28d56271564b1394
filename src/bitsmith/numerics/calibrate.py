"""Calibration: from values that a site has seen to the scale (and zero point) of its grid.

Four methods with one signature. All look at a value's *demand*, the scale at which it would be an outermost
level of the grid: min-max takes the largest of a channel, percentile leaves outliers out, MSE and KL search
below the largest. So signed, unsigned and SEQ grids, whose two sides differ, need no cases. Not here:
observing and subsampling values.

How it differs from the well-known implementations: at one and two bits MSE is the exact optimum, not the
best of some candidates (all codings of a channel are enumerated from one sort of at most three numbers a
value). All values are scaled by a power of two first, so that no magnitude overflows a square. Finite values
give finite positive scales; NaN is for the caller to refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

SMALLEST_STEP = (
    2.0**-27
)  # of a range that is found while it runs: a power of two, by which divisions are exact
EMPTY = 2.0**-24  # the scale of a channel of zeros: small, and the smallest that float16 can still store
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
AT_ONCE = 2**20  # values searched at a time: bounds the memory, and a chunk stays in the cache
COARSE = [i / 24 for i in range(-6, 25)]  # exponents of (mean / largest): from above the largest to the mean
FINE = [i / 192 for i in range(-8, 9)]
ENDS = ("start", "stop")
HISTOGRAM_BINS, KL_CANDIDATES = 2048, 64

Range = tuple[Tensor, Tensor]  # scale (channels,), zero point (channels,)
Calibration = Callable[[Tensor, float, float, float, bool], Range]


@torch.no_grad()
def calibrate(
    method: str, values: Tensor, low: float, high: float, half: float = 0.0, asymmetric: bool = False
) -> Range:
    """values (channels, n), finite -> scale (channels,) > 0, zero point (channels,), integer in [low, high].

    The value of code c is scale * (c - zero_point + half); the zero point is 0 unless ``asymmetric``.
    """
    if method not in METHODS:
        raise ValueError(f"calibration {method!r} is not one of {tuple(METHODS)}")
    x = values.float()
    # A power of two is exact, so that the codes of the scaled problem are those of the given one.
    exponent = x.abs().amax(1).clamp(min=SMALLEST).frexp().exponent.clamp(-125, 126)
    scale, zero_point = METHODS[method](
        x * torch.exp2(-exponent.float())[:, None], low, high, half, asymmetric
    )
    scale = torch.where(scale > SMALLEST, scale * torch.exp2(exponent.float()), EMPTY)
    return scale.clamp(SMALLEST, LARGEST), zero_point


def minmax(x: Tensor, low: float, high: float, half: float = 0.0, asymmetric: bool = False) -> Range:
    """The smallest scale that clips nothing (asymmetric: ONNX's DynamicQuantizeLinear)."""
    if asymmetric:
        return _fit(x.amin(1), x.amax(1), low, high)
    scale = _demand(x, low, high, half).amax(1)
    return scale, torch.zeros_like(scale)


def percentile(
    x: Tensor, low: float, high: float, half: float = 0.0, asymmetric: bool = False, percent: float = 99.99
) -> Range:
    """``percent`` of a channel's values are not clipped (asymmetric: half of the rest may be on either side).

    The bound is one of the values (no interpolation); where it is 0, as among mostly zeros, min-max instead.
    """
    n = x.shape[1]
    if asymmetric:
        k = math.ceil(n * (50 + percent / 2) / 100 - 1e-6)  # 20000 * 99.9 % is not quite 19980
        scale, zero_point = _fit(-(-x).kthvalue(k, dim=1).values, x.kthvalue(k, dim=1).values, low, high)
        whole_scale, whole_zero_point = minmax(x, low, high, half, asymmetric)
        return torch.where(scale > 0, scale, whole_scale), torch.where(
            scale > 0, zero_point, whole_zero_point
        )
    demand = _demand(x, low, high, half)
    scale = demand.kthvalue(math.ceil(n * percent / 100 - 1e-6), dim=1).values
    scale = torch.where(scale > 0, scale, demand.amax(1))
    return scale, torch.zeros_like(scale)


def mse(x: Tensor, low: float, high: float, half: float = 0.0, asymmetric: bool = False) -> Range:
    """The scale (and zero point) of least squared error; the true optimum on grids of at most four levels."""
    if high - low < 4:
        search = _every_zero_point if asymmetric else _every_coding
    else:
        search = _search_range if asymmetric else _search_scale
    found = [search(chunk, low, high, half) for chunk in x.split(max(1, AT_ONCE // x.shape[1]))]
    return torch.cat([scale for scale, *_ in found]), torch.cat([zero_point for _, zero_point, *_ in found])


def kl(x: Tensor, low: float, high: float, half: float = 0.0, asymmetric: bool = False) -> Range:
    """TensorRT's entropy calibration: the clipping whose histogram loses the least information."""
    ranges = [_least_divergence(channel, low, high, half, asymmetric) for channel in x]
    return torch.cat([scale for scale, _ in ranges]), torch.cat([zero_point for _, zero_point in ranges])


METHODS: dict[str, Calibration] = {"minmax": minmax, "percentile": percentile, "mse": mse, "kl": kl}


def _demand(x: Tensor, low: float, high: float, half: float) -> Tensor:
    """The scale at which each value is an outermost level; 0 on a side where the grid has no levels."""
    top, bottom = high + half, low + half
    upper = x.clamp(min=0) / top if top > 0 else torch.zeros_like(x)
    lower = x.clamp(max=0) / bottom if bottom < 0 else torch.zeros_like(x)
    return upper + lower


def _fit(lowest: Tensor, highest: Tensor, low: float, high: float) -> Range:
    """The grid from ``lowest`` to ``highest``, stretched to hold 0; rounding z cuts off up to half a step."""
    lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
    scale = (highest - lowest) / (high - low)
    zero_point = torch.round(low - lowest / scale.clamp(min=SMALLEST)).clamp(low, high)
    return scale, zero_point


def _refit(
    x: Tensor, scale: Tensor, low: float, high: float, half: float, zero_point: Tensor
) -> tuple[Tensor, Tensor]:
    """The codes of x (channels, n) at ``scale``: their squared error at their own best scale, and that scale.

    With levels v and residue r = scale v - x these are r.r - (r.v)^2 / v.v and scale - r.v / v.v.
    """
    scale, zero_point = scale.clamp(min=SMALLEST)[:, None], zero_point[:, None]
    level = (x / scale).sub_(half).round_().clamp_(low - zero_point, high - zero_point).add_(half)
    residue = (level * scale).sub_(x)
    slope, curvature = torch.linalg.vecdot(residue, level), torch.linalg.vecdot(level, level).clamp(min=0.25)
    error = torch.linalg.vecdot(residue, residue) - slope.square() / curvature
    return error, scale.squeeze(1) - slope / curvature


def _every_coding(x: Tensor, low: float, high: float, half: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scale of least squared error, zero point 0, and what it gains, by trying all codings that scales give.

    As the scale falls from infinity, codes step outwards one at a time: x_i crosses threshold t at x_i/t.
    With levels v, A = sum of x v and B = sum of v^2, the best scale of a coding is A/B and lowers the squared
    error by A^2/B; a step adds |x_i| to A and 2|t| to B. The coding of largest gain is that of its scale.
    """
    thresholds = [t for t in (code + 0.5 + half for code in range(int(low), int(high))) if t]
    magnitude = x.abs()
    a = half * magnitude.sum(1, keepdim=True, dtype=torch.float64)  # innermost levels: 0, or +-1/2 by sign
    b = torch.full_like(a, half**2 * x.shape[1])
    if thresholds:
        crossed = torch.cat([x / t for t in thresholds], 1)  # <= 0: never, the value is on the other side
        order = crossed.argsort(1, descending=True)
        step_a = torch.where(crossed > 0, magnitude.repeat(1, len(thresholds)), 0.0)
        step_b = torch.tensor(thresholds, device=x.device).abs().mul(2).repeat_interleave(x.shape[1])
        a = torch.cat([a, step_a.gather(1, order)], 1).cumsum(1)
        b = torch.cat([b, step_b[order]], 1).cumsum(1)
    gain = a.square() / b.clamp(min=0.25)  # only the empty coding, whose A is 0, has less
    best = gain.argmax(1, keepdim=True)
    scale = (a / b.clamp(min=0.25)).gather(1, best).squeeze(1).float()
    return scale, torch.zeros_like(scale), gain.gather(1, best).squeeze(1)


def _every_zero_point(x: Tensor, low: float, high: float, half: float) -> Range:
    zero_points = range(int(low), int(high) + 1)
    trials = [_every_coding(x, low - z, high - z, half) for z in zero_points]
    best = torch.stack([gain for *_, gain in trials]).argmax(0, keepdim=True)
    scale = torch.stack([scale for scale, *_ in trials]).gather(0, best).squeeze(0)
    return scale, torch.tensor(zero_points, dtype=scale.dtype, device=x.device)[best.squeeze(0)]


def _search_scale(x: Tensor, low: float, high: float, half: float) -> Range:
    """Geometric steps from above the largest demand to the mean one, finer ones, then Lloyd's."""
    demand = _demand(x, low, high, half)
    largest, zero_point = demand.amax(1), torch.zeros_like(x[:, 0])
    ratio = demand.mean(1) / largest.clamp(min=SMALLEST)
    best: tuple[Tensor, ...] = _refit(x, largest, low, high, half, zero_point)
    for exponent in COARSE:
        best = _better(_refit(x, largest * ratio**exponent, low, high, half, zero_point), best)
    centre = best[1]
    for exponent in FINE:
        best = _better(_refit(x, centre * ratio**exponent, low, high, half, zero_point), best)
    for _ in range(2):
        best = _better(_refit(x, best[1], low, high, half, zero_point), best)
    return best[1], zero_point


def _search_range(x: Tensor, low: float, high: float, half: float) -> Range:
    """The same over the ends of the range: together or one of them; then one of them again; then finer."""
    lowest, highest = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    ratio = x.abs().mean(1) / torch.maximum(highest, -lowest).clamp(min=SMALLEST)

    def trial(start: Tensor, stop: Tensor) -> tuple[Tensor, ...]:
        scale, zero_point = _fit(start, stop, low, high)
        return (*_refit(x, scale, low, high, half, zero_point), zero_point, start, stop)

    best = trial(lowest, highest)
    for exponents, moves in ((COARSE[::2], ("both", *ENDS)), (COARSE[::2], ENDS), (FINE[::2], ENDS)):
        *_, start, stop = best
        for exponent, moved in product(exponents, moves):
            factor = ratio**exponent
            new_start = start if moved == "stop" else torch.maximum(start * factor, lowest)
            new_stop = stop if moved == "start" else torch.minimum(stop * factor, highest)
            best = _better(trial(new_start, new_stop), best)
    return best[1], best[2]


def _better(trial: tuple[Tensor, ...], best: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Per channel the one of smaller error, which stands first."""
    return tuple(torch.where(trial[0] < best[0], new, old) for new, old in zip(trial, best, strict=True))


def _least_divergence(x: Tensor, low: float, high: float, half: float, asymmetric: bool) -> Range:
    """One channel (n,): of KL_CANDIDATES scales up to min-max, the one of least KL(reference || quantized).

    Reference: the histogram inside the grid, what is clipped added to its edge bins. Quantized: the same bins
    without the clipped mass, each code's mass spread evenly over its bins that are not empty. Zeros are left
    out: grids hold them exactly, and after a ReLU they would outweigh everything.
    """
    whole, zero_point = minmax(x[None], low, high, half, asymmetric)
    x = x[x != 0] if asymmetric else x[_demand(x, low, high, half) > 0]
    if not len(x):
        return whole, zero_point
    start, stop = x.min().clamp(max=0).item(), x.max().clamp(min=0).item()
    histogram = x.histc(HISTOGRAM_BINS, start, stop)
    centre = start + (torch.arange(HISTOGRAM_BINS, device=x.device) + 0.5) * ((stop - start) / HISTOGRAM_BINS)
    levels = int(high - low) + 1
    scales = whole * torch.linspace(1, levels / HISTOGRAM_BINS, KL_CANDIDATES, device=x.device)[:, None]

    code = torch.round(centre / scales - half) + zero_point  # (candidates, bins)
    below, above = code < low, code > high
    inside = ~(below | above)
    kept = histogram * inside
    first = inside.byte().argmax(1, keepdim=True)
    last = HISTOGRAM_BINS - 1 - inside.flip(1).byte().argmax(1, keepdim=True)
    reference = kept.scatter_add(1, first, (histogram * below).sum(1, keepdim=True))
    reference.scatter_add_(1, last, (histogram * above).sum(1, keepdim=True))

    code = (code.clamp(low, high) - low).long()
    filled = (reference > 0).float()
    mass = torch.zeros(KL_CANDIDATES, levels, device=x.device).scatter_add_(1, code, kept)
    bins = torch.zeros_like(mass).scatter_add_(1, code, filled)
    quantized = (mass / bins.clamp(min=1)).gather(1, code) * filled
    p = reference / reference.sum(1, keepdim=True)
    q = (quantized / quantized.sum(1, keepdim=True).clamp(min=1)).clamp(min=1e-9)
    divergence = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(1)
    return scales[divergence.argmin()], zero_point


def range_of(
    v: Tensor,
    axes: list[int],
    low: Tensor | float,
    high: Tensor | float,
    half: Tensor | float | None = None,
    asymmetric: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(scale, zero point) of a range that is found while it runs, over ``axes`` of v, which are kept; low and
    high broadcast against the result. Training and packed models compute it here, hence alike.

    Symmetric: the largest magnitude is the highest level; there is no zero point. Asymmetric:

        s = (max - min) / (high - low),  z = round(low - min / s),  the range stretched to hold 0

    which is ONNX's DynamicQuantizeLinear. The other form in use, ``s * q + min`` with a real offset (LoaQ's
    activations, 2509.06297), loses no half step at the ends; but an integer z is what runtimes execute: 0 is
    exact (padding, masks), and sums of integers correct a product of codes.
    """
    if not asymmetric:
        steps = high if half is None else high + half
        return (v.abs().amax(axes, keepdim=True).float() / steps).clamp(min=SMALLEST_STEP), None
    lowest = v.amin(axes, keepdim=True).float().clamp(max=0)
    highest = v.amax(axes, keepdim=True).float().clamp(min=0)
    scale = ((highest - lowest) / (high - low)).clamp(min=SMALLEST_STEP)
    zero_point = torch.round(-lowest / scale).clamp(max=high)  # low is 0
    # Levels below 0 are those of the stand-in of a row in float, which clips nothing.
    return scale, torch.where(torch.as_tensor(low, device=v.device) < 0, 0.0, zero_point)


def dorefa(w: Tensor) -> Tensor:
    """tanh(w) stretched to w's own largest magnitude (1606.06160, eq. 9, without its change of scale).

    The paper trains from scratch and leaves weights in -1..1; keeping the range lets a pretrained layer
    without BatchNorm survive.
    """
    t = torch.tanh(w)
    return t * (w.detach().abs().amax() / t.detach().abs().amax().clamp(min=1e-8))


def activation_grid(low: float, high: float) -> str:
    """unsigned without negative values, asymmetric where one side is less than half of the other."""
    if low >= 0:
        return "unsigned"
    return "asymmetric" if min(-low, max(high, 0.0)) < 0.5 * max(-low, high) else "symmetric"
