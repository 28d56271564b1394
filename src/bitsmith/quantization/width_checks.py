"""width_checks: the widths that a site cannot have, whatever its rows; each refused with one line."""

from __future__ import annotations

from bitsmith.errors import SchemeError
from bitsmith.numerics.grid import TABLES
from bitsmith.quantization.bits import BitWidth
from bitsmith.quantization.scheme import FLOAT, Scheme


def check_candidates(name: str, kind: str, scheme: Scheme, bits: BitWidth) -> None:
    """Raise SchemeError where the site ``name`` cannot have the candidates of ``bits`` beside each other."""
    if scheme.grid in TABLES and (bits.blended or bool((bits.candidates % 1).any())):
        raise SchemeError(
            "between two tables of levels there is no grid at a width that is not whole",
            where=f"{name}.grid",
            got=scheme.grid,
            expected="an evenly spaced grid here, such as auto",
            remedy="Choose grid: auto, or whole widths (of a search mode: sampled or mixed)",
        )
    if len(bits.candidates) == 1 or FLOAT not in bits.candidates:
        return
    # A row of 32 bits has to compute what the site in float does.
    for field, value, why in (
        ("range", "dorefa" if kind == "weight" else "", "tanh shapes these weights"),
        ("estimator", "smooth", "values on the grid get a seventh of the gradient"),
        (
            "grid",
            scheme.grid if scheme.grid in TABLES else "",
            "a table of levels has none at float's fineness",
        ),
    ):
        if getattr(scheme, field) == value:
            raise SchemeError(
                f"32 bits cannot be one candidate among others here: {why}",
                where=f"{name}.{field}",
                got=value,
                remedy=f"Choose another {field}, leave 32 out of the candidates, or override the site's bits",
            )


def check_each(name: str, kind: str, scheme: Scheme, count: int, channels: int) -> None:
    """Raise SchemeError where the site ``name`` of ``channels`` scales cannot have ``count`` widths, one for
    each output channel."""
    if kind != "weight" or scheme.granularity != "channel":
        raise SchemeError(
            "only weights with a scale per output channel can have a width per channel",
            where=f"{name}.bits",
            got=f"an activation, per {scheme.granularity}"
            if kind != "weight"
            else f"a scale per {scheme.granularity}",
            remedy="Give it one width" + ("" if kind != "weight" else ", or granularity: channel"),
        )
    if scheme.grid in TABLES:
        raise SchemeError(
            "a weight has one table of levels, and so one width for all channels",
            where=f"{name}.grid",
            got=scheme.grid,
            expected="an evenly spaced grid where channels have widths of their own, such as auto",
            remedy="Give it one width, or grid: auto",
        )
    if count != channels:
        raise SchemeError(
            "a list of widths has one for each output channel",
            where=f"{name}.bits",
            got=f"{count} widths",
            expected=f"{channels}",
        )
