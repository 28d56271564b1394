"""Reads masks.npz: test images of a segmentation with their masks, answers, and the IoU of every class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import FormatError
from bitsmith.report.arrays import read_arrays

FILE = "masks.npz"
UNLABELLED = 255  # a pixel of the truth without a label
ANSWERS = ("float", "quantized")


@dataclass(frozen=True)
class Masks:
    """images (n, channels, H, W) in 0..1; truth and answers (n, H, W) of class indices, or UNLABELLED in the
    truth; iou: model -> (classes,), NaN for a class that was neither answered nor true."""

    images: NDArray[np.float64]
    truth: NDArray[np.int64]
    answers: Mapping[str, NDArray[np.int64]]
    iou: Mapping[str, NDArray[np.float64]]
    classes: tuple[str, ...]


def read_masks(path: Path) -> Masks | None:
    """The pictures of a run; None where there is no file. Raises FormatError."""
    if not path.exists():
        return None
    arrays = read_arrays(path, "masks")
    for name in ("images", "truth", "classes"):
        if name not in arrays:
            raise FormatError(f"these masks have no {name}", where=str(path), got=", ".join(sorted(arrays)))
    images, truth, classes = (arrays[name] for name in ("images", "truth", "classes"))
    answers = {name: arrays[name] for name in ANSWERS if name in arrays}
    iou = {name: arrays[f"iou_{name}"] for name in ANSWERS if f"iou_{name}" in arrays}
    if images.ndim != 4 or images.dtype.kind not in "fu":
        raise _wrong(path, "images", images, "(n, channels, height, width)")
    for name, values in {"truth": truth, **answers}.items():
        if values.shape != (len(images), *images.shape[2:]) or values.dtype.kind not in "iu":
            raise _wrong(path, name, values, f"classes {(len(images), *images.shape[2:])}")
        known = values[values != UNLABELLED] if name == "truth" else values
        if known.size and not 0 <= known.min() <= known.max() < len(classes):
            raise FormatError(
                f"{name} holds a class that there is not", where=str(path), got=int(known.max()),
                expected=f"0 to {len(classes) - 1}",
            )  # fmt: skip
    for name, values in iou.items():
        if (
            values.dtype.kind != "f"
            or values.shape != (len(classes),)
            or not (np.isnan(values) | ((values >= 0) & (values <= 1))).all()
        ):
            raise _wrong(path, f"iou_{name}", values, f"shares of {len(classes)} classes")
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    return Masks(
        images.astype(np.float64) / scale,
        truth.astype(np.int64),
        {name: values.astype(np.int64) for name, values in answers.items()},
        {name: values.astype(np.float64) for name, values in iou.items()},
        tuple(str(name) for name in classes.reshape(-1)),
    )


def _wrong(path: Path, name: str, values: NDArray[Any], expected: str) -> FormatError:
    return FormatError(
        f"{name} of these masks has the wrong form",
        where=str(path),
        got=f"{values.dtype} {values.shape}",
        expected=expected,
        remedy="Delete the file (the report leaves out what it held), or run again",
    )
