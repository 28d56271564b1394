"""Reads a folder of images and masks: images/NAME.png beside masks/NAME.png, a label per pixel.

    PATH/images/*, PATH/masks/*                   split here, by a seed
    PATH/train/images/*, PATH/train/masks/*       and so in test/ and maybe val/

A mask is a grey PNG whose values are labels, or one with a palette, whose indices are. Files are paired by
their names without endings. Everything is decoded once and kept in memory: images (N, C, H, W) uint8, masks
(N, H, W) int64 with IGNORED where a file has the ignore label. Needs Pillow, imported only when it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitsmith.errors import DataError
from bitsmith.tasks.augment import PAIR_AUGMENTATIONS, named
from bitsmith.tasks.dataset import hold_out
from bitsmith.tasks.factory import suggestion
from bitsmith.tasks.folder import ENDINGS, open_image, read_image, stack, target_size
from bitsmith.tasks.masks import MaskData
from bitsmith.train.distillation import IGNORED

TEST_SHARE = 0.2  # of the images, where there is no test/
GREY = ("1", "L", "P", "I", "I;16")  # modes whose values are labels


def mask_folder(
    path: str,
    seed: int = 0,
    classes: int | Sequence[str] | None = None,
    ignore: int = 255,
    size: int | Sequence[int] | None = None,
    validation: float = 0.125,
    augment: str = "none",
) -> MaskData:
    """The data "masks:PATH". Without test/ a fifth of the images is the test part; without val/ the share
    ``validation`` of the training part is held out.

    classes: their number or names; without it as many as the largest training label asks for. ignore: the
    label of pixels that do not count. size: pixels, or height and width, that images (smoothly) and masks (by
    the nearest pixel) are resized to. augment: "shift" or "shift_and_flip", of image and mask alike. Raises
    DataError, MissingExtra.
    """
    where, root = f"data masks:{path}", Path(path)
    if not root.is_dir():
        raise DataError("there is no such folder", where=where, remedy="Check the path")
    augment_both = named(PAIR_AUGMENTATIONS, augment, where)
    if (root / "train").is_dir():
        if not (root / "test").is_dir():
            raise DataError("there is a folder train/ but no folder test/", where=where, remedy="Add test/")
        folders = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    else:
        folders = {"train": root}
    target = target_size(size, where)
    read = {name: _read_split(folder, target, where) for name, folder in folders.items()}
    arrays = [image for images, _, _ in read.values() for image in images]
    names = _names(classes, [m[m != ignore] for m in read["train"][1]], where)
    grey = all(array.ndim == 2 for array in arrays)
    splits = {}
    for split, (images, masks, files) in read.items():
        for mask, file in zip(masks, files, strict=True):
            _check_labels(mask, len(names), ignore, f"{where}: {file}")
        labels = torch.from_numpy(np.stack(masks))
        splits[split] = (stack(images, grey), labels.masked_fill_(labels == ignore, IGNORED))
    if "test" not in splits:
        splits["test"], splits["train"] = _held_out(*splits["train"], TEST_SHARE, seed, where)
    if "val" not in splits:
        share = f"{where}: validation"
        splits["val"], splits["train"] = _held_out(*splits["train"], validation, seed, share)
    return MaskData(
        *splits["train"],
        *splits["val"],
        *splits["test"],
        classes=names,
        name=root.name,
        augment_both=augment_both,
    )


def _read_split(
    folder: Path, target: tuple[int, int] | None, where: str
) -> tuple[list[np.ndarray], list[np.ndarray], list[Path]]:
    """Images (H, W) or (H, W, 3) uint8, masks (H, W) int64, and the masks' files."""
    files = {kind: _files(folder / kind, where) for kind in ("images", "masks")}
    images: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for name, file in files["images"].items():
        if name not in files["masks"]:
            close = suggestion(name, list(files["masks"])) if len(files["masks"]) < 100 else ""
            raise DataError(
                "this image has no mask",
                where=f"{where}: {file}",
                expected=f"{folder / 'masks' / name}.png",
                remedy=close or "Add it, or leave the image out",
            )
        images.append(read_image(file, target, where))
        masks.append(_read_mask(files["masks"][name], file, target, where))
        if images[-1].shape[:2] != images[0].shape[:2]:
            raise DataError(
                "images differ in size (height, width)",
                where=f"{where}: {file}",
                got=str(images[-1].shape[:2]),
                expected=f"{images[0].shape[:2]} as in the first",
                remedy="Give a size to resize them to",
            )
    for name in files["masks"]:
        if name not in files["images"]:
            raise DataError("this mask has no image", where=f"{where}: {files['masks'][name]}")
    return images, masks, [files["masks"][name] for name in files["images"]]


def _files(folder: Path, where: str) -> dict[str, Path]:
    """Name without ending -> file, of the image files in a folder, sorted."""
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder.name}/",
            where=f"{where}: {folder.parent}",
            expected="images/NAME.png and masks/NAME.png",
        )
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)
    if not files:
        raise DataError(
            "this folder holds no images",
            where=f"{where}: {folder}",
            expected=f"files that end in {', '.join(ENDINGS)}",
        )
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            raise DataError(
                "two files have one name",
                where=f"{where}: {file}",
                got=f"{found[file.stem].name}, {file.name}",
            )
        found[file.stem] = file
    return found


def _read_mask(file: Path, image: Path, target: tuple[int, int] | None, where: str) -> np.ndarray:
    """Labels (H, W) int64. Its size is compared with the image's file, before either is resized."""
    with open_image(file, where) as mask, open_image(image, where) as pair:
        if mask.size != pair.size:
            raise DataError(
                "this mask has another size than its image",
                where=f"{where}: {file}",
                got=f"{mask.size[0]} x {mask.size[1]} pixels",
                expected=f"{pair.size[0]} x {pair.size[1]}, as {image.name}",
            )
        if mask.mode not in GREY:
            raise DataError(
                "this mask has no label per pixel",
                where=f"{where}: {file}",
                got=f"an image of mode {mask.mode}",
                expected="a grey image whose values are labels, or one with a palette",
                remedy="Write the class of each pixel as its grey value",
            )
        if target is not None and mask.size != target[::-1]:
            mask = mask.resize(target[::-1], 0)  # 0: the nearest pixel
        return np.asarray(mask).astype(np.int64)


def _names(classes: int | Sequence[str] | None, labels: Sequence[np.ndarray], where: str) -> tuple[str, ...]:
    """The classes' names; ``labels``: those of the training masks that count."""
    if classes is None:
        classes = 1 + max((int(found.max()) for found in labels if found.size), default=0)
    if isinstance(classes, int):
        return tuple(str(index) for index in range(classes))
    if isinstance(classes, str):
        raise DataError(
            "these are no classes", where=f"{where}: classes", got=classes, expected="a list of names"
        )
    return tuple(str(name) for name in classes)


def _check_labels(mask: np.ndarray, classes: int, ignore: int, where: str) -> None:
    wrong = (mask >= classes) & (mask != ignore)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise DataError(
            "a mask holds an unknown label",
            where=where,
            got=f"{mask[row, column]} at row {row}, column {column}",
            expected=f"0 to {classes - 1}, one of {classes} classes, or {ignore} (ignored)",
            remedy="Give the data all classes, or write the ignore label",
        )


def _held_out(
    images: Tensor, masks: Tensor, share: float, seed: int, where: str
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(held out, kept): a random share of the pairs."""
    kept, held = hold_out(torch.zeros(len(images), dtype=torch.int64), share, seed, where)
    return (images[held], masks[held]), (images[kept], masks[kept])
