"""Three small methods, each the shape of a real one: they show that five hooks and Quantizer.bits suffice.

A budget search over categorical widths, fractional widths, and a second pass for sharpness. Not for use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.methods import Method
from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.methods.fractional_bits import FractionalBits
from bitsmith.methods.output_approximation import OutputApproximation
from bitsmith.methods.progressive_bits import ProgressiveBits
from bitsmith.methods.sharpness import Sharpness as Flatness
from bitsmith.methods.weight_anchor import WeightAnchor
from bitsmith.quantization import BitWidth, Plan, measure, plan_of, set_bits, sites
from bitsmith.quantization.layers import weights_of
from tests.quantization.widths import Sampled


class Search(Method):
    """min over weights and logits, max over the multiplier, of  loss + multiplier * (cost / budget - 1)."""

    def __init__(self, example: Any, budget: float = 0.01, candidates: Sequence[int] = (2, 4, 8)) -> None:
        super().__init__()
        self.example, self.budget, self.candidates = example, budget, candidates
        self.register_buffer("multiplier", torch.tensor(1.0))
        self.register_buffer("violation", torch.tensor(0.0))
        self.generator = torch.Generator().manual_seed(0)

    def attach(self, model: nn.Module) -> None:
        self.cost, self.models = measure(model, self.example), [model]
        self.widths = {name: Sampled(self.candidates) for name in sites(model)}
        set_bits(model, self.widths)

    def penalty(self) -> Tensor:
        bits = {name: width.expected() for name, width in self.widths.items()}
        over = self.cost.bops(bits) / (self.budget * self.cost.bops_float) - 1
        self.violation.copy_(over.detach())
        return self.multiplier * over

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        self.multiplier.add_(0.1 * self.violation).clamp_(min=0)
        for width in self.widths.values():
            width.draw(self.generator)

    def plan(self) -> Plan:
        best = {name: int(w.candidates[w.logits.argmax()]) for name, w in self.widths.items()}
        return plan_of(self.models[0], bits=best)

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state)


class Between(BitWidth):
    """A real width, as the mean of its two neighbours' rows: (1 - f) Q_n + f Q_(n+1)."""

    def __init__(self, start: float, candidates: Sequence[int]) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.tensor([start]))
        self.register_buffer("candidates", torch.tensor(candidates, dtype=torch.float32))
        self.register_buffer("rows", torch.zeros(2, dtype=torch.int64))
        self.move()

    @property
    def share(self) -> Tensor:  # type: ignore[override]
        f = self.width - self.candidates.index_select(0, self.rows[:1])
        return torch.cat([1 - f, f])

    def expected(self) -> Tensor:
        return self.width.squeeze(0)

    @torch.no_grad()
    def move(self) -> None:
        """Keep the width inside the candidates and the rows beside it."""
        low, high = self.candidates[0], self.candidates[-1]
        self.width.copy_(self.width.clamp(low, high - 1e-3))
        self.rows.copy_((self.width - low).floor() + torch.tensor([0, 1]))

    @torch.no_grad()
    def commit(self, bits: int) -> None:
        self.rows.fill_(self.candidates.tolist().index(bits))
        self.width.fill_(bits)


class Fractional(Method):
    """loss + strength * sum over sites of the width: each falls until the loss holds it."""

    def __init__(self, strength: float = 1.0, candidates: Sequence[int] = (2, 3, 4, 5)) -> None:
        super().__init__()
        self.candidates = candidates
        self.register_buffer("strength", torch.tensor(strength))

    def attach(self, model: nn.Module) -> None:
        self.models = [model]
        self.widths = {name: Between(3.55, self.candidates) for name in sites(model)}
        set_bits(model, self.widths)

    def penalty(self) -> Tensor:
        return self.strength * torch.stack([width.expected() for width in self.widths.values()]).sum()

    def after_step(self, step: int, steps: int) -> None:
        for width in self.widths.values():
            width.move()

    def plan(self) -> Plan:
        near = {name: round(float(width.expected().detach())) for name, width in self.widths.items()}
        return plan_of(self.models[0], bits=near)


class Sharpness(Method):
    """The gradient at w + radius * g / |g| instead of at w (2010.01412)."""

    def __init__(self, radius: float = 0.1) -> None:
        super().__init__()
        self.register_buffer("radius", torch.tensor(radius))

    def attach(self, model: nn.Module) -> None:
        self.weights = list(weights_of(model).values())

    @torch.no_grad()
    def after_backward(self, closure: Callable[[], Tensor]) -> None:
        before = [w.clone() for w in self.weights]
        norm = torch.stack([w.grad.norm() for w in self.weights]).norm()
        for w in self.weights:
            w.add_(w.grad * (self.radius / norm))
        with torch.enable_grad():
            closure()
        for w, value in zip(self.weights, before, strict=True):
            w.copy_(value)


# widths are the model's own
DECIDE_NOTHING = ("sharpness", "output approximation", "weight anchor", "anchor, requantized", "SAM", "SAGM")

METHODS: dict[str, Callable[[Tensor], list[Method]]] = {
    "budget_search": lambda example: [
        BudgetSearch({"bops": 0.012}, example, candidates=(2, 4, 8), search_share=0.7)
    ],
    "budget_search by channel group": lambda example: [
        BudgetSearch({"bops": 0.012}, example, candidates=(2, 4, 8), search_share=0.7, channel_groups=3)
    ],
    "fractional bits": lambda example: [
        FractionalBits(
            example,
            target={"average_weight_bits": 3, "average_activation_bits": 3},
            bits=(2, 4),
            learn_share=0.7,
        )
    ],
    "fractional bits by channel, sampled": lambda example: [
        FractionalBits(example, strength=0.5, bits=(2, 4), per="channel", mode="sampled", rounding="floor")
    ],
    "categorical fractional bits": lambda example: [
        FractionalBits(example, strength=1.0, parametrization="categorical", mode="argmax", bits=(2, 4))
    ],
    "progressive bits": lambda example: [
        ProgressiveBits(tensors="both", schedule=[(6, 0.2), (5.5, 0.2), (4.5, 0.2)], scale_steps=1)
    ],
    "output approximation": lambda example: [OutputApproximation(against="teacher", warm_up=0.3)],
    "output approximation in a budget": lambda example: [
        OutputApproximation(
            example,
            budget={"average_weight_bits": 3, "average_activation_bits": 3.2},
            candidates=(2, 3, 4),
            allocation="evolutionary",
            share_widths=False,
            warm_up=0.5,
            every=0.3,
            settle=0.9,
        )
    ],
    "budget_search with float": lambda example: [
        BudgetSearch({"bops": 0.012}, example, candidates=(2, 4, 32), search_share=0.7)
    ],
    "weight anchor": lambda example: [WeightAnchor(0.3, schedule="linear")],
    "anchor, requantized": lambda example: [WeightAnchor(0.5, pull="anchor", requantize=True)],
    "SAM": lambda example: [Flatness(0.05, every=3, schedule="cosine")],
    "SAGM": lambda example: [Flatness(0.05, kind="sagm", freeze="ordered", disorder_window=3)],
    "SAM, budget_search and weight anchor": lambda example: [
        Flatness(0.05),
        BudgetSearch({"bops": 0.012}, example, candidates=(2, 4, 8), search_share=0.7),
        WeightAnchor(0.3, schedule="constant"),
    ],
    "search": lambda example: [Search(example)],
    "fractional": lambda example: [Fractional()],
    "sharpness": lambda example: [Sharpness()],
    "search and sharpness": lambda example: [Search(example), Sharpness()],
}
