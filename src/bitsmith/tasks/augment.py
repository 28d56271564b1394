"""Training-time augmentation of images: random crop with padding and horizontal flip, for 32x32 photographs;
and shift and flip of images together with their masks.

One gather for the whole batch instead of a loop over images (torchvision's transforms work on one image at a
time, in worker processes). All randomness comes from the generator that is handed in, so that a resumed run
sees the same images; float and uint8 images keep their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bitsmith.errors import DataError
from bitsmith.tasks.factory import suggestion
from bitsmith.train.distillation import IGNORED

PairAugmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
Kind = TypeVar("Kind")


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Shift each image (N, C, H, W) by up to ``padding`` pixels (black moves in), and mirror half of them.

    He et al. 2016 (1512.03385), section 4.2.
    """
    return _moved(images, *_places(images, generator, padding, flips=True), padding, 0)


def shift(
    images: Tensor, masks: Tensor, generator: torch.Generator, padding: int = 4
) -> tuple[Tensor, Tensor]:
    """Shift each image (N, C, H, W) and its mask (N, H, W) alike, by up to ``padding`` pixels: black and
    IGNORED move in. A pair of which no pixel with a label would remain stays as it is."""
    return _both(images, masks, generator, padding, flips=False)


def shift_and_flip(
    images: Tensor, masks: Tensor, generator: torch.Generator, padding: int = 4
) -> tuple[Tensor, Tensor]:
    """`shift`, and half of the pairs mirrored: for what is no less itself then, as digits are not."""
    return _both(images, masks, generator, padding, flips=True)


def _both(
    images: Tensor, masks: Tensor, generator: torch.Generator, padding: int, flips: bool
) -> tuple[Tensor, Tensor]:
    places = _places(images, generator, padding, flips)
    moved = _moved(masks.unsqueeze(1), *places, padding, IGNORED).squeeze(1)
    kept = (moved != IGNORED).any(2).any(1).view(-1, 1, 1)
    images = torch.where(kept.unsqueeze(1), _moved(images, *places, padding, 0), images)
    return images, torch.where(kept, moved, masks)


def _places(images: Tensor, generator: torch.Generator, padding: int, flips: bool) -> tuple[Tensor, Tensor]:
    """Rows (N, H) and columns (N, W) of the padded images that each pixel is taken from."""
    (count, _, height, width), place = images.shape, generator.device
    top = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator, device=place)
    left = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator, device=place)
    columns = torch.arange(width, device=place).expand(count, width)
    if flips:
        flip = torch.randint(0, 2, (count, 1), generator=generator, device=place).bool()
        columns = torch.where(flip, columns.flip(1), columns)
    return top + torch.arange(height, device=place), left + columns


def _moved(images: Tensor, rows: Tensor, columns: Tensor, padding: int, border: int) -> Tensor:
    """Pixels of images (N, C, H, W), padded by ``border``, at these places."""
    count, _, height, width = images.shape
    # Pixels as contiguous C-vectors: the gather moves one vector, not C scalars, per pixel.
    padded = F.pad(images, (padding,) * 4, value=border)
    pixels = padded.permute(0, 2, 3, 1).reshape(-1, images.shape[1])
    stride = width + 2 * padding
    offset = torch.arange(count, device=rows.device)[:, None, None] * ((height + 2 * padding) * stride)
    index = (offset + rows[:, :, None] * stride + columns[:, None, :]).flatten().to(images.device)
    picked = pixels.index_select(0, index).view(count, height, width, -1)
    return picked.permute(0, 3, 1, 2).contiguous()


AUGMENTATIONS: dict[str, Augmentation | None] = {"none": None, "crop_and_flip": crop_and_flip}
PAIR_AUGMENTATIONS: dict[str, PairAugmentation | None] = {
    "none": None,
    "shift": shift,
    "shift_and_flip": shift_and_flip,
}


def named(augmentations: Mapping[str, Kind | None], name: str, where: str) -> Kind | None:
    """The augmentation of that name out of one of the two tables. Raises DataError."""
    if name not in augmentations:
        remedy = suggestion(name, list(augmentations))
        raise DataError(f"unknown augmentation {name!r}", where=where, remedy=remedy)
    return augmentations[name]
