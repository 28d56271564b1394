"""Targets: where the model will run, and what that place stores exactly.

A target is chosen before training, because it owns the grid: what it cannot hold is refused at `prepare`,
not found out at export. Containers say how many bits a code of b bits takes in the target's file.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitsmith.errors import TargetError, listing, nearest
from bitsmith.quantization.cost_table import CostTable, Shared
from bitsmith.quantization.scheme import FLOAT, Scheme


@dataclass(frozen=True)
class Target:
    """What a runtime stores and computes.

    weight_containers      bits of a code -> bits that it takes in the file
    weight_granularities, activation_granularities, grids, activation_ranges: what it can hold
    runs                   what runs the file, for people
    pairs                  (weight, activation) widths that it can multiply; None: all. A float operand is no
                           matter of the target's
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
    pairs: tuple[tuple[int, int], ...] | None = None
    shared: Shared = ()
    latency: CostTable | None = None
    energy: CostTable | None = None

    def multiplies(self, first: int, second: int) -> bool:
        """Whether it has a product of operands of these widths (of a MatMul, left and right)."""
        return self.pairs is None or FLOAT in (first, second) or (first, second) in self.pairs

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
        if kind == "weight" and scheme.bits not in self.weight_containers:
            raise TargetError(
                f"target {self.name} stores no such width",
                where=f"{site}.bits",
                got=scheme.bits,
                expected=listing(str(b) for b in self.weight_containers),
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
        if self.name == "onnxruntime" and scheme.granularity == "group" and not layer.endswith("Linear"):
            raise TargetError(
                "target onnxruntime holds groups in the weights of Linear layers only",
                where=f"{site}.granularity",
                got="group",
                expected="channel or tensor",
            )


TRUE_SIZE = {bits: bits for bits in range(1, 9)}

TARGETS: dict[str, Target] = {
    "native": Target(
        name="native",
        weight_containers=TRUE_SIZE,
        weight_granularities=("tensor", "channel", "group"),
        activation_granularities=("tensor", "channel", "group", "token"),
        weight_grids=("symmetric", "balanced", "seq", "unsigned", "asymmetric"),
        dynamic_activations=True,
        runs="Bitsmith itself, on any machine with PyTorch",
    ),
    "onnxruntime": Target(
        name="onnxruntime",
        # ONNX has INT2, INT4 and INT8 and nothing between (opset 25); see docs/targets.md.
        weight_containers={1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8},
        weight_granularities=("tensor", "channel", "group"),
        activation_granularities=("tensor",),
        weight_grids=("symmetric", "balanced", "seq"),
        dynamic_activations=False,
        runs="ONNX Runtime; weights packed in the file, products in float",
    ),
    "research": Target(
        name="research",
        weight_containers=TRUE_SIZE,
        weight_granularities=("tensor", "channel", "group"),
        activation_granularities=("tensor", "channel", "group", "token"),
        weight_grids=("symmetric", "balanced", "seq", "unsigned", "asymmetric"),
        dynamic_activations=True,
        runs="no runtime: figures only",
    ),
}


def get_target(name: str | Target) -> Target:
    """The built-in target of this name. Raises TargetError with the nearest names."""
    if isinstance(name, Target):
        return name
    if name not in TARGETS:
        close = nearest(name, TARGETS, 1)
        raise TargetError(
            "no such target",
            where="target",
            got=name,
            expected=listing(TARGETS),
            remedy=f"Did you mean {close[0]}?" if close else "",
        )
    return TARGETS[name]
