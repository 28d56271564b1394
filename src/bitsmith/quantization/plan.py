"""Plan: site -> integer bits. What every method ends in; a JSON file to read, edit and use again.

A plan is complete: sites that a scheme leaves in float are in it, with 32 bits, like those that a search
decided to leave so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import FormatError, SiteError, listing, nearest
from bitsmith.files import read_json, write_json
from bitsmith.quantization.bits import BitWidth, Width, one_or_each
from bitsmith.quantization.layers import drop_float, layer_operands, weights_of
from bitsmith.quantization.quantizer import Quantizer, sites
from bitsmith.quantization.scheme import FLOAT
from bitsmith.quantization.target import get_target

VERSION = 1
NO_SITE = "there is no such site"


@dataclass(frozen=True)
class PlannedSite:
    """The decision for one site. bits: one width, 32 in float, or one for each output channel of a weight;
    grid, granularity, group_size: as trained; scale_dtype: as stored. In float all but bits is idle."""

    kind: str
    bits: Width
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
    def bits(self) -> dict[str, Width]:
        """Site -> bits, one width or one per output channel."""
        return {name: site.bits for name, site in self.sites.items()}

    def to_dict(self) -> dict[str, Any]:
        """As plan.json holds it."""
        return {
            "version": VERSION,
            "target": self.target,
            "sites": {name: _entry(site) for name, site in self.sites.items()},
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
            widths = bits if isinstance(bits, list) else [bits]
            allowed = range(1, 9) if isinstance(bits, list) else (*range(1, 9), FLOAT)
            whole = widths and all(type(b) is int and b in allowed for b in widths)
            if not whole or entry.get("kind") not in ("weight", "activation"):
                raise FormatError(
                    "this site of the plan is not valid",
                    where=f"{where}: sites.{name}",
                    got=repr(entry),
                    expected="kind weight or activation and bits 1 to 8, or a list of such, or 32 for float",
                )
            if isinstance(bits, list) and (entry["kind"], entry.get("granularity")) != ("weight", "channel"):
                raise FormatError(
                    "this site of the plan cannot have a width per channel",
                    where=f"{where}: sites.{name}.bits",
                    got=f"{entry['kind']}, granularity {entry.get('granularity', 'tensor')}",
                    expected="kind weight, granularity channel",
                    remedy="Give it one width",
                )
            unknown = [k for k in entry if k not in PlannedSite.__dataclass_fields__]
            if unknown:
                close = nearest(unknown[0], PlannedSite.__dataclass_fields__, 1)
                raise FormatError(
                    "this site of the plan has a field that we do not know",
                    where=f"{where}: sites.{name}.{unknown[0]}",
                    remedy=f"Did you mean {close[0]}?" if close else "",
                )
            planned[name] = PlannedSite(**{**entry, "bits": tuple(bits) if isinstance(bits, list) else bits})
        return cls(planned, value.get("target", "native"), value.get("cost") or {}, value.get("budget") or {})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write plan.json atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read plan.json. Raises FormatError."""
        return cls.from_dict(read_json(path, "plan"), str(path))


def _entry(site: PlannedSite) -> dict[str, Any]:
    return {**vars(site), "bits": site.bits if isinstance(site.bits, int) else list(site.bits)}


def plan_of(
    model: nn.Module, cost: Mapping[str, Any] | None = None, *, bits: Mapping[str, Width] | None = None
) -> Plan:
    """The plan that a prepared model stands at; with ``bits`` of some sites, the one a method chose.

    Raises SiteError for a width that is not among a site's candidates.
    """
    quantizers, chosen = sites(model), bits or {}
    operands = {operand.site: operand for pair in layer_operands(model) for operand in pair}
    in_float = [site for site, operand in operands.items() if operand.quantizer is None]
    _check_names((n for n, b in chosen.items() if b != FLOAT or n not in in_float), quantizers, NO_SITE)
    planned = {
        site: PlannedSite(operand.kind, FLOAT)
        if operand.quantizer is None
        else _planned(operand.quantizer, chosen.get(site))
        for site, operand in operands.items()
    }
    return Plan(planned, getattr(model, "bitsmith_target", "native"), cost or {})


def _planned(quantizer: Quantizer, bits: Width | None) -> PlannedSite:
    row: int | Tensor | None = None
    one_row = len(quantizer.bits.candidates) == 1
    if bits is not None and not (one_row and bits == quantizer.bits.whole()):
        candidates = quantizer.bits.candidates.int().flatten().tolist()
        bits = one_or_each(bits)
        missing = [b for b in ([bits] if isinstance(bits, int) else bits) if b not in candidates]
        if missing:
            raise SiteError(
                "this width is not a candidate here",
                where=quantizer.name,
                got=missing[0],
                expected=listing(sorted(set(candidates))),
            )
        row = (
            candidates.index(bits)
            if isinstance(bits, int)
            else torch.tensor([candidates.index(b) for b in bits])
        )
    at, grids = quantizer.levels(row), set(quantizer.grids(row).values())
    if at.bits == FLOAT:
        return PlannedSite(quantizer.kind, FLOAT)
    return PlannedSite(
        kind=quantizer.kind,
        bits=at.bits,
        grid=quantizer.grid_name(row),
        granularity=quantizer.scheme.granularity,
        group_size=quantizer.scheme.group_size,
        symmetric=not grids & {"unsigned", "asymmetric"},
        signed=at.table is not None or bool((torch.as_tensor(at.low) < 0).any()),
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


def commit(model: nn.Module, plan: Plan | Mapping[str, int | Sequence[int]]) -> CommitReport:
    """Set the decided widths. Every tensor keeps its shape and every key its name; but where a site of one
    width takes a width per channel, or back, the buffers that say so change theirs.

    Raises SiteError where plan and model do not have the same sites, SchemeError for a width that a site's
    grid has not, or a list that does not fit it, TargetError for a pair of widths that the target does not
    multiply; the model is then as it was.
    """
    given = plan.bits if isinstance(plan, Plan) else plan
    quantizers, pairs = sites(model), list(layer_operands(model))
    in_float = {operand.site for pair in pairs for operand in pair if operand.quantizer is None}
    given = {name: bits for name, bits in given.items() if bits != FLOAT or name not in in_float}
    _check_names(given, quantizers, "the plan has a site that the model has not")
    missing = [name for name in quantizers if name not in given]
    if missing:
        raise SiteError("the plan says nothing of this site", where=missing[0], remedy="Add it to the plan")
    bits: dict[str, Width] = {n: b if isinstance(b, int) else tuple(b) for n, b in given.items()}
    for name, width in bits.items():
        quantizers[name].check_commit(width)
    target = get_target(getattr(model, "bitsmith_target", "native"))
    for pair in pairs:
        if len(pair) == 2:
            first, second = (operand.site for operand in pair)
            target.check_pair(first, second, (bits.get(first, FLOAT), bits.get(second, FLOAT)))
    weights = weights_of(model)
    trained = {name: quantizers[name].commit(width, weights.get(name)) for name, width in bits.items()}
    return CommitReport(
        tuple(n for n, t in trained.items() if t), tuple(n for n, t in trained.items() if not t)
    )


def collapse(model: nn.Module) -> None:
    """Drop the rows that are not in play, at every site, and the quantizers of sites in float: after the
    decision and the last training step, as an optimizer's state does not follow. The model is then the one
    that its plan prepares."""
    drop_float(model)
    for quantizer in sites(model).values():
        quantizer.collapse()


def set_bits(model: nn.Module, widths: Mapping[str, BitWidth]) -> None:
    """Give sites other bit-widths, each with a row per candidate: what a method that decides bits does in
    `attach`. Weights are calibrated, activations wait for `calibrate`.

    Raises SiteError for an unknown site or one that another method owns, SchemeError for a width that its
    grid has not.
    """
    quantizers, weights = sites(model), weights_of(model)
    _check_names(widths, quantizers, NO_SITE)
    for name, width in widths.items():
        quantizers[name].set_bits(width, weights.get(name))


def _check_names(names: Iterable[str], quantizers: Mapping[str, Quantizer], what: str) -> None:
    for name in names:
        if name not in quantizers:
            close = nearest(name, quantizers) or list(quantizers)[:3]
            raise SiteError(what, where=name, remedy=f"The nearest are {', '.join(close)}")
