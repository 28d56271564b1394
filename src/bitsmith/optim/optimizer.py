"""What integer optimizers share: they take the model, and update codes inside backward.

No set of gradients exists, so what needs one is refused: accumulation over two backwards, clipping by a norm
of all gradients, second passes, closures. What stayed float (biases, norms, parameters that were kept) is
trained by an ordinary torch optimizer, held here and stepped in `step()`: AdamW for the normalised rules,
else SGD, with this one's learning rate; another one by ``float_optimizer=``, and False where users step their
own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import FormatError, SiteError, check_choice, check_value
from bitsmith.kernels.choose import best
from bitsmith.kernels.operands import MOST_BLOCK
from bitsmith.numerics.calibrate import METHODS
from bitsmith.numerics.rounding import mix
from bitsmith.optim import blocks
from bitsmith.optim.estimators import ESTIMATORS, NEEDS_LATENT
from bitsmith.optim.state import REFIT, Rule, WeightState, refit, take_step
from bitsmith.quantization.integer_codes import matrix_shape, rows_at_once
from bitsmith.quantization.integer_gradients import WeightGradient
from bitsmith.quantization.integer_layers import PackedWeight
from bitsmith.quantization.integer_training import int_layers

SCALES = ("learned", "refit", "fixed")
MOMENTUM = 0.9
Direction = tuple[Tensor, Tensor | None, Tensor | None]
VERSION = 1


class IntegerOptimizer(torch.optim.Optimizer):
    """What the three share.

    lr: as for float weights; any scheduler of torch's may change it. carry: what becomes of a step's rounding
    error: ``residual`` keeps it in a byte of its own, ``eco`` puts it into the momentum, ``none`` leaves it
    to expectation. momentum: b of the average of steps, a byte more; None is 0.9 with ``eco`` and for
    `IntegerSign`, else 0. estimator: optim.estimators, by default ``piecewise_linear`` of a residual, else
    ``clipped``. scales: ``learned`` (by the part of each step that lies along the weight, times
    ``scale_rate``), ``refit`` every ``refit_every`` steps, or ``fixed``. scale_gradients False
    is the literal W_int - lr g_int, g_int the gradient of a code: s^2 times smaller than the step that a
    float weight would take (2206.15472). block: values that share a scale of momentum. weight_decay:
    decoupled, of the values.

    Raises SiteError for a model without integer layers, or with another integer optimizer.
    """

    carries: tuple[str, ...] = ("residual", "eco", "none")  # the default first
    normalised = True
    averages_gradients = False  # else momentum is one of steps

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float | None = None,
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
        carry = carry or self.carries[0]
        if momentum is None:
            momentum = MOMENTUM if carry == "eco" or self.averages_gradients else 0.0
        estimator = estimator or ("piecewise_linear" if carry == "residual" else "clipped")
        name = type(self).__name__
        check_value(f"{name}.lr", lr, 0 <= lr < float("inf"), "a finite number >= 0")
        check_value(f"{name}.momentum", momentum, 0 <= momentum < 1, "0 to below 1")
        check_value(f"{name}.block", block, type(block) is int and 8 <= block <= MOST_BLOCK, "8 to 1024")
        check_value(f"{name}.refit_every", refit_every, refit_every >= 1, "a whole number from 1 on")
        check_choice(f"{name}.carry", carry, self.carries)
        check_choice(f"{name}.estimator", estimator, ESTIMATORS)
        check_choice(f"{name}.scales", scales, SCALES)
        check_choice(f"{name}.calibration", calibration, tuple(METHODS))
        check_value(
            f"{name}.carry",
            carry,
            carry != "eco" or momentum > 0,
            "residual or none without momentum to carry it",
        )
        latent = carry == "residual" or (momentum > 0 and not self.averages_gradients)
        check_value(
            f"{name}.estimator",
            estimator,
            latent or estimator not in NEEDS_LATENT,
            "one that needs no latent weight, as no residual and no momentum of steps carries any",
        )
        check_value(f"{name}.scale_rate", scale_rate, scale_rate >= 0, "a number >= 0")
        check_value(f"{name}.weight_decay", weight_decay, weight_decay >= 0, "a number >= 0")
        self._layers = int_layers(model)
        if not self._layers:
            raise SiteError(
                "this model has no layer that trains on integers",
                where=name,
                remedy="Call prepare_integer(model) first",
            )
        taken = next((n for n, layer in self._layers.items() if layer.sink is not None), None)
        if taken is not None:
            raise SiteError(
                "another integer optimizer has this layer", where=taken, remedy="Call its detach() first"
            )
        self.rule = Rule(
            momentum=0.0 if self.averages_gradients else momentum,
            carry=carry,
            estimator=estimator,
            scale_gradients=scale_gradients,
            weight_decay=weight_decay,
            block=block,
            scale_rate=scale_rate if scales == "learned" else 0.0,
        )
        self.momentum = momentum
        self.scales, self.refit_every, self.calibration, self.seed = scales, refit_every, calibration, seed
        super().__init__([{"params": []}], {"lr": lr, "initial_lr": lr})
        self._weights: dict[str, PackedWeight] = {}
        self._states: dict[str, WeightState] = {}
        owners: dict[int, str] = {}
        for number, (layer_name, layer) in enumerate(self._layers.items()):
            owner = owners.setdefault(id(layer.weight), f"{layer_name}.weight")
            if owner not in self._weights:
                self._weights[owner] = layer.weight
                self._states[owner] = self._new_state(layer.weight)
            layer.sink = functools.partial(self._take, number, layer_name, owner)
        self.steps, self._arrived = 0, set[str]()
        self.saturated, self.moved = 0.0, 0.0
        self.float_optimizer = self._float_optimizer(model, lr, float_optimizer)
        self._float_ratios = [
            group["lr"] / lr if lr else 1.0 for group in getattr(self.float_optimizer, "param_groups", [])
        ]
        self._begin_step()

    def _float_optimizer(
        self, model: nn.Module, lr: float, given: torch.optim.Optimizer | bool
    ) -> torch.optim.Optimizer | None:
        if isinstance(given, torch.optim.Optimizer):
            return given
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not given or not parameters:
            return None
        if self.normalised:
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        return torch.optim.SGD(parameters, lr=lr)

    def _new_state(self, weight: PackedWeight) -> WeightState:
        rows, inputs = matrix_shape(weight)
        state = WeightState()
        if self.rule.momentum:
            state.momentum, state.momentum_scale = blocks.zeros(rows, inputs, self.rule.block)
        if self.rule.carry == "residual":
            state.residual = torch.zeros(rows, inputs, dtype=torch.int8)
        return state

    def _begin_step(self) -> None:
        self._arrived.clear()
        for number, layer in enumerate(self._layers.values()):
            layer.seed = mix(self.seed, self.steps, number)
        for state in self._states.values():
            state.cut = state.moved = 0
        self._seen = 0

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.param_groups[0]["lr"])

    @torch.no_grad()
    def _take(self, number: int, layer: str, owner: str, gradient: WeightGradient) -> None:
        """A layer's gradient, in backward."""
        if layer in self._arrived:
            raise SiteError(
                "this layer's codes were updated already in this step",
                where=layer,
                got="a second gradient",
                expected="one backward, in which each layer runs once, for each step()",
                remedy="Call step() after every backward, use larger batches instead of accumulating, and no "
                "second passes",
            )
        self._arrived.add(layer)
        weight, state, backend = self._weights[owner], self._states[owner], best()
        rows, inputs = matrix_shape(weight)
        count = rows if gradient.rows is None else len(gradient.rows)
        self._seen += count * inputs
        for start in range(0, count, rows_at_once(inputs)):
            stop = min(start + rows_at_once(inputs), count)
            at = slice(start, stop) if gradient.rows is None else gradient.rows[start:stop]
            seed = mix(self.seed, self.steps, number, start)
            g, by_row, by_column = self._direction(state, at, gradient.block(start, stop), seed)
            take_step(weight, state, at, g, self.lr, self.rule, seed, backend, by_row, by_column)
        self._taken(state, count)

    def _direction(self, state: WeightState, at: slice | Tensor, g: Tensor, seed: int) -> Direction:
        """What a gradient (r, inputs) asks for, before the learning rate: values, and factors of rows (r,)
        and of columns (inputs,), or None."""
        raise NotImplementedError

    def _taken(self, state: WeightState, rows: int) -> None:
        """All rows of a gradient have been seen."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Close the step: codes moved in backward already. Raises SiteError for a closure, and where no
        gradient has arrived."""
        if closure is not None:
            raise SiteError(
                "an integer optimizer takes no closure: codes move in backward, once",
                where=type(self).__name__,
                remedy="Call loss.backward() and then step()",
            )
        if not self._arrived:
            raise SiteError(
                "no gradient has arrived since the last step",
                where=type(self).__name__,
                remedy="Call loss.backward() before step(), and leave some layer trainable",
            )
        self.saturated = sum(s.cut for s in self._states.values()) / max(self._seen, 1)
        self.moved = sum(s.moved for s in self._states.values()) / max(self._seen, 1)
        if self.float_optimizer is not None:
            for group, ratio in zip(self.float_optimizer.param_groups, self._float_ratios, strict=True):
                group["lr"] = self.lr * ratio
            self.float_optimizer.step()
        self.steps += 1
        if self.scales == "refit" and self.steps % self.refit_every == 0:
            self._refit()
        self._begin_step()

    def _refit(self) -> None:
        for number, (name, weight) in enumerate(self._weights.items()):
            rows, inputs = matrix_shape(weight)
            for start in range(0, rows, rows_at_once(inputs)):
                at = slice(start, min(start + rows_at_once(inputs), rows))
                seed = mix(self.seed, self.steps, number, start, REFIT)
                refit(weight, self._states[name], at, self.rule, self.calibration, seed, best())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the float leftovers: codes have no gradients."""
        if self.float_optimizer is not None:
            self.float_optimizer.zero_grad(set_to_none)

    def check_loop(
        self, *, accumulation: int = 1, clip: float | None = None, second_pass: bool = False
    ) -> None:
        """For training loops: SiteError for what cannot be done without a set of gradients."""
        wrong = {
            "accumulation": accumulation != 1,
            "clipping by a norm of gradients": clip is not None,
            "a second pass": second_pass,
        }
        for what, asked in wrong.items():
            if asked:
                raise SiteError(
                    f"{what} needs all gradients at once, and here none is kept",
                    where=type(self).__name__,
                    remedy="Leave it out: larger batches, or a smaller learning rate",
                )

    def detach(self) -> None:
        """Let go of the model's layers, for another optimizer to take them."""
        for layer in self._layers.values():
            layer.sink = None

    def tensors(self) -> dict[str, Tensor]:
        """All state beside codes and scales, by weight and kind."""
        return {f"{n}.{kind}": t for n, s in self._states.items() for kind, t in s.tensors().items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs beside the model's own state."""
        return {
            "version": VERSION,
            "kind": type(self).__name__,
            "steps": self.steps,
            "seed": self.seed,
            "lr": self.lr,
            "tensors": {name: tensor.clone() for name, tensor in self.tensors().items()},
            "float": None if self.float_optimizer is None else self.float_optimizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse, for an optimizer made with the same choices. Raises FormatError where it was not."""
        own, given = self.tensors(), state_dict.get("tensors", {})
        expected = {"version": VERSION, "kind": type(self).__name__}
        for key, value in expected.items():
            if state_dict.get(key) != value:
                raise FormatError(
                    "this is the state of another optimizer",
                    where=key,
                    got=state_dict.get(key),
                    expected=value,
                )
        lazy = {name for name in given if name.endswith("_squares")}  # they come with the first gradient
        differing = (set(own) ^ set(given)) - lazy
        differing |= {n for n in set(own) & set(given) if own[n].shape != given[n].shape}
        if differing or (self.float_optimizer is None) != (state_dict.get("float") is None):
            raise FormatError(
                "this state is not that of this model and these choices",
                where=min(differing, default="float"),
                remedy="Make the optimizer with the carry, momentum and block that it was saved with",
            )
        for name, tensor in given.items():
            owner, _, kind = name.rpartition(".")
            setattr(self._states[owner], kind, tensor.clone())
        self.steps, self.seed = state_dict["steps"], state_dict["seed"]
        self.param_groups[0]["lr"] = state_dict["lr"]
        if self.float_optimizer is not None:
            self.float_optimizer.load_state_dict(state_dict["float"])
        self._begin_step()
