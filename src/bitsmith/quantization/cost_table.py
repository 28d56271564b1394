"""cost_table: what a layer costs on a device (microseconds, picojoules), measured or published, as a file.

    cost of a layer = per_layer + per_mac * MACs, of the most specific entry for its pair of widths

Unlike a look-up table keyed by layer name (HAQ, 1811.08886), entries are keyed by what the layer computes, so
that one file serves every model; a pair of widths that it does not list is an error and never interpolated.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bitsmith.errors import BudgetError, FormatError, listing, nearest
from bitsmith.files import read_json
from bitsmith.quantization.scheme import FLOAT

VERSION = 1
BUILT_IN = Path(__file__).with_name("tables")
KINDS = ("*", "Linear", "Conv1d", "Conv2d", "ConvTranspose2d", "MatMul")
TABLE_KEYS = ("version", "name", "unit", "source", "shared", "entries", "constant", "measured")

Shared = tuple[str | tuple[str, ...], ...]  # what must share a width: see `shared_from`


@dataclass(frozen=True)
class CostEntry:
    """One line of a table. ``*`` stands for every kind; macs and shape (of the weight), where given, must be
    those of the layer. Of a MatMul, weight_bits are the left operand's. 32 bits: in float."""

    weight_bits: int
    activation_bits: int
    kind: str = "*"
    macs: int | None = None
    shape: tuple[int, ...] | None = None
    per_mac: float = 0.0
    per_layer: float = 0.0

    @property
    def specificity(self) -> tuple[bool, bool, bool]:
        """Larger is more specific: a shape, then a number of MACs, then a kind."""
        return self.shape is not None, self.macs is not None, self.kind != "*"

    def fits(self, kind: str, macs: int, shape: tuple[int, ...]) -> bool:
        """Whether this entry speaks of such a layer."""
        return self.kind in ("*", kind) and self.macs in (None, macs) and self.shape in (None, shape)


@dataclass(frozen=True)
class CostTable:
    """Costs of layers by pairs of widths, in ``unit``; ``source`` says who measured them, and where.

    shared: sites that the device wants at one width, as in a target file. constant: what an inference costs
    beside its layers, where that was measured; products outside of every layer are then part of it.
    """

    name: str
    unit: str
    entries: tuple[CostEntry, ...]
    source: str = ""
    shared: Shared = ()
    constant: float | None = None

    @cached_property
    def _by_pair(self) -> dict[tuple[int, int], list[CostEntry]]:
        found: dict[tuple[int, int], list[CostEntry]] = {}
        for entry in sorted(self.entries, key=lambda e: e.specificity, reverse=True):
            found.setdefault((entry.weight_bits, entry.activation_bits), []).append(entry)
        return found

    @property
    def dearest(self) -> tuple[int, int]:
        """The pair that a share of this table refers to: 32 x 32 where listed, else the widest pair."""
        return max(self._by_pair, key=lambda pair: (pair[0] * pair[1], pair))

    def lists(
        self, kind: str, macs: int, shape: tuple[int, ...], weight_bits: int | Sequence[int], bits: int
    ) -> bool:
        """Whether there is an entry for such a layer at this pair of widths."""
        widths = [weight_bits] if isinstance(weight_bits, int) else sorted(set(weight_bits))
        return all(any(e.fits(kind, macs, shape) for e in self._by_pair.get((w, bits), ())) for w in widths)

    def cost(
        self,
        name: str,
        kind: str,
        macs: int,
        shape: tuple[int, ...],
        weight_bits: int | Sequence[int],
        activation_bits: int,
    ) -> float:
        """Cost of the layer ``name``; with a width per channel, that of each pair by its share of the
        channels. Raises BudgetError where no entry speaks of it at these widths."""
        if not isinstance(weight_bits, int):
            shares = {bits: weight_bits.count(bits) / len(weight_bits) for bits in sorted(set(weight_bits))}
            return sum(
                share * self.cost(name, kind, macs, shape, bits, activation_bits)
                for bits, share in shares.items()
            )
        for entry in self._by_pair.get((weight_bits, activation_bits), ()):
            if entry.fits(kind, macs, shape):
                return entry.per_layer + entry.per_mac * macs
        raise BudgetError(
            f"the table {self.name} says nothing of this layer at {weight_bits} x {activation_bits} bits",
            where=name,
            got=f"{kind}, {macs} MACs, weight shape {list(shape)}",
            expected="one of " + ", ".join(f"{w} x {a}" for w, a in sorted(self._by_pair)),
            remedy=f"Add an entry for {weight_bits} x {activation_bits}, or drop the width as a candidate",
        )

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], where: str = "table") -> CostTable:
        """Read and check what a table file holds. Raises FormatError."""
        unknown(value, TABLE_KEYS, where)
        if value.get("version") != VERSION:
            raise FormatError(
                "this is not a cost table that we can read",
                where=where,
                got=f"version {value.get('version')!r}",
                expected=f"version {VERSION}",
            )
        for key in ("name", "unit"):
            if not isinstance(value.get(key), str) or not value[key]:
                raise FormatError(
                    "a cost table needs this as text", where=f"{where}: {key}", got=repr(value.get(key))
                )
        if "." in value["name"]:  # traces and buffers are named after it
            raise FormatError(
                "the name of a cost table has no dots",
                where=f"{where}: name",
                got=value["name"],
                remedy=f"Write {value['name'].replace('.', '_')}",
            )
        lines = value.get("entries")
        if not isinstance(lines, list) or not lines:
            raise FormatError(
                "a cost table needs entries",
                where=f"{where}: entries",
                got=repr(lines),
                expected='a list such as [{"weight_bits": 4, "activation_bits": 8, "per_mac": 0.001}]',
            )
        entries = tuple(_entry(line, f"{where}: entries.{i}") for i, line in enumerate(lines))
        seen: dict[tuple[Any, ...], int] = {}
        for i, e in enumerate(entries):
            first = seen.setdefault((e.kind, e.macs, e.shape, e.weight_bits, e.activation_bits), i)
            if first != i:
                raise FormatError(
                    f"this entry speaks of the same layers and widths as entry {first}",
                    where=f"{where}: entries.{i}",
                    remedy="Keep one of them",
                )
        shared = shared_from(value.get("shared", []), f"{where}: shared")
        constant = value.get("constant")
        if constant is not None:
            _check_cost(constant, f"{where}: constant")
        return cls(value["name"], value["unit"], entries, str(value.get("source", "")), shared, constant)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostTable:
        """Read a table file, or a built-in table by its name ("energy_45nm"). Raises FormatError."""
        text = os.fspath(path)
        built_in = sorted(file.stem for file in BUILT_IN.glob("*.json"))
        if text in built_in:
            return cls.from_dict(read_json(BUILT_IN / f"{text}.json", "cost table"), text)
        if not text.endswith(".json"):
            close = nearest(text, built_in, 1)
            raise FormatError(
                "there is no such cost table",
                where="table",
                got=text,
                expected=f"{listing(built_in)}, or the path of a .json file",
                remedy=f"Did you mean {close[0]}?" if close else "",
            )
        return cls.from_dict(read_json(text, "cost table"), text)


def _entry(line: Any, where: str) -> CostEntry:
    if not isinstance(line, Mapping):
        raise FormatError("an entry is an object", where=where, got=repr(line))
    unknown(line, tuple(CostEntry.__dataclass_fields__), where)
    for key in ("weight_bits", "activation_bits"):
        if not _is_width(line.get(key)):
            raise FormatError(
                "no such bit-width", where=f"{where}.{key}", got=repr(line.get(key)), expected="1 to 8, or 32"
            )
    if line.get("kind", "*") not in KINDS:
        raise FormatError(
            "no such kind of layer", where=f"{where}.kind", got=repr(line["kind"]), expected=listing(KINDS)
        )
    if "per_mac" not in line and "per_layer" not in line:
        raise FormatError("this entry names no cost", where=where, expected="per_mac, per_layer or both")
    for key in ("per_mac", "per_layer"):
        _check_cost(line.get(key, 0.0), f"{where}.{key}")
    shape, macs = line.get("shape"), line.get("macs")
    if shape is not None and not (isinstance(shape, list) and all(isinstance(n, int) for n in shape)):
        raise FormatError(
            "this is no shape",
            where=f"{where}.shape",
            got=repr(shape),
            expected="the weight's shape, such as [64, 32, 3, 3]",
        )
    if macs is not None and (not isinstance(macs, int) or macs < 1):
        raise FormatError(
            "this is no number of MACs", where=f"{where}.macs", got=repr(macs), expected="an integer above 0"
        )
    return CostEntry(**{**line, "shape": None if shape is None else tuple(shape)})


def _check_cost(number: Any, where: str) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
        raise FormatError("this is no cost", where=where, got=repr(number), expected="a number of at least 0")


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in (*range(1, 9), FLOAT)


def shared_from(value: Any, where: str) -> Shared:
    """Check the key ``shared`` of a file: a list of globs on site names, or of lists of globs.

    All sites that a glob by itself matches share one width; of a list of globs, those share for which the
    wildcards stand for the same text (["*.q.input", "*.k.input"]: in each block). Raises FormatError.
    """
    items: list[Any] = value if isinstance(value, list) else [None]
    for i, item in enumerate(items):
        globs = [item] if isinstance(item, str) else item
        if not isinstance(globs, list) or not globs or not all(isinstance(g, str) for g in globs):
            raise FormatError(
                "this names no sites that share a width",
                where=f"{where}.{i}" if isinstance(value, list) else where,
                got=repr(item if isinstance(value, list) else value),
                expected='a list of globs, or of lists such as ["*.q.input", "*.k.input"]',
            )
    return tuple(item if isinstance(item, str) else tuple(item) for item in items)


def unknown(value: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Raise FormatError with the nearest name where ``value`` has a key that is not in ``keys``."""
    for key in value:
        if key not in keys:
            close = nearest(str(key), keys, 1)
            raise FormatError(
                "this file has a key that we do not know",
                where=f"{where}: {key}",
                expected=listing(keys),
                remedy=f"Did you mean {close[0]}?" if close else "",
            )
