"""`Data`: labelled images in memory, in three splits, checked once when they are made.

All of a small data set lives in tensors, so that shuffling, augmentation and resuming are index arithmetic
with one generator; torch's DataLoader would add worker processes and hidden random states. Images are
float32 in 0..1 or uint8 (read as value / 255); the normalisation by mean and std sits inside the model.
Where the images come from is in data.py and folder.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitsmith.errors import DataError
from bitsmith.tasks.augment import Augmentation
from bitsmith.tasks.factory import suggestion

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Data:
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

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """(images, labels) of "train", "val" or "test", as they are stored."""
        if name not in SPLITS:
            raise DataError(f"no split {name!r}", where=self.name, remedy=suggestion(name, list(SPLITS)))
        return getattr(self, f"{name}_x"), getattr(self, f"{name}_y")

    def example(self, count: int = 1) -> Tensor:
        """The first ``count`` training images as the model takes them: (count, C, H, W) float32."""
        return to_float(self.train_x[:count])

    def batches(
        self, split: str, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(images as float32, labels), batch by batch; the last one may be smaller.

        Without a generator in stored order. With one: shuffled by it, and the training split augmented.
        """
        images, labels = self.split(split)
        order = None if generator is None else torch.randperm(len(images), generator=generator)
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
            batch = to_float(images[rows])
            if generator is not None and self.augment is not None and split == "train":
                batch = self.augment(batch, generator)
            yield batch, labels[rows]

    def limited(self, count: int) -> Data:
        """The same data with at most ``count`` images in each split (a trial run; a timing)."""
        cut = {
            f"{split}_{part}": getattr(self, f"{split}_{part}")[:count] for split in SPLITS for part in "xy"
        }
        return replace(self, **cut)


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in 0..1; float images unchanged."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


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
