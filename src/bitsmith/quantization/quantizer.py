"""The quantizer: the module at a site. A float tensor goes in, a representable float tensor comes out.

Its state, a row for each candidate width, is rows.Rows; the scale of a row is base_scale * 2^range:
positive by construction, weight decay pulls it to its calibration, and exp2 is equal eager and compiled.
The bit-width (quantization.bits) names the rows in play, for the whole tensor or channel by channel;
nothing here asks which kind of bit-width it is. Through a site that is decided for 32 bits, x goes as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitsmith.errors import SiteError
from bitsmith.numerics import affine, blocks, levels
from bitsmith.numerics.calibrate import dorefa, range_of
from bitsmith.numerics.mixture import fake_quantize_mixture
from bitsmith.quantization.bits import FixedBits
from bitsmith.quantization.rows import Rows
from bitsmith.quantization.scheme import Scheme


class Quantizer(Rows):
    """Fake quantization of one site; see `Rows` for what it is made with."""

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
        super().__init__(name, kind, scheme, channels=channels, view=view, axis=axis, seq_allowed=seq_allowed)
        # Element noise is a hash of this seed and the index; `redraw` moves it between steps.
        self.register_buffer(
            "seed", torch.zeros(1, dtype=torch.int64) if scheme.estimator == "stochastic" else None
        )

    def extra_repr(self) -> str:
        """Width, grid and granularity, for print(model)."""
        widths = ", ".join(f"{b:g}" for b in self.bits.candidates.unique().tolist())
        return f"{self.name}, bits={widths}, granularity={self.scheme.granularity}, range={self.scheme.range}"

    # ---- forward

    @property
    def row_by_row(self) -> bool:
        """Whether rows of a weight can be quantized apart from the others, to the same values."""
        return self.scheme.range not in ("dorefa", "dynamic") and self.scheme.estimator != "stochastic"

    def forward(self, x: Tensor, of: Tensor | None = None) -> Tensor:
        """x fake-quantized with the rows in play; float32, shape of x. In float: x itself.

        ``of`` (N,): x (N, ...) are these rows (channels) of the weight, where they are `row_by_row`.
        """
        scheme, bits = self.scheme, self.bits
        if bits.in_float:
            return x
        if scheme.range == "dorefa" and self.kind == "weight":
            x = dorefa(x)
        v = x if scheme.group_size is None else blocks.to_groups(x, scheme.group_size, self.kind == "weight")
        rows, share = bits.rows, bits.share
        count = rows.shape[0]
        if share is None:
            y = self._at(v, rows if count == 1 else rows[:1], None, of)
        else:
            share = share if of is None or share.ndim == 1 else self._taken(share, of)
            if bits.blended:
                y = self._between(v, rows, share, of)
            elif count == 1:
                y = self._at(v, rows, share if share.ndim == 1 else share.view(self.view), of)
            else:
                y = self._mixed(v, rows, share, of)
        if scheme.group_size is not None:
            return blocks.from_groups(y, x, self.kind == "weight")
        return y if y.ndim == x.ndim else y.view(x.shape)  # (features,) without a batch met a (1, 1) scale

    def _at(self, v: Tensor, row: Tensor, share: Tensor | None = None, of: Tensor | None = None) -> Tensor:
        """v at the width of one row, given as a (1,) index, or of one per channel, (1, C); share: of a row
        that was drawn."""
        scheme = self.scheme
        base_scale, low, high, half = self.base_scale, self.low, self.high, self.half_step
        shift: Tensor | None = self.zero_shift
        exponent: Tensor | None = self.range
        if low.shape[0] > 1 or of is not None:
            base_scale, exponent, low, high, half, shift = self._of(row, of)
        scales = base_scale.shape[1] or 1  # of no row at all
        if half is not None and half.shape[1] != 1:
            half = half.view(self.view)
        if scheme.range == "dynamic" or (scheme.range == "dorefa" and self.kind == "weight"):
            base_scale, low, high = self._dynamic(v, low, high, half)
            exponent = None
        elif self.view != (1,):
            base_scale, exponent = base_scale.view(self.view), exponent.view(self.view)  # type: ignore[union-attr]
            low, high = low.view(self.view), high.view(self.view)
        count = max((v[0].numel() if self.kind == "activation" else v.numel()) // scales, 1)
        if self.table is not None:
            return self._at_level(v, row, base_scale, exponent, high, count, share)
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
            count=count,
            seed=self.seed if self.training else None,
            share=share,
        )

    def _at_level(
        self,
        v: Tensor,
        row: Tensor,
        base_scale: Tensor,
        exponent: Tensor | None,
        high: Tensor,
        count: int,
        share: Tensor | None,
    ) -> Tensor:
        """v at the table of levels of one row, (1,), with what `_at` found of it."""
        assert self.table is not None
        table, top = self.table.index_select(0, row), high.view(-1)[:1]
        if self.table_shift is not None:
            table = table + self.table_shift.index_select(0, row)
        return levels.fake_quantize(
            v,
            base_scale,
            levels.ordered(table[0], top),
            top,
            exponent=exponent,
            estimator=self.scheme.estimator,
            count=count,
            share=share,
        )

    def _of(
        self, rows: Tensor, of: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """base_scale, range, low, high, half_step and zero_shift of these rows, (R,) or (R, C): (R, C); with
        ``of``, those of its channels alone."""
        low, high, half = self.low, self.high, self.half_step
        shift: Tensor | None = self.zero_shift
        if rows.ndim > 1:
            half = None if half is None else half.expand(-1, rows.shape[1]).gather(0, rows)
            low, high = low.gather(0, rows), high.gather(0, rows)
            base_scale, exponent = self.base_scale.gather(0, rows), self.range.gather(0, rows)
        else:
            # a row is data, so that one compiled graph serves every width
            low, high = low.index_select(0, rows), high.index_select(0, rows)
            half = None if half is None else half.index_select(0, rows)
            shift = None if shift is None else shift.index_select(0, rows)
            base_scale, exponent = self.base_scale.index_select(0, rows), self.range.index_select(0, rows)
        if of is None:
            return base_scale, exponent, low, high, half, shift
        half = None if half is None else self._taken(half, of)
        base_scale, exponent = self._taken(base_scale, of), self._taken(exponent, of)
        return base_scale, exponent, self._taken(low, of), self._taken(high, of), half, shift

    def _taken(self, scales: Tensor, index: Tensor) -> Tensor:
        """Of ``scales`` (K, C) of a weight those of its channels ``index`` (N,): (K, N * scales per channel);
        one that all share stays."""
        if scales.shape[1] == 1:
            return scales
        each = 1 if self.scheme.group_size is None else self.view[1]
        return scales.unflatten(1, (-1, each)).index_select(1, index).flatten(1)

    def _mixed(self, v: Tensor, rows: Tensor, share: Tensor, of: Tensor | None) -> Tensor:
        """The sum of v at the widths of the rows, each times its share."""
        scheme, count = self.scheme, rows.shape[0]
        shares = share.view(count, *(self.view if share.ndim > 1 else (1,)))
        plain = scheme.estimator == "clipped" and scheme.range in ("lsq", "static", "pact")
        plain = plain and self.table is None
        if not plain:
            parts = [shares[i] * self._at(v, rows[i : i + 1], None, of) for i in range(count)]
            return torch.stack(parts).sum(0)
        base_scale, exponent, low, high, half, _ = self._of(rows, of)
        scales = base_scale.shape[1] or 1  # of no row at all
        if half is not None:
            half = half.view(count, *(self.view if half.shape[1] > 1 else (1,)))
        base_scale, exponent, low, high = (
            t.view(count, *self.view) for t in (base_scale, exponent, low, high)
        )
        return fake_quantize_mixture(
            v,
            shares,
            base_scale,
            exponent,
            low,
            high,
            half,
            clip_only=scheme.range == "pact",
            count=max((v[0].numel() if self.kind == "activation" else v.numel()) // scales, 1),
        )

    def _between(self, v: Tensor, rows: Tensor, share: Tensor, index: Tensor | None) -> Tensor:
        """v on one grid between the rows: level bounds and steps per unit are the shares' mean. In plain
        autograd, as bounds and scale both carry the shares' gradient."""
        weights = share if share.ndim > 1 else share.view(-1, 1)

        def shared(of: Tensor) -> Tensor:
            own = of.index_select(0, rows) if rows.ndim == 1 else of.expand(-1, rows.shape[1]).gather(0, rows)
            return weights * (own if index is None else self._taken(own, index))

        low, high = (shared(b).sum(0).view(self.view) for b in (self.low, self.high))
        scale = 1 / shared(torch.exp2(-self.range) / self.base_scale).sum(0).view(self.view)
        half: Tensor | float = 0.0
        if self.half_step is not None:
            half = shared(self.half_step)
            half = half.sum() if share.ndim == 1 else half.sum(0).view(self.view)
        u = v / scale - half
        return scale * (torch.clamp(u + (u.round() - u).detach(), low, high) + half)

    def _dynamic(
        self, v: Tensor, low: Tensor, high: Tensor, half: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, low, high) by the range of v itself, over the values that share a scale."""
        scale, zero_point = self._found(v, low, high, half)
        low, high = low.view(self.view), high.view(self.view)
        return (scale, low, high) if zero_point is None else (scale, low - zero_point, high - zero_point)

    def _found(
        self, v: Tensor, low: Tensor, high: Tensor, half: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(scale, zero point or None) by the range of v itself."""
        axes = blocks.shared_axes(v.ndim, self.scheme.granularity, self.axis)
        low, high = low.view(self.view), high.view(self.view)
        return range_of(v.detach(), axes, low, high, half, self.finds_zero_point)

    @torch.no_grad()
    def at_row(self, x: Tensor, row: int) -> Tensor:
        """x as it is with another row in play."""
        bits, count = self.bits, len(self.bits.candidates)
        self.bits = FixedBits(row + 1, range(1, count + 1) if count > 1 else None).to(x.device)
        try:
            return self.forward(x)
        finally:
            self.bits = bits

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Stored codes of x at the row in play, int16, in the shape of x's blocks (with groups: by group)."""
        at, (scale, zero_point) = self.levels(), self.stored_range(x)
        if at.table is not None:
            return levels.quantize(self._blocks(x), scale, at.table).to(torch.int16)
        return affine.quantize(self._blocks(x), scale, at.low, at.high, at.half, zero_point).to(torch.int16)

    @torch.no_grad()
    def stored_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero point) that go with ``codes(x)``, in the shape that broadcasts against them."""
        at = self.levels()
        if self.scheme.range != "dynamic" and (self.scheme.range != "dorefa" or self.kind != "weight"):
            return at.scale, at.zero_point
        low, high = self._in_play(self.low), self._in_play(self.high)
        half = None if self.half_step is None else self._in_play(self.half_step)
        half = half.view(self.view) if half is not None and len(half) > 1 else half
        scale, zero_point = self._found(self._blocks(x), low, high, half)
        if scale.ndim == len(self.view):
            scale = scale.expand(self.view)
        return scale, torch.zeros_like(scale) if zero_point is None else zero_point.expand_as(scale)

    def stored_scale(self, x: Tensor) -> Tensor:
        """The scale of `stored_range`."""
        return self.stored_range(x)[0]

    def _blocks(self, x: Tensor) -> Tensor:
        """x as its scales broadcast against it, after what shapes it."""
        v = dorefa(x) if self.scheme.range == "dorefa" and self.kind == "weight" else x.float()
        size = self.scheme.group_size
        return v if size is None else blocks.to_groups(v, size, self.kind == "weight")


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
