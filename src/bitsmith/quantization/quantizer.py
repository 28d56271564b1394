"""The quantizer: the module at a site. A float tensor goes in, a representable float tensor comes out.

It owns K rows, one per candidate width (a fixed width has K = 1): a learnable `range` that starts at 0, a
calibrated `base_scale`, and the levels `low` .. `high` (+ `half_step`) of the row's grid. The scale is
base_scale * 2^range: positive by construction, weight decay pulls it to its calibration, and exp2 is equal
eager and compiled. The bit-width (quantization.bits) names the rows in play; nothing here asks which kind of
bit-width it is.

Differences from the well-known implementations: no "initialised" flag and no state born in forward (an
uncalibrated site has base_scale NaN, gives NaN, and is refused by `check_calibrated`); low and high are
*levels*, with the zero point already subtracted, so that an asymmetric grid costs forward nothing; which is
why `zero_point` is a buffer that only export reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitsmith.errors import SchemeError, SiteError
from bitsmith.numerics import affine, blocks
from bitsmith.numerics.calibrate import activation_grid, dorefa
from bitsmith.numerics.calibrate import calibrate as calibrate_values
from bitsmith.numerics.grid import bounds
from bitsmith.numerics.rounding import choose
from bitsmith.quantization.bits import BitWidth, FixedBits
from bitsmith.quantization.scheme import Scheme


class Levels(NamedTuple):
    """The row in play, ready to be stored: tensors broadcast against the blocks of x.

    A stored code c (low <= c <= high, integer) has the value scale * (c - zero_point + half).
    """

    bits: int
    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    half: float


class Quantizer(nn.Module):
    """Fake quantization of one site.

    channels: how many scales the site has (C). view: the shape in which the C scales broadcast against the
    tensor, or against its groups. axis: the channel axis of the tensor. K rows, one per candidate width.
    """

    bits: BitWidth
    range: nn.Parameter
    zero_shift: nn.Parameter | None
    base_scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor
    half_step: Tensor | None
    seed: Tensor | None

    def __init__(
        self,
        name: str,
        kind: str,
        scheme: Scheme,
        *,
        channels: int = 1,
        view: tuple[int, ...] = (1,),
        axis: int = 0,
        seq_allowed: bool = True,
    ) -> None:
        super().__init__()
        self.name, self.kind, self.scheme, self.view, self.axis = name, kind, scheme, view, axis
        self.seq_allowed = seq_allowed and kind == "weight"
        self.pinned = False  # its width was asked for by name: a method that decides bits leaves it alone
        # Element noise is a hash of this seed and the index; `redraw` moves it between steps.
        self.register_buffer(
            "seed", torch.zeros(1, dtype=torch.int64) if scheme.estimator == "stochastic" else None
        )
        self._make_rows(FixedBits(scheme.bits), channels)

    def _make_rows(self, bits: BitWidth, channels: int) -> None:
        """A row for every candidate of ``bits``, not calibrated yet."""
        scheme, like = self.scheme, bits.candidates
        rows = len(like)
        self.bits = bits
        self.range = nn.Parameter(
            like.new_zeros(rows, channels), requires_grad=scheme.range in ("lsq", "lsq+", "pact")
        )
        shifts = scheme.range == "lsq+" and self.kind == "activation"  # LSQ+ keeps weights symmetric
        self.zero_shift = nn.Parameter(like.new_zeros(rows, channels)) if shifts else None
        self.register_buffer("base_scale", like.new_full((rows, channels), torch.nan))
        for buffer in ("zero_point", "low", "high"):
            self.register_buffer(buffer, like.new_zeros(rows, channels))
        halves = any(self.grid_at(width) == "seq" for width in like.int().tolist())
        self.register_buffer("half_step", like.new_zeros(rows, 1) if halves else None)
        for row, width in enumerate(like.int().tolist()):
            self._set_bounds(row, self.grid_at(width), width)

    def extra_repr(self) -> str:
        """Width, grid and granularity, for print(model)."""
        widths = ", ".join(f"{b:g}" for b in self.bits.candidates.tolist())
        return f"{self.name}, bits={widths}, granularity={self.scheme.granularity}, range={self.scheme.range}"

    # ---- forward

    def forward(self, x: Tensor) -> Tensor:
        """x fake-quantized with the rows in play; float32, shape of x."""
        scheme = self.scheme
        if scheme.range == "dorefa" and self.kind == "weight":
            x = dorefa(x)
        v = x if scheme.group_size is None else blocks.to_groups(x, scheme.group_size, self.kind == "weight")
        bits = self.bits
        rows, share = bits.rows, bits.share
        if share is None:
            y = self._at(v, rows if rows.numel() == 1 else rows[:1])
        elif bits.blended:
            y = self._between(v, rows, share)
        elif rows.numel() == 1:
            y = choose(self._at(v, rows), v, share)
        else:
            y = sum(share[i] * self._at(v, rows[i : i + 1]) for i in range(rows.numel()))  # type: ignore[assignment]
        if scheme.group_size is not None:
            return blocks.from_groups(y, x, self.kind == "weight")
        return y if y.ndim == x.ndim else y.view(x.shape)  # (features,) without a batch met a (1, 1) scale

    def _at(self, v: Tensor, row: Tensor) -> Tensor:
        """v at the width of one row, given as a (1,) index."""
        low, high, half, scheme = self.low, self.high, self.half_step, self.scheme
        shift: Tensor | None = self.zero_shift
        base_scale: Tensor = self.base_scale
        exponent: Tensor | None = self.range
        if low.shape[0] > 1:  # a row is data, so that one compiled graph serves every width
            low, high = low.index_select(0, row), high.index_select(0, row)
            base_scale, exponent = base_scale.index_select(0, row), self.range.index_select(0, row)
            half = None if half is None else half.index_select(0, row)
            shift = None if shift is None else shift.index_select(0, row)
        if scheme.range == "dynamic" or (scheme.range == "dorefa" and self.kind == "weight"):
            base_scale, low, high = self._dynamic(v, low, high, half)
            exponent = None
        elif self.view != (1,):
            assert exponent is not None
            base_scale, exponent = base_scale.view(self.view), exponent.view(self.view)
            low, high = low.view(self.view), high.view(self.view)
        return affine.fake_quantize(
            v,
            base_scale,
            low,
            high,
            half,
            shift if shift is None else shift.view(self.view),
            exponent=exponent,
            estimator=scheme.estimator,
            clip_only=scheme.range == "pact",
            count=max((v[0].numel() if self.kind == "activation" else v.numel()) // self.range.shape[1], 1),
            seed=self.seed if self.training else None,
        )

    def _between(self, v: Tensor, rows: Tensor, share: Tensor) -> Tensor:
        """v on one grid between the rows: level bounds and log scale are the shares' mean. In plain autograd,
        as bounds and scale both carry the shares' gradient."""
        mean = share.view(-1, 1)
        low, high = ((mean * b.index_select(0, rows)).sum(0).view(self.view) for b in (self.low, self.high))
        exponent = (self.base_scale.log2() + self.range).index_select(0, rows)
        scale = torch.exp2((mean * exponent).sum(0)).view(self.view)
        half: Tensor | float = 0.0
        if self.half_step is not None:
            half = (mean * self.half_step.index_select(0, rows)).sum()
        u = v / scale - half
        return scale * (torch.clamp(u + (u.round() - u).detach(), low, high) + half)

    def _dynamic(
        self, v: Tensor, low: Tensor, high: Tensor, half: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, low, high) by min-max of v itself, over the values that share a scale."""
        if self.scheme.granularity in ("token", "group"):
            axes = [v.ndim - 1]
        elif self.scheme.granularity == "channel":
            axes = [a for a in range(v.ndim) if a != self.axis % v.ndim]
        else:
            axes = list(range(v.ndim))
        top = v.detach().abs().amax(axes, keepdim=True).float()
        low, high = low[:, :1].view(-1), high[:, :1].view(-1)
        steps = high if half is None else high + half
        return (top / steps).clamp(min=1e-8), low, high

    @torch.no_grad()
    def at_row(self, x: Tensor, row: int) -> Tensor:
        """x as it is with another row in play."""
        bits = self.bits
        candidates = bits.candidates.int().tolist()
        self.bits = FixedBits(candidates[row], candidates).to(x.device)
        try:
            return self.forward(x)
        finally:
            self.bits = bits

    # ---- what is stored

    def levels(self, row: int | None = None) -> Levels:
        """The row in play, or another, detached. The scale of a dynamic site, which stores none, is its
        calibration's."""
        row = int(self.bits.rows[0]) if row is None else row
        scale = (self.base_scale[row] * torch.exp2(self.range[row])).detach().view(self.view)
        zero_point = self.zero_point[row].clone()
        low, high = self.low[row] + zero_point, self.high[row] + zero_point
        if self.zero_shift is not None:
            zero_point += self.zero_shift[row].detach().round()
        half = 0.0 if self.half_step is None else float(self.half_step[row])
        bits = int(self.bits.candidates[row])
        return Levels(bits, scale, zero_point.view(self.view), int(low[0]), int(high[0]), half)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Stored codes of x at the row in play, int16, in the shape of x's blocks (with groups: by group)."""
        scheme, at, scale = self.scheme, self.levels(), self.stored_scale(x)
        v = dorefa(x) if scheme.range == "dorefa" and self.kind == "weight" else x
        v = v if scheme.group_size is None else blocks.to_groups(v, scheme.group_size, self.kind == "weight")
        return affine.quantize(v, scale, at.low, at.high, at.half, at.zero_point).to(torch.int16)

    @torch.no_grad()
    def stored_scale(self, x: Tensor) -> Tensor:
        """The scale that goes with ``codes(x)``, in the shape that broadcasts against them."""
        if self.scheme.range == "dynamic" or (self.scheme.range == "dorefa" and self.kind == "weight"):
            v = dorefa(x) if self.scheme.range == "dorefa" else x.float()
            if self.scheme.group_size is not None:
                v = blocks.to_groups(v, self.scheme.group_size, self.kind == "weight")
            row = int(self.bits.rows[0])
            half = None if self.half_step is None else self.half_step[row : row + 1]
            scale = self._dynamic(v, self.low[row : row + 1], self.high[row : row + 1], half)[0]
            return scale.expand(self.view) if scale.ndim == len(self.view) else scale
        return self.levels().scale

    # ---- widths and calibration

    def grid_at(self, bits: int) -> str:
        """The grid that `auto` means at this width; activations are `unsigned` or not by calibration."""
        if self.scheme.range == "dorefa" and self.kind == "weight":
            return "seq"
        if self.scheme.grid != "auto":
            return self.scheme.grid
        return "seq" if self.seq_allowed and bits <= 2 else "symmetric"

    def has_zero_point(self) -> bool:
        """Whether the row in play has zero points to be stored."""
        return bool(self.levels().zero_point.any())

    def grid_name(self, row: int | None = None) -> str:
        """The grid of the row in play, or of another, in words."""
        at = self.levels(row)
        if at.half:
            return "seq"
        if at.low < 0:
            return "symmetric" if -at.low > at.high else "balanced"
        return "asymmetric" if bool(at.zero_point.any()) else "unsigned"

    @torch.no_grad()
    def _set_bounds(self, row: int, grid: str, bits: int, zero_point: Tensor | float = 0.0) -> None:
        low, high, half = bounds(grid, bits)  # type: ignore[arg-type]
        if grid == "symmetric" and bits == 1:
            low, high = 0, 1  # an activation of one bit is on or off: {-1, 0} would hold negatives only
        self.zero_point[row] = zero_point
        self.low[row], self.high[row] = low - self.zero_point[row], high - self.zero_point[row]
        if half and self.half_step is None:  # no other row of this site has one
            self.half_step = torch.zeros_like(self.low[:, :1])
        if self.half_step is not None:
            self.half_step[row] = half

    def is_trained(self) -> bool:
        """Whether training moved the range away from its calibration."""
        return bool(self.range.any()) or (self.zero_shift is not None and bool(self.zero_shift.any()))

    @torch.no_grad()
    def calibrate(self, values: Tensor, low: float, high: float, row: int | None = None) -> None:
        """Set scales and grids from ``values`` (C, n) whose extremes are ``low`` and ``high``: of all rows or
        of one ``row``. What was learned there is given up."""
        scheme = self.scheme
        for k, width in enumerate(self.bits.candidates.int().tolist()):
            if row not in (None, k):
                continue
            grid = self.grid_at(width)
            if self.kind == "activation" and scheme.grid == "auto":
                grid = activation_grid(low, high)
                if grid == "asymmetric" and (scheme.range == "dynamic" or scheme.calibration == "lsq"):
                    grid = "symmetric"  # these two have a rule for the scale alone
            lowest, highest, half = bounds(grid, width)  # type: ignore[arg-type]
            if grid == "symmetric" and width == 1:
                lowest, highest = 0, 1
            method = scheme.calibration
            if method == "lsq":
                scale = 2 * values.abs().mean(1) / max(highest, 0.5) ** 0.5
                zero_point = torch.zeros_like(scale)
                scale = scale.clamp(min=1e-8)
            else:
                scale, zero_point = calibrate_values(
                    method, values, float(lowest), float(highest), half, asymmetric=grid == "asymmetric"
                )
            self._set_bounds(k, grid, width, zero_point)
            self.base_scale[k] = scale
            self.range[k] = 0
            if self.zero_shift is not None:
                self.zero_shift[k] = 0

    @torch.no_grad()
    def set_bits(self, bits: BitWidth, weight: Tensor | None = None) -> None:
        """Give the site another bit-width, with a row for each candidate; before an optimizer is made.

        The rows of a ``weight`` are calibrated here, those of an activation wait for `calibrate`. Raises
        SiteError where a method owns the bits already, SchemeError where the grid has no such width.
        """
        if type(self.bits) is not FixedBits:
            raise SiteError(
                "the bits of this site belong to another method",
                where=self.name,
                got=type(self.bits).__name__,
                remedy="Attach one method that decides bits, or give each its own sites",
            )
        for width in bits.candidates.int().tolist():
            self.check_width(width)
        self._make_rows(bits.to(self.range.device), self.range.shape[1])
        if weight is not None:
            self.calibrate(*observe_weight(self, weight))

    def check_width(self, bits: int) -> None:
        """Raise SchemeError where the site's grid has no such width."""
        if self.scheme.replace(self.name, bits=bits).is_float:
            raise SchemeError("a site has no float width", where=f"{self.name}.bits", expected="1 to 8")

    @torch.no_grad()
    def commit(self, bits: int, x: Tensor | None = None) -> bool:
        """Fix the width. Where no row has it, the nearest row is made over: weights (x) calibrate anew,
        activations stretch their step to the same range. Returns whether the width was a trained one. Raises
        SchemeError where the grid has no such width."""
        self.check_width(bits)
        candidates = self.bits.candidates.int().tolist()
        near = min(candidates, key=lambda width: abs(width - bits))
        self.bits.commit(near)
        if near == bits:
            return True
        row, before, grid = candidates.index(near), self.levels(), self.grid_name()
        self.bits.candidates[row] = bits
        self.bits.commit(bits)
        if x is not None:
            self.calibrate(*observe_weight(self, x), row)
        else:
            old, new = before.high - before.low, bounds(grid, bits)[1] - bounds(grid, bits)[0]  # type: ignore[arg-type]
            if self.zero_shift is not None:
                self.zero_shift[row] = 0  # it is in before.zero_point
            self._set_bounds(row, grid, bits, (before.zero_point.view(-1) * new / old).round())
            self.base_scale[row] *= old / new
        return False

    @torch.no_grad()
    def collapse(self) -> None:
        """Drop all rows but the one in play: what is left is what a fixed width would have made."""
        row = slice(int(self.bits.rows[0]), int(self.bits.rows[0]) + 1)
        fixed = FixedBits(int(self.bits.candidates[row]))
        self.bits = fixed.to(self.range.device)
        for name in ("range", "zero_shift"):
            if (parameter := getattr(self, name)) is not None:
                setattr(self, name, nn.Parameter(parameter[row].clone(), parameter.requires_grad))
        for name in ("base_scale", "zero_point", "low", "high", "half_step"):
            if (buffer := getattr(self, name)) is not None:
                setattr(self, name, buffer[row].clone())
        if self.half_step is not None and not bool(self.half_step.any()):
            self.half_step = None


def observe_weight(quantizer: Quantizer, weight: Tensor) -> tuple[Tensor, float, float]:
    """(values (C, n), lowest, highest) of a weight, for ``Quantizer.calibrate``."""
    weight = weight.detach().float()
    if quantizer.scheme.range == "dorefa":
        weight = dorefa(weight)
    values = blocks.rows_of(weight, quantizer.scheme.granularity, quantizer.scheme.group_size, 0, True)
    return values, float(weight.min()), float(weight.max())


def sites(model: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer of the model by the name of its site, in the order of the modules; tied ones once."""
    return {m.name: m for m in model.modules() if isinstance(m, Quantizer)}


def redraw(model: nn.Module, step: int) -> None:
    """New element noise for stochastic rounding; the same for the same step, so that a resume repeats it."""
    for index, quantizer in enumerate(sites(model).values()):
        if quantizer.seed is not None:
            quantizer.seed.fill_((step * 0x7FEB352D + index * 0x846CA68B) % (2**31 - 1))


def check_calibrated(model: nn.Module) -> None:
    """Raise SiteError where a site has no range yet."""
    for name, quantizer in sites(model).items():
        if quantizer.scheme.range != "dynamic" and not bool((quantizer.base_scale > 0).all()):
            raise SiteError(
                "this site was never calibrated",
                where=name,
                remedy="Call bs.calibrate(model, batches) with a few batches of training inputs",
            )
