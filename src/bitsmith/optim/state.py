"""What an integer optimizer keeps of each weight, and the one step that all of them take on some of its rows.

In units of codes, with c the codes, d the fresh step (learning rate times direction, over the scale) and m a
momentum that holds steps, not gradients:

    m~ = b m + (1 - b) d;   t = clamp(c - m~, low, high);   c' = SR(t);   e = t - c'
    residual   t = clamp(c + r - m~, low, high);  c' = round(t);  r' = t - c';  m' = m~
    eco        m' = m~ + (1 - 1/b) e                                            2601.22101
    none       m' = m~

Without momentum (b = 0) m~ = d, and u = c + r, clamped, is the latent weight of float training to 1/127 of a
code. ECO is as printed with its m = m'/lr times the scale, for a constant learning rate. In these units the
rate divides nothing, so it may fall to 0, and what momentum carries has an exact meaning:
u = c - b m/(1 - b), where the code would come to rest, moves by u' = u - d, plain descent without any
rounding error, as long as nothing is clamped. What clamping cuts off is not fed back; `cut` counts it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitsmith.kernels.choose import Backend
from bitsmith.kernels.operands import Step
from bitsmith.kernels.training import aim
from bitsmith.numerics.affine import quantize
from bitsmith.numerics.blocks import to_groups
from bitsmith.numerics.calibrate import calibrate
from bitsmith.numerics.rounding import mix
from bitsmith.optim import blocks
from bitsmith.optim.estimators import NEEDS_LATENT, estimated
from bitsmith.quantization.integer_codes import (
    grid_of,
    matrix_shape,
    read_rows,
    scales_of,
    spread,
    write_rows,
)
from bitsmith.quantization.integer_layers import PackedWeight

RESIDUAL = 127  # codes of the residual, in -1..1
LARGEST_CHANGE = 2.0**-5  # of a scale in one step, as a logarithm
UPDATE, MOMENTUM, LEFT_OVER, NOISE, REFIT, FIRST = range(6)  # what a seed is for


@dataclass(frozen=True)
class Rule:
    """The choices that all weights share; see `IntegerOptimizer`."""

    momentum: float
    carry: str
    estimator: str
    scale_gradients: bool
    weight_decay: float
    block: int
    scale_rate: float  # 0: scales do not learn


@dataclass
class WeightState:
    """The tensors beside one weight; (rows, inputs) and blocks of it."""

    momentum: Tensor | None = None  # int8, in codes
    momentum_scale: Tensor | None = None
    residual: Tensor | None = None  # int8, 1/127 of a code
    first: Tensor | None = None  # int8: a momentum of gradients (IntegerSign)
    first_scale: Tensor | None = None
    row_squares: Tensor | None = None  # float32 (rows,): second moments (IntegerAdam)
    column_squares: Tensor | None = None  # (inputs,)
    cut: int = field(default=0, compare=False)
    moved: int = field(default=0, compare=False)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def take_step(
    weight: PackedWeight,
    state: WeightState,
    at: slice | Tensor,
    direction: Tensor,
    lr: float,
    rule: Rule,
    seed: int,
    backend: Backend,
    by_row: Tensor | None = None,
    by_column: Tensor | None = None,
) -> None:
    """Move the codes of rows ``at`` by ``direction`` (r, inputs), times by_row (r,) and by_column
    (inputs,), in units of the gradient of values: all of it is a function of the state and ``seed``."""
    _, low, high, half = grid_of(weight)
    scales, size, b = scales_of(weight), weight.form.group_size, rule.momentum
    codes = read_rows(weight, backend, at)
    ratio = lr / scales[at] if rule.scale_gradients else scales[at] * lr
    ratio = ratio if by_row is None else ratio * by_row[:, None]
    m = None
    if state.momentum is not None and state.momentum_scale is not None:
        m = (state.momentum[at], state.momentum_scale[at])  # views of a chunk, copies of rows of an index
    r = None if state.residual is None else state.residual[at]
    linear = rule.estimator == "piecewise_linear"
    d, dots, squares = aim(
        backend,
        direction,
        codes,
        ratio,
        by_column,
        group_size=size,
        half=half,
        decay=lr * rule.weight_decay,
        residual=r if linear else None,
    )
    if rule.scale_rate:
        change = dots.div_(squares.clamp_(min=1.0)).mul_(-rule.scale_rate)
        scales[at] = scales[at] * change.clamp_(-LARGEST_CHANGE, LARGEST_CHANGE).exp_()
    if rule.estimator in NEEDS_LATENT and not (linear and r is not None):
        momentum = None if m is None else blocks.read(*m, rule.block)
        carried = carried_of(momentum, None if r is None else r.float() / RESIDUAL, b)
        d = estimated(rule.estimator, d, codes, carried, low, high, mix(seed, NOISE), exact=r is not None)
    step = Step(
        low,
        high,
        keep=b,
        carry=1 - 1 / b if rule.carry == "eco" else 0.0,
        block=rule.block,
        clip=rule.estimator != "pure" and r is None,
        nearest=r is not None and rule.estimator != "probabilistic",
        seeds=(mix(seed, UPDATE), mix(seed, MOMENTUM), mix(seed, LEFT_OVER)),
    )
    cut, moved = backend.move(codes, d, step, m, r)
    state.cut, state.moved = state.cut + cut, state.moved + moved
    write_rows(weight, backend, at, codes)
    if isinstance(at, Tensor):
        if m is not None and state.momentum is not None and state.momentum_scale is not None:
            state.momentum[at], state.momentum_scale[at] = m
        if r is not None and state.residual is not None:
            state.residual[at] = r


def carried_of(m: Tensor | None, r: Tensor | None, b: float) -> Tensor | None:
    """u - q: the residual, or else the way that momentum has still to go, within half a code."""
    if r is not None:
        return r.clamp(-0.5, 0.5)
    return None if m is None else (m * (-b / (1 - b))).clamp(-0.5, 0.5)


def refit(
    weight: PackedWeight,
    state: WeightState,
    at: slice,
    rule: Rule,
    calibration: str,
    seed: int,
    backend: Backend,
) -> None:
    """Find the scales of some rows anew for what codes and carry stand for, and code that on them."""
    _, low, high, half = grid_of(weight)
    inputs, size = matrix_shape(weight)[1], weight.form.group_size
    scales, codes = scales_of(weight), read_rows(weight, backend, at)
    m = None
    if state.momentum is not None:
        assert state.momentum_scale is not None
        m = blocks.read(state.momentum[at], state.momentum_scale[at], rule.block)
    r = None if state.residual is None else state.residual[at].float() / RESIDUAL
    carried = carried_of(m, r, rule.momentum)
    old = spread(scales[at], inputs, size)
    u = codes + half if carried is None else codes + carried + half
    values = u * old
    grouped = values[:, None] if size is None else to_groups(values, size, flatten=True)
    found, _ = calibrate(calibration, grouped.flatten(0, -2), float(low), float(high), half)
    new = spread(found.view(len(values), -1), inputs, size)
    made = torch.zeros_like(codes)
    aim = values / new - half
    backend.update(made, -aim.contiguous(), mix(seed, REFIT), low, high)
    scales[at] = found.view(len(values), -1)
    ratio = old / new
    if m is not None:
        made_momentum = blocks.write((m * ratio).contiguous(), rule.block, mix(seed, MOMENTUM), backend)
        assert state.momentum is not None
        assert state.momentum_scale is not None
        state.momentum[at], state.momentum_scale[at] = made_momentum
    if state.residual is not None:
        nearest = quantize(values, new, low, high, half)
        made = nearest.to(torch.int8)
        left = torch.zeros_like(made)
        error = (aim - nearest).clamp(-1, 1)
        backend.update(left, (error * -RESIDUAL).contiguous(), mix(seed, LEFT_OVER), -RESIDUAL, RESIDUAL)
        state.residual[at] = left
    write_rows(weight, backend, at, made)
