"""`Examples`: what a job asks of its data, whatever they are: three splits, how a model is measured, answers.

`Data` (images, dataset.py), `MaskData` (images with a label for every pixel, masks.py) and `TextData`
(text.py; with answers, problems.py) are the kinds. Whoever trains, calibrates, compares and delivers goes
through this and never asks which of them it has. All of a small data set lives in tensors, so that shuffling,
augmentation and resuming are index arithmetic with one generator; torch's DataLoader would add worker
processes and hidden random states.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.tasks.augment import Augmentation, PairAugmentation
from bitsmith.tasks.factory import suggestion
from bitsmith.tasks.shifts import Shift

SPLITS = ("train", "val", "test")


class Examples(ABC):
    """Inputs and targets (N, ...) in three splits. ``val`` may be empty; the other splits may not."""

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    name: str
    augment: Augmentation | None
    augment_both: PairAugmentation | None = None  # of inputs and targets alike

    unit: ClassVar[str]  # what a row is, in the plural
    figures: ClassVar[tuple[str, ...]]  # the metrics that stand for a model, the most important first
    default_shifts: ClassVar[tuple[str, ...]] = ()  # the names (or suites) of those that a run measures
    most_rows: int = 256  # of one forward outside of training

    # ---- rows

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of "train", "val" or "test", as they are stored."""
        if name not in SPLITS:
            raise DataError(f"no split {name!r}", where=self.name, remedy=suggestion(name, list(SPLITS)))
        return getattr(self, f"{name}_x"), getattr(self, f"{name}_y")

    @property
    def batch_rows(self) -> int:
        """Rows of one forward outside of training."""
        return self.most_rows

    def at_most(self, rows: int) -> Self:
        """The same data, of which no forward outside of training takes more than ``rows`` at once."""
        found = copy.copy(self)
        object.__setattr__(found, "most_rows", rows)  # the kinds of data are frozen
        return found

    def validation(self) -> tuple[Tensor, Tensor]:
        """The validation split; the training split where there is none."""
        return self.split("val" if len(self.val_x) else "train")

    def example(self, count: int = 1) -> Tensor:
        """The first ``count`` training inputs as the model takes them."""
        return self.inputs(self.train_x[:count])

    def batches(
        self, split: str, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs as the model takes them, targets), batch by batch; the last one may be smaller.

        Without a generator in stored order. With one: shuffled by it, and the training split augmented.
        """
        x, y = self.split(split)
        order = None if generator is None else torch.randperm(len(x), generator=generator)
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
            batch, targets = self.inputs(x[rows]), y[rows]
            if generator is not None and split == "train":
                batch = batch if self.augment is None else self.augment(batch, generator)
                if self.augment_both is not None:
                    batch, targets = self.augment_both(batch, targets, generator)
            yield batch, targets

    def drawn(self, count: int, seed: int, batch_size: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Batches of up to ``count`` training rows, drawn at random: stored order may be by class."""
        rows = torch.randperm(len(self.train_x), generator=torch.Generator().manual_seed(seed))[:count]
        parts = rows.split(min(batch_size or self.batch_rows, self.batch_rows))
        return [(self.inputs(self.train_x[part]), self.train_y[part]) for part in parts]

    def as_trained(self, count: int, seed: int) -> list[Tensor]:
        """About ``count`` training inputs as training sees them, in whole batches: shuffled and augmented.

        Statistics of plain images fit weights that were trained on augmented ones badly (docs/findings.md).
        """
        size = min(self.batch_rows, len(self.train_x))
        batches = self.batches("train", size, torch.Generator().manual_seed(seed))
        wanted = max(1, min(count, len(self.train_x)) // size)
        return [x for x, _ in itertools.islice(batches, wanted)]

    def limited(self, count: int) -> Self:
        """The same data with at most ``count`` rows in each split (a trial run; a timing)."""
        cut = {
            f"{split}_{part}": getattr(self, f"{split}_{part}")[:count] for split in SPLITS for part in "xy"
        }
        return replace(self, **cut)  # type: ignore[type-var]

    # ---- what the kinds of data differ in

    @abstractmethod
    def inputs(self, x: Tensor) -> Tensor:
        """Stored inputs as the model takes them."""

    @abstractmethod
    def evaluate(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
        """The metrics of ``model`` on rows: all of `figures`, "accuracy" and "loss" among them."""

    @abstractmethod
    def score(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        """The metrics of outputs that are already there, e.g. a runtime's."""

    @abstractmethod
    def validate(self, model: nn.Module) -> dict[str, float]:
        """What is watched while training, of the `validation` rows: the most important figure."""

    @abstractmethod
    def rank(self, standing: Mapping[str, float]) -> tuple[float, ...]:
        """A contender's validation_accuracy, validation_loss and most important figure on validation, such as
        validation_mean_iou, as a rank: the greater one is delivered."""

    @abstractmethod
    def answers(self, model: nn.Module) -> tuple[dict[str, float], Any]:
        """(metrics on the test split, what `write_answers` keeps of the model's behaviour there)."""

    @abstractmethod
    def write_answers(self, out: Path, answers: Mapping[str, Any]) -> None:
        """Write the answers of the models "float" and "quantized" into a run directory, for its report."""

    def shifts(self) -> tuple[Shift, ...]:
        """The ways in which the test split might look elsewhere; none where no such way is known."""
        return ()

    def verified(self) -> tuple[Tensor, Tensor]:
        """The (inputs, targets) that an exported file is compared on: of the test split, what fits memory."""
        return self.inputs(self.test_x), self.test_y

    def facts(self) -> dict[str, Any]:
        """What metrics.json should say of these data besides their name."""
        return {}

    def check(self, model: nn.Module, calibration_samples: int) -> None:  # noqa: B027
        """Raise DataError where ``model`` cannot take these inputs, or they are too few to calibrate on."""
