"""Images of another size or number of channels as a model's own: to try a model on another data set.

Grey becomes coloured by repetition, coloured grey by luma (ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B); sizes
are changed bilinearly, with antialiasing where images shrink. uint8 stays uint8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bitsmith.errors import DataError
from bitsmith.tasks.classification import to_float
from bitsmith.tasks.dataset import Data
from bitsmith.tasks.examples import SPLITS

LUMA = (0.299, 0.587, 0.114)


def fitted(images: Tensor, shape: Sequence[int], where: str = "images") -> Tensor:
    """Images (N, c, h, w) as (N, C, H, W); the same tensor where they are of ``shape`` already.

    Raises DataError for channels other than one or three that would have to become others.
    """
    if images.shape[1:] == torch.Size(shape):
        return images
    (channels, height, width), own = shape, images.shape[1]
    found = to_float(images)
    if own == 3 and channels == 1:
        found = (found * torch.tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
    elif own == 1 and channels == 3:
        found = found.expand(-1, 3, -1, -1)
    elif own != channels:
        raise DataError(
            "these channels cannot be converted",
            where=where,
            got=f"{own} channels",
            expected=f"{channels}, or one of 1 and 3 for the other",
        )
    if found.shape[2:] != (height, width):
        found = F.interpolate(found, (height, width), mode="bilinear", antialias=True).clamp_(0, 1)
    return (255 * found).round().byte() if images.dtype == torch.uint8 else found.contiguous()


def like(data: Data, own: Data) -> Data:
    """``data`` with images of the size and channels of ``own``. Raises DataError where classes differ.

    Names of classes are compared where both have names: 0, 1, 2, ... are numbers.
    """
    numbers = [tuple(str(index) for index in range(len(d.classes))) == d.classes for d in (data, own)]
    if any(numbers):
        differ = len(data.classes) > len(own.classes)
    else:
        differ = data.classes != own.classes
    if differ:
        raise DataError(
            "the classes are not those of the run",
            where=f"data {data.name}",
            got=_names(data.classes),
            expected=_names(own.classes),
        )
    train, val, test = (fitted(data.split(split)[0], own.shape, f"data {data.name}") for split in SPLITS)
    return replace(data, train_x=train, val_x=val, test_x=test, classes=own.classes)


def _names(classes: Sequence[str]) -> str:
    shown = ", ".join(classes[:6])
    return f"{len(classes)} ({shown}{', ...' if len(classes) > 6 else ''})"
