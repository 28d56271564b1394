"""One training run in progress: what a step needs, and what a checkpoint saves.

`train_step` is the order of the five hooks; `loop.py` decides when to step, to validate, to save and to stop.
Compared with the usual trainer nothing waits for the GPU in a step: losses are kept on the device and read
every 32 steps there (every step on a CPU, where reading is free).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitsmith.errors import RecipeError, TrainingDiverged
from bitsmith.methods.method import Method
from bitsmith.optim import ZerothOrder
from bitsmith.quantization import redraw, sites
from bitsmith.train.average import Average
from bitsmith.train.batches import Batches, MicroBatch
from bitsmith.train.config import TrainConfig
from bitsmith.train.distillation import Loss, combined_loss
from bitsmith.train.divergence import check_parameters, loss_diverged
from bitsmith.train.modes import make_optimizer
from bitsmith.train.schedule import learning_rate_factor
from bitsmith.train.traces import Traces


class Run:
    """A model, its data, its optimizer and a step counter. ``step`` is the number of steps done."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        config: TrainConfig,
        *,
        methods: Sequence[Method],
        task_loss: Loss,
        device: torch.device,
        precision: str,
        optimizer: torch.optim.Optimizer | None = None,
        steps: int | None = None,
    ) -> None:
        self.model, self.batches, self.config = model, batches, config
        self.methods = sorted(methods, key=lambda method: method.turn)
        self.task_loss, self.device, self.precision = task_loss, device, precision
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(model, config) if optimizer is None else optimizer
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        for method in self.methods:
            method.optimizer_made(self.optimizer)
        self.average = Average(model, config.ema) if config.ema > 0 else None
        self.steps = config.epochs * batches.steps_per_epoch if steps is None else steps
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.traces = Traces()
        self.losses = torch.zeros(batches.steps_per_epoch, device=device)
        self.last_loss = math.nan
        self.learning_rate = 0.0
        self.seconds_before = 0.0
        self._started = time.perf_counter()
        self._check_every = 1 if device.type == "cpu" else 32
        self._checked = 0
        self._batchnorms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self._stochastic = any(quantizer.seed is not None for quantizer in sites(model).values())
        self._second_pass_of: Method | None = None
        self._may_repeat = any(type(m).after_backward is not Method.after_backward for m in self.methods)

    @property
    def seconds(self) -> float:
        """Time spent on this run, before an interruption too."""
        return self.seconds_before + time.perf_counter() - self._started

    @property
    def epoch_is_over(self) -> bool:
        """The steps of an epoch are done, and it is not in the history yet."""
        return self.step == (len(self.history) + 1) * self.batches.steps_per_epoch

    def train_step(self) -> None:
        """One optimizer step, in the order that methods are promised."""
        batch = self.batches.step(self.step)
        self._set_learning_rate()
        if self._stochastic:
            redraw(self.model, self.step)
        if isinstance(self.optimizer, ZerothOrder):
            traced = self._forward_step(batch, self.optimizer)
        else:
            traced = self._backward_step(batch)
        self.traces.add(self.step + 1, traced | self._counted())
        for method in self.methods:
            method.after_step(self.step, self.steps)
        if self.average is not None:
            self.average.update()
        self.step += 1

    def _backward_step(self, batch: list[MicroBatch]) -> dict[str, Tensor]:
        """Gradients, and the optimizer's step along them. Returns what methods tell of it."""
        random_state = self._random_state() if self._may_repeat else None
        self._clear_gradients()
        self._record(self._forward_backward(batch))
        for method in self.methods:
            method.after_backward(partial(self._second_pass, method, batch, random_state))
        for method in self.methods:
            penalty = method.penalty()
            if penalty.requires_grad:
                penalty.backward()
        traced = self._traced()
        if self.config.gradient_clip > 0:
            nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        self.optimizer.step()
        return traced

    def _forward_step(self, batch: list[MicroBatch], optimizer: ZerothOrder) -> dict[str, Tensor]:
        """The step of an optimizer that looks at losses alone, all of this batch."""

        def loss() -> Tensor:
            return sum((self._loss(part) * part.weight for part in batch), torch.zeros(()))

        self._record(torch.tensor(optimizer.step(loss)))
        return {}

    def finish_epoch(self, validation: float | Mapping[str, float] | None) -> dict[str, Any]:
        """Add the epoch just trained to the history: its record. A plain number is an accuracy."""
        self._check_losses(self.batches.steps_per_epoch)
        check_parameters(self.model, self.step, self.steps)
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": len(self.history) + 1,
            "loss": self.losses.mean().item(),
            "learning_rate": self.learning_rate,
        }
        if validation is not None:
            figures = validation if isinstance(validation, Mapping) else {"accuracy": validation}
            record |= {f"validation_{name}": float(value) for name, value in figures.items()}
        if scalars := self._method_scalars():
            record["methods"] = scalars
        self.history.append(record)
        self._checked = 0
        return record

    def _set_learning_rate(self) -> None:
        config = self.config
        factor = learning_rate_factor(
            config.schedule, self.step, self.steps, warmup=config.warmup, cooldown=config.cooldown
        )
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        self.learning_rate = config.learning_rate * factor

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:  # optimizer.zero_grad does this, and costs 20 us around it
            parameter.grad = None

    def _forward_backward(self, batch: list[MicroBatch]) -> Tensor:
        """Gradients of the mean loss over all micro-batches, and that loss (0-D, detached)."""
        total: Tensor | None = None
        for part in batch:
            if len(batch) > 1:
                for method in self.methods:
                    method.micro_batch(part.share)
            loss = self._loss(part) if len(batch) == 1 else self._loss(part) * part.weight
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def _loss(self, part: MicroBatch) -> Tensor:
        return combined_loss(
            self._forward(part).float(),
            part.y,
            part.teacher_logits,
            task_loss=self.task_loss,
            weight=self.config.distillation,
            temperature=self.config.temperature,
        )

    def _forward(self, part: MicroBatch) -> Tensor:
        with autocast(self.device, self.precision):
            logits: Tensor = self.model(part.x)
        return logits

    def _second_pass(self, method: Method, batch: list[MicroBatch], random_state: Any) -> Tensor:
        """The closure of ``after_backward``: the same function as the first pass, dropout masks included."""
        if self._second_pass_of not in (None, method):
            raise RecipeError(
                "only one method of a run can make a second pass: it clears the gradients of the others",
                where="methods",
                got=f"{type(self._second_pass_of).__name__} and {type(method).__name__}",
                remedy="Drop one of them",
            )
        self._second_pass_of = method
        self._clear_gradients()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), frozen_statistics(self._batchnorms):
            self._set_random_state(random_state)
            return self._forward_backward(batch)

    def _record(self, loss: Tensor) -> None:
        index = self.step % self.batches.steps_per_epoch
        self.losses[index] = loss
        if (index + 1) % self._check_every == 0:
            self._check_losses(index + 1)

    def _check_losses(self, end: int) -> None:
        """Read this epoch's losses up to ``end`` (exclusive); TrainingDiverged names the first bad step."""
        for index, loss in enumerate(self.losses[self._checked : end].tolist(), start=self._checked):
            if not math.isfinite(loss):
                raise self._diverged(len(self.history) * self.batches.steps_per_epoch + index, loss)
            self.last_loss = loss
        self._checked = end

    def _diverged(self, step: int, loss: float) -> TrainingDiverged:
        batch = self.batches.step(step)  # made again, the same to the last bit
        with frozen_statistics(self._batchnorms):
            return loss_diverged(
                self.model,
                [part.x for part in batch],
                lambda: [self._forward(part) for part in batch],
                loss,
                step,
                self.steps,
            )

    def _traced(self) -> dict[str, Tensor]:
        return {
            f"{type(method).__name__}.{name}": value
            for method in self.methods
            for name, value in method.traces().items()
        }

    def _counted(self) -> dict[str, Tensor]:
        """What an optimizer of codes counted in its step: the shares that moved, and that an end held."""
        told = {name: getattr(self.optimizer, name, None) for name in ("saturated", "moved")}
        kind = type(self.optimizer).__name__
        return {f"{kind}.{name}": torch.tensor(value) for name, value in told.items() if value is not None}

    def _method_scalars(self) -> dict[str, float]:
        """The scalars of the methods as the epoch leaves them."""
        return {
            f"{type(method).__name__}.{name}": value.item()
            for method in self.methods
            for name, value in method.scalars().items()
        }

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set_random_state(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def state_dict(self) -> dict[str, Any]:
        """All that decides how the run goes on; the data position follows from ``step``."""
        return {
            "step": self.step,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "methods": [dict(method.state_dict()) for method in self.methods],
            "average": None if self.average is None else self.average.state_dict(),
            "random": self._random_state(),
            "history": self.history,
            "traces": self.traces.state_dict(),
            "losses": self.losses,
            "precision": self.precision,
            "learning_rate": self.learning_rate,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; the caller has checked that it fits."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for method, saved in zip(self.methods, state["methods"], strict=True):
            method.load_state_dict(saved)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._set_random_state(state["random"])
        self.losses.copy_(state["losses"])
        self.step, self.history = state["step"], state["history"]
        if "traces" in state:  # not in the checkpoints of before they were kept
            self.traces.load_state_dict(state["traces"])
        self.learning_rate, self.seconds_before = state["learning_rate"], state["seconds"]


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast, or nothing at all: a disabled autocast still costs time in a 2 ms step."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextlib.contextmanager
def frozen_statistics(batchnorms: Sequence[_BatchNorm]) -> Iterator[None]:
    """BatchNorm normalises by the batch as in training, but leaves its running statistics alone."""
    tracking = [module.track_running_stats for module in batchnorms]
    for module in batchnorms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module, value in zip(batchnorms, tracking, strict=True):
            module.track_running_stats = value
