"""`adapt`: trains an exported model on a user's data, on the integer codes that its file holds; or, by
forward passes alone, what lies beside them.

    opened      codes and scales become integer layers, or stay the packed ones of inference; no float weight
                exists, from here on, but of the layer that runs
    planned     what it needs in memory, and the batch that fits a limit (adapt_memory)
    trained     the one loop of `train`, whose checkpoint lies beside the model
    written     the model's own tensors, in one step: a reader sees the old model or the new one

Beside the model lie adapted.json, which says what it was adapted from and how, and while the work lasts
adapting.safetensors, its checkpoint. The first is begun before the work and finished before the model is
replaced, so that whoever finds them knows which of the three has happened. Nothing here opens a connection.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitsmith.errors import FormatError, RecipeError, RunError, TrainingDiverged, check_choice, check_value
from bitsmith.export.delta import model_digest, share_changed, write_delta
from bitsmith.export.native import CONFIG, TENSORS, read_stored, write_stored
from bitsmith.files import read_json, write_json
from bitsmith.optim import IntegerOptimizer, ZerothOrder
from bitsmith.recipe.adapt_memory import Need, plan_memory, return_freed
from bitsmith.recipe.adapt_model import Opened, check_data, check_model, digest_of, open_model
from bitsmith.recipe.directory import hold
from bitsmith.recipe.progress import Event, Progress, silent
from bitsmith.recipe.schema import relocated
from bitsmith.recipe.threads import threads_for
from bitsmith.report.words import size
from bitsmith.tasks import Examples, load
from bitsmith.train import Progress as TrainProgress
from bitsmith.train import TrainConfig, train
from bitsmith.train.checkpoint import tensor_digest
from bitsmith.train.modes import make_optimizer, usual_rate

EPOCHS = {"integer": 5, "zeroth_order": 30}  # forward passes alone learn less from each batch
RECORD, CHECKPOINT = "adapted.json", "adapting.safetensors"
STAGE = "adapt"


@dataclass(frozen=True)
class AdaptSettings:
    """How to train. epochs, learning_rate: None is what the mode usually takes. steps: instead of epochs.
    memory_limit: bytes, beside those of libraries. even_if_worse: write what is worse on the validation
    split, too. mode: ``integer``, codes and all else by gradients; ``zeroth_order``, scales, biases and norms
    by forward passes."""

    epochs: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    batch_size: int = 32
    seed: int = 0
    memory_limit: int | None = None
    even_if_worse: bool = False
    mode: str = "integer"

    def __post_init__(self) -> None:
        steps, limit = self.steps, self.memory_limit
        check_choice("--mode", self.mode, tuple(EPOCHS))
        for name, usual in {"epochs": EPOCHS[self.mode], **usual_rate({"mode": self.mode})}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)
        assert self.epochs is not None
        check_value("--steps", steps, steps is None or steps >= 1, "a whole number >= 1")
        check_value("--epochs", self.epochs, self.epochs >= 1, "a whole number >= 1")
        check_value("--memory-limit", limit, limit is None or limit > 0, "more than nothing")
        self.config()

    def config(self, batch_size: int | None = None) -> TrainConfig:
        """The same as the loop of `train` takes it."""
        assert self.epochs is not None
        assert self.learning_rate is not None
        try:
            return TrainConfig(
                weight_decay=0.0,
                mode=self.mode,
                epochs=self.epochs,
                batch_size=batch_size or self.batch_size,
                learning_rate=self.learning_rate,
                seed=self.seed,
                device="cpu",
            )
        except RecipeError as error:
            options = {
                "train.learning_rate": "--lr",
                "train.batch_size": "--batch-size",
                "train.seed": "--seed",
            }
            raise relocated(error, options.get(error.where, error.where)) from None


def adapt(
    exported: str | Path,
    data: str | Examples,
    settings: AdaptSettings | None = None,
    *,
    out: str | Path | None = None,
    delta: str | Path | None = None,
    resume: bool = False,
    factory: str | None = None,
    progress: Progress | None = None,
    checkpoint_seconds: float = 10.0,
) -> dict[str, Any]:
    """Train the model in the folder ``exported`` on ``data`` (a name as in recipes), and write it back, or to
    the folder ``out``. Returns what adapted.json holds: the test split's figures before and after among it.

    delta: a file for the changed codes alone. factory: ``module:factory`` of a model that is not built in.
    Raises FormatError for what is no model of ours, DataError, RecipeError (a limit that is too low, a
    folder that is taken, other settings than those to be resumed), SiteError, Interrupted, RunError (worse
    than before on the validation split: nothing is written).
    """
    source, settings = Path(exported), settings or AdaptSettings()
    place, tell = source if out is None else Path(out), progress or silent
    check_model(source)
    if settings.memory_limit is not None:
        return_freed()
    with _held(place, source, settings, resume) as finished:
        if finished is not None:
            return finished
        examples = load(data, seed=settings.seed, model=factory or "") if isinstance(data, str) else data
        rows = f"{len(examples.train_x)} training and {len(examples.test_x)} test {examples.unit}"
        tell(Event("data", note=f"{examples.name}: {rows}"))
        with torch.random.fork_rng(devices=[]):
            opened = open_model(source, factory, settings.mode)
            if opened.text != opened.base and (out is None or delta is not None):
                raise RecipeError(
                    "weights of this model have one scale for all channels, and get one for each",
                    where=str(source),
                    remedy="Give --out for the new model, and no --delta",
                )
            return _adapt(source, place, opened, examples, settings, delta, resume, tell, checkpoint_seconds)


def _adapt(
    source: Path,
    place: Path,
    opened: Opened,
    data: Examples,
    settings: AdaptSettings,
    delta: str | Path | None,
    resume: bool,
    tell: Progress,
    checkpoint_seconds: float,
) -> dict[str, Any]:
    model, started = opened.model, time.perf_counter()
    answers, products = check_data(model, data, f"data {data.name}")
    need = plan_memory(
        model,
        data,
        partial(_optimizer, settings),
        settings.batch_size,
        settings.memory_limit,
        answers=answers,
        skeleton=opened.skeleton,
    )
    for line in (*opened.notes, *_stated(opened, need, settings)):
        tell(Event(STAGE, 0, 1, note=line.strip()))
    data = data.at_most(need.batch_size)
    before, rank = data.evaluate(model, data.test_x, data.test_y), _rank(data, model)
    earlier, seen = read_record(place if resume else source), tensor_digest(data.train_x)
    if resume and earlier is not None and earlier["data_digest"] != seen:
        raise RecipeError(
            "the adaptation here was begun with other data", where=f"--resume {place}", got=data.name
        )
    record = _begin(earlier, opened, settings) | {"data_digest": seen}
    write_json(place / RECORD, record)

    optimizer = _optimizer(settings, model)
    saturated: list[float] = []

    def show(now: TrainProgress) -> None:
        if now.record is None:
            saturated.append(optimizer.saturated)
        if now.record or now.step % 20 == 0:
            tell(Event(STAGE, now.step, now.steps + 1, {"loss": now.loss}))

    try:
        with threads_for(products * need.batch_size):
            result = train(
                model,
                data.train_x,
                data.train_y,
                settings.config(need.batch_size),
                augment=data.augment,
                augment_both=data.augment_both,
                progress=show,
                checkpoint=place / CHECKPOINT,
                checkpoint_seconds=checkpoint_seconds,
                resume=resume,
                optimizer=optimizer,
                steps=settings.steps,
            )
    except TrainingDiverged as error:
        remedy = "The model is as it was. Lower --lr, and start anew without its checkpoint"
        raise TrainingDiverged(error.what, where=error.where, remedy=remedy) from None
    if isinstance(optimizer, IntegerOptimizer):
        optimizer.detach()
    if _rank(data, model) < rank and not settings.even_if_worse:
        _withdraw(place, earlier)
        raise RunError(
            "the model got worse on the validation split, and is left as it was",
            where="adapt",
            remedy="Lower --lr, give more examples, or give --even-if-worse",
        )
    after = data.evaluate(model, data.test_x, data.test_y)

    tensors = opened.tensors()
    base_tensors = read_stored(source)[1]
    record |= {
        "result": model_digest(opened.text, tensors),
        "data": data.name,
        data.unit: len(data.train_x),
        "before": before,
        "after": after,
        "steps": result.steps,
        "batch_size": need.batch_size,
        "saturated": sum(saturated) / max(len(saturated), 1),
        "changed": share_changed(opened.text, base_tensors, tensors),
        "layers": {"trained": list(opened.trained), "frozen": list(opened.frozen)},
        "float": list(opened.in_float),
        "memory": need.to_dict(),
        "seconds": time.perf_counter() - started,
    }
    if delta is not None:
        record["delta_bytes"] = write_delta(delta, opened.base, base_tensors, tensors)
    write_json(place / RECORD, record)
    write_stored(place, opened.text, tensors)
    (place / CHECKPOINT).unlink(missing_ok=True)
    tell(Event(STAGE, values={key: after[key] for key in data.figures[:1]}))
    return record


def _optimizer(
    settings: AdaptSettings, model: nn.Module, learning_rate: float | None = None
) -> IntegerOptimizer | ZerothOrder:
    made = make_optimizer(model, settings.config(), learning_rate)
    assert isinstance(made, IntegerOptimizer | ZerothOrder)
    return made


def _rank(data: Examples, model: nn.Module) -> tuple[float, ...]:
    """How a model stands on the validation split; the greater the better."""
    found = data.evaluate(model, *data.validation())
    return data.rank({f"validation_{name}": found[name] for name in ("accuracy", "loss", data.figures[0])})


def _stated(opened: Opened, need: Need, settings: AdaptSettings) -> Iterator[str]:
    """What is known before the first step."""
    parts = {"data": need.data, "model": need.model, "optimizer": need.optimizer, "a step": need.step}
    listed = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
    yield f"needs {size(need.total)} beside the libraries: {listed}, batches of {need.batch_size}"
    if need.batch_size < min(need.asked, settings.batch_size):
        yield (
            f"batches of {need.batch_size} instead of {settings.batch_size}, for the limit of "
            f"{size(settings.memory_limit or 0)}; the learning rate is unchanged"
        )
    if opened.frozen:
        yield f"frozen, as they have no integer form: {', '.join(opened.frozen)}"


# ---- what lies beside the model


@contextlib.contextmanager
def _held(
    place: Path, source: Path, settings: AdaptSettings, resume: bool
) -> Iterator[dict[str, Any] | None]:
    """Hold the folder; gives the record where the work to be resumed is finished."""
    if place.exists() and not place.is_dir():
        raise RecipeError(
            "this is a file, not a directory", where=f"--out {place}", remedy="Choose another --out"
        )
    with hold(place):
        record = read_record(place)
        if not resume:
            check_place(source, place)
            yield None
            return
        if record is None or "data_digest" not in record:
            raise RecipeError(
                "there is no adaptation to resume", where=str(place), remedy="Leave --resume out"
            )
        for key, value in asdict(settings).items():
            if record["settings"].get(key) != value:
                raise RecipeError(
                    f"the adaptation here was begun with another {key.replace('_', ' ')}",
                    where=f"--resume {place}",
                    got=value if value is not None else "none",
                    expected=record["settings"].get(key),
                    remedy="Resume without changes",
                )
        if record.get("result") and (place / CONFIG).exists() and (place / TENSORS).exists():
            if record["result"] == digest_of(place):
                (place / CHECKPOINT).unlink(missing_ok=True)
                yield record
                return
        if record["base"] != digest_of(source):
            raise FormatError(
                "this model has changed since its adaptation began",
                where=str(source),
                remedy=f"Restore it, or delete {place / CHECKPOINT} and begin anew without --resume",
            )
        yield None


def check_place(source: Path, place: Path) -> None:
    """Refuse a folder where an adaptation is unfinished, or another model lies. Raises RecipeError."""
    if (place / CHECKPOINT).exists():
        raise RecipeError(
            "an unfinished adaptation lies here",
            where=str(place / CHECKPOINT),
            remedy="Go on with --resume, or delete this file to begin anew",
        )
    if place.resolve() != source.resolve() and (place / TENSORS).exists():
        raise RecipeError("this folder holds a model", where=f"--out {place}", remedy="Choose another --out")


def read_record(place: Path) -> dict[str, Any] | None:
    """adapted.json of a folder: what the model in it was adapted from. Raises FormatError."""
    if not (place / RECORD).exists():
        return None
    record = read_json(place / RECORD, "record of an adaptation")
    if record.get("version") != 1 or not {"base", "ancestors", "settings", "result"} <= record.keys():
        raise FormatError("this record of an adaptation is not one of ours", where=str(place / RECORD))
    return record


def _withdraw(place: Path, earlier: dict[str, Any] | None) -> None:
    """Leave a folder as it was before the work began."""
    if earlier is not None and (place / TENSORS).exists():
        write_json(place / RECORD, earlier)
    else:
        (place / RECORD).unlink(missing_ok=True)
    (place / CHECKPOINT).unlink(missing_ok=True)


def _begin(earlier: dict[str, Any] | None, opened: Opened, settings: AdaptSettings) -> dict[str, Any]:
    """What is written down when the work begins. ancestors: digests that the model has had before, the oldest
    first."""
    known: list[str] = []
    if earlier is not None and opened.digest in (earlier.get("result"), earlier["base"]):
        known = list(earlier["ancestors"])
    if opened.digest not in known:
        known.append(opened.digest)
    return {
        "version": 1,
        "base": opened.digest,
        "ancestors": known,
        "settings": asdict(settings),
        "result": None,
    }
