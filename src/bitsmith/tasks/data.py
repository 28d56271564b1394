"""Where data come from: `load` of a built-in name or of "package.module:factory".

Loaders are functions that return checked `Examples`; a table names them: "digits", "npz:PATH", "folder:PATH"
(images, dataset.py), "domains:PATH" (domains.py), "digit_scenes" (scenes.py) and "masks:PATH" with a label
for every pixel (mask_folder.py), "breast_cancer" (tabular.py), "pydoc" and "text:PATH" (text.py),
"arithmetic" (arithmetic.py). Nothing is downloaded.
Images keep their range: uint8 is read as value / 255, floats are passed to the model as they are.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitsmith.errors import DataError, MissingExtra
from bitsmith.tasks.arithmetic import arithmetic_data
from bitsmith.tasks.augment import AUGMENTATIONS, PAIR_AUGMENTATIONS, Augmentation, named
from bitsmith.tasks.dataset import Data, hold_out
from bitsmith.tasks.domains import (
    DomainData,
    domain_folders,
    from_arrays,
    joined,
    leave_one_out,
    to_one_shape,
)
from bitsmith.tasks.examples import SPLITS, Examples
from bitsmith.tasks.factory import FACTORY_PATTERN, accepts, call, load_factory, suggestion
from bitsmith.tasks.folder import read_folder
from bitsmith.tasks.mask_folder import mask_folder
from bitsmith.tasks.masks import MaskData
from bitsmith.tasks.scenes import compose
from bitsmith.tasks.tabular import breast_cancer
from bitsmith.tasks.text import pydoc, read_text

FOLDS = 5


def load(spec: str, seed: int = 0, model: str = "", **arguments: Any) -> Examples:
    """The data that ``spec`` names; ``seed`` decides the splits. Raises DataError, MissingExtra.

    "digits" (fold, validation); "npz:PATH" (classes, validation, augment); "folder:PATH" (size, validation,
    augment); "domains:PATH" (leave_out, size, validation, augment; or "domains" with the argument path);
    "digit_scenes" (fold, size, train, validation, test, augment); "masks:PATH" (classes, ignore, size,
    validation, augment); "breast_cancer" (feature, quantile, validation); "pydoc" and "text:PATH" (context,
    tokenizer, validation, test), "arithmetic" (largest, held_out, tokenizer), whose tokenizer is that of
    ``model`` where it is an "hf:" one; "package.module:factory", called with ``arguments``, and with ``seed``
    where it takes one.
    """
    kind, colon, path = spec.partition(":")
    if spec == "domains" and "path" in arguments:  # a list of files has no name
        return _checked(call(domains, {"seed": seed, **arguments}, "data domains", DataError), spec)
    if kind in LOADERS and bool(colon) == (kind not in WITHOUT_PATH):
        loader = LOADERS[kind]
        inputs = {"path": path} if colon else {}
        known = {"model": model} if accepts(loader, "model") else {}
        return _checked(
            call(loader, {**inputs, **known, "seed": seed, **arguments}, f"data {spec}", DataError), spec
        )
    if not FACTORY_PATTERN.fullmatch(spec):
        names = (kind if kind in WITHOUT_PATH else f"{kind}:PATH" for kind in LOADERS)
        raise DataError(
            f"unknown data {spec!r}",
            where="data",
            expected=f"{', '.join(names)} or package.module:factory",
            remedy=suggestion(kind, list(LOADERS)),
        )
    factory = load_factory(spec, "data", DataError)
    seeded = {"seed": seed} if accepts(factory, "seed") else {}
    return _checked(call(factory, {**seeded, **arguments}, f"data {spec}", DataError), spec)


def _checked(data: Any, spec: str) -> Examples:
    if not isinstance(data, Examples):
        raise DataError(
            "the factory returned something else",
            where=f"data {spec}",
            got=type(data).__name__,
            expected="a bitsmith.tasks.Data, MaskData or TextData",
        )
    return data


def digits(seed: int = 0, fold: int = 0, validation: float = 0.125) -> Data:
    """scikit-learn's 1,797 handwritten digits, (1, 8, 8) in 0..1; a fifth is the test part, by fold 0..4.

    Stratified folds shuffled by ``seed``; ``validation`` is the share of the rest that is held out.
    """
    if fold not in range(FOLDS):
        raise DataError("there is no such fold", where="data digits", got=fold, expected=f"0 to {FOLDS - 1}")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import StratifiedKFold
    except ImportError:
        raise MissingExtra("vision", "scikit-learn", "the digits data set") from None
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).long()
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(bunch.images, bunch.target)
    train, test = (torch.from_numpy(rows) for rows in list(folds)[fold])
    splits = {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
    return assemble(splits, tuple("0123456789"), "digits", validation, seed, None)


def digit_scenes(
    seed: int = 0,
    fold: int = 0,
    size: int = 24,
    train: int = 1000,
    validation: int = 150,
    test: int = 300,
    augment: str = "none",
) -> MaskData:
    """Scenes of scikit-learn's digits with a class for every pixel (scenes.py), so many in each split.

    The digits of the splits are those of "digits" with this seed and fold.
    """
    counts = {"train": train, "val": validation, "test": test}
    both = named(PAIR_AUGMENTATIONS, augment, "data digit_scenes")
    return compose(digits(seed, fold), counts, size, seed, both)


def npz(
    path: str,
    seed: int = 0,
    classes: int | Sequence[str] | None = None,
    validation: float = 0.125,
    augment: str = "none",
) -> Data:
    """Arrays ``train_x, train_y, test_x, test_y`` and, if there, ``val_x, val_y`` and ``classes`` (names).

    Images (N, C, H, W), (N, H, W, C) or (N, H, W); labels integers from 0. Without ``val_x``, the share
    ``validation`` of the training part is held out.
    """
    where = f"data npz:{path}"
    arrays = _read_npz(path, where)
    for name in ("train_x", "train_y", "test_x", "test_y"):
        if name not in arrays:
            remedy = suggestion(name, list(arrays))
            raise DataError(f"array {name} is missing", where=where, got=", ".join(arrays), remedy=remedy)
    if ("val_x" in arrays) != ("val_y" in arrays):
        raise DataError("val_x and val_y go together, and one is missing", where=where, got=", ".join(arrays))
    splits = {
        split: (
            _images(arrays[f"{split}_x"], f"{where}: {split}_x"),
            _labels(arrays[f"{split}_y"], f"{where}: {split}_y"),
        )
        for split in SPLITS
        if f"{split}_x" in arrays
    }
    if classes is None and "classes" in arrays:
        classes = [str(name) for name in arrays["classes"].ravel()]
    if classes is None:
        labels = splits["train"][1]
        classes = int(labels.max()) + 1 if len(labels) else 0
    names = [str(index) for index in range(classes)] if isinstance(classes, int) else classes
    return assemble(
        splits, tuple(names), Path(path).stem, validation, seed, named(AUGMENTATIONS, augment, where)
    )


def _read_npz(path: str, where: str) -> dict[str, np.ndarray]:
    try:
        # Opened here: np.load leaves a file that it cannot read open.
        with open(path, "rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise DataError("this file holds a single array", where=where, expected="an .npz archive")
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise DataError("there is no such file", where=where, remedy="Check the path") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"this file cannot be read as .npz ({error})", where=where) from None


def _images(array: np.ndarray, where: str) -> Tensor:
    """(N, C, H, W): grey images get a channel, channels-last ones are turned."""
    if array.dtype.kind not in "fiub":
        raise DataError("these are no images", where=where, got=f"dtype {array.dtype}", expected="numbers")
    if array.dtype.kind in "iub" and array.dtype != np.uint8:
        if array.size and (array.min() < 0 or array.max() > 255):
            got = f"{array.min()} to {array.max()}"
            raise DataError("integer images are out of range", where=where, got=got, expected="0 to 255")
        array = array.astype(np.uint8)
    images = torch.from_numpy(np.ascontiguousarray(array))
    images = images if images.dtype == torch.uint8 else images.float()
    if images.ndim == 3:
        images = images.unsqueeze(1)
    if images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2).contiguous()
    return images


def _labels(array: np.ndarray, where: str) -> Tensor:
    if array.dtype.kind not in "iu":
        got = f"dtype {array.dtype}"
        raise DataError("labels are not integers", where=where, got=got, expected="integers from 0")
    column = array.ndim == 2 and array.shape[1] == 1
    return torch.from_numpy((array.ravel() if column else array).astype(np.int64))


def folder(
    path: str,
    seed: int = 0,
    size: int | Sequence[int] | None = None,
    validation: float = 0.125,
    augment: str = "none",
) -> Data:
    """One sub-folder of images per class; or ``train/`` and ``test/`` (and ``val/``) that hold such folders.

    Without ``test/``, a fifth of every class becomes the test part. Images must be of one size, unless
    ``size`` (pixels, or height and width) says what to resize them to. Needs Pillow.
    """
    where = f"data folder:{path}"
    splits, classes = read_folder(Path(path), size, where)
    if "test" not in splits:
        images, labels = splits["train"]
        kept, held = hold_out(labels, 1 / FOLDS, seed, where)
        splits = {"train": (images[kept], labels[kept]), "test": (images[held], labels[held])}
    return assemble(splits, classes, Path(path).name, validation, seed, named(AUGMENTATIONS, augment, where))


def domains(
    path: str | Sequence[str],
    leave_out: str,
    seed: int = 0,
    size: int | Sequence[int] | None = None,
    validation: float = 0.125,
    augment: str = "none",
) -> DomainData:
    """Several domains of the same classes, one of which is left out of training and is the shift of the data.

    A folder of folders (domain/class/image); an .npz of arrays x, y and domain; a folder or list of .npz
    files, each a domain (x and y, or the arrays of "npz:PATH") called after its file. ``size`` resizes all of
    them; grey ones are repeated over three channels where others are coloured.
    """
    paths = [Path(one) for one in ([path] if isinstance(path, str) else path)]
    where = f"data domains:{paths[0] if len(paths) == 1 else f'{len(paths)} files'}"
    classes: Sequence[str] | None = None
    if len(paths) == 1 and paths[0].is_dir():
        paths = domain_folders(paths[0], where)
    if paths and all(one.is_dir() for one in paths):
        found, classes = _domain_folders(paths, size, where)
    else:
        archives = {one.stem: _read_npz(str(one), f"data domains:{one}") for one in paths}
        if len(archives) == 1:
            arrays = from_arrays(next(iter(archives.values())), where)
        else:
            arrays = {name: joined(archive, f"{where}: {name}") for name, archive in archives.items()}
        found = {
            name: (_images(x, f"{where}: {name}"), _labels(y, f"{where}: {name}"))
            for name, (x, y) in arrays.items()
        }
        listed = next((archive["classes"] for archive in archives.values() if "classes" in archive), None)
        classes = None if listed is None else [str(one) for one in listed.ravel()]
    found = to_one_shape(found, size, where)
    if classes is None:
        count = 1 + max((int(y.max()) for _, y in found.values() if len(y)), default=0)
        classes = [str(index) for index in range(count)]
    name = "domains" if isinstance(path, list | tuple) else Path(str(path)).stem
    return leave_one_out(
        found,
        leave_out,
        classes,
        name,
        validation=validation,
        seed=seed,
        augment=named(AUGMENTATIONS, augment, where),
    )


def _domain_folders(
    paths: Sequence[Path], size: int | Sequence[int] | None, where: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[str, ...]]:
    """Each domain's folder, read as one part, and the classes that all of them have."""
    found, names = {}, {}
    for place in paths:
        parts, names[place.name] = read_folder(place, size, f"{where}: {place.name}")
        found[place.name] = parts["train"]
    first, classes = next(iter(names.items()))
    for domain, own in names.items():
        if own != classes:
            raise DataError(
                "the classes of the domains differ",
                where=f"{where}: {domain}",
                got=", ".join(own),
                expected=f"{', '.join(classes)} as in {first}",
            )
    return found, classes


def assemble(
    splits: dict[str, tuple[Tensor, Tensor]],
    classes: tuple[str, ...],
    name: str,
    validation: float,
    seed: int,
    augment: Augmentation | None,
) -> Data:
    """`Data` of the given splits; without "val", the share ``validation`` of each class is held out."""
    train_x, train_y = splits["train"]
    if "val" in splits or train_y.shape != train_x.shape[:1]:  # the second is reported by Data
        val_x, val_y = splits.get("val", (train_x[:0], train_y[:0]))
    else:
        kept, held = hold_out(train_y, validation, seed, f"data {name}: validation")
        val_x, val_y, train_x, train_y = train_x[held], train_y[held], train_x[kept], train_y[kept]
    return Data(train_x, train_y, val_x, val_y, *splits["test"], classes=classes, name=name, augment=augment)


LOADERS: dict[str, Callable[..., Examples]] = {
    "digits": digits,
    "digit_scenes": digit_scenes,
    "masks": mask_folder,
    "npz": npz,
    "folder": folder,
    "domains": domains,
    "breast_cancer": breast_cancer,
    "pydoc": pydoc,
    "text": read_text,
    "arithmetic": arithmetic_data,
}
WITHOUT_PATH = ("digits", "digit_scenes", "breast_cancer", "pydoc", "arithmetic")
