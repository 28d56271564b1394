"""Reads the image sheets of benchmarks and slow tests: CIFAR-10, Fashion-MNIST, MNIST; and finds weights.

They lie outside the project, in ``$BITSMITH_DATA`` or in ``../shared/data`` beside the repository; the
package itself never needs them. A sheet is one lossless WebP of up to 5000 images in a grid of 100 columns;
decoding takes seconds, so the arrays are kept as .npz in ``$BITSMITH_CACHE`` or the system's temporary
folder. Needs Pillow with WebP.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitsmith.tasks.augment import crop_and_flip
from bitsmith.tasks.data import assemble
from bitsmith.tasks.dataset import Data

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
# name: (test sheets' name, side, channels, classes)
SHEETS = {
    "cifar10": ("test_a", 32, 3, CIFAR_CLASSES),
    "fashion_mnist": ("test", 28, 1, FASHION_CLASSES),
    "mnist": ("test", 28, 1, tuple("0123456789")),
}
PER_SHEET, COLUMNS = 5000, 100


def root() -> Path:
    """The folder of the sheets; it may not exist."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    return Path(os.environ.get("BITSMITH_DATA") or beside)


def resnet_weights(depth: int) -> Path:
    """The CIFAR-10 weights of ResNet-20, -32 or -56."""
    return root() / "cifar_resnet" / f"resnet{depth}.safetensors"


def load(name: str, validation: float = 0.04, seed: int = 0) -> Data:
    """`Data` of uint8 images, a share of the training part held out; CIFAR-10 with crop and flip."""
    classes = SHEETS[name][3]
    train_x, train_y, test_x, test_y = load_arrays(name)
    splits = {"train": (train_x, train_y), "test": (test_x, test_y)}
    return assemble(splits, classes, name, validation, seed, crop_and_flip if name == "cifar10" else None)


def load_arrays(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train_x, train_y, test_x, test_y), images (N, C, H, W) uint8, labels int64."""
    test_name, side, channels, _ = SHEETS[name]
    train = load_part(name, "train", side, channels)
    return *train, *load_part(name, test_name, side, channels)


def load_part(name: str, part: str, side: int, channels: int) -> tuple[Tensor, Tensor]:
    """One part's (images, labels), from the cache where it is there."""
    cache = Path(os.environ.get("BITSMITH_CACHE") or Path(tempfile.gettempdir()) / "bitsmith-cache")
    cached = cache / f"{name}-{part}.npz"
    if not cached.is_file():
        images, labels = _decode(root() / name, part, side, channels)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, suffix=".part", delete=False) as file:
            np.savez(file, images=images, labels=labels)
        os.replace(file.name, cached)  # two processes may do this at once: each leaves a whole file
    with np.load(cached) as arrays:
        return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])


def _decode(folder: Path, part: str, side: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # a sheet of 5000 images looks like a decompression bomb
    labels = np.load(folder / f"{part}_labels.npz")["label"].astype(np.int64)
    sheets: list[np.ndarray] = []
    for path in sorted(folder.glob(f"{part}_[0-9][0-9].webp")):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))[..., :channels]
        rows = pixels.shape[0] // side
        grid = pixels.reshape(rows, side, COLUMNS, side, channels)
        sheet = grid.transpose(0, 2, 4, 1, 3).reshape(rows * COLUMNS, channels, side, side)
        sheets.append(sheet[: min(PER_SHEET, len(labels) - PER_SHEET * len(sheets))])
    return np.concatenate(sheets), labels
