"""The metrics of segmentation: a class for every pixel, mean IoU over classes, from one confusion matrix.

    IoU_c = |answered c and truly c| / |answered c or truly c|        mean IoU = mean over the classes c

counted over the pixels of a whole split, as Pascal VOC and Cityscapes count it, not image by image (which
weighs a class by how many images it is in). Pixels whose target is IGNORED count nowhere; a class that is
neither answered nor true anywhere has no IoU (0/0) and is left out of the mean, where some tools count it
as 0 or as 1. Works on any module from images (N, C, H, W) to logits (N, classes, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.quantization.layers import in_eval_mode
from bitsmith.tasks.classification import device_of, to_float
from bitsmith.train.distillation import IGNORED


def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 64) -> dict[str, float]:
    """{"mean_iou", "accuracy" (the share of pixels), "loss"} of images x (N, C, H, W), targets y (N, H, W).

    Raises DataError where no pixel has a label.
    """
    return metrics(_predicted(model, x, y, batch_size))[0]


def score(logits: Tensor, y: Tensor) -> dict[str, float]:
    """The same metrics of logits (N, classes, H, W) that are already there, e.g. a runtime's."""
    return metrics([(logits.cpu(), y)])[0]


def answers(
    model: nn.Module, x: Tensor, y: Tensor, shown: int, batch_size: int = 64
) -> tuple[dict[str, float], Tensor, Tensor]:
    """(metrics, IoU of each class (classes,), NaN where it has none, classes (shown, H, W) of the first
    images)."""
    pictures: list[Tensor] = []

    def kept() -> Iterator[tuple[Tensor, Tensor]]:
        for logits, targets in _predicted(model, x, y, batch_size):
            rest = shown - sum(map(len, pictures))
            pictures.append(logits[: max(rest, 0)].argmax(1))
            yield logits, targets

    figures, each = metrics(kept())
    return figures, each, torch.cat(pictures)


@torch.no_grad()
def _predicted(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    place = device_of(model)
    with in_eval_mode(model):
        for rows, targets in zip(x.split(batch_size), y.split(batch_size), strict=True):
            yield model(to_float(rows).to(place)).float().cpu(), targets.cpu()


def metrics(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[dict[str, float], Tensor]:
    """(metrics, IoU of each class) of batches of (logits (N, classes, H, W), targets (N, H, W))."""
    total, counts = 0.0, torch.zeros(0, 0, dtype=torch.int64)
    for logits, targets in batches:
        total += F.cross_entropy(logits.double(), targets, ignore_index=IGNORED, reduction="sum").item()
        found = confusion(logits.argmax(1), targets, logits.shape[1])
        counts = counts + found if len(counts) else found
    pixels = int(counts.sum())
    if not pixels:
        raise DataError("there is nothing to predict", where="evaluate", got="0 pixels with a label")
    each = class_iou(counts)
    figures = {
        "mean_iou": each.nanmean().item(),
        "accuracy": int(counts.trace()) / pixels,
        "loss": total / pixels,
    }
    return figures, each


def confusion(predicted: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Pixels by (truth, answer), (classes, classes) int64; those whose target is IGNORED are left out."""
    kept = targets != IGNORED
    pairs = targets[kept] * classes + predicted[kept]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def class_iou(counts: Tensor) -> Tensor:
    """IoU (classes,) float64 of a confusion matrix; NaN for a class that is neither answered nor true."""
    right = counts.diagonal().double()
    either = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return torch.where(either > 0, right / either, math.nan)
