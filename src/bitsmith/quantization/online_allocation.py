"""online_allocation: widths that are chosen within a budget while a model trains, by errors measured then.

Sites start at the best plan for errors that fall as 4^-b and are alike everywhere, which needs no data. Later
`measure` adds up, on training batches, what each width of each site costs at its layer's output
(sensitivity.output_errors), and `choose` puts the plan of the least sum in play: exactly, greedily or by a
small evolution. Rows that are not in play follow the one that is: what training found for its scale, as a
factor on its calibration, is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bitsmith.quantization.allocate import allocate
from bitsmith.quantization.allocate_roughly import evolutionary, greedy
from bitsmith.quantization.bits import Allocated, FixedBits
from bitsmith.quantization.budget import Budget, BudgetCost
from bitsmith.quantization.candidates import free_sites, site_candidates
from bitsmith.quantization.cost import measure
from bitsmith.quantization.layers import layer_operands, weights_of
from bitsmith.quantization.plan import Plan, plan_of, set_bits
from bitsmith.quantization.quantizer import sites
from bitsmith.quantization.sensitivity import after_training, output_errors

ALLOCATIONS = ("exact", "greedy", "evolutionary")
ROWS = 16  # samples of a batch that errors are measured on


class OnlineAllocation(nn.Module):
    """The widths of all free sites of ``model``, which it takes over.

    example: a batch, from which costs are counted. candidates: of each free site. share_widths: one width for
    both operands of a layer. where: the method, for messages.

    Raises BudgetError where no plan meets the budget, SchemeError for candidates that the target does not
    hold, SiteError where no site is free.
    """

    errors: Tensor
    batches: Tensor

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        example: Any,
        *,
        candidates: Sequence[int],
        allocation: str,
        share_widths: bool,
        seed: int,
        where: str,
    ) -> None:
        super().__init__()
        self.models, self.allocation = [model], allocation
        cost = measure(model, example)
        held = site_candidates(model, free_sites(model, None, where), sorted(set(candidates)))
        self.cost = BudgetCost(cost, budget, held)
        free = set(self.cost.sites)
        pairs = [[operand.site for operand in layer] for layer in layer_operands(model)]
        self.shared = [pair for pair in pairs if share_widths and free.issuperset(pair)]
        self.generator = torch.Generator().manual_seed(seed)
        start = self._best({name: [-(4.0**-b) for b in held[name]] for name in self.cost.sites}, "exact")
        self.widths = {name: Allocated(start[name], held[name]) for name in self.cost.sites}
        single = {name: FixedBits(widths[0]) for name, widths in held.items() if len(widths) == 1}
        set_bits(model, {**self.widths, **single})
        self.register_buffer("errors", torch.zeros(len(self.widths), self.cost.width))
        self.register_buffer("batches", torch.tensor(0.0))

    @torch.no_grad()
    def measure(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """Add the errors of all widths on the first rows of a batch of the model's inputs."""
        self._follow()
        arguments, keywords = tree_map(_first_rows, (arguments, dict(keywords)))
        found = output_errors(self.models[0], *arguments, **keywords)
        for own, name in zip(self.errors, self.widths, strict=True):
            own[: len(found[name])] += found[name]
        self.batches += 1

    @torch.no_grad()
    def choose(self) -> None:
        """Put the best plan for the errors measured in play, and begin to count anew."""
        parts = zip(self.widths.items(), self.errors / self.batches, strict=True)
        scores = {name: own[: len(width.candidates)] for (name, width), own in parts}
        fit = after_training(scores, weights_of(self.models[0]))
        best = self._best({name: (-score).tolist() for name, score in fit.items()}, self.allocation)
        self._follow()
        for name, width in self.widths.items():
            width.commit(best[name])
        self.errors.zero_()
        self.batches.zero_()

    def plan(self) -> Plan:
        """The plan in play."""
        plan = plan_of(self.models[0])
        used = self.cost.exact(plan.bits)
        limits = zip(self.cost.kinds, self.cost.limits.tolist(), strict=True)
        budget = {kind: {"limit": limit, "used": used[kind]} for kind, limit in limits}
        return Plan(plan.sites, plan.target, plan.cost, budget)

    def mean_bits(self) -> Tensor:
        """Mean width of the sites, a scalar."""
        return torch.stack([width.expected() for width in self.widths.values()]).mean()

    def get_extra_state(self) -> Tensor:
        """The state of the generator of the evolution."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on where ``get_extra_state`` was taken."""
        self.generator.set_state(state.cpu())

    def _best(self, value: Mapping[str, Sequence[float]], allocation: str) -> dict[str, Any]:
        """The widths of the greatest value within the budget."""
        if allocation == "greedy":
            return greedy(self.cost, value, shared=self.shared).bits
        if allocation == "evolutionary":
            return evolutionary(self.cost, value, shared=self.shared, generator=self.generator).bits
        return allocate(self.cost, value, shared=self.shared).bits

    def _follow(self) -> None:
        """Give every row the learned factor of the one in play."""
        quantizers = sites(self.models[0])
        for name, width in self.widths.items():
            now = int(width.rows)
            for row in range(len(width.candidates)):
                if row != now:
                    quantizers[name].hand_over(now, row, keep_range=False)


def _first_rows(value: Any) -> Any:
    return value[:ROWS] if isinstance(value, Tensor) and value.ndim else value
