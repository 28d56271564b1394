"""Fractional bits: the bit-width of every tensor, channel or group is a real number that trains (FraQAT).

    min over weights W, scales s and widths b of  loss(W, s, b) + lambda * sum over k of f(b_k)

or, with a target ("4.2 bits on average"), lambda from the multipliers that hold a budget search's budget,
here on both sides. Widths start wide, and the target falls to where it is wanted over the first part of the
run, so that weights meet every precision on the way. Then the widths are rounded, scales that never were in
play are found anew, and the rest of the steps trains at exactly the plan. How they are rounded is
quantization.whole_widths.

Differences from the description. (1) The target falls instead of standing: a constant one winds lambda up
while the widths are on their way. (2) Where one grid is in play, the gradient of a width is that of an error
which halves with each bit (quantization.fractional), at the price of a plain step. 2510.14823 itself has no
learned widths but a schedule: see progressive_bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import SchemeError, check_choice, check_value
from bitsmith.methods.method import Method, is_number
from bitsmith.quantization import Plan, commit, measure, plan_of, set_bits, sites
from bitsmith.quantization.bits import Width
from bitsmith.quantization.candidates import KINDS, free_sites, group_sizes, site_candidates
from bitsmith.quantization.categorical import Categorical, GroupCategorical, draw, scores_of
from bitsmith.quantization.cost_kinds import AVERAGES, average_shares
from bitsmith.quantization.fractional import MODES, Fractional, move, real
from bitsmith.quantization.layers import weights_of
from bitsmith.quantization.multipliers import Multipliers
from bitsmith.quantization.rows import observe_weight
from bitsmith.quantization.target import get_target
from bitsmith.quantization.whole_widths import ROUNDINGS, one_by_one, within_averages

ROUNDING = 1e-4  # bits
FALL = 0.6  # of the steps with real widths, in which a target falls from where the widths start
CERTAIN = 0.9  # probability of the start at the start of a categorical width
CHOICES = {
    "regularizer": ("linear", "quadratic", "size"),
    "tensors": tuple(KINDS),
    "parametrization": ("continuous", "categorical"),
    "mode": MODES,
    "rounding": ("allocate", *ROUNDINGS),
    "recalibrate": ("new", "all", "none"),
}


class FractionalBits(Method):
    """Real bit-widths that train, under a penalty or to a target.

    target: average bits to be hit, a mapping of average_weight_bits and average_activation_bits (over all
    weights, or operands, of the model). Without: ``strength`` times the ``regularizer``: `linear` sum of b,
    `quadratic` of b^2 / 8, `size` of b times the tensor's elements over their mean; channels count by their
    share of the site. bits: (b_min, b_max). start: of all b, a number or "random"; by default b_max. sites:
    globs; by default all whose width was not asked for by name. tensors: both, weights or activations. per:
    "tensor", "channel" (of weights), or a number of groups of channels. parametrization: continuous, or
    categorical: a distribution over whole widths, b its mean. mode: what a forward does, see
    quantization.fractional and categorical. rounding: allocate, nearest, ceil or floor, to what the device
    stores. recalibrate: of the decided rows those never in play ("new"), all or none. learn_share: share of
    the steps with real widths. rate: speed of a width against weights.

    Raises SchemeError for options out of range, TargetError where the device stores no widths per channel,
    SiteError where no site is free, BudgetError for averages out of reach.
    """

    limits: Tensor
    begin: Tensor
    learned: Tensor
    shares: Tensor
    fixed: Tensor
    elements: Tensor
    of_site: Tensor
    target_shares: Tensor
    target_fixed: Tensor
    wanted_bits: Tensor

    def __init__(
        self,
        example: Any,
        *,
        target: Mapping[str, float] | None = None,
        strength: float = 0.0,
        regularizer: str = "size",
        bits: Sequence[int] = (2, 8),
        start: float | str | None = None,
        sites: Sequence[str] | None = None,
        tensors: str = "both",
        per: str | int = "tensor",
        parametrization: str = "continuous",
        mode: str = "mixed",
        rounding: str = "allocate",
        recalibrate: str = "new",
        learn_share: float = 0.5,
        rate: float = 20.0,
        multiplier_rate: float = 0.2,
        damping: float = 5.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        given = locals()
        for name, choices in CHOICES.items():
            check_choice(f"fractional_bits.{name}", given[name], choices)
        self.ends, self.start = tuple(bits), bits[-1] if start is None else start
        self.target = dict(target or {})
        _check_numbers(given, self.ends, self.start, self.target)
        self.example, self.wanted, self.tensors = example, sites, tensors
        self.channel_groups = {"tensor": 1, "channel": 1 << 30}.get(str(per)) or int(per)
        self.strength, self.regularizer = strength, regularizer
        self.parametrization, self.mode, self.rate = parametrization, mode, rate
        self.rounding, self.recalibrate, self.learn_share = rounding, recalibrate, learn_share
        self.multipliers = Multipliers(tuple(self.target), multiplier_rate, damping, two_sided=True)
        self.generator = torch.Generator().manual_seed(seed)

    def attach(self, model: nn.Module) -> None:
        """Make the free sites' widths fractional."""
        self.models, quantizers = [model], sites(model)
        free = free_sites(model, self.wanted, "fractional_bits")
        names = [name for name in free if quantizers[name].kind in KINDS[self.tensors]]
        whole = list(range(self.ends[0], self.ends[1] + 1))
        self.storable = site_candidates(model, names, whole)
        self.groups = group_sizes(model, names, self.channel_groups, "fractional_bits.per")
        self.widths: dict[str, Any] = {n: self._made(whole, self.groups.get(n, ())) for n in names}
        set_bits(model, self.widths)
        self.cost = measure(model, self.example)
        self.counts = [len(self.groups.get(name, ())) or 1 for name in names]

        shares, fixed, elements = average_shares(self.cost, names, self.groups)
        self.register_buffer("shares", shares, persistent=False)  # (2, T): of the averages
        self.register_buffer("fixed", fixed, persistent=False)  # (2,)
        self.register_buffer("elements", elements, persistent=False)  # (T,)
        of_site = torch.cat([torch.full((n,), 1 / n) for n in self.counts])
        self.register_buffer("of_site", of_site, persistent=False)
        targeted = [AVERAGES.index(kind) for kind in self.target]
        self.register_buffer("target_shares", shares[targeted], persistent=False)
        self.register_buffer("target_fixed", fixed[targeted], persistent=False)
        self.register_buffer("wanted_bits", torch.tensor(list(self.target.values())), persistent=False)
        self._check_device(model)
        b = self.real().detach()
        self.register_buffer("learned", b.clone())
        self.register_buffer("begin", self._targeted(b))
        self.register_buffer("limits", self.begin.clone())
        if self.target:
            self._rounded(b)  # a target out of reach is found out now
        self._move()

    def real(self) -> Tensor:
        """b of all sites and their groups, (T,), differentiable; what was learned, once it is decided."""
        widths = list(self.widths.values())
        if not self.is_learning():
            return self.learned
        if self.parametrization == "continuous":
            return real(widths)
        return torch.softmax(scores_of(widths, widths[0].temperature, 0.0), 1) @ widths[0].candidates

    def learned_bits(self) -> dict[str, list[float]]:
        """Site -> its real width, or those of its groups."""
        return self._by_site(self.real().detach())

    def averages(self, b: Tensor) -> Tensor:
        """average_weight_bits and average_activation_bits of the model, (2,)."""
        return torch.addmv(self.fixed, self.shares, b)

    def is_learning(self) -> bool:
        """Widths are real numbers still."""
        return not next(iter(self.widths.values()))._is_decided

    def penalty(self) -> Tensor:
        """The regularizer, or what holds the averages at their targets; 0 once the widths are decided."""
        if not self.is_learning():
            return torch.zeros(())
        b = self.real()
        if self.target:
            used = self._targeted(b) / self.limits
            return self.multipliers.pressure(used) @ used.log()
        if self.regularizer == "size":
            return self.strength * (self.elements @ b) * (len(self.widths) / self.elements.sum())
        return self.strength * (self.of_site @ (b if self.regularizer == "linear" else b.square() / 8))

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Keep widths within their ends, lower the target, draw; decide at the end of the learning."""
        if not self.is_learning():
            return
        learning = max(1, round(self.learn_share * steps))
        if self.target:
            self.multipliers.advance()
            fall = (step + 1) / (FALL * learning)
            if fall <= 1:
                self.limits.copy_(self.begin * (self.wanted_bits / self.begin) ** fall)
            else:
                self.limits.copy_(self.wanted_bits)
        self._move()
        if step + 1 >= learning:
            self.learned.copy_(self.real())
            self._decide(self.plan().bits)

    @torch.no_grad()
    def plan(self) -> Plan:
        """The rounded plan; what was decided, once it is."""
        if not self.is_learning():
            return plan_of(self.models[0])
        b = self.real()
        return plan_of(self.models[0], bits=self._rounded(b))

    def scalars(self) -> dict[str, Tensor]:
        """The averages, what holds them, and the mean width of every site ("bits.SITE")."""
        b = self.real().detach()
        found = dict(zip(AVERAGES, self.averages(b), strict=True)) | self.multipliers.scalars()
        by_site = (part.mean() for part in b.split(self.counts))
        return found | {f"bits.{name}": mean for name, mean in zip(self.widths, by_site, strict=True)}

    def traces(self) -> dict[str, Tensor]:
        """The scalars, while the widths are learned."""
        return self.scalars() if self.is_learning() else {}

    def get_extra_state(self) -> Tensor:
        """The state of the generator of draws."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on drawing where ``get_extra_state`` was taken."""
        self.generator.set_state(state.cpu())

    # ---- inside

    def _targeted(self, b: Tensor) -> Tensor:
        """Of the averages those that have a target."""
        return torch.addmv(self.target_fixed, self.target_shares, b)

    def _made(self, whole: list[int], sizes: Sequence[int]) -> Fractional | Categorical:
        """A width that starts where it was asked for."""
        groups = max(len(sizes), 1)
        if self.start == "random":
            low, high = self.ends
            start = low + (high - low) * torch.rand(groups, generator=self.generator)
        else:
            start = torch.full((groups,), float(self.start))
        if self.parametrization == "continuous":
            return Fractional(whole, start, sizes=sizes, mode=self.mode, rate=self.rate)
        width = (
            GroupCategorical(whole, sizes, self.mode, self.rate)
            if sizes
            else Categorical(whole, self.mode, self.rate)
        )
        distance = (torch.tensor(whole) - start.unsqueeze(1)).abs().clamp(max=1)
        p = CERTAIN * (1 - distance) + (1 - CERTAIN) / len(whole)
        width.logits.data.copy_((p.log() / self.rate).view(width.logits.shape))
        return width

    def _move(self) -> None:
        widths = list(self.widths.values())
        columns = 1 if self.parametrization == "continuous" else len(widths[0].candidates)
        noise = torch.rand(len(self.learned), columns, generator=self.generator).to(self.learned.device)
        if self.parametrization == "continuous":
            move(widths, noise.squeeze(1))
        else:
            draw(widths, -noise.log(), widths[0].temperature, 0.0)

    def _rounded(self, b: Tensor) -> dict[str, Width]:
        """The whole widths of b (T,), within the targets or where the averages are."""
        by_site = self._by_site(b)
        if self.rounding != "allocate":
            return one_by_one(by_site, self.storable, self.groups, self.rounding)
        now = dict(zip(AVERAGES, self.averages(b).tolist(), strict=True))
        # Where all are at b_min the average in float32 may come out below what these widths cost.
        limits = {kind: self.target.get(kind, now[kind] + ROUNDING) for kind in self._learned_kinds()}
        elements = self._by_site(self.elements)
        return within_averages(self.cost, by_site, elements, limits, self.storable, self.groups)

    def _by_site(self, numbers: Tensor) -> dict[str, list[float]]:
        """(T,) -> site -> its own."""
        parts = numbers.split(self.counts)
        return {name: part.tolist() for name, part in zip(self.widths, parts, strict=True)}

    def _learned_kinds(self) -> list[str]:
        """The averages that have a part in what is learned."""
        return [kind for kind, shares in zip(AVERAGES, self.shares, strict=True) if bool(shares.any())]

    def _decide(self, bits: Mapping[str, Width]) -> None:
        """Fix the widths, and find scales for those rows that training did not."""
        model, quantizers = self.models[0], sites(self.models[0])
        weights = weights_of(model)
        before = {name: int(quantizers[name].bits.rows.flatten()[0]) for name in self.widths}
        commit(model, bits)
        for name in self.widths if self.recalibrate != "none" else ():
            quantizer = quantizers[name]
            for row in quantizer.bits.rows[0].unique().tolist():
                trained = bool(quantizer.range[row].any())
                if name in weights and (self.recalibrate == "all" or not trained):
                    quantizer.calibrate(*observe_weight(quantizer, weights[name]), row)
                elif name not in weights and not trained and quantizer.range.requires_grad:
                    quantizer.hand_over(before[name], row, keep_range=True)

    def _check_device(self, model: nn.Module) -> None:
        device = get_target(getattr(model, "bitsmith_target", "native"))
        free = self.rounding == "allocate" or not (device.pairs or device.shared)
        why = f"allocate: on target {device.name} the width of one site binds that of another"
        check_value("fractional_bits.rounding", self.rounding, free, why)
        for kind, bits in self.target.items():
            held = kind in self._learned_kinds()
            why = "no such target, as no site of this kind is free"
            check_value(f"fractional_bits.target.{kind}", bits, held, why)


def _check_numbers(
    given: Mapping[str, Any], ends: tuple[int, ...], start: float | str, target: Mapping[str, float]
) -> None:
    """Refuse numbers out of range. Raises SchemeError."""

    def check(name: str, value: Any, holds: bool, expected: str) -> None:
        check_value(f"fractional_bits.{name}", value, holds, expected)

    whole = len(ends) == 2 and all(isinstance(b, int) and 1 <= b <= 8 for b in ends)
    check("bits", list(ends), whole and ends[0] < ends[1], "two whole numbers from 1 to 8, the smaller first")
    inside = is_number(start) and ends[0] <= float(start) <= ends[1]
    check("start", start, start == "random" or inside, f"random, or a number from {ends[0]} to {ends[1]}")
    per = given["per"]
    check(
        "per",
        per,
        per in ("tensor", "channel") or (isinstance(per, int) and per >= 1 and not isinstance(per, bool)),
        "tensor, channel, or a number of groups of channels",
    )
    for kind, value in target.items():
        check_choice("fractional_bits.target", kind, AVERAGES)
        holds = is_number(value) and 1 <= value <= 8
        check(f"target.{kind}", value, holds, "bits from 1 to 8")
    strength = given["strength"]
    check("strength", strength, is_number(strength) and 0 <= strength < math.inf, "a number of at least 0")
    share = given["learn_share"]
    check("learn_share", share, is_number(share) and 0 < share <= 1, "a share of the steps above 0, up to 1")
    for name in ("rate", "multiplier_rate"):
        check(name, given[name], is_number(given[name]) and given[name] > 0, "a number above 0")
    check("damping", given["damping"], is_number(given["damping"]) and given["damping"] >= 0, "a number >= 0")
    if not target and not strength:
        raise SchemeError(
            "nothing makes the widths smaller",
            where="fractional_bits",
            expected="a target, such as {average_weight_bits: 4}, or a strength above 0",
        )
    if target and strength:
        raise SchemeError(
            "a target and a strength are two ways of the same",
            where="fractional_bits",
            got=f"target {dict(target)} and strength {strength}",
            remedy="Leave out one of them",
        )
