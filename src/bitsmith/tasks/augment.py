"""Training-time augmentation of images: random crop with padding and horizontal flip, for 32x32 photographs.

One gather for the whole batch instead of a loop over images (torchvision's transforms work on one image at a
time, in worker processes). All randomness comes from the generator that is handed in, so that a resumed run
sees the same images; float and uint8 images keep their dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Shift each image (N, C, H, W) by up to ``padding`` pixels (black moves in), and mirror half of them.

    He et al. 2016 (1512.03385), section 4.2.
    """
    count, _, height, width = images.shape
    top = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator)
    flip = torch.randint(0, 2, (count, 1), generator=generator).bool()
    rows = top + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    columns = left + torch.where(flip, columns.flip(1), columns)
    # Pixels as contiguous C-vectors: the gather moves one vector, not C scalars, per pixel.
    pixels = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1).reshape(-1, images.shape[1])
    stride = width + 2 * padding
    offset = torch.arange(count)[:, None, None] * ((height + 2 * padding) * stride)
    index = (offset + rows[:, :, None] * stride + columns[:, None, :]).flatten().to(images.device)
    picked = pixels.index_select(0, index).view(count, height, width, -1)
    return picked.permute(0, 3, 1, 2).contiguous()


AUGMENTATIONS: dict[str, Augmentation | None] = {"none": None, "crop_and_flip": crop_and_flip}
