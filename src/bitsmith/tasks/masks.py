"""`MaskData`: images with a label for every pixel, in three splits, checked once when they are made.

Segmentation asks of its data what classification does, with maps (N, H, W) for labels; a pixel without a
label is IGNORED (files mark it by a number of their own, 255 by custom, see mask_folder.py). Metrics are in
segmentation.py; shifts are those of shifts.py that leave every pixel where it is.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.files import write_atomic
from bitsmith.quantization.layers import in_eval_mode
from bitsmith.tasks import segmentation
from bitsmith.tasks.augment import Augmentation, PairAugmentation
from bitsmith.tasks.classification import to_float
from bitsmith.tasks.dataset import check_images
from bitsmith.tasks.examples import SPLITS, Examples
from bitsmith.tasks.shifts import Shift, shifted
from bitsmith.train.distillation import IGNORED

LOGITS = 2**24  # of one forward outside of training: 64 MB
COMPARED = 2**26  # logits of an exported file that are compared
SHOWN, SIDE = 8, 160  # test images in the report, and the most pixels of their longer side
IN_PLACE = (  # shifts that move no pixel; a run measures the first three
    *("noise", "blur", "contrast", "shot_noise", "impulse_noise"),
    *("defocus_blur", "brightness", "pixelate", "jpeg"),
)
UNLABELLED = 255  # in masks.npz


class Answers(NamedTuple):
    """What a report shows of a model: IoU of each class, and answers (SHOWN, H, W) to the first images."""

    iou: Tensor
    pictures: Tensor


@dataclass(frozen=True, eq=False)
class MaskData(Examples):
    """Images (N, C, H, W), float32 or uint8, with masks (N, H, W) int64 in 0..len(classes)-1 or IGNORED.

    augment_both moves images and masks alike while training. ``val_x`` may be empty; the other splits may
    not. Raises DataError where anything is amiss, as an image without a single label.
    """

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    name: str = "masks"
    augment_both: PairAugmentation | None = None
    augment: Augmentation | None = field(default=None, init=False)

    unit: ClassVar[str] = "images"
    figures: ClassVar[tuple[str, ...]] = ("mean_iou", "accuracy")
    default_shifts: ClassVar[tuple[str, ...]] = IN_PLACE[:3]

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(str(c) for c in self.classes))
        for split in SPLITS:
            images, masks = self.split(split)
            check_images(images, where=f"{self.name}: {split}_x", may_be_empty=split == "val")
            check_masks(masks, images, self.classes, where=f"{self.name}: {split}_y")
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

    @property
    def batch_rows(self) -> int:
        """As many images as their logits allow."""
        return min(self.most_rows, max(1, LOGITS // (len(self.classes) * self.train_y[0].numel())))

    def inputs(self, x: Tensor) -> Tensor:
        """(N, C, H, W) float32."""
        return to_float(x)

    def evaluate(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
        """Mean IoU, share of the pixels that are right, and mean cross-entropy of a pixel."""
        return segmentation.evaluate(model, x, y, self.batch_rows)

    def score(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        """The same, of logits (N, classes, H, W)."""
        return segmentation.score(outputs, y)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """The mean IoU."""
        return {"mean_iou": self.evaluate(model, *self.validation())["mean_iou"]}

    def rank(self, standing: Mapping[str, float]) -> tuple[float, ...]:
        """The one of the higher mean IoU; of those that draw, the one of the lower loss."""
        return standing["validation_mean_iou"], -standing["validation_loss"]

    def answers(self, model: nn.Module) -> tuple[dict[str, float], Answers]:
        """The metrics, and what the report shows."""
        found, each, pictures = segmentation.answers(model, self.test_x, self.test_y, SHOWN, self.batch_rows)
        return found, Answers(each, pictures)

    def write_answers(self, out: Path, answers: Mapping[str, Answers]) -> None:
        """masks.npz: the first test images, their masks and what each model makes of them, thinned to SIDE
        pixels; and each model's IoU of every class."""
        step = math.ceil(max(self.train_x.shape[2:]) / SIDE)
        images, truth = self.test_x[:SHOWN, :, ::step, ::step], self.test_y[:SHOWN, ::step, ::step]
        arrays: dict[str, Any] = {
            "images": images.numpy(),
            "truth": truth.where(truth != IGNORED, UNLABELLED).numpy().astype(np.uint8),
            "classes": np.array(self.classes),
        }
        for name, found in answers.items():
            arrays[name] = found.pictures[:, ::step, ::step].numpy().astype(np.uint8)
            arrays[f"iou_{name}"] = found.iou.numpy()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomic(out / "masks.npz", buffer.getvalue())

    def shifts(self) -> tuple[Shift, ...]:
        """The corruptions that move no pixel, so that masks stay as they are."""
        return tuple(Shift(name, "corruptions", partial(self._corrupted, name)) for name in IN_PLACE)

    def _corrupted(
        self, name: str, severity: int, seed: int, model: nn.Module | None
    ) -> tuple[Tensor, Tensor]:
        return shifted(name, self.test_x, severity, seed), self.test_y

    def verified(self) -> tuple[Tensor, Tensor]:
        """As many test images as their logits allow."""
        rows = max(1, COMPARED // (len(self.classes) * self.train_y[0].numel()))
        return self.inputs(self.test_x[:rows]), self.test_y[:rows]

    def facts(self) -> dict[str, Any]:
        """The task, its classes, and how many images were tested."""
        return {"task": "segmentation", "classes": list(self.classes), "test_images": len(self.test_x)}

    def check(self, model: nn.Module, calibration_samples: int) -> None:
        """Whether ``model`` gives a logit for every class and pixel."""
        with torch.no_grad(), in_eval_mode(model):
            shape = tuple(model(self.example()).shape)
        expected = (1, len(self.classes), *self.train_y.shape[1:])
        if shape != expected:
            raise DataError(
                "the model does not give logits for every class and pixel",
                where=f"data {self.name}",
                got=f"outputs of shape {shape}",
                expected=f"{expected}: (N, classes, height, width)",
                remedy=f"Use a model for segmentation, such as unet, with classes: {len(self.classes)}",
            )


def check_masks(masks: Tensor, images: Tensor, classes: tuple[str, ...], where: str) -> None:
    """Raise DataError unless ``masks`` is (N, H, W) int64 of the images' size, in 0..len(classes)-1 or
    IGNORED, with a label in every mask."""
    expected = (len(images), *images.shape[2:])
    if masks.dtype != torch.int64 or tuple(masks.shape) != expected:
        raise DataError(
            "masks have the wrong form",
            where=where,
            got=f"{masks.dtype} of shape {tuple(masks.shape)}",
            expected=f"int64 of shape {expected}",
        )
    if not 2 <= len(classes) <= UNLABELLED:
        raise DataError(
            "this is no number of classes", where=where, got=len(classes), expected=f"2 to {UNLABELLED}"
        )
    flat = masks.flatten(1)
    wrong = ((flat < 0) | (flat >= len(classes))) & (flat != IGNORED)
    if bool(wrong.any()):
        row = int(wrong.any(1).nonzero()[0])
        raise DataError(
            "a label is out of range",
            where=where,
            got=f"{int(flat[row][wrong[row]][0])} in mask {row}",
            expected=f"0 to {len(classes) - 1}, one of {len(classes)} classes, or {IGNORED} for none",
        )
    if bool((empty := (flat == IGNORED).all(1)).any()):  # its loss would be 0/0
        raise DataError(
            "a mask has no pixel with a label",
            where=where,
            got=f"none in mask {int(empty.nonzero()[0])}",
            expected="at least one",
            remedy="Leave this image out",
        )
