"""An exported model that is opened to train on: integer layers of the very codes that its file holds, or the
packed layers of inference.

What cannot train on integers stays packed and frozen, and is listed. Nothing is converted, neither here nor
when the file is written: its tensors are the model's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import DataError, FormatError, SiteError
from bitsmith.export import load as load_model
from bitsmith.export.delta import model_digest
from bitsmith.export.native import CONFIG, read_stored, stored_tensors
from bitsmith.quantization.integer_layers import packed_layers
from bitsmith.quantization.integer_packed import resume_integer
from bitsmith.quantization.integer_training import int_layers
from bitsmith.tasks import Examples, build


@dataclass(frozen=True)
class Opened:
    """A model that trains on integers, or by forward passes. text: the configuration that its file will have,
    equal to the one it has unless weights with one scale for all got one for each channel. frozen: layers
    that stay packed while others train; in_float: parameters that train as floats. skeleton: bytes of the
    float model of a factory's, which is there while the file is read, and no longer."""

    model: nn.Module
    text: bytes
    digest: str
    base: bytes
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    in_float: tuple[str, ...]
    notes: tuple[str, ...]
    skeleton: int

    def tensors(self) -> dict[str, Tensor]:
        """What the file will hold: the model's own tensors."""
        return stored_tensors(self.model)


def digest_of(directory: Path) -> str:
    """`model_digest` of the model in a folder. Raises FormatError."""
    _, tensors = read_stored(directory)
    return model_digest((directory / CONFIG).read_bytes(), tensors)


def open_model(directory: Path, factory: str | None = None, mode: str = "integer") -> Opened:
    """Load the model of ``directory`` and let it train on integers, or in mode ``zeroth_order`` as it is, on
    the kernels of inference; ``factory`` builds what is not built in.

    Raises FormatError where it is no model of ours, SiteError where no layer of it has an integer form.
    """
    check_model(directory)
    skeleton, into = 0, None
    if factory is not None:
        into = build(factory)
        skeleton = sum(p.numel() * p.element_size() for p in into.parameters())
    before = digest_of(directory)
    model = load_model(directory, into, kernels=mode != "integer")
    del into
    if not packed_layers(model):
        raise FormatError("this model has no packed layer", where=str(directory))
    base = (directory / CONFIG).read_bytes()
    if mode != "integer":
        in_float = tuple(name for name, _ in model.named_parameters())
        return Opened(model, base, before, base, tuple(_frozen(model)), (), in_float, (), skeleton)
    found = resume_integer(model, keep_float=True)
    layers = int_layers(model)
    if not layers:
        kinds = ", ".join(
            f"{name}: {layer.extra_repr() or layer.kind}" for name, layer in _frozen(model).items()
        )
        raise SiteError(
            "no layer of this model has an integer form to train on", where=str(directory), got=kinds
        )
    return Opened(
        model,
        _configuration(base, model),
        before,
        base,
        tuple(layers),
        tuple(_frozen(model)),
        tuple(name for name, _ in model.named_parameters()),
        found.notes,
        skeleton,
    )


def check_model(directory: Path) -> None:
    """Refuse a path that is no exported model, with what to give instead. Raises FormatError."""
    if (directory / CONFIG).is_file():
        return
    inside = directory / "model"
    if (inside / CONFIG).is_file():
        raise FormatError(
            "this is a run, not an exported model", where=str(directory), remedy=f"Give {inside}"
        )
    raise FormatError(
        "this is no exported model: it has no config.json"
        if directory.is_dir()
        else "there is no such directory",
        where=str(directory),
        expected="a folder that bs.save wrote, or the model/ of a run",
    )


def _frozen(model: nn.Module) -> dict[str, Any]:
    """Layers with weights that are still packed."""
    return {n: layer for n, layer in packed_layers(model).items() if hasattr(layer, "weight")}


def _configuration(base: bytes, model: nn.Module) -> bytes:
    """The text of config.json, changed where a weight's scales became one for each channel."""
    config, changed = json.loads(base), False
    for name, layer in int_layers(model).items():
        entry = config["layers"][name]["weight"]
        if "bits" in entry and entry["granularity"] != layer.weight.form.granularity:
            config["layers"][name]["weight"], changed = layer.weight.form.to_dict(), True
    return (json.dumps(config, indent=1) + "\n").encode() if changed else base


def check_data(model: nn.Module, data: Examples, where: str) -> tuple[int, int]:
    """Run the model on a row of ``data``, and see that its answers are of these classes. Returns how many
    numbers it answers to the row, and the multiply-accumulates of that. Raises DataError."""
    data.check(model, 0)
    products = [0]

    def count(layer: Any, inputs: Any, output: Tensor) -> None:
        products[0] += output.numel() * layer.weight.shape[1:].numel()

    layers = int_layers(model) or _frozen(model)
    hooks = [layer.register_forward_hook(count) for layer in layers.values()]
    try:
        with torch.no_grad():
            outputs = model.eval()(data.example())
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        shape = tuple(data.example().shape[1:])
        raise DataError(
            f"the model cannot take these {data.unit} ({said[:120]})",
            where=where,
            got=f"{data.unit} of shape {shape}",
            expected="those of the shape that the model was trained on",
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    known = getattr(data, "classes", None)
    if known is not None:
        there = outputs.shape[1]
        numbers = tuple(str(index) for index in range(len(known))) == tuple(known)
        if len(known) > there or (len(known) < there and not numbers):
            raise DataError(
                "the classes are not those of the model",
                where=where,
                got=f"{len(known)} ({', '.join(known[:6])}{', ...' if len(known) > 6 else ''})",
                expected=f"the model's {there}",
            )
    return int(outputs[0].numel()), products[0]
