"""Scenes of several real handwritten digits with a class for every pixel: what `digit_scenes` is made of.

Three to six digits of random sizes lie at random places on a textured grey background, none upon another;
a pixel belongs to a digit where its ink is at least a quarter, else to the background. The scenes of a split
are made of the digits of that split alone: no digit of a test scene was trained on. Everything is drawn
from one generator, so that a seed names the scenes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bitsmith.errors import DataError
from bitsmith.tasks.augment import PairAugmentation
from bitsmith.tasks.dataset import Data
from bitsmith.tasks.examples import SPLITS
from bitsmith.tasks.masks import MaskData

SMALLEST, LARGEST = 9, 12  # pixels of a digit's side
FEWEST, MOST = 3, 6  # digits of a scene
TRIES = 12  # places tried for a digit before it is left out
INK = 0.25  # of a pixel that belongs to a digit


def compose(
    digits: Data,
    counts: Mapping[str, int],
    size: int,
    seed: int,
    augment_both: PairAugmentation | None = None,
) -> MaskData:
    """Scenes of ``size`` pixels, (N, 1, size, size) uint8, as many in each split as ``counts`` says.

    digits: square grey images in 0..1. Classes are the background (0) and those of the digits (from 1).
    Raises DataError.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < LARGEST:
        raise DataError(
            "this size of scenes is impossible",
            where="data digit_scenes: size",
            got=size,
            expected=f"a whole number of pixels, at least {LARGEST}",
        )
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < (name != "val"):
            raise DataError(
                "this is no number of scenes", where=f"data digit_scenes: {name}", got=count, expected=">= 1"
            )
    generator = torch.Generator().manual_seed(seed)
    made = {name: _scenes(*digits.split(name), counts[name], size, generator) for name in SPLITS}
    return MaskData(
        *made["train"],
        *made["val"],
        *made["test"],
        classes=("background", *digits.classes),
        name="digit_scenes",
        augment_both=augment_both,
    )


def _scenes(
    images: Tensor, labels: Tensor, count: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Scenes (count, 1, size, size) uint8 of these digits (M, 1, 8, 8), and masks (count, size, size)."""
    scenes, masks = _backgrounds(count, size, generator), torch.zeros(count, size, size, dtype=torch.int64)
    sides = range(SMALLEST, LARGEST + 1)
    inks = [
        F.interpolate(images, (side, side), mode="bilinear", align_corners=False).clamp_(0, 1).squeeze(1)
        for side in sides
    ]
    numbers = torch.randint(FEWEST, MOST + 1, (count,), generator=generator).tolist()
    which = torch.randint(len(images), (count, MOST), generator=generator).tolist()
    scales = torch.randint(len(sides), (count, MOST), generator=generator).tolist()
    grey = torch.rand(count, MOST, generator=generator).mul_(0.45).add_(0.55).tolist()
    places = torch.rand(count, MOST, TRIES, 2, generator=generator).tolist()
    classes = (labels + 1).tolist()
    for scene in range(count):
        taken: list[tuple[int, int, int]] = []
        for digit in range(numbers[scene]):
            side = sides[scales[scene][digit]]
            box = _free_place(places[scene][digit], side, size, taken)
            if box is None:
                continue
            taken.append(box)
            area = (slice(box[0], box[0] + side), slice(box[1], box[1] + side))
            ink = inks[scales[scene][digit]][which[scene][digit]]
            scenes[scene][area].lerp_(torch.tensor(grey[scene][digit]), ink)
            masks[scene][area].masked_fill_(ink >= INK, classes[which[scene][digit]])
    return scenes.mul_(255).round_().to(torch.uint8).unsqueeze(1), masks


def _free_place(
    places: list[list[float]], side: int, size: int, taken: list[tuple[int, int, int]]
) -> tuple[int, int, int] | None:
    """(top, left, side) of the first of ``places`` (0..1 twice) that is on no box of ``taken``; or None."""
    for down, right in places:
        top, left = int(down * (size - side + 1)), int(right * (size - side + 1))
        if all(top + side <= t or t + s <= top or left + side <= x or x + s <= left for t, x, s in taken):
            return top, left, side
    return None


def _backgrounds(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Grey clouds with grain, (count, size, size) in 0..1."""
    level = 0.1 + 0.25 * torch.rand(count, 1, 1, 1, generator=generator)
    clouds = 0.08 * torch.randn(count, 1, 5, 5, generator=generator)
    clouds = F.interpolate(clouds, (size, size), mode="bicubic", align_corners=False)
    grain = 0.04 * torch.randn(count, 1, size, size, generator=generator)
    return (level + clouds + grain).clamp_(0, 1).squeeze(1)
