"""Optimizers of integer layers: they take the model, and update codes inside backward.

    optimizer = IntegerSGD(model, lr=0.1)
    loss.backward()          # each layer's gradient moves its codes as soon as it is known, and is gone
    optimizer.step()         # closes the step: float leftovers, counters, seeds

    IntegerSGD    d = lr g                                       residual, a byte
    IntegerSign   d = lr sign(b m + (1 - b) g)                   momentum of gradients and residual, two bytes
    IntegerAdam   d = lr g / sqrt(R C / mean C), R, C factored   residual, a byte

Differences from the well-known implementations. Momentum averages, m = b m + (1 - b) g, where torch's SGD
sums: its learning rate is 1/(1 - b) times smaller. Adam's momentum is one of normalised gradients, for ECO to
hold exactly (optim.state); ECO's own form multiplies what it carries by sqrt(v), which is the same where v
stands still. Second moments are Adafactor's (1804.04235, algorithm 4), the columns those of the step before,
so that one pass over the gradient is enough; its clipping is by row. They start at the first gradient they
see instead of at 0, so that nothing has to be corrected for the beginning.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitsmith.errors import check_value
from bitsmith.kernels.choose import best
from bitsmith.numerics.rounding import mix
from bitsmith.optim import blocks
from bitsmith.optim.optimizer import Direction, IntegerOptimizer
from bitsmith.optim.state import FIRST, WeightState
from bitsmith.quantization.integer_codes import matrix_shape
from bitsmith.quantization.integer_layers import PackedWeight


class IntegerSGD(IntegerOptimizer):
    """Plain descent: no square root and no division for each weight, and one byte of state."""

    normalised = False

    def _direction(self, state: WeightState, at: slice | Tensor, g: Tensor, seed: int) -> Direction:
        return g, None, None


class IntegerSign(IntegerOptimizer):
    """The sign of a momentum of gradients (Lion's family, 2302.06675, with one b): the size of gradients does
    not matter, and nothing is divided for each weight. ECO is not proved for it, so rounding errors have a
    byte of their own; ``carry="none"`` saves it."""

    carries = ("residual", "none")

    averages_gradients = True

    def _new_state(self, weight: PackedWeight) -> WeightState:
        state = super()._new_state(weight)
        state.first, state.first_scale = blocks.zeros(*matrix_shape(weight), self.rule.block)
        return state

    def _direction(self, state: WeightState, at: slice | Tensor, g: Tensor, seed: int) -> Direction:
        assert state.first is not None
        assert state.first_scale is not None
        m, b = blocks.read(state.first[at], state.first_scale[at], self.rule.block), self.momentum
        m.mul_(b).add_(g, alpha=1 - b)
        state.first[at], state.first_scale[at] = blocks.write(m, self.rule.block, mix(seed, FIRST), best())
        return m.sign_(), None, None


class IntegerAdam(IntegerOptimizer):
    """Steps normalised by factored second moments: a float for each row and each column."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float | None = None,
        second: float = 0.99,
        eps: float = 1e-12,
        clip: float = 1.0,
        carry: str = "",
        estimator: str = "",
        scales: str = "learned",
        scale_rate: float = 1.0,
        refit_every: int = 100,
        calibration: str = "mse",
        scale_gradients: bool = True,
        weight_decay: float = 0.0,
        block: int = 128,
        seed: int = 0,
        float_optimizer: torch.optim.Optimizer | bool = True,
    ) -> None:
        """second: b of the second moments; eps: added to both; clip: the largest root mean square of a row's
        normalised gradient."""
        check_value("IntegerAdam.second", second, 0 <= second < 1, "0 to below 1")
        check_value("IntegerAdam.clip", clip, clip > 0, "a number above 0")
        self.second, self.eps, self.clip = second, eps, clip
        self._columns: Tensor | None = None
        self._profile = torch.ones(0)  # C / mean C of the weight at hand
        super().__init__(
            model,
            lr,
            momentum=momentum,
            carry=carry,
            estimator=estimator,
            scales=scales,
            scale_rate=scale_rate,
            refit_every=refit_every,
            calibration=calibration,
            scale_gradients=scale_gradients,
            weight_decay=weight_decay,
            block=block,
            seed=seed,
            float_optimizer=float_optimizer,
        )

    def _new_state(self, weight: PackedWeight) -> WeightState:
        state = super()._new_state(weight)
        rows, inputs = matrix_shape(weight)
        state.row_squares, state.column_squares = torch.zeros(rows), torch.zeros(inputs)
        return state

    def _direction(self, state: WeightState, at: slice | Tensor, g: Tensor, seed: int) -> Direction:
        assert state.row_squares is not None
        assert state.column_squares is not None
        squares = g.square()
        fresh, old = squares.mean(1), state.row_squares[at]
        rows = torch.where(old > 0, old.lerp(fresh, 1 - self.second), fresh)
        state.row_squares[at] = rows
        if self._columns is None:  # the first rows of this weight
            mean = state.column_squares.mean()
            self._profile = (state.column_squares + self.eps) / (mean + self.eps)
            self._columns = torch.zeros(g.shape[1])
        self._columns += squares.sum(0)
        rows = rows + self.eps
        size = ((squares @ self._profile.reciprocal()) / (rows * g.shape[1])).sqrt()
        return g, rows.rsqrt() / (size / self.clip).clamp(min=1.0), self._profile.rsqrt()

    def _taken(self, state: WeightState, rows: int) -> None:
        assert state.column_squares is not None
        if self._columns is not None and rows:
            fresh, old = self._columns / rows, state.column_squares
            started = bool((old > 0).any())
            state.column_squares = old.lerp(fresh, 1 - self.second) if started else fresh
        self._columns = None
