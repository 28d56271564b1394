"""`Data`: labelled images in memory, in three splits, checked once when they are made.

Images are float32 in 0..1 or uint8 (read as value / 255); the normalisation by mean and std sits inside the
model. Where the images come from is in data.py and folder.py, what all data have in common in examples.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.tasks.adversarial import ATTACKS, RADII, Attack, attacked
from bitsmith.tasks.augment import Augmentation
from bitsmith.tasks.examples import SPLITS
from bitsmith.tasks.labelled import Labelled, check_labels
from bitsmith.tasks.shifts import CORRUPTIONS, DEFAULT, Shift, generator_of, shifted

MISREAD = 24  # test images shown in the report
ATTACKED = 100  # the first attack's number: seeds of its own, however many corruptions there will be


@dataclass(frozen=True, eq=False)
class Data(Labelled):
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
    default_shifts: ClassVar[tuple[str, ...]] = DEFAULT

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

    def pictured(self, answers: Tensor) -> dict[str, Any]:
        """The first test images that are misread, and their rows."""
        misread = (answers != self.test_y).nonzero().flatten()[:MISREAD]
        return {"images": self.test_x[misread].numpy(), "image_rows": misread.numpy()}

    def shifts(self) -> tuple[Shift, ...]:
        """All corruptions (shifts.py), then all attacks (adversarial.py)."""
        corrupted = (Shift(name, "corruptions", partial(self._corrupted, name)) for name in CORRUPTIONS)
        attacked = (
            Shift(name, "adversarial", partial(self._attacked, number, attack), attacks=against)
            for number, (name, (attack, against)) in enumerate(ATTACKS.items())
        )
        return *corrupted, *attacked

    def _corrupted(
        self, name: str, severity: int, seed: int, model: nn.Module | None
    ) -> tuple[Tensor, Tensor]:
        return shifted(name, self.test_x, severity, seed), self.test_y

    def _attacked(
        self, number: int, attack: Attack, severity: int, seed: int, model: nn.Module | None
    ) -> tuple[Tensor, Tensor]:
        assert model is not None
        generator, radius = generator_of(ATTACKED + number, severity, seed), RADII[severity - 1]
        images = attacked(attack, model, self.test_x, self.test_y, radius, generator, self.batch_rows)
        return images, self.test_y


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
