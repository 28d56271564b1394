"""Readers of exported files that share no code with training or with the writers: what verify trusts.

Each gives, per site, the integers and numbers as they lie in the file. The native reader parses safetensors
by hand and unpacks bits with numpy; the ONNX one reads initializers with the onnx package. Neither computes
a value of the model: running a file is the business of its runtime.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitsmith.errors import FormatError, MissingExtra

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StoredSite:
    """What a file holds of one site; codes flat (weights only), in the order of the weight's elements.
    levels: what the codes of a non-uniform grid index.
    container: bits that each code takes, where all take the same."""

    codes: Array | None = None
    scale: Array | None = None
    zero_point: Array | None = None
    levels: Array | None = None
    container: int | None = None


def read_native(directory: Path) -> dict[str, StoredSite]:
    """The sites of a native model."""
    try:
        config = json.loads((directory / "config.json").read_text())
        data = (directory / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        body = data[8 + length :]
        found: dict[str, StoredSite] = {}
        for layer, entry in config["layers"].items():
            for operand in ("weight", "input", "left", "right"):
                form = entry.get(operand)
                if form and "bits" in form:
                    site = f"{layer}.{operand}" if layer else operand
                    found[site] = _native_site(site, form, header, body)
        return found
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise FormatError(f"this model cannot be read ({error})", where=str(directory)) from None


def _native_site(site: str, form: dict[str, Any], header: dict[str, Any], body: bytes) -> StoredSite:
    def tensor(part: str, kind: str) -> Array | None:
        entry = header.get(f"{site}.{part}")
        if entry is None:
            return None
        start, end = entry["data_offsets"]
        return np.frombuffer(body[start:end], kind)

    scale, stored = tensor("scale", "<f4"), tensor("codes", "u1")
    if stored is None or scale is None:
        return StoredSite(None, scale, tensor("zero_point", "<f4"))
    zero_point, packed = None, header.get(f"{site}.zero_point")
    if packed is not None:
        one = "u1" if packed["dtype"] == "U8" else "<f4"  # the first files held them in float
        zero_point = tensor("zero_point", one)
        if zero_point is not None and one == "u1":
            rows = form["shape"][0] if scale.size > 1 else 1
            zero_point = _codes(zero_point, [rows, scale.size // rows], form).astype(np.float32)
    return StoredSite(_codes(stored, form["shape"], form), scale, zero_point, tensor("levels", "<f4"))


def _codes(stored: Array, shape: list[int], form: dict[str, Any]) -> Array:
    """The codes of this shape in a stream of bits, flat."""
    rows = shape[0]
    each = np.broadcast_to(np.array(form["bits"]), rows)  # one width, or one per output channel
    grids = np.broadcast_to(np.array(form["grid"]), len(np.unique(each)))
    codes, stream, start = np.zeros(shape, np.int64), np.unpackbits(stored, bitorder="little"), 0
    for width, grid in zip(np.unique(each), grids, strict=True):  # channels of the least width first
        at = each == width
        end = start + codes[at].size * width
        half = 2 ** (width - 1)
        from_zero = dict.fromkeys(("unsigned", "asymmetric", "powers_of_two", "levels"), 0)
        lowest = {**from_zero, "balanced": 1 - half}.get(str(grid), -half)
        values = stream[start:end].reshape(-1, width).astype(np.int64) @ (1 << np.arange(width)) + lowest
        codes[at] = values.reshape(codes[at].shape)
        start = end
    return codes.reshape(-1)


def read_onnx(path: Path) -> dict[str, StoredSite]:
    """The sites of an ONNX file."""
    try:
        import onnx
    except ImportError:
        raise MissingExtra("onnx", "onnx", "reading ONNX files") from None
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # protobuf's own exception type differs between its implementations
        raise FormatError(f"this is not an ONNX file ({error})", where=str(path)) from None
    found: dict[str, dict[str, Any]] = {}
    for initializer in graph.initializer:
        site, _, part = initializer.name.rpartition(".")
        if part in ("codes", "scale", "zero_point", "levels"):
            array = onnx.numpy_helper.to_array(initializer).reshape(-1)
            kind = np.float32 if part in ("scale", "levels") else np.int64
            found.setdefault(site, {})[part] = array.astype(kind)
            if part == "codes":  # INT2, UINT4, ...
                found[site]["container"] = int(
                    onnx.TensorProto.DataType.Name(initializer.data_type).lstrip("UINT")
                )
    return {site: StoredSite(**parts) for site, parts in found.items()}
