"""Domains: the same classes in several worlds (photographs, sketches), one of which is left out of training.

Training, validation and test split are shares of the domains that are *not* left out, so that nothing which
is chosen on the validation split (a checkpoint, a winner) has seen the left-out one; DomainBed (Gulrajani and
Lopez-Paz 2021, 2007.01434) calls this training-domain validation. The left-out domain, all of it, is a shift
of the data, and the one that a run reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bitsmith.errors import DataError, listing, nearest
from bitsmith.tasks.augment import Augmentation
from bitsmith.tasks.convert import fitted
from bitsmith.tasks.dataset import Data, check_images, hold_out
from bitsmith.tasks.labelled import check_labels
from bitsmith.tasks.shifts import Shift

FOLDS = 5  # one of them is the test part of the domains that are trained on

Domains = Mapping[str, tuple[Tensor, Tensor]]  # name -> (images (N, C, H, W), labels (N,))


@dataclass(frozen=True, eq=False)
class DomainData(Data):
    """`Data` of some domains, and another one (M, C, H, W) that nothing but its own shift looks at."""

    left_out: str = ""
    shifted_x: Tensor = field(default_factory=lambda: torch.empty(0))
    shifted_y: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    default_shifts: ClassVar[tuple[str, ...]] = ("domains",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_images(self.shifted_x, where=f"{self.name}: domain {self.left_out}")
        check_labels(
            self.shifted_y, len(self.shifted_x), self.classes, f"{self.name}: domain {self.left_out}"
        )

    def shifts(self) -> tuple[Shift, ...]:
        """The left-out domain, then those of all images."""
        return (
            Shift(f"domain {self.left_out}", "domains", self._elsewhere, graded=False),
            *super().shifts(),
        )

    def _elsewhere(self, severity: int, seed: int, model: nn.Module | None) -> tuple[Tensor, Tensor]:
        return self.inputs(self.shifted_x), self.shifted_y


def leave_one_out(
    domains: Domains,
    leave_out: str,
    classes: Sequence[str],
    name: str,
    *,
    validation: float = 0.125,
    seed: int = 0,
    augment: Augmentation | None = None,
) -> DomainData:
    """`DomainData` that trains on all domains but ``leave_out``; of each of them and of each class a fifth is
    the test part, and the share ``validation`` of the rest the validation part.

    Raises DataError for a single or an empty domain, one that there is not, images that differ in size, and
    domains whose classes differ.
    """
    where = f"data {name}"
    check_domains(domains, leave_out, where)
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": [], "test": []}
    for domain, (images, labels) in domains.items():
        if domain != leave_out:
            kept, test = hold_out(labels, 1 / FOLDS, seed, where)
            train, val = hold_out(labels[kept], validation, seed, f"{where}: validation")
            for split, rows in (("train", kept[train]), ("val", kept[val]), ("test", test)):
                parts[split].append((images[rows], labels[rows]))
    train_part, val_part, test_part = (_joined(part) for part in parts.values())
    return DomainData(
        *train_part,
        *val_part,
        *test_part,
        tuple(classes),
        name,
        augment,
        leave_out,
        *domains[leave_out],
    )


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def check_domains(domains: Domains, leave_out: str, where: str) -> None:
    """Raise DataError unless there are two domains of one size and the same classes, with ``leave_out``."""
    names = list(domains)
    if len(names) < 2:
        raise DataError(
            "one domain cannot be left out of fewer than two",
            where=where,
            got=f"{len(names)} domain{'s' * (len(names) != 1)}" + f" ({', '.join(names)})" * bool(names),
            expected="at least two",
        )
    for domain, (images, _) in domains.items():
        if not len(images):
            raise DataError("this domain is empty", where=f"{where}: {domain}", expected="at least one image")
    if leave_out not in domains:
        near = nearest(str(leave_out), names, 1)
        raise DataError(
            "there is no such domain to leave out",
            where=f"{where}: leave_out",
            got=leave_out,
            expected=listing(names),
            remedy=f"Did you mean {near[0]}?" if near else "",
        )
    first_x, first_y = domains[names[0]]
    for domain, (images, labels) in domains.items():
        if images.shape[1:] != first_x.shape[1:]:
            raise DataError(
                "the domains differ in image size",
                where=f"{where}: {domain}",
                got=str(tuple(images.shape[1:])),
                expected=f"{tuple(first_x.shape[1:])} as in {names[0]}",
                remedy="Give a size to resize all of them to",
            )
        if set(labels.tolist()) != set(first_y.tolist()):
            raise DataError(
                "the classes of the domains differ",
                where=f"{where}: {domain}",
                got=f"labels {_short(labels)}",
                expected=f"{_short(first_y)} as in {names[0]}",
                remedy="Leave out the classes that not all domains have",
            )


def _short(labels: Tensor) -> str:
    found = [str(label) for label in sorted(set(labels.tolist()))]
    return ", ".join(found if len(found) <= 8 else [*found[:3], "...", found[-1]])


def from_arrays(arrays: Mapping[str, np.ndarray], where: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{domain: (images, labels)} of one archive with arrays x, y and domain (names or numbers, one a row)."""
    for name in ("x", "y", "domain"):
        if name not in arrays:
            raise DataError(
                f"array {name} is missing", where=where, got=", ".join(arrays), expected="x, y, domain"
            )
    rows = arrays["domain"].ravel()
    if not len(rows) == len(arrays["x"]) == len(arrays["y"]):
        raise DataError(
            "x, y and domain differ in number",
            where=where,
            got=f"{len(arrays['x'])}, {len(arrays['y'])} and {len(rows)}",
        )
    return {
        str(domain): (arrays["x"][rows == domain], arrays["y"].ravel()[rows == domain])
        for domain in np.unique(rows)
    }


def joined(arrays: Mapping[str, np.ndarray], where: str) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of an archive that is one domain: arrays x and y, or the splits of an npz data set,
    one after the other."""
    if "x" in arrays and "y" in arrays:
        return arrays["x"], arrays["y"].ravel()
    splits = [
        split for split in ("train", "val", "test") if f"{split}_x" in arrays and f"{split}_y" in arrays
    ]
    if not splits:
        raise DataError(
            "this archive holds no images with labels",
            where=where,
            got=", ".join(arrays) or "nothing",
            expected="x and y, or train_x, train_y, test_x, test_y",
        )
    images, labels = ([arrays[f"{split}_{part}"] for split in splits] for part in "xy")
    return np.concatenate(images), np.concatenate([each.ravel() for each in labels])


def to_one_shape(
    domains: Domains, size: int | Sequence[int] | None, where: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """All domains at ``size`` (left as they are where it is None), coloured where one of them is."""
    channels = max((images.shape[1] for images, _ in domains.values() if images.ndim == 4), default=1)
    found = {}
    for name, (images, labels) in domains.items():
        if images.ndim == 4 and len(images):
            pair = (
                tuple(images.shape[2:])
                if size is None
                else (size, size)
                if isinstance(size, int)
                else tuple(size)
            )
            images = fitted(images, (channels, *pair), f"{where}: {name}")
        found[name] = (images, labels)
    return found


def domain_folders(path: Path, where: str) -> list[Path]:
    """The folders or .npz files in ``path`` that each hold one domain, by name."""
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    return [e for e in entries if e.is_dir()] or [e for e in entries if e.suffix == ".npz"]
