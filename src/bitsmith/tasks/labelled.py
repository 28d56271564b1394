"""`Labelled`: what images (dataset.py) and tables (tabular.py) have in common: each row is of a class."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.files import write_atomic
from bitsmith.tasks import classification
from bitsmith.tasks.examples import Examples


class Labelled(Examples):
    """Inputs (N, ...) float32 or uint8 with labels (N,) int64 in 0..len(classes)-1."""

    classes: tuple[str, ...]

    figures: ClassVar[tuple[str, ...]] = ("accuracy",)

    def inputs(self, x: Tensor) -> Tensor:
        """float32; uint8 as fractions of 255."""
        return classification.to_float(x)

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
        """The metrics, and the class (N,) that each test row is taken for."""
        logits = classification.predict(model, self.test_x, self.batch_rows)
        return self.score(logits, self.test_y), logits.argmax(1)

    def write_answers(self, out: Path, answers: Mapping[str, Tensor]) -> None:
        """predictions.npz: labels, answers, names of the classes, and what `pictured` adds."""
        arrays: dict[str, Any] = {
            "labels": self.test_y.numpy(),
            **self.pictured(answers["quantized"]),
            "classes": np.array(self.classes),
            **{name: rows.numpy() for name, rows in answers.items()},
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomic(out / "predictions.npz", buffer.getvalue())

    def pictured(self, answers: Tensor) -> dict[str, Any]:
        """Arrays by which the report shows rows that are misread; none where rows cannot be looked at."""
        return {}


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
