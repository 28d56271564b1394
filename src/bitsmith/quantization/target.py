"""Targets: where the model will run, and what that place stores exactly.

A target is chosen before training, because it owns the grid: what it cannot hold is refused at `prepare`,
not found out at export. Containers say how many bits a code of b bits takes in the target's file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsmith.errors import FormatError, TargetError, listing, nearest
from bitsmith.files import read_json
from bitsmith.numerics.blocks import GRANULARITIES
from bitsmith.numerics.grid import GRIDS, TABLES
from bitsmith.quantization.bits import in_words
from bitsmith.quantization.cost_table import BUILT_IN, CostTable, Shared, shared_from, unknown
from bitsmith.quantization.scheme import CHOICES, FLOAT, Scheme

VERSION = 1  # of target files


@dataclass(frozen=True)
class Target:
    """What a runtime stores and computes.

    weight_containers      bits of a code -> bits that it takes in the file
    weight_granularities, activation_granularities, grids, activation_ranges: what it can hold
    runs                   what runs the file, for people
    channel_widths         where the output channels of one weight have widths of their own: "own", each
                           channel is stored at its width; "widest", all in the container of the widest;
                           "none", refused
    pairs                  (weight, activation) widths that it can multiply; None: all. 32 stands for float;
                           where no pair names it, a product with an operand in float is no matter of the
                           target's, and no search leaves a site in float for it
    shared                 sites that must have one width (cost_table.shared_from)
    latency, energy        what a layer costs there, for budgets that name the table "latency" or "energy"
    """

    name: str
    weight_containers: dict[int, int]
    weight_granularities: tuple[str, ...]
    activation_granularities: tuple[str, ...]
    weight_grids: tuple[str, ...]
    dynamic_activations: bool
    runs: str
    channel_widths: str = "none"
    pairs: tuple[tuple[int, int], ...] | None = None
    shared: Shared = ()
    latency: CostTable | None = None
    energy: CostTable | None = None

    def multiplies(self, first: int | Sequence[int], second: int) -> bool:
        """Whether it has a product of operands of these widths (of a MatMul, left and right)."""
        widths = [first] if isinstance(first, int) else set(first)
        return self.pairs is None or all(
            (b, second) in self.pairs or (FLOAT in (b, second) and not self.has_float) for b in widths
        )

    @property
    def has_float(self) -> bool:
        """Whether it has products with operands in float."""
        return self.pairs is None or any(FLOAT in pair for pair in self.pairs)

    def weight_bits(self, elements: int, bits: int | Sequence[int]) -> int:
        """Bits that the codes of a weight of ``elements`` take in the file at ``bits``, one or one per
        channel."""
        held = [self.weight_containers.get(b, 8) for b in ([bits] if isinstance(bits, int) else bits)]
        if self.channel_widths != "own":
            held = [max(held)]
        return elements // len(held) * sum(held)

    def check_pair(self, first: str, second: str, widths: tuple[Any, Any]) -> None:
        """Raise TargetError where it has no product of the sites ``first`` and ``second`` at these widths."""
        if not self.multiplies(*widths):
            raise TargetError(
                f"target {self.name} does not multiply this pair of widths",
                where=f"{first} x {second}",
                got=f"{in_words(widths[0])} x {in_words(widths[1])} bits",
                expected=listing(f"{a} x {b}" for a, b in self.pairs or ()),
                remedy="Give these sites the bits of a pair that it lists, by the schemes or an override",
            )

    def check(self, site: str, kind: str, scheme: Scheme, layer: str) -> None:
        """Raise TargetError where this target cannot hold ``scheme`` at ``site`` of a ``layer`` class."""
        allowed = self.weight_granularities if kind == "weight" else self.activation_granularities
        if scheme.granularity not in allowed:
            raise TargetError(
                f"target {self.name} does not hold this granularity of {kind}s",
                where=f"{site}.granularity",
                got=scheme.granularity,
                expected=listing(allowed),
                remedy="Choose one of these, or target: native",
            )
        widths = sorted(set(scheme.bits)) if isinstance(scheme.bits, tuple) else [scheme.bits]
        if len(widths) > 1 and self.channel_widths == "none":
            raise TargetError(
                f"target {self.name} holds one width for all channels of a weight",
                where=f"{site}.bits",
                got=f"{len(widths)} widths",
                remedy="Give one width, or choose a target that holds channels at widths of their own, "
                "such as native",
            )
        multiplied = {bits for pair in self.pairs or () for bits in pair}
        for bits in widths:
            if kind == "weight" and bits not in self.weight_containers:
                raise TargetError(
                    f"target {self.name} stores no such width",
                    where=f"{site}.bits",
                    got=bits,
                    expected=listing(str(b) for b in self.weight_containers),
                )
            if self.pairs is not None and bits not in multiplied and layer != "Embedding":
                raise TargetError(
                    f"target {self.name} multiplies no such width",
                    where=f"{site}.bits",
                    got=bits,
                    expected=listing(str(b) for b in sorted(multiplied)),
                )
        if kind == "weight" and scheme.grid not in ("auto", *self.weight_grids):
            raise TargetError(
                f"target {self.name} does not hold this grid",
                where=f"{site}.grid",
                got=scheme.grid,
                expected=listing(self.weight_grids),
            )
        if kind == "activation" and scheme.range == "dynamic" and not self.dynamic_activations:
            raise TargetError(
                f"target {self.name} needs ranges that are known before it runs",
                where=f"{site}.range",
                got="dynamic",
                expected="lsq, lsq+, pact or static",
                remedy="Choose one of these, or target: native",
            )
        in_rows = layer.endswith(("Linear", "Embedding"))
        if self.name == "onnxruntime" and scheme.granularity == "group" and not in_rows:
            raise TargetError(
                "target onnxruntime holds groups in the weights of Linear and Embedding layers only",
                where=f"{site}.granularity",
                got="group",
                expected="channel or tensor",
            )


CHANNEL_WIDTHS = ("own", "widest", "none")
TRUE_SIZE = {bits: bits for bits in range(1, 9)}

TARGETS: dict[str, Target] = {
    "native": Target(
        name="native",
        weight_containers=TRUE_SIZE,
        weight_granularities=("tensor", "channel", "group"),
        activation_granularities=("tensor", "channel", "group", "token"),
        weight_grids=(*GRIDS, *TABLES),
        dynamic_activations=True,
        runs="Bitsmith itself, on any machine with PyTorch",
        channel_widths="own",
    ),
    "onnxruntime": Target(
        name="onnxruntime",
        # ONNX has INT2, INT4 and INT8 and nothing between (opset 25); see docs/targets.md.
        weight_containers={1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8},
        weight_granularities=("tensor", "channel", "group"),
        activation_granularities=("tensor",),
        weight_grids=("symmetric", "balanced", "seq", *TABLES),
        dynamic_activations=False,
        runs="ONNX Runtime; weights packed in the file, products in float",
        channel_widths="widest",
    ),
    "research": Target(
        name="research",
        weight_containers=TRUE_SIZE,
        weight_granularities=("tensor", "channel", "group"),
        activation_granularities=("tensor", "channel", "group", "token"),
        weight_grids=(*GRIDS, *TABLES),
        dynamic_activations=True,
        runs="no runtime: figures only",
        channel_widths="own",
    ),
}


def get_target(name: str | Target) -> Target:
    """The built-in target of this name, or the one that a .json file describes.

    Raises TargetError with the nearest names, and what `load_target` raises.
    """
    if isinstance(name, Target):
        return name
    if name.endswith(".json"):
        return load_target(name)
    if name not in TARGETS:
        close = nearest(name, TARGETS, 1)
        raise TargetError(
            "no such target",
            where="target",
            got=name,
            expected=f"{listing(TARGETS)}; or the path of a .json file",
            remedy=f"Did you mean {close[0]}?" if close else "",
        )
    return TARGETS[name]


def load_target(path: str | os.PathLike[str]) -> Target:
    """The target that a file describes (docs/custom_targets.md); its name is the path, so that what is saved
    with a model finds it again. Raises FormatError, naming the key.
    """
    value, where = read_json(path, "target file"), os.fspath(path)
    unknown(value, ("version", *(key for key in Target.__dataclass_fields__ if key != "name")), where)
    if value.get("version") != VERSION:
        raise FormatError(
            "this is not a target file that we can read",
            where=where,
            got=f"version {value.get('version')!r}",
            expected=f"version {VERSION}",
        )

    def some(key: str, choices: tuple[str, ...]) -> tuple[str, ...]:
        return _read(value, key, where, lambda v: _names(v, choices), f"a list of {listing(choices)}")

    def table(key: str) -> CostTable | None:
        found = value.get(key)
        if found is None or isinstance(found, Mapping):
            return None if found is None else CostTable.from_dict(found, f"{where}: {key}")
        text = _read(value, key, where, lambda v: v if isinstance(v, str) else None, "a table, or its path")
        # A path is meant from the folder of the file that names it.
        built_in = (BUILT_IN / f"{text}.json").is_file()
        return CostTable.load(text if built_in else os.fspath(Path(path).parent / text))

    pairs_are = "a list of pairs of widths, such as [[4, 8], [8, 8]]"
    pairs = None if value.get("pairs") is None else _read(value, "pairs", where, _pairs, pairs_are)
    return Target(
        name=where,
        weight_containers=_read(
            value,
            "weight_containers",
            where,
            _containers,
            'bits of a code -> bits in the file, {"4": 4, "8": 8}',
        ),
        weight_granularities=some("weight_granularities", tuple(g for g in GRANULARITIES if g != "token")),
        activation_granularities=some("activation_granularities", GRANULARITIES),
        weight_grids=some("weight_grids", tuple(g for g in CHOICES["grid"] if g != "auto")),
        dynamic_activations=_read(
            value, "dynamic_activations", where, lambda v: v if isinstance(v, bool) else None, "true or false"
        ),
        runs=_read(value, "runs", where, lambda v: v if isinstance(v, str) else None, "text: what runs it"),
        channel_widths=_read(
            {"channel_widths": "none", **value},
            "channel_widths",
            where,
            lambda v: v if v in CHANNEL_WIDTHS else None,
            listing(CHANNEL_WIDTHS),
        ),
        pairs=pairs,
        shared=shared_from(value.get("shared", []), f"{where}: shared"),
        latency=table("latency"),
        energy=table("energy"),
    )


def _read(value: Mapping[str, Any], key: str, where: str, parse: Callable[[Any], Any], expected: str) -> Any:
    """``parse(value[key])``, which is None for a wrong value."""
    found = parse(value[key]) if key in value else None
    if found is None:
        raise FormatError(
            "a target needs this" if key not in value else "this key of a target is not valid",
            where=f"{where}: {key}",
            got=repr(value[key]) if key in value else None,
            expected=expected,
        )
    return found


def _names(value: Any, choices: tuple[str, ...]) -> tuple[str, ...] | None:
    if not isinstance(value, list) or not value or not all(v in choices for v in value):
        return None
    return tuple(value)


def _containers(value: Any) -> dict[int, int] | None:
    widths = {str(b): b for b in range(1, 9)}
    if not isinstance(value, dict) or not value or not set(value) <= set(widths):
        return None
    for key, held in value.items():
        if isinstance(held, bool) or not isinstance(held, int) or not widths[key] <= held <= FLOAT:
            return None
    return {widths[key]: value[key] for key in sorted(value)}


def _pairs(value: Any) -> tuple[tuple[int, int], ...] | None:
    if not isinstance(value, list) or not value:
        return None
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2 or any(b not in (*range(1, 9), FLOAT) for b in pair):
            return None
    return tuple((int(w), int(a)) for w, a in value)
