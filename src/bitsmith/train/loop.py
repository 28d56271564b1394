"""`train`: the one loop, for the float baseline, for QAT and for fine-tuning alike.

It takes tensors and callables, and knows neither data sets nor terminals: validation and progress are
callbacks. Methods are attached and quantizers calibrated before; BatchNorm re-estimation comes after. Unlike
trainer frameworks a finished, an interrupted and a resumed run are the same run, bit for bit on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import Interrupted, RecipeError, SiteError
from bitsmith.methods.method import Method
from bitsmith.optim import IntegerOptimizer, ZerothOrder
from bitsmith.train.batches import Augment, AugmentBoth, Batches
from bitsmith.train.checkpoint import check_keys, load_checkpoint, save_checkpoint, tensor_digest
from bitsmith.train.config import TrainConfig, resolve_device
from bitsmith.train.distillation import Loss, cross_entropy
from bitsmith.train.events import Events
from bitsmith.train.modes import KEYS, make_optimizer
from bitsmith.train.precision import choose_precision
from bitsmith.train.run import Run, autocast
from bitsmith.train.signals import StopFlag, catch_signals

Validate = Callable[[], float | Mapping[str, float]]


@dataclass(frozen=True)
class Progress:
    """Where training is, told after every step; ``record`` is the history entry of an epoch just finished."""

    step: int  # steps done
    steps: int
    epoch: int  # the current one, from 1
    epochs: int
    loss: float  # the last one known: of this step on a CPU, up to 32 steps old on a GPU
    learning_rate: float
    record: dict[str, Any] | None = None


@dataclass(frozen=True)
class TrainResult:
    """What a run did; the trained weights are in the model."""

    history: list[
        dict[str, Any]
    ]  # one an epoch: step, epoch, loss (mean), learning_rate, what `validate` gave
    traces: list[dict[str, Any]]  # the methods' scalars over the steps, at most 200 of these
    steps: int
    seconds: float  # before an interruption too
    device: str
    precision: str
    resumed_at: int | None  # the step that a checkpoint was taken up at
    notes: list[str]  # what to know: the measured precision, events that could not be written


def train(
    model: nn.Module,
    train_x: Tensor,
    train_y: Tensor,
    config: TrainConfig,
    *,
    methods: Sequence[Method] = (),
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    augment: Augment | None = None,
    augment_both: AugmentBoth | None = None,
    validate: Validate | None = None,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 10.0,
    resume: bool = False,
    events: Path | None = None,
    stop: Callable[[], bool] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int | None = None,
) -> TrainResult:
    """Train ``model`` in place; it is left in eval mode, and with averaged weights where ema > 0.

    train_x (N, ...) float, or uint8 which becomes 0..1; train_y (N, ...). ``augment(x, generator)`` changes
    a batch of float inputs, ``augment_both(x, y, generator)`` inputs and targets; ``validate()`` gives an
    accuracy after each epoch, or figures by name, which the history holds as ``validation_NAME``;
    ``loss(logits, targets)`` replaces cross entropy. ``checkpoint`` is one file, written once
    ``checkpoint_seconds`` have passed since the last time, at the end, and on SIGINT, SIGTERM or when
    ``stop()`` is true after a step: those raise Interrupted. ``resume`` continues from it if it exists.
    ``optimizer`` takes the place of the config's; its learning rates are the peaks of the schedule. A config
    of another mode than float wants a model in the form of that mode (train.modes). ``steps`` takes the place
    of the config's epochs.
    Raises RecipeError, FormatError, TrainingDiverged, Interrupted.
    """
    _check_methods(model, methods)
    if optimizer is None and config.mode != "float":
        optimizer = make_optimizer(model, config)
    _check_optimizer(optimizer, config, methods)
    if config.distillation > 0 and teacher is None:
        raise RecipeError(
            "there is no teacher to learn from", where="train.distillation", got=config.distillation
        )
    device = resolve_device(config.device if config.mode == "float" else "cpu")
    fingerprint = _fingerprint(config, methods, train_x, train_y) if checkpoint else {}
    saved = (
        load_checkpoint(checkpoint, fingerprint) if resume and checkpoint and checkpoint.exists() else None
    )
    # An interrupted run goes on in the precision that it began in: a second measurement might differ.
    precision, note = (saved["precision"], "") if saved else choose_precision(config.precision, device)

    model.to(device).train()
    for method in methods:
        method.to(device)
    # Our draws (dropout) neither depend on the caller's generators nor move them.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), catch_signals() as signals:
        torch.manual_seed(config.seed)
        run = Run(
            model,
            Batches(
                train_x.to(device),
                train_y.to(device),
                batch_size=config.batch_size,
                accumulation=config.accumulation,
                seed=config.seed,
                augment=augment,
                augment_both=augment_both,
                teacher=_teacher(teacher, device, precision) if config.distillation > 0 else None,
            ),
            config,
            methods=methods,
            task_loss=loss or partial(cross_entropy, label_smoothing=config.label_smoothing),
            device=device,
            precision=precision,
            optimizer=optimizer,
            steps=steps,
        )
        if saved and checkpoint:
            _restore(run, saved, checkpoint)
        resumed_at = run.step if saved else None
        writer = Events(events, run.step)
        try:
            save = partial(_save, run, checkpoint, fingerprint)
            _loop(run, writer, signals, validate, progress, save, checkpoint_seconds, stop)
        finally:
            writer.close()
    if run.average is not None:
        run.average.copy_to_model()
    model.eval()
    notes = [text for text in (note, writer.note) if text]
    return TrainResult(
        run.history, run.traces.rows(), run.steps, run.seconds, str(device), precision, resumed_at, notes
    )


def _loop(
    run: Run,
    writer: Events,
    signals: StopFlag,
    validate: Validate | None,
    progress: Callable[[Progress], None] | None,
    save: Callable[[], bool],
    checkpoint_seconds: float,
    stop: Callable[[], bool] | None,
) -> None:
    last_save = run.seconds
    while run.step < run.steps or run.epoch_is_over:
        record = None
        if run.epoch_is_over:
            record = run.finish_epoch(validate() if validate is not None else None)
            run.model.train()  # validation left it in eval mode
            writer.epoch(record, run.losses.tolist())
        else:
            run.train_step()
        done = run.step == run.steps and not run.epoch_is_over
        if done or run.seconds - last_save >= checkpoint_seconds:
            save()
            last_save = run.seconds
        if progress is not None:
            progress(_progress(run, record))
        if signals.received or (stop is not None and stop()):
            raise _interrupted(run, signals.received, saved=save())


def _progress(run: Run, record: dict[str, Any] | None) -> Progress:
    epoch = min(run.config.epochs, run.step // run.batches.steps_per_epoch + 1)
    if record is not None:
        epoch = record["epoch"]
    return Progress(run.step, run.steps, epoch, run.config.epochs, run.last_loss, run.learning_rate, record)


def _interrupted(run: Run, signal: str, *, saved: bool) -> Interrupted:
    return Interrupted(
        f"stopped {f'by {signal} ' if signal else ''}after step {run.step} of {run.steps}"
        + ("; everything is saved" if saved else "; nothing is saved, as there is no checkpoint file"),
        where="train",
        remedy="Continue with --resume" if saved else "",
    )


def _save(run: Run, checkpoint: Path | None, fingerprint: dict[str, Any]) -> bool:
    if checkpoint is None:
        return False
    save_checkpoint(checkpoint, run.state_dict(), fingerprint)
    return True


def _restore(run: Run, saved: dict[str, Any], path: Path) -> None:
    check_keys(path, "model", saved["model"], dict(run.model.state_dict()))
    for method, state in zip(run.methods, saved["methods"], strict=True):
        check_keys(path, f"setting of {type(method).__name__}", state, dict(method.state_dict()))
    run.load_state_dict(saved)


def _fingerprint(config: TrainConfig, methods: Sequence[Method], x: Tensor, y: Tensor) -> dict[str, Any]:
    """What a checkpoint belongs to. The device may change (but then not to the last bit)."""
    settings = {
        f"train.{name}": value
        for name, value in dataclasses.asdict(config).items()
        if name != "device" and (config.mode != "float" or name not in KEYS)
    }
    return {
        **settings,
        "methods": [type(method).__name__ for method in methods],
        "data shape": list(x.shape),
        "data labels": tensor_digest(y),
    }


def _check_methods(model: nn.Module, methods: Sequence[Method]) -> None:
    """The optimizer sees the model's parameters alone, so a method's must live there."""
    known = {id(parameter) for parameter in model.parameters()}
    for method in methods:
        for name, parameter in method.named_parameters():
            if id(parameter) not in known:
                raise SiteError(
                    f"parameter {name} of this method is not in the model, so no optimizer would move it",
                    where=type(method).__name__,
                    remedy="Add it to the model in attach(), or make it a buffer",
                )


def _check_optimizer(
    optimizer: torch.optim.Optimizer | None, config: TrainConfig, methods: Sequence[Method]
) -> None:
    """Refuse what an optimizer of another kind cannot do. Raises SiteError, RecipeError."""
    if isinstance(optimizer, IntegerOptimizer):
        optimizer.check_loop(
            accumulation=config.accumulation,
            clip=config.gradient_clip or None,
            second_pass=any(type(m).after_backward is not Method.after_backward for m in methods),
        )
    if isinstance(optimizer, ZerothOrder) and (methods or config.gradient_clip):
        raise RecipeError(
            "there is no backward pass for this to work in",
            where="methods" if methods else "train.gradient_clip",
            got=", ".join(type(method).__name__ for method in methods) or config.gradient_clip,
            remedy="Leave it out, or train by gradients",
        )


def _teacher(teacher: nn.Module | None, device: torch.device, precision: str) -> Callable[[Tensor], Tensor]:
    assert teacher is not None
    teacher.to(device).eval()

    @torch.no_grad()
    def logits(x: Tensor) -> Tensor:
        with autocast(device, precision):
            return teacher(x).float()

    return logits
