"""Output approximation: what a layer puts out is an objective of training (LoaQ's aim, 2509.06297).

    L = L_task + lambda * sum over l of  error(a_l, reference_l)

a_l is the tensor at an activation site: the output of what comes before it, at its consumer. Where a layer
has its weight alone quantized, a_l is that layer's output; or it is a block's, its residual addition
included.

    against self     reference = Q(a_l), detached with its range: activations are pulled to their grid. Of a
                     layer with its weight alone quantized, a_l = W x is pulled to Q(W) x, in W
    against teacher  Q(a_l) is pulled to the same tensor in the float model that was prepared

The error of a sample is relative to the sample's own mean square, so that no layer drowns the rest and
lambda means the same for each: numerics.output_error. quantization.site_terms adds it where the activation
is.

With a budget the method decides the widths, too (quantization.online_allocation): plain training at a plan
that needs no data, then the best plan for the errors at the layers' outputs, measured on a few training
batches; where asked for, again from time to time; the rest of the steps trains at a fixed plan.

Differences from the description. (1) Its literal loss, nothing detached, trains no activation: inside the
range d(a - Q(a)) / da = 1 - 1 = 0. It does train the ranges, so it is kept as `trains: ranges`. (2) The
width of a layer is that of its weight and its *input*, which a device multiplies, not of its output. The
paper's closed form is one for after training, and no part of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import SchemeError, check_choice, check_value, matching
from bitsmith.methods.method import Method, is_number
from bitsmith.numerics.output_error import LOSSES
from bitsmith.quantization import Plan
from bitsmith.quantization.budget import Budget
from bitsmith.quantization.online_allocation import ALLOCATIONS, OnlineAllocation
from bitsmith.quantization.site_terms import (
    Output,
    approximate,
    block_outputs,
    float_copy,
    float_output,
    layer_outputs,
    watch,
)

MEASURED = 2  # steps before an allocation on whose batches errors are measured
EVERY = 4  # samples: of one in so many a layer with its weight alone quantized is computed in float as well
CHOICES = {
    "against": ("self", "teacher"),
    "loss": LOSSES,
    "trains": ("activations", "ranges"),
    "layers": ("linear", "block"),
    "allocation": ALLOCATIONS,
}


class OutputApproximation(Method):
    """Pulls the outputs of layers to their grid or to the float model's; with a budget it allocates widths.

    strength: lambda. against, loss, layers: see above. normalise: errors relative to the mean square
    (False: as they are). trains: of the loss against self, "activations", or "ranges" (the literal loss).
    sites: globs of the outputs that count, by the names of sites, layers (`fc.output`) or blocks; by default
    all. warm_up: share of the steps before the term and the first allocation.

    budget: what the plan may cost; without one widths stay as they are. example: a batch, for a budget.
    candidates: of each site whose width was not asked for by name. allocation: exact, greedy or
    evolutionary. share_widths: one width for both operands of a layer. every: share of the steps between
    re-allocations, 0 for none; settle: share of the steps after which the plan stays.

    Raises SchemeError for options out of range or that contradict one another, SiteError for a glob that
    matches nothing or a model without blocks, BudgetError where no plan meets the budget.
    """

    strength: Tensor
    coefficient: Tensor

    def __init__(
        self,
        example: Any = None,
        *,
        strength: float = 0.1,
        against: str = "self",
        loss: str = "mse",
        normalise: bool = True,
        trains: str = "activations",
        layers: str = "linear",
        sites: Sequence[str] | None = None,
        warm_up: float = 0.1,
        budget: Budget | Mapping[str, Any] | None = None,
        candidates: Sequence[int] = (2, 3, 4, 6, 8),
        allocation: str = "exact",
        share_widths: bool = True,
        every: float = 0.0,
        settle: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        given = locals()
        for name, choices in CHOICES.items():
            check_choice(f"output_approximation.{name}", given[name], choices)
        _check(given)
        self.example, self.factor, self.against, self.loss = example, float(strength), against, loss
        self.normalise, self.trains, self.layers, self.wanted = normalise, trains, layers, sites
        self.warm_up, self.every, self.settle, self.seed = warm_up, every, settle, seed
        self.budget = Budget.from_dict(budget, "budget") if isinstance(budget, Mapping) else budget
        self.candidates, self.how, self.share_widths = candidates, allocation, share_widths
        self.register_buffer("strength", torch.tensor(0.0 if warm_up else self.factor))
        self.register_buffer("coefficient", self.strength.clone())  # times the micro-batch's share
        self.allocation: OnlineAllocation | None = None

    def attach(self, model: nn.Module, teacher: nn.Module | None = None) -> None:
        """Add the terms, and with a budget take the widths over. ``teacher``: a float model with the modules
        of this one; by default a copy of the model that was prepared."""
        outputs = self._outputs(model)
        self.seen: list[Tensor | None] = [None] * len(outputs)  # of the teacher, in the forward that runs
        self.inputs: list[Any] = [(), {}]  # of the forward that ran last
        if self.against == "teacher":
            self.teacher = float_copy(model if teacher is None else teacher)
            watch(self.teacher, outputs, self.seen)
        if self.budget is not None:
            self.allocation = OnlineAllocation(
                model,
                self.budget,
                self.example,
                candidates=self.candidates,
                allocation=self.how,
                share_widths=self.share_widths,
                seed=self.seed,
                where="output_approximation",
            )
        self.hooks = [item[1].at.register_forward_hook(self._term(*item)) for item in enumerate(outputs)]
        self.hooks.append(model.register_forward_pre_hook(self._start(), with_kwargs=True))

    def micro_batch(self, share: float) -> None:
        """The terms of a micro-batch count by its share of the step's rows."""
        self.coefficient.copy_(self.strength * share)

    def after_step(self, step: int, steps: int) -> None:
        """End the warm-up; measure errors and allocate; with the last step take the terms away."""
        self.strength.fill_(self.factor if step + 1 >= round(self.warm_up * steps) else 0.0)
        self.coefficient.copy_(self.strength)
        if self.allocation is not None:
            ahead = [at - (step + 1) for at in self._moments(steps)]
            if any(0 <= left < MEASURED for left in ahead):
                self.allocation.measure(*self.inputs)
            if 0 in ahead:
                self.allocation.choose()
        if step + 1 == steps:
            for hook in self.hooks:
                hook.remove()

    def plan(self) -> Plan | None:
        """The widths allocated last; None without a budget."""
        return None if self.allocation is None else self.allocation.plan()

    def scalars(self) -> dict[str, Tensor]:
        """The strength; with a budget the mean width of the sites that have one allocated."""
        bits = {} if self.allocation is None else {"bits": self.allocation.mean_bits()}
        return {"strength": self.strength, **bits}

    def traces(self) -> dict[str, Tensor]:
        """The scalars where they move: with a budget."""
        return {} if self.allocation is None else self.scalars()

    def _moments(self, steps: int) -> list[int]:
        """After how many steps widths are allocated."""
        first = max(1, round(self.warm_up * steps))
        if not self.every:
            return [first]
        return list(
            range(first, max(first, round(self.settle * steps)) + 1, max(1, round(self.every * steps)))
        )

    # ---- terms

    def _outputs(self, model: nn.Module) -> list[Output]:
        """The outputs that count."""
        every = bool(self.wanted)
        found = layer_outputs(model) if self.layers == "linear" else block_outputs(model, every)
        if not self.wanted:
            return list(found.values())
        return [found[n] for n in matching("output_approximation.sites", self.wanted, found, "output")]

    # Hooks are functions, not methods: a copy of the model would copy a method's object with it.

    def _term(self, index: int, output: Output) -> Callable[..., Any]:
        """The hook behind one output."""

        def pull(y: Tensor, a: Tensor, reference: Tensor, level: str) -> Tensor:
            return approximate(
                y, a, reference, self.coefficient, self.loss, level if self.normalise else None
            )

        def term(module: nn.Module, arguments: tuple[Tensor, ...], y: Any) -> Any:
            if not (module.training and torch.is_grad_enabled()):
                return None
            if self.against == "teacher":
                reference = self.seen[index]
                assert reference is not None
                if isinstance(y, tuple):
                    return (pull(y[0], y[0], reference, "reference"), *y[1:])
                return pull(y, y, reference, "reference")
            if output.operand is not None:
                a, q = arguments[0], y
            else:  # costs a product of its own, so only some samples, whose mean is as good
                a, q = float_output(module, arguments[0][::EVERY]), y[::EVERY]
            if not a.requires_grad:  # the model's own input
                return None
            pulled = pull(y, a, q, "a")
            return pulled if self.trains == "activations" else pull(pulled, q, a, "reference")

        return term

    def _start(self) -> Callable[..., None]:
        """The hook before each forward of the model, which runs the teacher's."""

        def start(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if not (module.training and torch.is_grad_enabled()):
                return
            if self.allocation is not None:
                self.inputs[:] = [arguments, keywords]
            if self.against == "teacher":
                self.seen[:] = [None] * len(self.seen)
                with torch.no_grad():
                    self.teacher(*arguments, **keywords)

        return start


def _check(given: Mapping[str, Any]) -> None:
    """Refuse numbers out of range and options that contradict one another. Raises SchemeError."""

    def check(name: str, holds: bool, expected: str) -> None:
        check_value(f"output_approximation.{name}", given[name], holds, expected)

    check(
        "strength",
        is_number(given["strength"]) and 0 <= given["strength"] < math.inf,
        "a number of at least 0",
    )
    for name in ("warm_up", "every", "settle"):
        check(name, is_number(given[name]) and 0 <= given[name] <= 1, "a share of the steps from 0 to 1")
    widths = given["candidates"]
    whole = isinstance(widths, Sequence) and all(b in range(1, 9) and not isinstance(b, bool) for b in widths)
    check("candidates", whole and len(set(widths)) > 1, "at least two whole numbers of bits from 1 to 8")
    for name, value, other, needed, why in (
        ("layers", "block", "against", "teacher", "a block's output has no grid of its own to be pulled to"),
        ("trains", "ranges", "against", "self", "against the teacher activations and ranges train together"),
    ):
        if given[name] == value and given[other] != needed:
            raise SchemeError(
                why,
                where=f"output_approximation.{name}",
                got=f"{value} against {given[other]}",
                remedy=f"Set {other}: {needed}",
            )
    if given["budget"] is not None and given["example"] is None:
        raise SchemeError(
            "costs are counted on a batch",
            where="output_approximation.example",
            got=None,
            expected="a batch of inputs, where there is a budget",
        )
