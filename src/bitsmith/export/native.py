"""Native: a packed model as a folder of two files that any Bitsmith loads, without training code.

    model.safetensors   every buffer of the packed model under its qualified name: codes at their true width,
                        scales, zero points (of a weight at the width of its codes), the levels that codes of
                        a non-uniform grid index, biases, what stayed in float; a tied weight once. Where
                        output channels have widths of their own, those of the least width come first in the
                        codes
    config.json         {"format": "bitsmith", "version": 1, "model": {"name", "arguments"} | null,
                         "layers": {name: {"kind", "weight", "input" | "left" | "right", "geometry",
                                           "transposed"}},
                         "folded": {BatchNorm: layer}, "split": {Linear: outlier channels}, where there are
                         some}; it says per site bits, grid and granularity

Nothing in them is executable: a built-in model is rebuilt by name from a fixed table (a name of the form
module:factory is refused, and so are paths), any other is loaded `into` a model that the user made. The
tensors' digest and that of config.json lie in the safetensors metadata, so that a changed, truncated or
mixed-up pair is an error. What ONNX holds lives in export.onnx.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import BitsmithError, FormatError, SiteError
from bitsmith.files import load_tensors, read_json, save_tensors, write_atomic
from bitsmith.numerics.blocks import GRANULARITIES, group_count
from bitsmith.numerics.grid import GRIDS, TABLES
from bitsmith.numerics.pack import packed_size
from bitsmith.quantization.bits import in_words
from bitsmith.quantization.integer_layers import (
    ConvGeometry,
    FloatWeight,
    Folded,
    Form,
    FrozenQuantizer,
    IntegerConv,
    IntegerConvTranspose,
    IntegerEmbedding,
    IntegerLayer,
    IntegerLinear,
    IntegerMatMul,
    PackedWeight,
    pack_codes,
    packed_layers,
)
from bitsmith.quantization.integer_products import run_on_kernels
from bitsmith.quantization.layers import MatMul
from bitsmith.quantization.outliers import split_as, splits_of
from bitsmith.tasks.hollow import build_hollow
from bitsmith.tasks.models import MODELS, NOT_STRUCTURE

VERSION = 1
TENSORS, CONFIG = "model.safetensors", "config.json"
CONFIG_DIGEST = "config_sha256"
FLOAT_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "conv": (nn.Conv1d, nn.Conv2d),
    "conv_transpose": (nn.ConvTranspose2d,),
    "embedding": (nn.Embedding,),
    "matmul": (MatMul,),
}


def save(packed: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write a finalized model to ``directory``. Each file is written atomically."""
    layers = packed_layers(packed)
    if not layers:
        raise FormatError(
            "this model has no packed layer", where="save", remedy="Call bs.finalize(model, example) first"
        )
    config = {
        "format": "bitsmith",
        "version": VERSION,
        "model": getattr(packed, "bitsmith_model", None),
        "layers": {name: _describe(name, layer, layers) for name, layer in layers.items()},
        "folded": {name: m.into for name, m in packed.named_modules() if isinstance(m, Folded)},
        **({"split": splits} if (splits := splits_of(packed)) else {}),
    }
    write_stored(directory, (json.dumps(config, indent=1) + "\n").encode(), stored_tensors(packed))
    return Path(directory)


def write_stored(directory: str | os.PathLike[str], text: bytes, tensors: Mapping[str, Tensor]) -> None:
    """The two files of a model, ``text`` that of its configuration; where that is there already, only the
    tensors are written, in one step."""
    where, sealed = Path(directory), hashlib.sha256(text).hexdigest()
    save_tensors(where / TENSORS, tensors, {"bitsmith": str(VERSION), CONFIG_DIGEST: sealed})
    if not (where / CONFIG).exists() or (where / CONFIG).read_bytes() != text:
        write_atomic(where / CONFIG, text)


def stored_tensors(packed: nn.Module) -> dict[str, Tensor]:
    """What the file holds: the state dict, shared tensors once, without BatchNorm's training counters."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in packed.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and not name.endswith("num_batches_tracked"):
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def load(
    directory: str | os.PathLike[str], into: nn.Module | None = None, *, kernels: bool = True
) -> nn.Module:
    """The packed model of ``directory``, in eval mode.

    ``into``: a model of the same architecture, for models that are not built in; its layers are replaced, in
    place, after everything was checked. ``kernels``: multiply integers where the grids allow it
    (quantization.integer_products); without, floats, bit for bit as `finalize` left them. Raises FormatError.
    """
    where = Path(directory)
    config, tensors = read_stored(where)
    skeleton = _built_in(config, where) if into is None else into
    try:
        skeleton = split_as(skeleton, config.get("split", {}))
        loaded = _assemble(skeleton, config, tensors, str(where))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SiteError) as error:
        raise FormatError(f"this model cannot be put together ({_short(error)})", where=str(where)) from None
    if kernels:
        run_on_kernels(loaded)
    if into is None or type(loaded) is not type(into):
        return loaded
    vars(into).update(vars(loaded))  # all at once: a load that fails leaves the user's model as it was
    return into


def read_stored(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) of a folder's two files, which must belong together. Raises FormatError."""
    where = Path(directory)
    config = read_json(where / CONFIG, "model configuration")
    if config.get("format") != "bitsmith":
        raise FormatError("this is not a model of Bitsmith's", where=str(where / CONFIG))
    if config.get("version") != VERSION:
        raise FormatError(
            "this file has another format version",
            where=str(where / CONFIG),
            got=config.get("version"),
            expected=VERSION,
            remedy="Load it with the Bitsmith that wrote it",
        )
    tensors, metadata = load_tensors(where / TENSORS, "model")
    if metadata.get(CONFIG_DIGEST) != hashlib.sha256((where / CONFIG).read_bytes()).hexdigest():
        raise FormatError(
            f"{CONFIG} is not the one that {TENSORS} was written with",
            where=str(where),
            remedy="Restore both from one copy, or save the model again",
        )
    return config, tensors


# ---- writing


def _describe(name: str, layer: IntegerLayer, layers: dict[str, IntegerLayer]) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": layer.kind}
    for operand in ("input", "left", "right"):
        quantizer = getattr(layer, operand, None)
        if quantizer is not None:
            entry[operand] = quantizer.form.to_dict()
    if isinstance(layer, IntegerMatMul):
        return entry
    owner = next(n for n, other in layers.items() if getattr(other, "weight", None) is layer.weight)
    if owner != name:
        entry["weight"] = {"tied_to": owner}
    elif isinstance(layer.weight, FloatWeight):
        entry["weight"] = {"float": True}
    else:
        entry["weight"] = layer.weight.form.to_dict()
    if isinstance(layer, IntegerLinear) and layer.transposed:
        entry["transposed"] = True
    if isinstance(layer, IntegerConv):
        entry["geometry"] = vars(layer.geometry)
    if isinstance(layer, IntegerConvTranspose):
        entry["output_padding"] = layer.output_padding
    return entry


# ---- reading: nothing in the files is trusted


def _built_in(config: dict[str, Any], where: Path) -> nn.Module:
    recipe = config.get("model")
    name = recipe.get("name") if isinstance(recipe, dict) else None
    if not isinstance(name, str) or name not in MODELS:
        raise FormatError(
            "this model is not a built-in one",
            where=str(where),
            got=name,
            remedy="Make the float model yourself and call bs.load(directory, into=model)",
        )
    assert isinstance(recipe, dict)
    arguments = recipe.get("arguments")
    if not isinstance(arguments, dict) or set(arguments) & set(NOT_STRUCTURE):
        raise FormatError("the arguments of the built-in model are damaged", where=str(where / CONFIG))
    try:
        return build_hollow(name, **arguments)
    except (BitsmithError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(
            f"the built-in model {name} cannot be built ({_short(error)})", where=str(where / CONFIG)
        ) from None


def _assemble(
    skeleton: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], where: str
) -> nn.Module:
    """A copy of ``skeleton`` with packed layers in place of float ones, and all tensors of the file."""
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    memo: dict[int, Any] = {}  # deepcopy takes what it finds here for the copy, as in finalize
    made: dict[str, Any] = {}
    for name, entry in config["layers"].items():
        kind = entry["kind"]
        transposed = entry.get("transposed") is True
        if name not in modules or not _is_a(modules[name], kind, transposed):
            raise FormatError(
                "this layer of the file is not in the model",
                where=f"{where}: {name}",
                got=type(modules[name]).__name__ if name in modules else "no such module",
                expected=f"a {kind} layer" + ", its weight (in, out)" * transposed,
                remedy="Load into the architecture that was trained",
            )
        made[name] = _layer(name, entry, tensors, made)
        weight, before = getattr(made[name], "weight", None), getattr(modules[name], "weight", None)
        shape = None if weight is None else tuple(weight.shape)
        if shape is not None and (transposed or kind == "conv_transpose"):
            shape = (shape[1], shape[0], *shape[2:])
        if weight is not None and before is not None and shape != tuple(before.shape):
            raise FormatError(
                "this layer has another shape in the model",
                where=f"{where}: {name}",
                got=tuple(before.shape),
                expected=shape,
                remedy="Load into the architecture that was trained",
            )
        memo[id(modules[name])] = made[name]
    for name, layer in config["folded"].items():
        memo[id(modules[name])] = Folded(str(layer))
    model: nn.Module = copy.deepcopy(skeleton, memo)

    state = model.state_dict(keep_vars=True)
    shared: dict[int, list[str]] = {}
    for key, value in state.items():
        shared.setdefault(id(value), []).append(key)
    expected = {keys[0] for keys in shared.values() if not keys[0].endswith("num_batches_tracked")}
    for what, names in (("lacks", expected - set(tensors)), ("has more than", set(tensors) - expected)):
        if names:
            raise FormatError(f"the file {what} the model's tensors: {sorted(names)[0]}", where=where)
    with torch.no_grad():
        for key in sorted(expected):
            if state[key].shape != tensors[key].shape:
                raise FormatError(
                    "this tensor has another shape in the model",
                    where=f"{where}: {key}",
                    got=tuple(state[key].shape),
                    expected=tuple(tensors[key].shape),
                )
            state[key].copy_(tensors[key])
    return model.requires_grad_(False).eval()


def _is_a(module: nn.Module, kind: str, transposed: bool) -> bool:
    """Whether a layer of the file may take the module's place. One whose weight is (in, out) is of a class
    that only its package knows: it is told by what it has."""
    known = FLOAT_LAYERS[kind]
    if not transposed:
        return isinstance(module, known)
    every = tuple(c for classes in FLOAT_LAYERS.values() for c in classes)
    weight = getattr(module, "weight", None)
    return kind == "linear" and not isinstance(module, every) and getattr(weight, "ndim", 0) == 2


def _layer(
    name: str, entry: dict[str, Any], tensors: dict[str, Tensor], made: dict[str, Any]
) -> IntegerLayer:
    prefix = f"{name}." if name else ""
    kind = entry["kind"]
    if kind == "matmul":
        return IntegerMatMul(*(_quantizer(f"{prefix}{o}", entry.get(o), tensors) for o in ("left", "right")))
    transposed = entry.get("transposed") is True
    inputs_first = transposed or kind == "conv_transpose"
    weight = _weight(f"{prefix}weight", entry["weight"], tensors, made, inputs_first)
    if kind == "embedding":
        return IntegerEmbedding(weight)
    input, bias = _quantizer(f"{prefix}input", entry.get("input"), tensors), tensors.get(f"{prefix}bias")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"{prefix}bias has shape {tuple(bias.shape)}")
    if kind == "linear":
        return IntegerLinear(weight, input, bias, transposed)
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["geometry"].items()}
    if kind == "conv_transpose":
        more = tuple(int(n) for n in entry["output_padding"])
        return IntegerConvTranspose(weight, input, bias, ConvGeometry(**values), more)
    return IntegerConv(weight, input, bias, ConvGeometry(**values))


def _weight(
    site: str, entry: dict[str, Any], tensors: dict[str, Tensor], made: dict[str, Any], inputs_first: bool
) -> PackedWeight | FloatWeight:
    if "tied_to" in entry:
        weight: PackedWeight | FloatWeight = made[entry["tied_to"]].weight
        return weight
    if entry.get("float") is True:
        values = _floats(f"{site}.values", tensors)
        if inputs_first:  # to be summed as before
            values = values.transpose(0, 1).contiguous().transpose(0, 1)
        return FloatWeight(values)
    form = _form(site, entry)
    if form.shape is None:
        raise ValueError(f"{site} has no shape")
    codes, scale = tensors[f"{site}.codes"], _floats(f"{site}.scale", tensors)
    rows, length = form.shape[0], math.prod(form.shape[1:])
    if isinstance(form.bits, tuple) and (len(form.bits) != rows or form.granularity != "channel"):
        raise ValueError(
            f"{site} has {len(form.bits)} widths, which is not one for each of its {rows} channels"
        )
    if codes.dtype != torch.uint8 or codes.numel() != _size(form, rows * length):
        raise ValueError(
            f"{site} has {codes.numel()} bytes of codes, which are not {in_words(form.bits)} bits each"
        )
    groups = group_count(length, form.group_size) if form.group_size else 1
    if scale.numel() != {"tensor": 1, "channel": rows, "group": rows * groups}[form.granularity]:
        raise ValueError(f"{site} has {scale.numel()} scales, which is not one per {form.granularity}")
    zero_point = tensors.get(f"{site}.zero_point")
    if zero_point is not None:
        if zero_point.is_floating_point() and zero_point.shape == scale.shape:  # as the first files held them
            zero_point = tensors[f"{site}.zero_point"] = pack_codes(zero_point, form)
        if zero_point.dtype != torch.uint8 or zero_point.numel() != _size(form, scale.numel()):
            raise ValueError(f"{site} has {zero_point.numel()} bytes of zero points")
    levels = _levels(site, form, tensors)
    weight = PackedWeight(codes, form, scale, zero_point, levels)
    if levels is not None and int(weight.integers().max()) >= len(levels):  # forward would look them up
        raise ValueError(f"{site} has codes beyond its {len(levels)} levels")
    return weight


def _levels(site: str, form: Form, tensors: dict[str, Tensor]) -> Tensor | None:
    if form.grid not in TABLES:
        return None
    (bits, (_, high, _), _), *_ = form.runs
    levels = _floats(f"{site}.levels", tensors)
    if levels.shape != (high + 1,):
        raise ValueError(f"{site} has {levels.numel()} levels, which are not those of {bits} bits")
    return levels


def _size(form: Form, count: int) -> int:
    """Bytes of ``count`` codes or zero points; where channels have widths of their own, as many of each."""
    widths = form.bits if isinstance(form.bits, tuple) else (form.bits,)
    return packed_size(count // len(widths) * sum(widths), 1)


def _quantizer(site: str, entry: dict[str, Any] | None, tensors: dict[str, Tensor]) -> FrozenQuantizer | None:
    if entry is None:
        return None
    form = _form(site, entry)
    scale = None if form.dynamic else _floats(f"{site}.scale", tensors)
    return FrozenQuantizer(form, scale, tensors.get(f"{site}.zero_point"))


def _form(site: str, entry: dict[str, Any]) -> Form:
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()}
    form = Form(**values)
    widths = form.bits if isinstance(form.bits, tuple) else (form.bits,)
    whole = [*widths, form.group_size or 1, *(form.shape or ())]
    if not widths or not all(type(n) is int and n >= 1 for n in whole) or max(widths) > 8:
        raise ValueError(f"{site} has impossible numbers: {values}")
    grids = form.grid if isinstance(form.grid, tuple) else (form.grid,)
    if len(grids) not in (1, len(set(widths))) or (len(widths) > 1 and form.shape is None):
        raise ValueError(f"{site} has {len(grids)} grids for {len(set(widths))} widths")
    if (
        not set(grids) <= {*GRIDS, *TABLES}
        or form.granularity not in GRANULARITIES
        or type(form.axis) is not int
    ):
        raise ValueError(f"{site} is of an unknown kind: {form}")
    if (form.granularity == "group") != (form.group_size is not None):
        raise ValueError(f"{site} has groups without a size, or a size without groups")
    return form


def _floats(name: str, tensors: dict[str, Tensor]) -> Tensor:
    tensor = tensors[name]
    if tensor.dtype != torch.float32 or not tensor.numel():
        raise ValueError(f"{name} is not float32")
    return tensor


def _short(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"no entry {text}" if isinstance(error, KeyError) else text[:200] or type(error).__name__
