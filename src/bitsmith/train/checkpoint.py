"""Training checkpoints: a nest of dicts, lists, tuples, numbers, strings and tensors in one safetensors file.

torch.save would do it in a line, but unpickling can run code. Here the tensors are stored by number and the
nest around them as JSON in a tensor of bytes, so that the file's digest covers both. Beside the state there
is a fingerprint: the settings and the data that the state belongs to. Resuming with others is an error that
names the difference. Python's and NumPy's generators are not saved: nothing in the loop draws from them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitsmith.errors import FormatError, RecipeError
from bitsmith.files import load_tensors, save_tensors

KIND = "bitsmith training checkpoint"
VERSION = 1
REMEDY = "Use the settings that it was written with, or start anew without --resume"

_NEST = "nest"  # key of the JSON among the numbered tensors


def flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for ``value``, its tensors moved into ``tensors``; keys may be integers, tuples stay tuples."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[flatten(k, tensors), flatten(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [flatten(item, tensors) for item in value]}
    raise FormatError(
        "this value cannot be part of a checkpoint",
        where="checkpoint",
        got=type(value).__name__,
        expected="tensors, numbers, strings, dicts, lists and tuples",
        remedy="Return a tensor from get_extra_state",
    )


def unflatten(nest: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of ``flatten``."""
    if not isinstance(nest, dict):
        return nest
    ((kind, content),) = nest.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {unflatten(k, tensors): unflatten(v, tensors) for k, v in content}
    items = [unflatten(item, tensors) for item in content]
    return {"list": list, "tuple": tuple}[kind](items)


def save_checkpoint(path: Path, state: dict[str, Any], fingerprint: dict[str, Any]) -> None:
    """Write atomically: after a crash there is the old checkpoint or the new one."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"state": flatten(state, tensors), "fingerprint": fingerprint})
    tensors[_NEST] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    save_tensors(path, tensors, {"kind": KIND, "version": str(VERSION)})


def load_checkpoint(path: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The state in ``path``. FormatError for a damaged or foreign file, RecipeError for other settings."""
    tensors, metadata = load_tensors(path, "checkpoint", mark="kind")
    if metadata.get("kind") != KIND:
        raise FormatError(
            "this is not a training checkpoint of ours",
            where=str(path),
            got=metadata.get("kind", "a safetensors file without our mark"),
            expected=KIND,
        )
    if metadata.get("version") != str(VERSION):
        raise FormatError(
            "this checkpoint was written by another version",
            where=str(path),
            got=f"format {metadata.get('version')}",
            expected=f"format {VERSION}",
            remedy="Start anew without --resume",
        )
    try:
        document = json.loads(tensors.pop(_NEST).numpy().tobytes())
        state, stored = unflatten(document["state"], tensors), document["fingerprint"]
    except (KeyError, ValueError, TypeError) as error:
        raise FormatError(f"this checkpoint is damaged ({error!r})", where=str(path)) from None
    _compare(path, stored, json.loads(json.dumps(fingerprint)))
    return dict(state)


def _compare(path: Path, stored: dict[str, Any], now: dict[str, Any]) -> None:
    for key in sorted(stored.keys() | now.keys()):
        if stored.get(key) != now.get(key):
            raise RecipeError(
                f"this checkpoint was written with another {key}",
                where=str(path),
                got=f"{now.get(key)!r} now",
                expected=repr(stored.get(key)),
                remedy=REMEDY,
            )


def check_keys(path: Path, what: str, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    """FormatError naming the first entry by which a stored state_dict does not fit the one at hand."""
    for name in sorted(stored.keys() | expected.keys()):
        old, new = stored.get(name), expected.get(name)
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (old, new)]
        if (name in stored) != (name in expected) or shapes[0] != shapes[1]:
            raise FormatError(
                f"this checkpoint is of another {what}: {name} does not fit",
                where=str(path),
                got=shapes[0] if name in stored else "nothing",
                expected=shapes[1] if name in expected else "nothing",
                remedy=REMEDY,
            )


def tensor_digest(tensor: Tensor) -> str:
    """Short sha256 of shape, dtype and bytes: tells data sets and folds apart."""
    plain = tensor.detach().cpu().contiguous()
    total = hashlib.sha256(f"{tuple(plain.shape)}|{plain.dtype}|".encode())
    total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]
