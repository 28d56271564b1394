"""Scheme: how one tensor is to be quantized. What a user writes; a quantizer is what becomes of it.

A Scheme holds no tensors. It checks itself when it is made, so that a wrong value is found in the user's
line and not in the depths of a forward.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from bitsmith.errors import SchemeError, check_choice, listing, nearest
from bitsmith.numerics.blocks import GRANULARITIES, Granularity
from bitsmith.numerics.grid import TABLE_BITS, TABLES
from bitsmith.numerics.rounding import ESTIMATORS, Estimator

GridChoice = Literal[
    "auto", "symmetric", "balanced", "seq", "unsigned", "asymmetric", "powers_of_two", "levels"
]
Range = Literal["lsq", "lsq+", "pact", "dorefa", "static", "dynamic"]
Calibration = Literal["mse", "minmax", "percentile", "kl", "lsq"]

FLOAT = 32  # bits that mean: leave the site in float


@dataclass(frozen=True)
class Scheme:
    """How a tensor is quantized.

    bits         1..8, or 32 to leave the site in float; of a weight per channel also a list of 1..8, one
                 width for each output channel
    granularity  what shares a scale: tensor, channel, group (of ``group_size``), token (activations, dynamic)
    grid         numerics.grid; auto: `seq` for weights of 1-2 bits where the target holds it and `symmetric`
                 above; for activations what calibration sees: `unsigned` without negative values,
                 `asymmetric` where one side is less than half of the other (never where range is dynamic),
                 else `symmetric`; of weights of 2 to 4 bits also the tables `powers_of_two` and `levels`
    range        lsq: learned scale (1902.08153); lsq+: and, of activations, zero point (2004.09576);
                 pact: learned by what is clipped (1805.06085); dorefa: tanh of the weights (1606.06160);
                 static: as calibrated; dynamic: min-max of each tensor as it comes
    calibration  where scales start; lsq: 2 mean|x| / sqrt(high), the rule of the LSQ paper
    estimator    what stands in for the derivative of rounding (numerics.rounding)
    """

    bits: int | tuple[int, ...] = 8
    granularity: Granularity = "tensor"
    group_size: int | None = None
    grid: GridChoice = "auto"
    range: Range = "lsq"
    calibration: Calibration = "mse"
    estimator: Estimator = "clipped"

    def __post_init__(self) -> None:
        widths: tuple[Any, ...] = (self.bits,)
        if isinstance(self.bits, list | tuple):
            object.__setattr__(self, "bits", tuple(self.bits))
            widths = tuple(self.bits)
        allowed = (*range(1, 9), FLOAT) if isinstance(self.bits, int) else range(1, 9)
        wrong = [b for b in widths if not isinstance(b, int) or isinstance(b, bool) or b not in allowed]
        if wrong or not widths:
            raise SchemeError(
                "no such bit-width",
                where="bits",
                got=wrong[0] if wrong else "an empty list",
                expected="1 to 8, or 32 to leave the site in float; in a list 1 to 8 for each output channel",
            )
        if isinstance(self.bits, tuple) and self.granularity != "channel":
            raise SchemeError(
                "only channels with a scale each can have a width each",
                where="granularity",
                got=self.granularity,
                expected="channel where bits is a list",
                remedy="Set granularity: channel, or give one width for all",
            )
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if self.granularity == "group":
            if not isinstance(self.group_size, int) or self.group_size < 1:
                raise SchemeError(
                    "granularity group needs a size",
                    where="group_size",
                    got=self.group_size,
                    expected="a positive integer",
                )
        elif self.group_size is not None:
            raise SchemeError(
                "only groups have a size",
                where="group_size",
                got=self.group_size,
                remedy="Set granularity: group, or leave group_size out",
            )
        if self.granularity == "token" and self.range != "dynamic":
            raise SchemeError(
                "tokens are not known before they come, so their scale cannot be stored",
                where="range",
                got=self.range,
                expected="dynamic with granularity token",
            )
        if self.grid == "asymmetric" and self.calibration == "lsq":
            raise SchemeError(
                "calibration lsq has no rule for a zero point",
                where="grid",
                got="asymmetric",
                expected="auto, symmetric or unsigned",
            )
        if self.grid == "symmetric" and 1 in widths:
            raise SchemeError(
                "a symmetric grid of one bit is {-1, 0}",
                where="grid",
                got="symmetric",
                expected="seq or auto at 1 bit",
            )
        if self.grid == "balanced" and 1 in widths:
            raise SchemeError(
                "a balanced grid of one bit holds only 0",
                where="grid",
                got="balanced",
                expected="seq or auto at 1 bit",
            )
        if self.grid in TABLES and not self.is_float:
            self._check_table()

    def _check_table(self) -> None:
        """Refuse what a grid that is a table of levels does not go with."""
        for field, allowed in TABLE_FIELDS.items():
            value = getattr(self, field)
            if value not in allowed:
                raise SchemeError(
                    f"grid {self.grid}, a table of levels, does not go with this",
                    where=field,
                    got=list(value) if isinstance(value, tuple) else value,
                    expected=listing(map(str, allowed)),
                    remedy=f"Choose one of these, or another grid than {self.grid}",
                )

    def check_kind(self, kind: str, where: str) -> None:
        """Raise SchemeError where a tensor of this kind, weight or activation, cannot have this scheme."""
        if kind == "activation" and self.grid in TABLES and not self.is_float:
            raise SchemeError(
                "activations have evenly spaced levels: only the codes of a weight index a table",
                where=f"{where}.grid",
                got=self.grid,
                expected="auto, symmetric, balanced, seq, unsigned or asymmetric",
                remedy=f"Set grid: auto here; grid: {self.grid} is for weights",
            )

    @property
    def is_float(self) -> bool:
        """Whether the site stays in float."""
        return self.bits == FLOAT

    def replace(self, where: str = "", **changes: Any) -> Scheme:
        """This scheme with some fields changed; ``where`` names the site in messages."""
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                close = nearest(name, known, 1)
                raise SchemeError(
                    "a scheme has no such field",
                    where=f"{where}.{name}" if where else name,
                    expected=listing(known),
                    remedy=f"Did you mean {close[0]}?" if close else "",
                )
        values = {name: getattr(self, name) for name in known} | changes
        if values["granularity"] != "group" and "group_size" not in changes:
            values["group_size"] = None
        try:
            return Scheme(**values)
        except SchemeError as error:
            error.where = f"{where}.{error.where}" if where else error.where
            raise


CHOICES: dict[str, tuple[str, ...]] = {
    "granularity": GRANULARITIES,
    "grid": get_args(GridChoice),
    "range": get_args(Range),
    "calibration": get_args(Calibration),
    "estimator": ESTIMATORS,
}
TABLE_FIELDS: dict[str, tuple[Any, ...]] = {  # what goes with a grid of numerics.levels
    "bits": TABLE_BITS,
    "granularity": ("tensor", "channel", "group"),
    "range": ("lsq", "lsq+", "static"),
    "calibration": ("mse", "minmax"),
    "estimator": ("clipped", "pure"),
}
