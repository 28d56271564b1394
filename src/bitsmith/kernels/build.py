"""Compiling the library at its first use, into the user's cache.

A file is named by what it was made from (sources, flags, compiler, processor) and by its own sha256: it
appears in one step under its final name, two processes that build at once make two files of which each is
good, and a damaged file does not fit its name and is built anew. The folder must belong to the user alone,
because what lies there is executed. Every failure is a NotBuilt that says why; whoever asked falls back to
torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bitsmith.kernels.processor import FLAGS, InstructionSet, processor

SOURCES = Path(__file__).parent / "c"
COMPILERS = ("cc", "gcc", "clang")
COMMON = (
    "-O3",
    "-std=gnu11",
    "-shared",
    "-fPIC",
    "-fwrapv",  # sums of integers wrap as torch's do
    "-ffp-contract=off",  # a product and a sum round twice, as torch's do
    "-fno-math-errno",
    "-fno-trapping-math",
)
PATIENCE = 300  # seconds


class NotBuilt(Exception):
    """Why there is no library: one line."""


def cache_folder() -> Path:
    """$BITSMITH_CACHE, else bitsmith in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("BITSMITH_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "bitsmith" if base else Path("~/.cache/bitsmith").expanduser()


def private_folder(folder: Path) -> Path:
    """The folder, made where it is missing; NotBuilt where it cannot be, or where others may write to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
    except (OSError, RuntimeError) as error:
        raise NotBuilt(f"the cache {folder} cannot be made ({error})") from None
    if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o022):
        raise NotBuilt(f"the cache {folder} can be written by others, and what lies in it would be executed")
    return folder


def built(
    instruction_set: InstructionSet,
    sources: Sequence[Path] | None = None,
    flags: Sequence[str] | None = None,
) -> Path:
    """The library for one instruction set, compiled where the cache has none. Raises NotBuilt.

    sources, flags: in place of the library's own (benchmarks/peak.c).
    """
    files = sorted(SOURCES.glob("*.c")) if sources is None else list(sources)
    headers = sorted(SOURCES.glob("*.h")) if sources is None else []
    chosen = (*COMMON, *(FLAGS[instruction_set] if flags is None else flags))
    told = hashlib.sha256("\0".join((*chosen, processor())).encode())
    for path in (*files, *headers):
        told.update(path.read_bytes())
    stem = f"{instruction_set}-{told.hexdigest()[:16]}"
    folder = private_folder(cache_folder())
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if path.name == _name(stem, path):
            return path
        with contextlib.suppress(OSError):
            path.unlink()
    return _compile([*chosen, f"-DBITSMITH_{instruction_set.upper()}"], files, folder, stem)


def _name(stem: str, path: Path) -> str:
    return f"{stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}.so"


def _compile(flags: Sequence[str], files: Sequence[Path], folder: Path, stem: str) -> Path:
    compiler = _compiler()
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{stem}.", suffix=".part")
        os.close(handle)
        command = [*compiler, *flags, *map(str, files), "-o", temporary, "-lm", "-lpthread", "-ldl"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise NotBuilt(f"{compiler[0]} failed: {said}")
        final = folder / _name(stem, Path(temporary))
        os.replace(temporary, final)
        return final
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"the library was not built in {folder} ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _compiler() -> list[str]:
    if named := os.environ.get("CC"):
        return shlex.split(named)
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise NotBuilt(f"there is no C compiler (none of {', '.join(COMPILERS)})")
