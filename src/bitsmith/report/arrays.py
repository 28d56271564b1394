"""Reads the .npz files of a run directory: arrays by name, or one FormatError of one line."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import FormatError


def read_arrays(path: Path, what: str) -> dict[str, NDArray[Any]]:
    """All arrays of a file that exists. ``what`` they are, in the plural. Raises FormatError."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (
        OSError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        AttributeError,
        TypeError,
    ) as error:
        raise FormatError(
            f"these {what} are corrupted, truncated or not an .npz file ({error})",
            where=str(path),
            remedy="Delete the file (the report leaves out what it held), or run again",
        ) from None
