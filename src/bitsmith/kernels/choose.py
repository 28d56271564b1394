"""Which products of integers run here: the library for the best instruction set, or torch's operators.

    BITSMITH_KERNELS   avx512vnni, avxvnni, avx2, neon, portable: that instruction set; torch: no library
    BITSMITH_CACHE     where libraries are built; else $XDG_CACHE_HOME/bitsmith, else ~/.cache/bitsmith

What fails (no compiler, a cache that cannot be written, wrong integers in the self-test) is said once, as a
warning, and stands in `describe()`, which `bitsmith inspect --system` shows.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings

import torch

from bitsmith.errors import FormatError, RunError
from bitsmith.files import read_json, write_json
from bitsmith.kernels.build import NotBuilt, built, cache_folder, private_folder
from bitsmith.kernels.native import Native
from bitsmith.kernels.operands import Activations
from bitsmith.kernels.processor import InstructionSet, instruction_sets, processor
from bitsmith.kernels.torch_path import TorchPath
from bitsmith.kernels.torch_products import PRODUCTS, ByteProduct, fastest

Backend = Native | TorchPath


@functools.cache
def best() -> Backend:
    """The backend of this process, found at its first use."""
    wanted = os.environ.get("BITSMITH_KERNELS", "")
    if wanted == "torch":
        return torch_path()
    here = instruction_sets()
    try:
        if not wanted:
            return native(here[0])
        if wanted not in here:
            raise NotBuilt(f"BITSMITH_KERNELS={wanted} does not run here (have {', '.join(here)}, torch)")
        return native(next(name for name in here if name == wanted))
    except NotBuilt as error:
        warnings.warn(
            f"integer kernels: {error}; torch computes the same integers, more slowly", stacklevel=2
        )
        return torch_path(str(error))


@functools.cache
def native(instruction_set: InstructionSet) -> Native:
    """The library for one instruction set of `instruction_sets()`, built, loaded and tested. Raises
    NotBuilt."""
    path = built(instruction_set)
    try:
        library = Native(path, instruction_set)
    except OSError as error:
        raise NotBuilt(f"the library cannot be loaded ({error})") from None
    if wrong := self_test(library):
        raise NotBuilt(f"the library for {instruction_set} computed wrong integers: {wrong}")
    return library


def torch_path(reason: str = "") -> TorchPath:
    """torch's operators, whose fastest exact product is measured once on this kind of machine."""
    return TorchPath(_product_for, reason)


def self_test(library: Native) -> str:
    """What the library gets wrong beside plain float products: nothing, "", if it works."""
    generator, plain = torch.Generator().manual_seed(0), TorchPath()
    for bits in range(1, 9):
        for m, k, n in ((1, 70, 33), (7, 1100, 17)):
            extreme = torch.full((m, k), -128, dtype=torch.int8)
            drawn = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
            codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
            for x, w in ((drawn, codes), (extreme, torch.full_like(codes, 2**bits - 1))):
                left = library.sums(Activations(x), library.pack(w, bits, offset=-1))
                if not torch.equal(left, plain.sums(Activations(x), plain.pack(w, bits, offset=-1))):
                    return f"{bits} bits, {m} x {k} x {n}"
    return ""


def _product_for(bits: int) -> ByteProduct:
    return PRODUCTS[_fastest(8 if bits == 8 else 7 if bits > 4 else 4)]


@functools.cache
def _fastest(bits: int) -> str:
    """The measured choice for this processor and this torch; kept on disk where that is possible."""
    key = f"{processor()}-torch{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}-{bits}"
    path = cache_folder() / "torch_products.json"
    known: dict[str, str] = {}
    with contextlib.suppress(FormatError):
        known = read_json(path)
    if known.get(key) in PRODUCTS:
        return known[key]
    known[key] = fastest(bits)
    with contextlib.suppress(RunError, NotBuilt):
        private_folder(path.parent)
        write_json(path, known)
    return known[key]


def describe() -> dict[str, str]:
    """Plain facts: which backend runs here, why not a better one, and where its file lies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = best()
    if isinstance(backend, Native):
        return {"kernels": backend.name, "kernels_file": str(backend.path)}
    chosen = sorted({_fastest(bits) for bits in (4, 7, 8)})
    facts = {"kernels": f"torch ({', '.join(chosen)})"}
    return facts | ({"kernels_why": backend.reason} if backend.reason else {})
