"""Reads the data of benchmarks and slow tests: CIFAR-10, Fashion-MNIST, MNIST; digits in three hands (MNIST,
MNIST-M, USPS) and PACS in four styles, as domains; and finds weights.

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
from bitsmith.tasks.convert import fitted
from bitsmith.tasks.data import assemble
from bitsmith.tasks.dataset import Data
from bitsmith.tasks.domains import DomainData, leave_one_out

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
# name: (test sheets' name, side, channels, classes)
SHEETS = {
    "cifar10": ("test_a", 32, 3, CIFAR_CLASSES),
    "fashion_mnist": ("test", 28, 1, FASHION_CLASSES),
    "mnist": ("test", 28, 1, tuple("0123456789")),
    "mnist_m": ("test", 32, 3, tuple("0123456789")),
}
PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
PACS = ("photo", "art_painting", "cartoon", "sketch")
HANDS = ("mnist", "mnist_m", "usps")
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


def digits_as(name: str, side: int = 32, channels: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`load_arrays` of "mnist", "mnist_m" or "usps" at one size and number of channels."""
    if name == "usps":
        with np.load(root() / "usps" / "usps.npz") as arrays:
            parts = [torch.from_numpy(arrays[key]) for key in ("train_x", "train_y", "test_x", "test_y")]
        train_x, train_y, test_x, test_y = (
            part.unsqueeze(1) if part.ndim == 3 else part.long() for part in parts
        )
    else:
        train_x, train_y, test_x, test_y = load_arrays(name)
    shape = (channels, side, side)
    return fitted(train_x, shape), train_y, fitted(test_x, shape), test_y


def hands(leave_out: str, side: int = 32, channels: int = 3, limit: int | None = None) -> DomainData:
    """Digits of three hands as domains, at most ``limit`` of each, one of them left out."""
    found = {}
    for name in HANDS:
        train_x, train_y, test_x, test_y = digits_as(name, side, channels)
        found[name] = (torch.cat([train_x, test_x])[:limit], torch.cat([train_y, test_y])[:limit])
    return leave_one_out(found, leave_out, tuple("0123456789"), "hands")


def pacs(leave_out: str, side: int = 64, validation: float = 0.125, seed: int = 0) -> DomainData:
    """PACS (Li et al. 2017, 1710.03077) at ``side`` pixels, one of its four styles left out."""
    found = {}
    for name in PACS:
        images, labels = load_part("pacs64", name, 64, 3, columns=50)
        found[name] = (fitted(images, (3, side, side)), labels)
    return leave_one_out(found, leave_out, PACS_CLASSES, "pacs", validation=validation, seed=seed)


def load_part(
    name: str, part: str, side: int, channels: int, columns: int = COLUMNS
) -> tuple[Tensor, Tensor]:
    """One part's (images, labels), from the cache where it is there."""
    cache = Path(os.environ.get("BITSMITH_CACHE") or Path(tempfile.gettempdir()) / "bitsmith-cache")
    cached = cache / f"{name}-{part}.npz"
    if not cached.is_file():
        images, labels = _decode(root() / name, part, side, channels, columns)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, suffix=".part", delete=False) as file:
            np.savez(file, images=images, labels=labels)
        os.replace(file.name, cached)  # two processes may do this at once: each leaves a whole file
    with np.load(cached) as arrays:
        return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])


def _decode(folder: Path, part: str, side: int, channels: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # a sheet of 5000 images looks like a decompression bomb
    labels = np.load(folder / f"{part}_labels.npz")["label"].astype(np.int64)
    sheets: list[np.ndarray] = []
    for path in sorted(folder.glob(f"{part}_[0-9][0-9].webp")):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))[..., :channels]
        rows = pixels.shape[0] // side
        grid = pixels.reshape(rows, side, columns, side, channels)
        sheet = grid.transpose(0, 2, 4, 1, 3).reshape(rows * columns, channels, side, side)
        sheets.append(sheet[: min(PER_SHEET, len(labels) - PER_SHEET * len(sheets))])
    return np.concatenate(sheets), labels
