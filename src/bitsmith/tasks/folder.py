"""Reads folders of image files into uint8 tensors; how they are split is decided in data.py.

Classes are the sub-folders' names in sorted order, as in torchvision's ImageFolder; unlike there, everything
is decoded once and kept in memory, test folders must have the training classes, and images of different
sizes are an error until a size is given. Needs Pillow, imported only here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitsmith.errors import DataError, MissingExtra
from bitsmith.tasks.factory import suggestion

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
BILINEAR = 2  # Pillow's number of it
GREY_MODES = ("1", "L", "LA")


def read_folder(
    path: Path, size: int | Sequence[int] | None, where: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[str, ...]]:
    """({"train": (images, labels), maybe "val", "test"}, class names); images (N, C, H, W) uint8.

    C is 1 where every image is grey, else 3.
    """
    if not path.is_dir():
        raise DataError("there is no such folder", where=where, remedy="Check the path")
    if not (path / "train").is_dir():
        parts = {"train": path}
    elif not (path / "test").is_dir():
        raise DataError("there is a folder train/ but no folder test/", where=where, remedy="Add test/")
    else:
        parts = {name: path / name for name in ("train", "val", "test") if (path / name).is_dir()}
    classes = _subfolders(parts["train"])
    if len(classes) < 2:
        raise DataError(
            "too few class folders",
            where=where,
            got=", ".join(classes) or "none",
            expected="one folder of images for each of at least two classes",
        )
    target = target_size(size, where)
    arrays: dict[str, list[np.ndarray]] = {}
    labels: dict[str, list[int]] = {}
    for split, folder in parts.items():
        for name in _subfolders(folder):
            if name not in classes:
                raise DataError(
                    f"class {name!r} does not occur in the training part",
                    where=f"{where}: {folder.name}/",
                    remedy=suggestion(name, classes),
                )
        arrays[split], labels[split] = _read_split(folder, classes, target, where)
    everything = [array for part in arrays.values() for array in part]
    grey = all(array.ndim == 2 for array in everything)
    return {split: (stack(arrays[split], grey), torch.tensor(labels[split])) for split in parts}, tuple(
        classes
    )


def _subfolders(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )


def target_size(size: int | Sequence[int] | None, where: str) -> tuple[int, int] | None:
    """(height, width) of ``size``: pixels of both sides, or the two. Raises DataError."""
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise DataError(
            "not an image size", where=where, got=str(size), expected="pixels, or [height, width]"
        )
    return pair[0], pair[1]


def _read_split(
    folder: Path, classes: list[str], target: tuple[int, int] | None, where: str
) -> tuple[list[np.ndarray], list[int]]:
    arrays: list[np.ndarray] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        class_folder = folder / name
        files = sorted(class_folder.iterdir()) if class_folder.is_dir() else []
        files = [file for file in files if file.suffix.lower() in ENDINGS]
        if not files:
            raise DataError(
                "this class folder holds no images",
                where=f"{where}: {class_folder}",
                expected=f"files that end in {', '.join(ENDINGS)}",
            )
        for file in files:
            arrays.append(read_image(file, target, where))
            if arrays[-1].shape[:2] != arrays[0].shape[:2]:
                raise DataError(
                    "images differ in size (height, width)",
                    where=f"{where}: {file}",
                    got=str(arrays[-1].shape[:2]),
                    expected=f"{arrays[0].shape[:2]} as in the first",
                    remedy="Give a size to resize them to",
                )
        labels += [label] * len(files)
    return arrays, labels


def read_image(file: Path, target: tuple[int, int] | None, where: str) -> np.ndarray:
    """(H, W) of a grey image, (H, W, 3) of any other, uint8."""
    with open_image(file, where) as image:
        plain = image.convert("L" if image.mode in GREY_MODES else "RGB")
        if target is not None and plain.size != target[::-1]:
            plain = plain.resize(target[::-1], BILINEAR)
        return np.asarray(plain)


@contextlib.contextmanager
def open_image(file: Path, where: str) -> Iterator[Any]:
    """The Pillow image of a file. Raises MissingExtra, and DataError for what cannot be read."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtra("vision", "pillow", "a folder of images") from None
    try:
        with Image.open(file) as image:
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"this image cannot be read ({error})", where=f"{where}: {file}") from None


def stack(arrays: list[np.ndarray], grey: bool) -> Tensor:
    """(N, C, H, W) uint8; grey images among coloured ones are repeated over the three channels."""
    if grey:
        return torch.from_numpy(np.stack(arrays)).unsqueeze(1)
    coloured = [a if a.ndim == 3 else np.repeat(a[:, :, None], 3, axis=2) for a in arrays]
    return torch.from_numpy(np.stack(coloured)).permute(0, 3, 1, 2).contiguous()
