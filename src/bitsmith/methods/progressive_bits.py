"""Progressive bits: from 8 bits down to the wanted width through fractional ones (FraQAT, 2510.14823).

    bits    8  7  6  5.5  5  4.75  4.5  4.25  4
    epochs  1  1  1  1    1  2     2     2    14      the paper's table 4

Each precision starts where the one before left the weights, so that no step is a large one. The model is
prepared at the widths that it shall end at; this method starts every site wider and moves them all alike. A
width b has the levels -floor(2^(b-1)) .. floor(2^(b-1)) - 1 (numerics.grid).

Differences from the paper. (1) Shares of the steps instead of epochs. (2) It recomputes the range max|W| in
every forward; here scales are whatever the scheme says (learned by default), and a step down hands over what
was learned: the range, so that new = old * high(old) / high(new), or the factor on what the calibration of
the new width says; after which ``scale_steps`` steps train scales alone. (3) It ends at
4 bits; for 3 and 2 the table goes on in the same steps of a quarter of a bit. (4) Its loss is the distance to
the float model's output alone: that is ``train.distillation: 1``, for any method.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from bitsmith.errors import SchemeError, check_choice, check_value
from bitsmith.methods.method import Closure, Method, is_number
from bitsmith.quantization import Plan, plan_of, set_bits, sites
from bitsmith.quantization.candidates import KINDS, free_sites
from bitsmith.quantization.fractional import Stepped

PAPER = ((8, 1), (7, 1), (6, 1), (5.5, 1), (5, 1), (4.75, 2), (4.5, 2), (4.25, 2))  # bits, epochs
BELOW = ((4, 2), (3.75, 2), (3.5, 2), (3.25, 2), (3, 2), (2.75, 2), (2.5, 2), (2.25, 2), (2, 2), (1.5, 2))
ON_THE_WAY = 11 / 25  # of the steps that the paper's table spends above 4 bits


class ProgressiveBits(Method):
    """All sites step down together to the widths that the model was prepared at.

    schedule: (bits, share of the steps) of each precision on the way, falling; a site passes those above its
    own width, and has that for the rest of the steps. By default the paper's table. sites: globs; by default
    all whose width was not asked for by name. tensors: weights (activations stay as they are, as in the
    paper), activations or both. hand_over: what a scale keeps at a step down, its learned "factor" on the
    calibration or its "range". scale_steps: steps after each step down in which scales train alone.

    Raises SchemeError for a schedule that rises or takes more than all steps, SiteError where no site is
    free.
    """

    stage: Tensor
    settling: Tensor

    def __init__(
        self,
        *,
        schedule: Sequence[Sequence[float]] | None = None,
        sites: Sequence[str] | None = None,
        tensors: str = "weights",
        hand_over: str = "factor",
        scale_steps: int = 0,
    ) -> None:
        super().__init__()
        check_choice("progressive_bits.tensors", tensors, tuple(KINDS))
        check_choice("progressive_bits.hand_over", hand_over, ("factor", "range"))
        self.keep_range = hand_over == "range"
        self.schedule = None if schedule is None else [(float(b), float(s)) for b, s in _pairs(schedule)]
        self.wanted, self.kinds, self.scale_steps = sites, KINDS[tensors], scale_steps
        _check(self.schedule, scale_steps)
        self.register_buffer("stage", torch.tensor(0.0))
        self.register_buffer("settling", torch.tensor(0.0))

    def attach(self, model: nn.Module) -> None:
        """Start the sites at the first precision of the schedule."""
        self.models, quantizers = [model], sites(model)
        names = free_sites(model, self.wanted, "progressive_bits")
        names = [name for name in names if quantizers[name].kind in self.kinds]
        self.goals: dict[str, int] = {}
        for name in names:
            goal = quantizers[name].bits.whole()
            if not isinstance(goal, int):
                raise SchemeError(
                    "a site with a width per channel cannot step down as a whole",
                    where=f"progressive_bits.sites: {name}",
                    remedy="Give it one width, or leave it out",
                )
            self.goals[name] = goal
        low = min(self.goals.values())
        if self.schedule is None:
            self.schedule = paper_schedule(low)
        self.passed = [(b, share) for b, share in self.schedule if b > low]
        above = [b for b, _ in self.passed]
        self.stops = {name: [*(b for b in above if b > goal), goal] for name, goal in self.goals.items()}
        set_bits(model, {name: Stepped(stops) for name, stops in self.stops.items()})
        self._ranges = {id(p) for name in names for p in quantizers[name].parameters()}

    def after_backward(self, closure: Closure) -> None:
        """While scales settle, nothing else moves."""
        if self.settling > 0:
            for parameter in self.models[0].parameters():
                if id(parameter) not in self._ranges:
                    parameter.grad = None

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Step down where the schedule says so."""
        self.settling.sub_(1).clamp_(min=0)
        ends = [round(share * steps) for share in accumulate(share for _, share in self.passed)]
        stage = bisect_right(ends, step + 1)
        if stage != int(self.stage):
            self._step(stage)
            self.settling.fill_(self.scale_steps)

    def plan(self) -> Plan | None:
        """The widths that the model was prepared at, once they are reached."""
        return plan_of(self.models[0]) if self.stage >= len(self.passed) else None

    def scalars(self) -> dict[str, Tensor]:
        """The width of the precision at which most sites are."""
        stage = int(self.stage)
        bits = self.passed[stage][0] if stage < len(self.passed) else float(min(self.goals.values()))
        return {"bits": torch.tensor(bits)}

    def _step(self, stage: int) -> None:
        """Move every site to the precision of a stage, or to its goal where that is not below."""
        quantizers = sites(self.models[0])
        for name, stops in self.stops.items():
            quantizer, row = quantizers[name], min(stage, len(stops) - 1)
            now = int(quantizer.bits.rows)
            if row != now:
                quantizer.hand_over(now, row, keep_range=self.keep_range)
                quantizer.bits.rows.fill_(row)
        self.stage.fill_(stage)


def paper_schedule(goal: int) -> list[tuple[float, float]]:
    """(bits, share of the steps) above ``goal`` bits: FraQAT's table, continued below 4 bits."""
    rows = [(float(b), epochs) for b, epochs in (*PAPER, *BELOW) if b > goal]
    total = sum(epochs for _, epochs in rows)
    return [(b, ON_THE_WAY * epochs / total) for b, epochs in rows]


def _pairs(schedule: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
    for i, entry in enumerate(schedule):
        pair = isinstance(entry, Sequence) and len(entry) == 2 and all(is_number(n) for n in entry)
        check_value(
            f"progressive_bits.schedule.{i}", entry, pair, "bits and a share of the steps: [5.5, 0.04]"
        )
    return schedule


def _check(schedule: Sequence[tuple[float, float]] | None, scale_steps: int) -> None:
    count = isinstance(scale_steps, int) and not isinstance(scale_steps, bool) and scale_steps >= 0
    check_value("progressive_bits.scale_steps", scale_steps, count, "a whole number from 0 on")
    if schedule is None:
        return
    for i, (bits, share) in enumerate(schedule):
        where = f"progressive_bits.schedule.{i}"
        check_value(where, [bits, share], 1 <= bits <= 8, "bits from 1 to 8")
        check_value(where, [bits, share], 0 < share < 1, "a share of the steps between 0 and 1")
        if i and bits >= schedule[i - 1][0]:
            raise SchemeError(
                "a schedule goes down",
                where=where,
                got=f"{bits:g} bits after {schedule[i - 1][0]:g}",
                expected="fewer bits than before",
            )
    total = sum(share for _, share in schedule)
    check_value(
        "progressive_bits.schedule", f"{total:.3g} of the steps in all", total < 1, "less than all steps"
    )
