"""`Data`: labelled images in memory, in three splits, checked once when they are made.

Images are float32 in 0..1 or uint8 (read as value / 255); the normalisation by mean and std sits inside the
model. Where the images come from is in data.py and folder.py, what all data have in common in examples.py.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.files import write_atomic
from bitsmith.tasks import classification
from bitsmith.tasks.augment import Augmentation
from bitsmith.tasks.classification import to_float
from bitsmith.tasks.examples import SPLITS, Examples
from bitsmith.tasks.shifts import evaluate_shifts

MISREAD = 24  # test images shown in the report


@dataclass(frozen=True, eq=False)
class Data(Examples):
    """Images (N, C, H, W), float32 or uint8, with labels (N,) int64 in 0..len(classes)-1.

    ``val_x`` may be empty (N = 0); the other splits may not. Raises DataError where anything is amiss.
    """

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    name: str = "data"
    augment: Augmentation | None = None

    unit: ClassVar[str] = "images"
    figures: ClassVar[tuple[str, ...]] = ("accuracy",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(str(c) for c in self.classes))
        for split in SPLITS:
            images, labels = getattr(self, f"{split}_x"), getattr(self, f"{split}_y")
            check_images(images, where=f"{self.name}: {split}_x", may_be_empty=split == "val")
            check_labels(labels, len(images), self.classes, where=f"{self.name}: {split}_y")
            if images.shape[1:] != self.train_x.shape[1:]:
                raise DataError(
                    "the splits differ in image size",
                    where=f"{self.name}: {split}_x",
                    got=f"{tuple(images.shape[1:])}",
                    expected=f"{tuple(self.train_x.shape[1:])} as in train_x",
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return tuple(self.train_x.shape[1:])

    def inputs(self, x: Tensor) -> Tensor:
        """(N, C, H, W) float32."""
        return to_float(x)

    def evaluate(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
        """Accuracy and mean cross-entropy."""
        return classification.evaluate(model, x, y, self.batch_rows)

    def score(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        """The same, of logits (N, classes)."""
        return classification.score(outputs, y)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """The accuracy."""
        return {"accuracy": self.evaluate(model, *self.validation())["accuracy"]}

    def rank(self, standing: Mapping[str, float]) -> tuple[float, ...]:
        """The more accurate; of those as accurate, as happens on a small split, the one of the lower loss."""
        return standing["validation_accuracy"], -standing["validation_loss"]

    def answers(self, model: nn.Module) -> tuple[dict[str, float], Tensor]:
        """The metrics, and the class (N,) that each test image is taken for."""
        logits = classification.predict(model, self.test_x, self.batch_rows)
        return self.score(logits, self.test_y), logits.argmax(1)

    def write_answers(self, out: Path, answers: Mapping[str, Tensor]) -> None:
        """predictions.npz: labels, answers, and the first test images that the quantized model misreads."""
        misread = (answers["quantized"] != self.test_y).nonzero().flatten()[:MISREAD]
        arrays: dict[str, Any] = {
            "labels": self.test_y.numpy(),
            "images": self.test_x[misread].numpy(),
            "image_rows": misread.numpy(),
            "classes": np.array(self.classes),
            **{name: rows.numpy() for name, rows in answers.items()},
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomic(out / "predictions.npz", buffer.getvalue())

    def shifts(self, model: nn.Module) -> dict[str, float]:
        """Noise, blur, contrast, rotation, translation (shifts.py)."""
        return evaluate_shifts(model, self)


def check_images(images: Tensor, where: str, may_be_empty: bool = False) -> None:
    """Raise DataError unless ``images`` is (N, C, H, W), float32 or uint8, finite, and not empty."""
    if images.ndim != 4:
        raise DataError(
            "images have the wrong number of dimensions",
            where=where,
            got=f"shape {tuple(images.shape)}",
            expected="(N, C, H, W)",
        )
    if images.dtype not in (torch.float32, torch.uint8):
        raise DataError(
            "images have the wrong dtype", where=where, got=str(images.dtype), expected="float32 or uint8"
        )
    if len(images) == 0 and not may_be_empty:
        raise DataError("there are no images", where=where, got="0 rows", expected="at least one")
    if images.dtype == torch.float32 and not bool(images.isfinite().all()):
        bad = int((~images.isfinite()).flatten(1).any(1).nonzero()[0])
        raise DataError(
            "there are NaN or infinite values",
            where=where,
            got=f"the first in image {bad}",
            expected="finite numbers",
            remedy="Clean or drop these images",
        )


def check_labels(labels: Tensor, count: int, classes: tuple[str, ...], where: str) -> None:
    """Raise DataError unless ``labels`` is (count,) int64 in 0..len(classes)-1."""
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise DataError(
            "labels have the wrong form",
            where=where,
            got=f"{labels.dtype} of shape {tuple(labels.shape)}",
            expected="int64 of shape (N,)",
        )
    if len(labels) != count:
        raise DataError("labels and images differ in number", where=where, got=len(labels), expected=count)
    wrong = (labels < 0) | (labels >= len(classes))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise DataError(
            "a label is out of range",
            where=where,
            got=f"{int(labels[row])} in row {row}",
            expected=f"0 to {len(classes) - 1}, one of {len(classes)} classes",
            remedy="Renumber the labels from 0, or say how many classes there are",
        )


def hold_out(labels: Tensor, share: float, seed: int, where: str) -> tuple[Tensor, Tensor]:
    """Rows (kept, held out): a random ``share`` of every class is held out; the same for the same seed."""
    if not 0 <= share < 1:
        raise DataError("the held-out share is impossible", where=where, got=share, expected="0 <= share < 1")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    # Row k of the class-sorted order is held out where the running total k·share passes an integer: each
    # class gives its share, to within one image.
    steps = torch.arange(len(labels) + 1, dtype=torch.float64).mul(share).floor()
    held = steps[1:] > steps[:-1]
    return order[~held].sort().values, order[held].sort().values
