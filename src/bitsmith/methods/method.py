"""The five hooks through which a method looks into training.

A method is a module so that its buffers are its state and its `state_dict` is its checkpoint; it keeps no
state elsewhere (a generator's state goes through `get_extra_state`). Parameters that it trains are added to
the *model* in `attach`, so that every optimizer built from `model.parameters()` moves them; the layers it
remembers go into plain lists, as a module stored as an attribute would be saved twice.

Unlike callback systems with dozens of events there are five hooks, each a no-op here, in this order:

    task loss backward (all micro-batches) -> after_backward -> penalty().backward() -> clip -> optimizer step
    -> after_step

Our loop (`bitsmith.train`) has no privileges: a loop of your own calls the same hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from bitsmith.quantization import Plan

Closure = Callable[[], Tensor]


class Method(nn.Module):
    """Base of all methods: override the hooks that you need.

    turn: a run calls each hook of its methods in rising order of it, equal ones as they were given; so that
    their order in a recipe decides nothing. Below 0: a second pass, which replaces the gradients that others
    change. 0: what decides widths. Above 0: what needs the widths of the next forward.
    """

    turn = 0

    def attach(self, model: nn.Module) -> None:
        """Choose bit-widths, add parameters to the model, remember sites; once, before `calibrate`."""

    def penalty(self) -> Tensor:
        """Terms of the loss that depend on parameters alone, as a scalar; it has a backward of its own.

        Once per optimizer step, whatever the accumulation, loss scaling or number of processes. A result
        that needs no gradient is skipped. Terms of activations are added at the site instead.
        """
        return torch.zeros(())

    def micro_batch(self, share: float) -> None:
        """Said before each micro-batch: its share of the step's rows.

        No hook but a number: a term at a site (quantization.site_terms) has no other way to know it. A step
        of one micro-batch need not say 1.
        """

    def optimizer_made(self, optimizer: Optimizer) -> None:
        """Said once, before the first step, of the optimizer that moves the model's parameters.

        No hook either: for a method that keeps tensors of its own which move as the model's do.
        """

    def after_backward(self, closure: Closure) -> None:
        """Change the gradients of the task loss before the penalty's are added.

        ``closure()`` is a second pass for sharpness-like methods: it clears the gradients, runs all
        micro-batches of this step forward and backward with the weights as they now are and BatchNorm
        statistics frozen, and returns their mean loss (detached). At most one method of a run calls it.
        """

    def after_step(self, step: int, steps: int) -> None:
        """Move multipliers, temperatures, anchors; draw the noise of the next forward.

        ``step`` counts optimizer steps from 0; the last call is ``after_step(steps - 1, steps)``.
        """

    def scalars(self) -> dict[str, Tensor]:
        """The 0-D float buffers (multipliers, temperatures), by name: what is written down of each epoch."""
        return {
            name: value
            for name, value in self.named_buffers()
            if value.ndim == 0 and value.is_floating_point()
        }

    def traces(self) -> dict[str, Tensor]:
        """Those of them worth a curve over the steps, read after `penalty`; none once they stand still."""
        return self.scalars()

    def plan(self) -> Plan | None:
        """The bit-widths decided, or None from a method that decides none."""
        return None

    def learned_bits(self) -> dict[str, list[float]]:
        """Site -> its real width as it was learned, before rounding, or those of its groups of channels."""
        return {}


def is_number(value: Any) -> bool:
    """A real number, not a flag."""
    return isinstance(value, int | float) and not isinstance(value, bool)
