"""Budget search: training decides the bits, under a hard budget (Compute-Optimal QAT, 2509.22935).

    min over weights W and logits a of  loss(W, p(a))  subject to  cost(p(a)) <= budget,   p = softmax(a / t)

One run: for `search_share` of the steps W and a train together, then the widths are decided and the rest of
the steps trains W at exactly these. Every site draws one width per step (`sampled`), so that a step costs
about one of fixed-width training for any number of candidates; the logits' gradient is <g, Q_k(x) - x> for
the width k that was drawn, times that of log p_k.

The budget is held by an augmented Lagrangian (quantization.multipliers) on the log of cost / limit. Cost is
the exact expectation, free of sampling noise, so that its multipliers are equal on all ranks. What is decided
in the end is not the argmax: `allocate` finds the most likely plan that the budget allows, so it is never
exceeded.

Differences from the paper's description. (1) The search is short: each undecided step trains weights for
widths that they will not have. (2) So it starts from what one backward per batch knows (`start_at`, from
quantization.sensitivity), not from uniform logits. `search_share: 1.0` without `start_at` is the
description's own loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import SchemeError, check_choice, check_value, listing
from bitsmith.methods.method import Method
from bitsmith.quantization import Plan, commit, measure, plan_of, set_bits, sites
from bitsmith.quantization.allocate import allocate
from bitsmith.quantization.bits import FixedBits, Width
from bitsmith.quantization.budget import Budget, BudgetCost
from bitsmith.quantization.candidates import free_sites, group_sizes, site_candidates
from bitsmith.quantization.categorical import MODES, Categorical, GroupCategorical, draw, scores_of
from bitsmith.quantization.multipliers import Multipliers
from bitsmith.quantization.scheme import FLOAT

FILL = 0.98  # of what the dearest plan uses: bits that the budget pays for are not left unused


class BudgetSearch(Method):
    """Bits of all free sites under a hard budget, learned while training.

    budget: what the plan may cost (`Budget`, or a mapping of its fields); several are held at once.
    example: a batch, from which the cost is counted. candidates: widths of every free site, 32 to leave it
    in float; those are left out that the target does not hold. sites: globs of the sites to search; by
    default all whose width was not asked for by name (first and last layer, overrides with bits).
    channel_groups: groups of consecutive output channels that a weight is searched in, each with a width of
    its own. mode: see `Categorical`.
    search_share: share of the steps that search. temperature: at the first and the last step of the search.
    multiplier_rate (eta), damping (rho): of the Lagrangian. logit_rate: speed of logits against weights.

    Raises BudgetError where no plan meets the budget, SchemeError for bad candidates or weights without a
    scale per channel to be searched in groups, TargetError where the target holds no widths per channel,
    SiteError for a glob that matches nothing or where no site is free.
    """

    temperature: Tensor
    padding: Tensor

    def __init__(
        self,
        budget: Budget | Mapping[str, Any],
        example: Any,
        *,
        candidates: Sequence[int] = (1, 2, 3, 4, 6, 8),
        sites: Sequence[str] | None = None,
        channel_groups: int = 1,
        mode: str = "sampled",
        search_share: float = 0.1,
        temperature: tuple[float, float] = (1.0, 0.3),
        multiplier_rate: float = 0.2,
        damping: float = 2.0,
        logit_rate: float = 20.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.budget = budget if isinstance(budget, Budget) else Budget.from_dict(budget, "budget")
        self.example, self.candidates = example, _checked(candidates)
        self.wanted, self.mode, self.logit_rate = sites, mode, logit_rate
        self.channel_groups = channel_groups
        _check_options(mode, channel_groups, search_share, temperature, multiplier_rate, damping, logit_rate)
        if FLOAT in self.candidates:
            _check_float(mode, channel_groups)
        self.search_share, self.temperatures = search_share, temperature
        self.multiplier_rate, self.damping = multiplier_rate, damping
        self.register_buffer("temperature", torch.tensor(float(temperature[0])))
        self.generator = torch.Generator().manual_seed(seed)

    def attach(self, model: nn.Module) -> None:
        """Make the free sites' widths categorical."""
        self.models = [model]
        cost = measure(model, self.example)
        free = free_sites(model, self.wanted, "budget_search")
        candidates = site_candidates(model, free, self.candidates)
        several = [name for name, widths in candidates.items() if len(widths) > 1]
        if not several:
            raise SchemeError(
                "no site is left with two widths to choose from",
                where="budget_search.candidates",
                got=listing(map(str, self.candidates)),
                remedy="Add widths that grids and target hold",
            )
        groups = group_sizes(model, several, self.channel_groups, "budget_search.channel_groups")
        self.cost = BudgetCost(cost, self.budget, candidates, groups)
        self.widths: dict[str, Categorical] = {}
        for name, widths in candidates.items():
            if name in self.cost.groups:
                self.widths[name] = GroupCategorical(widths, groups[name], self.mode, self.logit_rate)
            elif len(widths) > 1:
                self.widths[name] = Categorical(widths, self.mode, self.logit_rate)
        single = {name: FixedBits(widths[0]) for name, widths in candidates.items() if len(widths) == 1}
        set_bits(model, {**self.widths, **single})
        allocate(self.cost, self._values())  # an impossible budget is found out now
        counts = [len(self.cost.candidates[name]) for name in self.cost.sites]
        padding = torch.tensor([[0.0] * n + [-math.inf] * (self.cost.width - n) for n in counts])
        self.register_buffer("padding", padding)
        self.multipliers = Multipliers(self.cost.kinds, self.multiplier_rate, self.damping)

    @torch.no_grad()
    def start_at(self, values: Mapping[str, Tensor], confidence: float = 0.9) -> None:
        """Start from ``values`` of all candidates (site -> (K,), or of each channel (K, C); larger is better,
        e.g. minus a sensitivity): the best plan of the budget has the probability ``confidence`` at every
        site, the others share the rest in the order of their values."""
        worth = {n: v for site in self.widths for n, v in self._by_group(site, values[site])}
        best = allocate(self.cost, {name: v.tolist() for name, v in worth.items()}, fill=FILL)
        logits = [row for width in self.widths.values() for row in width.logits_by_group()]
        for own, (name, value) in zip(logits, worth.items(), strict=True):
            chosen = self.cost.candidates[name].index(best.choices[name])
            gaps = (value - value[chosen]).abs()
            gaps = gaps / gaps[gaps > 0].median() if bool((gaps > 0).any()) else gaps
            others = torch.softmax(torch.where(torch.arange(len(gaps)) == chosen, -math.inf, -gaps), 0)
            p = (1 - confidence) * others
            p[chosen] = confidence
            own.copy_(p.clamp(min=1e-3).log() / self.logit_rate)
            own.sub_(own.mean())
        self._draw()

    def _by_group(self, site: str, value: Tensor) -> list[tuple[str, Tensor]]:
        """(name, (K,)) of the site, or of each of its groups: the sum over its channels."""
        names, sizes = self.cost.names(site), self.cost.groups.get(site, ())
        if value.ndim > 1:
            value = value.sum(1) if not sizes else value
        elif sizes:  # of the whole tensor: each channel its even share
            value = value.unsqueeze(1).expand(-1, sum(sizes)) / sum(sizes)
        parts = value.split(list(sizes), 1) if sizes else ()
        return [(n, part.sum(1)) for n, part in zip(names, parts, strict=True)] if sizes else [(site, value)]

    def is_searching(self) -> bool:
        """Widths are not decided yet."""
        return not next(iter(self.widths.values()))._is_decided

    def probabilities(self) -> Tensor:
        """(sites, K) padded with zeros, free of noise, differentiable."""
        return torch.softmax(scores_of(list(self.widths.values()), self.temperature, self.padding), 1)

    def penalty(self) -> Tensor:
        """[lambda + rho g]_+ g summed over the budgets; 0 once the widths are decided."""
        if not self.is_searching():
            return torch.zeros(())
        used = self.cost.used(self.probabilities())
        return self.multipliers.pressure(used) @ used.log()

    def scalars(self) -> dict[str, Tensor]:
        """Expected costs over their limits, multipliers, temperature and entropy."""
        entropy = _entropy(self.probabilities().detach(), self.padding)
        return {"entropy": entropy, **super().scalars(), **self.multipliers.scalars()}

    def traces(self) -> dict[str, Tensor]:
        """The scalars, while the search lasts."""
        return self.scalars() if self.is_searching() else {}

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Move the multipliers, cool down, draw the next widths; decide at the end of the search."""
        if not self.is_searching():
            return
        self.multipliers.advance()
        search_steps = max(1, round(self.search_share * steps))
        first, last = self.temperatures
        progress = min(1.0, (step + 1) / search_steps)
        self.temperature.fill_(first * (last / first) ** progress)
        if step + 1 >= search_steps:
            commit(self.models[0], self.plan())
        else:
            self._draw()

    @torch.no_grad()
    def plan(self) -> Plan:
        """The most likely plan within the budget; what was decided, once it is."""
        bits: dict[str, Width]
        if self.is_searching():
            bits = allocate(self.cost, self._values(), fill=FILL).bits
        else:
            bits = {name: q.bits.whole() for name, q in sites(self.models[0]).items()}
        plan = plan_of(self.models[0], bits=bits)
        exact = self.cost.exact(bits)
        limits = dict(zip(self.cost.kinds, self.cost.limits.tolist(), strict=True))
        budget = {kind: {"limit": limits[kind], "used": exact[kind]} for kind in self.cost.kinds}
        return Plan(plan.sites, plan.target, plan.cost, budget)

    def _values(self) -> dict[str, list[float]]:
        """Log-probabilities of all candidates."""
        found: dict[str, list[float]] = {}
        for site, width in self.widths.items():
            values = width.probabilities().detach().clamp(min=1e-12).log()
            found.update(zip(self.cost.names(site), values.view(-1, values.shape[-1]).tolist(), strict=True))
        return found

    def _draw(self) -> None:
        noise = torch.empty(self.padding.shape).exponential_(generator=self.generator)
        noise = noise.to(self.padding.device)
        draw(list(self.widths.values()), noise, self.temperature, self.padding)

    def get_extra_state(self) -> Tensor:
        """The state of the generator of draws."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on drawing where ``get_extra_state`` was taken."""
        self.generator.set_state(state.cpu())


def _checked(candidates: Any) -> list[int]:
    if isinstance(candidates, str) or not isinstance(candidates, Sequence):
        candidates = [candidates]
    for bits in candidates:
        if isinstance(bits, bool) or not isinstance(bits, int) or bits not in (*range(1, 9), FLOAT):
            raise SchemeError(
                "this is not a width",
                where="budget_search.candidates",
                got=bits,
                expected="whole numbers of bits from 1 to 8, or 32 to leave a site in float",
                remedy="Drop it from the list, as in [2, 4, 8, 32]",
            )
    if len(set(candidates)) < 2:
        raise SchemeError(
            "one width leaves nothing to search",
            where="budget_search.candidates",
            got=listing(map(str, candidates)),
            expected="at least two widths",
        )
    return sorted(set(candidates))


def _check_options(
    mode: str,
    channel_groups: int,
    search_share: float,
    temperature: Sequence[float],
    multiplier_rate: float,
    damping: float,
    logit_rate: float,
) -> None:
    check_choice("budget_search.mode", mode, MODES)
    checks = (
        ("channel_groups", channel_groups, _is_count(channel_groups), "a whole number from 1 on"),
        ("search_share", search_share, 0 < search_share <= 1, "a share of the steps above 0, up to 1"),
        (
            "temperature",
            listing(map(str, temperature)),
            len(temperature) == 2 and 0 < temperature[1] <= temperature[0],
            "two numbers above 0, the first and a smaller last one",
        ),
        ("multiplier_rate", multiplier_rate, multiplier_rate > 0, "a number above 0"),
        ("damping", damping, damping >= 0, "a number >= 0"),
        ("logit_rate", logit_rate, logit_rate > 0, "a number above 0"),
    )
    for name, value, holds, expected in checks:
        check_value(f"budget_search.{name}", value, holds, expected)


def _check_float(mode: str, channel_groups: int) -> None:
    """What cannot be searched with 32 among the candidates."""
    checks = (
        ("mode", mode, mode != "real", "sampled or mixed: between 8 bits and float there is no grid"),
        ("channel_groups", channel_groups, channel_groups == 1, "1: a weight is in float as a whole"),
    )
    for name, value, holds, expected in checks:
        if not holds:
            raise SchemeError(
                "this does not go with 32 among the candidates",
                where=f"budget_search.{name}",
                got=value,
                expected=expected,
                remedy="Change it, or leave 32 out of the candidates",
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _entropy(p: Tensor, padding: Tensor) -> Tensor:
    """Mean entropy of the sites as a share of a uniform distribution's."""
    count = torch.isfinite(padding).sum(1)
    nats = -(p * p.clamp(min=1e-12).log()).sum(1)
    return (nats / count.clamp(min=2).log()).mean()
