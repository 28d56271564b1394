"""Rows: what a quantizer keeps of each candidate width, and all that happens to it outside of forward.

K rows, one per candidate width (a fixed width has K = 1): a learnable `range` that starts at 0, a calibrated
`base_scale`, and the levels `low` .. `high` (+ `half_step`) of the row's grid, all (K, C) for C scales. The
scale is base_scale * 2^range. A grid that is a table of levels (numerics.levels) has one for each row:
`table` where calibration put it, plus `table_shift`, what training made of it; low .. high are then its
codes. Here rows are made, calibrated, committed, dropped and read; quantizer.Quantizer computes with them.

Differences from the well-known implementations: no "initialised" flag and no state born in forward (an
uncalibrated site has base_scale NaN, gives NaN, and is refused by `check_calibrated`); low and high are
*levels*, with the zero point already subtracted, so that an asymmetric grid costs forward nothing; which is
why `zero_point` is a buffer that only export reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import SiteError, listing
from bitsmith.numerics import blocks
from bitsmith.numerics import levels as tables
from bitsmith.numerics.calibrate import activation_grid, dorefa
from bitsmith.numerics.calibrate import calibrate as calibrate_values
from bitsmith.numerics.grid import TABLES
from bitsmith.quantization.bits import BitWidth, FixedBits, Width, in_words, one_or_each
from bitsmith.quantization.levels import STAND_IN_HIGH, STAND_IN_STEP, Levels, bounds, grid_name
from bitsmith.quantization.scheme import FLOAT, Scheme
from bitsmith.quantization.width_checks import check_candidates, check_each

BUFFERS = ("base_scale", "zero_point", "low", "high", "half_step", "table")
SHIFTS = ("range", "zero_shift", "table_shift")  # what trains, from 0 on


class Rows(nn.Module):
    """The K rows of one site.

    channels: how many scales the site has (C). view: the shape in which the C scales broadcast against the
    tensor, or against its groups. axis: the channel axis of the tensor.
    """

    bits: BitWidth
    range: nn.Parameter
    zero_shift: nn.Parameter | None
    base_scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor
    half_step: Tensor | None
    table: Tensor | None  # (K, MOST), of which a row uses the first 2^bits or so
    table_shift: nn.Parameter | None

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
        self._make_rows(FixedBits(scheme.bits if isinstance(scheme.bits, int) else scheme.bits[0]), channels)
        if isinstance(scheme.bits, tuple):
            check_each(name, kind, scheme, len(scheme.bits), channels)
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
        self.register_buffer("half_step", None)
        tabled = scheme.grid in TABLES
        self.register_buffer("table", like.new_zeros(rows, tables.MOST) if tabled else None)
        learned = scheme.grid == "levels"
        self.table_shift = nn.Parameter(like.new_zeros(rows, tables.MOST)) if learned else None
        for row in range(rows):
            for width, at in self._parts(row):
                self._set_bounds(row, self.grid_at(width), width, at=at)

    def _parts(self, row: int) -> list[tuple[Any, Any]]:
        """(width, index of the channels that have it) of a row, ascending."""
        widths = self.bits.candidates[row]
        if widths.ndim == 0:
            only = widths.item()
            return [(int(only) if only == int(only) else only, slice(None))]
        return [(int(width), (widths == width).nonzero().flatten()) for width in widths.unique()]

    # ---- what is stored

    def _in_play(self, rows: Tensor, row: int | Tensor | None = None) -> Tensor:
        """Of a tensor (K, C) the row in play, or another, or one per channel: (C,)."""
        row = self.bits.rows[0] if row is None else row
        if isinstance(row, Tensor) and row.ndim:
            return rows.expand(-1, len(row)).gather(0, row.unsqueeze(0)).squeeze(0)
        return rows[int(row)]

    def levels(self, row: int | Tensor | None = None) -> Levels:
        """The row in play, or another (an index, or one per channel), detached. The scale of a dynamic site,
        which stores none, is its calibration's."""
        base_scale, exponent, zero_point, low, high = (
            self._in_play(t, row) for t in (self.base_scale, self.range, self.zero_point, self.low, self.high)
        )
        zero_point = zero_point.clone()
        low, high = low + zero_point, high + zero_point
        if self.zero_shift is not None:
            zero_point += self._in_play(self.zero_shift, row).detach().round()
        half = low.new_zeros(1) if self.half_step is None else self._in_play(self.half_step, row)
        widths: list[float] | float = self._candidates(row).tolist()
        bits = one_or_each([int(b) for b in widths] if isinstance(widths, list) else int(widths))
        scale = (base_scale * torch.exp2(exponent)).detach().view(self.view)
        if isinstance(bits, int):
            zero_point, table = zero_point.view(self.view), self._table_at(row, high)
            return Levels(bits, scale, zero_point, int(low[0]), int(high[0]), float(half[0]), table)
        low, high = low.view(self.view), high.view(self.view)
        half = half.expand(len(zero_point)).view(self.view)
        return Levels(bits, scale, zero_point.view(self.view), low, high, half)

    def _table_at(self, row: int | Tensor | None, high: Tensor) -> Tensor | None:
        """The levels of the row in play, or of another, ascending; None where they are evenly spaced."""
        if self.table is None:
            return None
        table = self._in_play(self.table, row)
        if self.table_shift is not None:
            table = table + self._in_play(self.table_shift, row).detach()
        return tables.ordered(table, high[:1])[: int(high[0]) + 1]

    def _candidates(self, row: int | Tensor | None) -> Tensor:
        """The widths of a row, (), or (C,) where channels differ."""
        candidates = self.bits.candidates
        return self._in_play(candidates if candidates.ndim > 1 else candidates.unsqueeze(1), row).squeeze(0)

    def grid_at(self, bits: float) -> str:
        """The grid that `auto` means at this width; activations are `unsigned` or not by calibration."""
        if self.scheme.range == "dorefa" and self.kind == "weight":
            return "seq"
        if self.scheme.grid != "auto":
            return self.scheme.grid
        return "seq" if self.seq_allowed and bits <= 2 else "symmetric"

    @property
    def finds_zero_point(self) -> bool:
        """Whether zero points are found with the range, in each tensor as it comes."""
        return self.scheme.range == "dynamic" and self.scheme.grid == "asymmetric"

    def has_zero_point(self) -> bool:
        """Whether the row in play has zero points to be stored; those that an activation finds are not."""
        return self.kind == "weight" if self.finds_zero_point else bool(self.levels().zero_point.any())

    def grids(self, row: int | Tensor | None = None) -> dict[int, str]:
        """Width -> grid of the row in play, or of another, ascending; one where all channels share a
        width."""
        at = self.levels(row)
        if at.table is not None:
            found: dict[int, str] = {int(self._candidates(row)): self.scheme.grid}
        elif isinstance(at.bits, int):
            found = {at.bits: grid_name(at.low, at.high, at.half, at.zero_point)}
        else:
            first = {bits: at.bits.index(bits) for bits in sorted(set(at.bits))}
            found = {b: grid_name(at.low[c], at.high[c], at.half[c], at.zero_point) for b, c in first.items()}
        return dict.fromkeys(found, "asymmetric") if self.finds_zero_point else found

    def grid_name(self, row: int | Tensor | None = None) -> str:
        """The grid of the row in play, or of another, in words; `auto` where channels of different widths
        have different ones, which they only do by its rule."""
        names = set(self.grids(row).values())
        return names.pop() if len(names) == 1 else "auto"

    def _set_bounds(
        self, row: int, grid: str, bits: float, zero_point: Tensor | float = 0.0, at: Any = slice(None)
    ) -> None:
        low, high, half = bounds(grid, bits)
        with torch.no_grad():
            self.zero_point[row, at] = zero_point
            self.low[row, at], self.high[row, at] = (
                float(low) - self.zero_point[row, at],
                float(high) - self.zero_point[row, at],
            )
            if half and self.half_step is None:  # no other row of this site has one
                each = self.bits.candidates.ndim > 1
                self.half_step = torch.zeros_like(self.low if each else self.low[:, :1])
            if self.half_step is not None:
                self.half_step[row, at] = half

    def is_trained(self) -> bool:
        """Whether training moved the range away from its calibration."""
        return any(bool(t.any()) for t in (getattr(self, name) for name in SHIFTS) if t is not None)

    @torch.no_grad()
    def calibrate(self, values: Tensor, low: float, high: float, row: int | None = None) -> None:
        """Set scales and grids from ``values`` (C, n) whose extremes are ``low`` and ``high``: of all rows or
        of one ``row``. What was learned there is given up."""
        for k in range(len(self.bits.candidates)):
            if row not in (None, k):
                continue
            for width, at in self._parts(k):
                self._calibrate(k, width, at, values[at], low, high)
            for shift in (getattr(self, name) for name in SHIFTS):
                if shift is not None:
                    shift[k] = 0

    def _calibrate(self, row: int, width: int, at: Any, values: Tensor, low: float, high: float) -> None:
        """Of one row the channels ``at``, which share a width."""
        if width == FLOAT:
            self._set_bounds(row, "symmetric", width)
            self.base_scale[row] = STAND_IN_STEP
            return
        scheme = self.scheme
        grid = self.grid_at(width)
        if self.table is not None:
            self._set_bounds(row, grid, width)
            self.base_scale[row], levels = tables.fit(values, grid, width, scheme.calibration)
            self.table[row] = 0
            self.table[row, : len(levels)] = levels
            return
        if self.kind == "activation" and scheme.grid == "auto":
            grid = activation_grid(low, high)
            if grid == "asymmetric" and (scheme.range == "dynamic" or scheme.calibration == "lsq"):
                grid = "symmetric"  # lsq has a rule for the scale alone; dynamic ranges are asked for one
        lowest, highest, half = bounds(grid, width)
        if scheme.calibration == "lsq":
            scale = 2 * values.abs().mean(1) / max(highest, 0.5) ** 0.5
            zero_point = torch.zeros_like(scale)
            scale = scale.clamp(min=1e-8)
        else:
            scale, zero_point = calibrate_values(
                scheme.calibration,
                values,
                float(lowest),
                float(highest),
                half,
                asymmetric=grid == "asymmetric",
            )
        self._set_bounds(row, grid, width, 0.0 if self.finds_zero_point else zero_point, at)
        self.base_scale[row, at] = scale

    @torch.no_grad()
    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Scales (C,) and zero points (C,) of a fixed width, found elsewhere. What was learned is given
        up."""
        width = self.levels().bits
        assert isinstance(width, int)
        self._set_bounds(0, self.grid_at(width), width, zero_point)
        self.base_scale[0] = scale
        self.range.zero_()

    # ---- widths

    @torch.no_grad()
    def set_bits(self, bits: BitWidth, weight: Tensor | None = None) -> None:
        """Give the site another bit-width, with a row for each candidate; before an optimizer is made.

        The rows of a ``weight`` are calibrated here, those of an activation wait for `calibrate`. Raises
        SiteError where a method owns the bits already, SchemeError where the grid has no such width, or the
        site no widths per channel.
        """
        if type(self.bits) is not FixedBits:
            raise SiteError(
                "the bits of this site belong to another method",
                where=self.name,
                got=type(self.bits).__name__,
                remedy="Attach one method that decides bits, or give each its own sites",
            )
        for width in bits.candidates.int().unique().tolist():
            self.check_width(width)
        check_candidates(self.name, self.kind, self.scheme, bits)
        if bits.per_channel:
            each = bits.rows if bits.rows.ndim > 1 else bits.candidates
            check_each(self.name, self.kind, self.scheme, each.shape[1], self.range.shape[1])
        self._make_rows(bits.to(self.range.device), self.range.shape[1])
        if weight is not None:
            self.calibrate(*observe_weight(self, weight))

    def check_width(self, bits: Width) -> None:
        """Raise SchemeError where the site's grid has no such width, or the site no widths per channel."""
        if isinstance(bits, tuple):
            check_each(self.name, self.kind, self.scheme, len(bits), self.range.shape[1])
        self.scheme.replace(self.name, bits=bits)

    def check_commit(self, bits: Width) -> None:
        """What `check_width` raises, and SiteError where the rows hold no such widths per channel."""
        self.check_width(bits)
        candidates = self.bits.candidates.int().tolist()
        if isinstance(one_or_each(bits), int) or len(candidates) == 1:
            return  # a single row, or the nearest one, is made over
        assert isinstance(bits, tuple)
        missing = [b for b in bits if b not in candidates]
        if missing or not self.bits.per_channel:
            raise SiteError(
                "the candidates of this site do not hold these widths per channel",
                where=self.name,
                got=in_words(bits),
                expected=f"{listing(map(str, candidates))}, "
                + ("per channel" if missing else "one for all channels"),
                remedy="Prepare a fresh model with the plan",
            )

    @torch.no_grad()
    def commit(self, bits: int | Sequence[int], x: Tensor | None = None) -> bool:
        """Fix the width, or one width per channel. Where no row has it, the nearest row is made over:
        weights (x) calibrate anew, activations stretch their step to the same range. Returns whether the
        width was a trained one, as which float counts. Raises SchemeError where the grid has no such width,
        SiteError where channels cannot choose among the rows."""
        self.check_commit(bits if isinstance(bits, int) else tuple(bits))
        bits, mixed = one_or_each(bits), self.bits.candidates.ndim > 1
        if bits == FLOAT:  # nothing is rounded; the levels of a row made over stay, for a way back
            if not mixed and FLOAT not in self.bits.candidates:
                self.bits.candidates[-1] = FLOAT
            self.bits.commit(FLOAT)
            return True
        if isinstance(bits, tuple) and len(self.bits.candidates) > 1:
            self.bits.commit(bits)
            return True
        if isinstance(bits, tuple) or mixed:
            if bits == self.bits.whole():
                return True
            assert x is not None
            self.bits.commit(bits)
            self.half_step = None  # of the other widths
            self.calibrate(*observe_weight(self, x))
            return False
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
            low, high, _ = bounds(grid, bits)
            old, new = float(before.high - before.low), float(high - low)
            if self.zero_shift is not None:
                self.zero_shift[row] = 0  # it is in before.zero_point
            self._set_bounds(row, grid, bits, (before.zero_point.view(-1) * new / old).round())
            # A stand-in knows no range: what `check_calibrated` then refuses.
            self.base_scale[row] *= old / new if before.high < STAND_IN_HIGH else torch.nan
        return False

    @torch.no_grad()
    def hand_over(self, source: int, row: int, *, keep_range: bool) -> None:
        """Give ``row`` what training found for the scale of ``source``: the factor on its calibration, or,
        with ``keep_range``, the range itself: its scale is then that of ``source`` times the ratio of their
        highest levels."""
        self.range[row] = self.range[source]
        if self.zero_shift is not None:
            self.zero_shift[row] = self.zero_shift[source] * self._steps(row) / self._steps(source)
        if keep_range:
            self.base_scale[row] = self.base_scale[source] * self._steps(source) / self._steps(row)

    def _steps(self, row: int) -> Tensor:
        """How many steps reach from zero, or from the lowest level, to the highest one."""
        if self.table is not None:
            return self.table[row].abs().amax(0, keepdim=True)  # levels end at 1, whatever the width
        half = 0 if self.half_step is None else self.half_step[row]
        above = self.high[row] + half
        return torch.where(self.low[row] < 0, above, above - self.low[row])

    @torch.no_grad()
    def collapse(self) -> None:
        """Drop all rows but the one in play: what is left is what a fixed width would have made."""
        width = self.levels().bits
        kept = {name: getattr(self, name) for name in (*SHIFTS, *BUFFERS)}
        kept = {name: self._in_play(t)[None].clone() for name, t in kept.items() if t is not None}
        self.bits = FixedBits(width).to(self.range.device)
        if "half_step" in kept and isinstance(width, int):
            kept["half_step"] = kept["half_step"][:, :1]
        for name, tensor in kept.items():
            old = getattr(self, name)
            setattr(self, name, nn.Parameter(tensor, old.requires_grad) if name not in BUFFERS else tensor)
        if self.half_step is not None and not bool(self.half_step.any()):
            self.half_step = None


def observe_weight(quantizer: Rows, weight: Tensor) -> tuple[Tensor, float, float]:
    """(values (C, n), lowest, highest) of a weight, for ``Rows.calibrate``."""
    weight = weight.detach().float()
    if quantizer.scheme.range == "dorefa":
        weight = dorefa(weight)
    values = blocks.rows_of(weight, quantizer.scheme.granularity, quantizer.scheme.group_size, 0, True)
    return values.contiguous(), float(weight.min()), float(weight.max())
