"""A delta: what an adaptation changed in a native model, as one small file, and the way back.

    FILE   safetensors; each changed tensor under its name, as the smaller of two forms of bytes:
             codes   gaps between the changed codes (1, 2, 4 or 8 bytes each), then their new values, packed
             xor     zlib of the old bytes XOR the new ones
           metadata: "bitsmith_delta": version, "base", "result": digests of both models, "changes": JSON,
           name -> {"kind", "bits", "count", "gap"}

A delta fits one base, by digest, and applying it gives the model that it was made from, by digest. Codes are
those of weights of one width; everything else (scales, biases, norms) is compared as bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitsmith.errors import FormatError
from bitsmith.files import digest, load_tensors, save_tensors
from bitsmith.numerics.pack import pack_bytes, packed_size, unpack

VERSION = "1"
MARK = "bitsmith_delta"
GAPS = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}  # bytes of a gap
Tensors = Mapping[str, Tensor]


def model_digest(text: bytes, tensors: Tensors) -> str:
    """sha256 that stands for both files of a model: the text of its configuration, and its tensors."""
    return hashlib.sha256(text + digest(tensors).encode()).hexdigest()


def code_widths(text: bytes) -> dict[str, tuple[int, int]]:
    """(bits, how many) of the codes of every weight that has one width: name of the tensor -> both."""
    found = {}
    for layer, entry in json.loads(text)["layers"].items():
        form = entry.get("weight", {})
        if isinstance(form.get("bits"), int):
            name = f"{layer}.weight.codes" if layer else "weight.codes"
            found[name] = form["bits"], int(np.prod(form["shape"]))
    return found


def share_changed(text: bytes, base: Tensors, result: Tensors) -> float:
    """The share of all codes that differ between two models of one configuration."""
    changed = total = 0
    for name, (bits, count) in code_widths(text).items():
        total += count
        if not torch.equal(base[name], result[name]):
            changed += int((unpack(base[name], bits, count, 0) != unpack(result[name], bits, count, 0)).sum())
    return changed / max(total, 1)


def write_delta(path: str | os.PathLike[str], text: bytes, base: Tensors, result: Tensors) -> int:
    """Write what turns ``base`` into ``result``, two models of the configuration ``text``. Returns bytes."""
    widths, stored, changes = code_widths(text), {}, {}
    for name, new in result.items():
        old = base[name]
        if _bytes(old).tobytes() == _bytes(new).tobytes():
            continue
        data, entry = _xor(old, new)
        if name in widths:
            other = _codes(old, new, *widths[name])
            data, entry = min((data, entry), other, key=lambda form: len(form[0]))
        stored[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        changes[name] = entry
    facts = {
        MARK: VERSION,
        "base": model_digest(text, base),
        "result": model_digest(text, result),
        "changes": json.dumps(changes, sort_keys=True),
    }
    save_tensors(path, stored, facts)
    return Path(path).stat().st_size


def read_delta(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a delta file. Raises FormatError."""
    tensors, facts = load_tensors(path, "delta", mark=MARK)
    if MARK not in facts:
        raise FormatError("this is not a delta of ours", where=str(path))
    if facts[MARK] != VERSION:
        raise FormatError(
            "this delta has another format version",
            where=str(path),
            got=facts[MARK],
            expected=VERSION,
            remedy="Apply it with the Bitsmith that wrote it",
        )
    return tensors, facts


def apply_delta(path: str | os.PathLike[str], text: bytes, base: Tensors) -> dict[str, Tensor]:
    """The tensors of the model that a delta was made from. Raises FormatError for another base, or damage."""
    stored, facts = read_delta(path)
    if facts.get("base") != model_digest(text, base):
        raise FormatError(
            "this delta belongs to another model",
            where=str(path),
            got=f"a model of digest {model_digest(text, base)[:12]}",
            expected=f"the one that was adapted, {facts.get('base', '')[:12]}",
        )
    result = dict(base)
    try:
        for name, entry in json.loads(facts["changes"]).items():
            data = stored[name].numpy().tobytes()
            turn = {"xor": _unxor, "codes": _uncodes}[entry["kind"]]
            result[name] = turn(base[name], data, entry)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, zlib.error) as error:
        raise FormatError(f"this delta is damaged ({error!r})", where=str(path)) from None
    if model_digest(text, result) != facts.get("result"):
        raise FormatError("this delta does not give the model that it was made from", where=str(path))
    return result


def _bytes(tensor: Tensor) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return found


def _xor(old: Tensor, new: Tensor) -> tuple[bytes, dict[str, Any]]:
    return zlib.compress((_bytes(old) ^ _bytes(new)).tobytes(), 9), {"kind": "xor"}


def _unxor(old: Tensor, data: bytes, entry: dict[str, Any]) -> Tensor:
    before = _bytes(old)
    opened = zlib.decompressobj()
    found = opened.decompress(data, len(before) + 1)  # no more than there can be, whatever the file says
    made = before ^ np.frombuffer(found, np.uint8)
    return torch.from_numpy(made).view(old.dtype).view(old.shape)


def _codes(old: Tensor, new: Tensor, bits: int, count: int) -> tuple[bytes, dict[str, Any]]:
    after = unpack(new, bits, count, 0)
    at = (unpack(old, bits, count, 0) != after).nonzero().flatten()
    gaps = at.diff(prepend=at.new_zeros(1)).numpy()
    size = next(size for size in GAPS if int(gaps.max()) < 256**size)
    values = pack_bytes(after[at].to(torch.uint8), bits)
    entry = {"kind": "codes", "bits": bits, "count": len(at), "gap": size}
    return gaps.astype(GAPS[size]).tobytes() + _bytes(values).tobytes(), entry


def _uncodes(old: Tensor, data: bytes, entry: dict[str, Any]) -> Tensor:
    bits, count, size = int(entry["bits"]), int(entry["count"]), int(entry["gap"])
    total = old.numel() * 8 // max(bits, 1)  # up to seven more than there are, of which none changes
    if not 1 <= bits <= 8 or not 0 < count <= total or len(data) != count * size + packed_size(count, bits):
        raise ValueError("a number of codes that does not fit")
    gaps = np.frombuffer(data[: count * size], GAPS[size]).astype(np.int64)
    values = torch.frombuffer(bytearray(data[count * size :]), dtype=torch.uint8)
    at = torch.from_numpy(gaps).cumsum(0)
    if int(at.min()) < 0:
        raise ValueError("codes in an order that does not fit")
    codes = unpack(old[: packed_size(total, bits)], bits, total, 0)
    codes[at] = unpack(values, bits, count, 0)
    made = old.clone()
    made[: packed_size(total, bits)] = pack_bytes(codes.to(torch.uint8), bits)
    return made
