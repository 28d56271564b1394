"""Reading and writing files so that nothing is lost and nothing that we load can run code.

A file is written under a temporary name in the same folder, fsynced and renamed: a reader sees the old file
or the new one, never half of one. Only JSON and safetensors are read. A safetensors file of ours carries the
sha256 of its tensors (names, shapes, dtypes, bytes) in its metadata; it is checked on load, so that a
flipped bit is an error and not a slightly different model. Unlike the library's own writer, which holds the
whole file in memory and shuffles the metadata, ours writes tensor by tensor: equal tensors give equal bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitsmith.errors import FormatError, RunError

DIGEST = "sha256"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def write_atomic(path: str | os.PathLike[str], data: bytes | Iterable[Any]) -> None:
    """Write ``data``, or buffers one after the other, to ``path`` in one step; a full disk is a RunError and
    leaves the old file alone."""
    path = Path(path)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(descriptor, "wb") as file:
            parts: Iterable[Any] = (data,) if isinstance(data, bytes) else data
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would surprise whoever shares a run directory
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            "the disk is full; the previous version of this file is intact",
            where=str(path),
            remedy="Free some space and run again with --resume",
        )
    return RunError(
        f"cannot be written ({error.strerror})", where=str(path), remedy="Check the path and its permissions"
    )


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON (indented, NaN refused) atomically."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str | os.PathLike[str], what: str = "file") -> dict[str, Any]:
    """Read a JSON object; ``what`` names it in messages. Raises FormatError."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"there is no such {what}", where=str(path), remedy="Check the path") from None
    except (IsADirectoryError, PermissionError) as error:
        raise FormatError(f"this {what} cannot be read ({error.strerror})", where=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"this {what} is not valid JSON ({error})",
            where=str(path),
            remedy="It is corrupted or truncated: restore it, or make it again",
        ) from None
    if not isinstance(value, dict):
        raise FormatError(
            f"this {what} is not one of ours",
            where=str(path),
            got=f"a JSON {type(value).__name__}",
            expected="a JSON object",
        )
    return value


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of the tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(_buffer(tensor))
    return total.hexdigest()


def _buffer(tensor: Tensor) -> Any:
    """The bytes of a tensor in the order of its elements, without a copy where they lie so."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with a digest in its metadata. Each tensor is stored whole, shared or not."""
    facts = {**(metadata or {}), "format": "pt", DIGEST: digest(tensors)}
    header: dict[str, Any] = {"__metadata__": dict(sorted(facts.items()))}
    names, end = (
        sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)),
        0,
    )  # each one aligned
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    buffers = (_buffer(tensors[name]) for name in names)
    write_atomic(path, itertools.chain([len(text).to_bytes(8, "little"), text], buffers))


def load_tensors(
    path: str | os.PathLike[str], what: str = "tensor file", *, mark: str = ""
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what ``save_tensors`` wrote: (tensors, metadata). Raises FormatError, also on a wrong digest.

    mark: a key of the metadata that only ``save_tensors`` writes: where it is, a missing digest is damage.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"there is no such {what}", where=str(path), remedy="Check the path")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(
            f"this {what} is corrupted, truncated or not a safetensors file ({error})",
            where=str(path),
            remedy="Restore it from a copy, or make it again",
        ) from None
    stored = metadata.pop(DIGEST, None)
    unsealed = mark in metadata and (stored is None or metadata.get("format") != "pt")
    if unsealed or (stored is not None and stored != digest(tensors)):
        raise FormatError(
            f"this {what} is corrupted: its content does not match its {DIGEST}",
            where=str(path),
            remedy="Restore it from a copy, or make it again",
        )
    return tensors, metadata


@contextlib.contextmanager
def directory_lock(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Hold ``directory`` for this process; RunError where a live process holds it.

    The lock is the kernel's (flock on ``.lock``), so that a killed process leaves none behind.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / ".lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise _write_error(directory, error) from error
    with file:
        if not _try_lock(file.fileno()):
            file.seek(0)
            raise RunError(
                f"this run directory is in use by process {file.read().strip() or 'unknown'}",
                where=str(directory),
                remedy="Wait for it, stop it, or choose another --out",
            )
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: no advisory lock; running twice in one directory is not detected
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
