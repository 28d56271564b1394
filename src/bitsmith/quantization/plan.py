"""Plan: site -> integer bits. What every method ends in; a JSON file to read, edit and use again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bitsmith.errors import FormatError, SiteError, listing, nearest
from bitsmith.files import read_json, write_json
from bitsmith.quantization.bits import BitWidth
from bitsmith.quantization.layers import operand_quantizers, weights_of
from bitsmith.quantization.quantizer import Quantizer, sites
from bitsmith.quantization.target import get_target

VERSION = 1


@dataclass(frozen=True)
class PlannedSite:
    """The decision for one site. grid, granularity, group_size: as trained; scale_dtype: as stored."""

    kind: str
    bits: int
    grid: str = "auto"
    granularity: str = "tensor"
    group_size: int | None = None
    symmetric: bool = True
    signed: bool = True
    scale_dtype: str = "float32"
    tied_to: str | None = None


@dataclass(frozen=True)
class Plan:
    """Bits of every site, with what they cost and for which target. Contract: plan.json, version 1."""

    sites: Mapping[str, PlannedSite]
    target: str = "native"
    cost: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> dict[str, int]:
        """Site -> bits."""
        return {name: site.bits for name, site in self.sites.items()}

    def to_dict(self) -> dict[str, Any]:
        """As plan.json holds it."""
        return {
            "version": VERSION,
            "target": self.target,
            "sites": {name: dict(vars(site)) for name, site in self.sites.items()},
            "cost": dict(self.cost),
            "budget": dict(self.budget),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], where: str = "plan") -> Plan:
        """Read and check what ``to_dict`` wrote. Raises FormatError."""
        if value.get("version") != VERSION or not isinstance(value.get("sites"), Mapping):
            raise FormatError(
                "this is not a plan that we can read",
                where=where,
                got=f"version {value.get('version')!r}",
                expected=f"version {VERSION} with a table of sites",
            )
        planned = {}
        for name, entry in value["sites"].items():
            bits = entry.get("bits") if isinstance(entry, Mapping) else None
            if (
                not isinstance(bits, int)
                or not 1 <= bits <= 8
                or entry.get("kind") not in ("weight", "activation")
            ):
                raise FormatError(
                    "this site of the plan is not valid",
                    where=f"{where}: sites.{name}",
                    got=repr(entry),
                    expected="kind weight or activation and bits 1 to 8",
                )
            unknown = [k for k in entry if k not in PlannedSite.__dataclass_fields__]
            if unknown:
                close = nearest(unknown[0], PlannedSite.__dataclass_fields__, 1)
                raise FormatError(
                    "this site of the plan has a field that we do not know",
                    where=f"{where}: sites.{name}.{unknown[0]}",
                    remedy=f"Did you mean {close[0]}?" if close else "",
                )
            planned[name] = PlannedSite(**entry)
        return cls(planned, value.get("target", "native"), value.get("cost") or {}, value.get("budget") or {})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write plan.json atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read plan.json. Raises FormatError."""
        return cls.from_dict(read_json(path, "plan"), str(path))


def plan_of(
    model: nn.Module, cost: Mapping[str, Any] | None = None, *, bits: Mapping[str, int] | None = None
) -> Plan:
    """The plan that a prepared model stands at; with ``bits`` of some sites, the one a method chose.

    Raises SiteError for a width that is not among a site's candidates.
    """
    quantizers, chosen = sites(model), bits or {}
    _check_names(chosen, quantizers, "there is no such site")
    planned = {name: _planned(quantizer, chosen.get(name)) for name, quantizer in quantizers.items()}
    return Plan(planned, getattr(model, "bitsmith_target", "native"), cost or {})


def _planned(quantizer: Quantizer, bits: int | None) -> PlannedSite:
    row, candidates = None, quantizer.bits.candidates.int().tolist()
    if bits is not None:
        if bits not in candidates:
            raise SiteError(
                "this width is not a candidate here",
                where=quantizer.name,
                got=bits,
                expected=listing(candidates),
            )
        row = candidates.index(bits)
    at, grid = quantizer.levels(row), quantizer.grid_name(row)
    return PlannedSite(
        kind=quantizer.kind,
        bits=at.bits,
        grid=grid,
        granularity=quantizer.scheme.granularity,
        group_size=quantizer.scheme.group_size,
        symmetric=grid not in ("unsigned", "asymmetric"),
        signed=at.low < 0,
    )


@dataclass(frozen=True)
class CommitReport:
    """What `commit` did: sites whose width was trained, and sites made over (post-training quantization)."""

    trained: tuple[str, ...]
    post_training: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{len(self.trained)} sites committed to a trained width"
        if self.post_training:
            text += (
                f"; {len(self.post_training)} to a width that was not trained (post-training quantization): "
            )
            text += ", ".join(self.post_training)
        return text


def commit(model: nn.Module, plan: Plan | Mapping[str, int]) -> CommitReport:
    """Set the decided widths. Every tensor keeps its shape and every key its name.

    Raises SiteError where plan and model do not have the same sites, SchemeError for a width that a site's
    grid has not, TargetError for a pair of widths that the target does not multiply; the model is then as it
    was.
    """
    bits = plan.bits if isinstance(plan, Plan) else dict(plan)
    quantizers = sites(model)
    _check_names(bits, quantizers, "the plan has a site that the model has not")
    missing = [name for name in quantizers if name not in bits]
    if missing:
        raise SiteError("the plan says nothing of this site", where=missing[0], remedy="Add it to the plan")
    for name, width in bits.items():
        quantizers[name].check_width(width)
    target = get_target(getattr(model, "bitsmith_target", "native"))
    for first, second in operand_quantizers(model):
        if first is not None and second is not None:  # a float operand is no matter of the target's
            target.check_pair(first.name, second.name, (bits[first.name], bits[second.name]))
    weights = weights_of(model)
    trained = {name: quantizers[name].commit(width, weights.get(name)) for name, width in bits.items()}
    return CommitReport(
        tuple(n for n, t in trained.items() if t), tuple(n for n, t in trained.items() if not t)
    )


def collapse(model: nn.Module) -> None:
    """Drop the rows that are not in play, at every site: after the decision and the last training step, as
    an optimizer's state does not follow. The model is then the one that its plan prepares."""
    for quantizer in sites(model).values():
        quantizer.collapse()


def set_bits(model: nn.Module, widths: Mapping[str, BitWidth]) -> None:
    """Give sites other bit-widths, each with a row per candidate: what a method that decides bits does in
    `attach`. Weights are calibrated, activations wait for `calibrate`.

    Raises SiteError for an unknown site or one that another method owns, SchemeError for a width that its
    grid has not.
    """
    quantizers, weights = sites(model), weights_of(model)
    _check_names(widths, quantizers, "there is no such site")
    for name, width in widths.items():
        quantizers[name].set_bits(width, weights.get(name))


def _check_names(names: Iterable[str], quantizers: Mapping[str, Quantizer], what: str) -> None:
    for name in names:
        if name not in quantizers:
            close = nearest(name, quantizers) or list(quantizers)[:3]
            raise SiteError(what, where=name, remedy=f"The nearest are {', '.join(close)}")
