"""prepare_integer: from a float model to one that trains on integers, and has no float weight any more.

Nothing is skipped in silence: what has no integer form is refused, all of it in one message, unless
``keep_float`` names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import SchemeError, SiteError, check_choice, check_value, matching
from bitsmith.kernels.operands import MOST_INPUTS
from bitsmith.numerics.affine import quantize
from bitsmith.numerics.blocks import Granularity, from_groups, to_groups
from bitsmith.numerics.calibrate import METHODS, calibrate
from bitsmith.numerics.grid import Grid, bounds
from bitsmith.quantization import integer_blocks
from bitsmith.quantization.integer_codes import rows_at_once
from bitsmith.quantization.integer_layers import (
    ConvGeometry,
    Form,
    FrozenQuantizer,
    PackedWeight,
    packed_layers,
)
from bitsmith.quantization.integer_training import (
    IntConv2d,
    IntEmbedding,
    IntLayer,
    IntLinear,
    int_layers,
)

FIRST_LAST_BITS = 8
WIDTHS = {"weights": (2, 8), "activations": (2, 8), "gradients": (4, 8)}
WEIGHT_GRIDS = ("auto", "symmetric", "balanced", "seq")
KEPT = "kept in float as asked"


@dataclass(frozen=True)
class IntegerReport:
    """What became of a model. layers: (name, what, elements of the weight); in_float: parameters of two axes
    or more that stayed so; notes: what else was decided."""

    layers: tuple[tuple[str, str, int], ...]
    in_float: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max((len(name) for name, *_ in self.layers), default=4)
        lines = [f"{len(self.layers)} layers train on integers"]
        lines += [f"  {name:<{width}}  {what}" for name, what, _ in self.layers]
        lines += [f"  float: {name}" for name in self.in_float]
        return "\n".join([*lines, *self.notes])


def prepare_integer(
    model: nn.Module,
    weights: int = 4,
    activations: int = 8,
    gradients: int = 8,
    *,
    group_size: int | None = None,
    grid: str = "auto",
    calibration: str = "mse",
    asymmetric: bool = False,
    hadamard: bool = False,
    first_last_bits: int | None = FIRST_LAST_BITS,
    overrides: Mapping[str, Mapping[str, int]] | None = None,
    keep_float: bool | Sequence[str] = False,
    save_codes: bool = True,
    example: Any = None,
) -> IntegerReport:
    """Swap Linear, Conv2d and Embedding for layers that train on integers, in place; their float weights are
    gone afterwards.

    weights: bits of the codes, 2 to 8, one scale per channel, or of Linear per ``group_size`` inputs; grid
    auto: `seq` at 2 bits, else `symmetric`; calibration: how scales are found. activations: bits of inputs,
    each token (of a Conv2d each image) with a scale as it comes, symmetric, or for Linear ``asymmetric``;
    with ``example``, a batch or a tuple of arguments, inputs that are never negative there get the unsigned
    grid, twice as fine. gradients: bits of output gradients, 4 to 8. first_last_bits: weights and activations
    of the first and the last layer (None: no such rule); overrides: glob on layer names -> {"weights",
    "activations", "gradients"}, the last match wins.

    keep_float: True, or globs on parameter names, for parameters of two axes or more that have no integer
    form. Without, they are refused, all of them listed. save_codes: what surrounds the layers keeps codes for
    backward, too (integer_blocks), where it is known.

    Raises SiteError, SchemeError; the model is then as it was.
    """
    check_widths(weights, activations, gradients)
    check_choice("grid", grid, WEIGHT_GRIDS)
    check_choice("calibration", calibration, tuple(METHODS))
    found = _float_layers(model)
    _check_leftovers(model, found, keep_float)
    names = list(found)
    widths: dict[str, dict[str, int]] = {}
    for name in names:
        at_end = first_last_bits and name in (names[0], names[-1])
        ends = first_last_bits or 0
        own = {"weights": ends, "activations": ends} if at_end else {}
        widths[name] = {"weights": weights, "activations": activations, "gradients": gradients} | own
    for pattern, changes in (overrides or {}).items():
        unknown = [key for key in changes if key not in WIDTHS]
        if unknown:
            check_choice(f"overrides.{pattern}", unknown[0], list(WIDTHS))
        for name in matching("overrides", [pattern], names, "layer"):
            widths[name] |= changes
            w, a, g = widths[name].values()
            check_widths(w, a, g, f"overrides.{pattern}.")
    unsigned = _never_negative(model, found, example) if example is not None else set()

    packed: dict[int, PackedWeight] = {}
    made: dict[int, nn.Module] = {}
    for name, layer in found.items():
        bits, seen = widths[name], id(layer.weight)
        if seen not in packed:
            size = group_size if isinstance(layer, nn.Linear) else None
            packed[seen] = _pack(layer.weight, bits["weights"], grid, size, calibration)
        range_grid = "unsigned" if name in unsigned else "symmetric"
        if asymmetric and isinstance(layer, nn.Linear):
            range_grid = "asymmetric"
        made[id(layer)] = _make(layer, name, packed[seen], bits, range_grid, hadamard)
    replace_layers(model, made)
    return report(model, surroundings(model) if save_codes else ())


def surroundings(model: nn.Module) -> tuple[str, ...]:
    """Let what surrounds the layers keep codes; a note of how much it is, for a report."""
    changed = integer_blocks.save_codes(model)
    return (f"  {len(changed)} modules around the layers keep codes for backward",) if changed else ()


def check_widths(weights: int, activations: int, gradients: int, where: str = "") -> None:
    """Raise SchemeError for a number of bits that there is not."""
    for name, value in (("weights", weights), ("activations", activations), ("gradients", gradients)):
        low, high = WIDTHS[name]
        whole = type(value) is int and low <= value <= high
        check_value(f"{where}{name}", value, whole, f"a whole number of bits from {low} to {high}")


def _float_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that get an integer form, each once, in order."""
    if int_layers(model) or packed_layers(model):
        raise SiteError(
            "this model holds integers already",
            where="prepare_integer",
            remedy="Prepare a float model, or call resume_integer(model) for a packed one",
        )
    found = {name: m for name, m in model.named_modules() if _has_form(m) and not _why_not(m)}
    if not found or "" in found:
        raise SiteError(
            "this model has no layer to train on integers" if not found else "a single layer has no parent",
            where=type(model).__name__,
            expected="nn.Linear, nn.Conv2d or nn.Embedding inside a module",
            remedy="Put it into nn.Sequential(layer)" if found else "",
        )
    return found


def _has_form(layer: nn.Module) -> bool:
    """Subclasses are left alone: their forward may not use the weight as their parent does."""
    return type(layer) in (nn.Linear, nn.Conv2d, nn.Embedding)


def _why_not(layer: Any) -> str:
    """Why a layer of a known class has no integer form; nothing, "", if it has."""
    if layer.weight.device.type != "cpu":
        return f"it lies on {layer.weight.device}: the kernels run on the CPU"
    if layer.weight.numel() == 0:
        return "it is empty"
    if isinstance(layer, nn.Embedding):
        return "max_norm changes its weight in forward" if layer.max_norm is not None else ""
    if math.prod(layer.weight.shape[1:]) > MOST_INPUTS:
        return f"more than {MOST_INPUTS} inputs could overflow a sum of 32 bits"
    if isinstance(layer, nn.Conv2d):
        outputs = layer.out_channels // layer.groups * math.prod(layer.kernel_size)
        if outputs > MOST_INPUTS:
            return f"more than {MOST_INPUTS} outputs times taps could overflow a sum of 32 bits"
        if layer.padding_mode != "zeros":
            return f"padding {layer.padding_mode}"
        uneven = any(d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        if layer.padding == "same" and uneven:
            return "padding that differs from side to side"
    return ""


def _check_leftovers(model: nn.Module, found: dict[str, Any], keep_float: bool | Sequence[str]) -> None:
    """Refuse parameters of two axes or more that no integer layer holds."""
    own = {id(layer.weight) for layer in found.values()}
    refused = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and id(parameter) not in own:
                known = _has_form(module) and name == "weight"
                why = _why_not(module) if known else f"no integer form of {type(module).__name__}"
                refused[f"{module_name}.{name}" if module_name else name] = why
    kept = kept_float(keep_float, list(refused))
    if remaining := {name: why for name, why in refused.items() if name not in kept}:
        raise refusal(remaining)


def kept_float(keep_float: bool | Sequence[str], names: list[str]) -> set[str]:
    """The names that ``keep_float`` asks for: globs, True for all, False for none."""
    if isinstance(keep_float, bool):
        return set(names) if keep_float else set()
    if names:
        return set(matching("keep_float", list(keep_float), names, "part without an integer form"))
    return set()


def refusal(refused: Mapping[str, str]) -> SiteError:
    """The error that lists parts of a model and why each cannot train on integers."""
    listed = "; ".join(f"{name} ({why})" for name, why in refused.items())
    return SiteError(
        f"{len(refused)} parts of the model have no integer form",
        where="keep_float",
        got=listed,
        remedy="Name them in keep_float=[...] to leave them in float, or pass keep_float=True for all",
    )


def _never_negative(model: nn.Module, found: dict[str, Any], example: Any) -> set[str]:
    """Layers whose inputs have no negative value in one forward of ``example``."""
    seen: dict[str, bool] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[name] = seen.get(name, True) and bool((inputs[0] >= 0).all())

        return hook

    with_inputs = {name: layer for name, layer in found.items() if not isinstance(layer, nn.Embedding)}
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in with_inputs.items()]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(*example) if isinstance(example, tuple) else model.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, was in training.items():
            module.training = was
    return {name for name, never in seen.items() if never}


@torch.no_grad()
def _pack(weight: Tensor, bits: int, grid: str, group_size: int | None, calibration: str) -> PackedWeight:
    """A float weight as codes, some rows at a time."""
    name: Grid = ("seq" if bits == 2 else "symmetric") if grid == "auto" else grid  # type: ignore[assignment]
    low, high, half = bounds(name, bits)
    rows = weight.detach().float().flatten(1)
    if not bool(torch.isfinite(rows).all()):
        raise SchemeError("this weight is not finite", where="prepare_integer")
    codes = torch.empty(rows.shape, dtype=torch.int16)
    scales = []
    for part in range(0, len(rows), rows_at_once(rows.shape[1])):
        block = rows[part : part + rows_at_once(rows.shape[1])]
        values = block if group_size is None else to_groups(block, group_size, flatten=True)
        scale, _ = calibrate(calibration, values.flatten(0, -2), float(low), float(high), half)
        scale = scale.view(*values.shape[:-1], 1)
        found = quantize(values, scale, low, high, half)
        codes[part : part + len(block)] = found if group_size is None else from_groups(found, block, True)
        scales.append(scale.reshape(len(block), -1))
    granularity: Granularity = "channel" if group_size is None else "group"
    form = Form(bits, name, granularity, group_size, tuple(weight.shape))
    ones = (1,) * (weight.ndim - 1)
    scale = torch.cat(scales)
    shape = (len(rows), *ones) if group_size is None else (*scale.shape, 1)
    return PackedWeight.from_codes(codes.view(weight.shape), form, scale.view(shape), None)


def dynamic_range(bits: int, grid: Grid, image: bool) -> FrozenQuantizer:
    """Ranges as they come: of each token, or of each image (all axes but the first)."""
    return FrozenQuantizer(Form(bits, grid, "channel" if image else "token", dynamic=True), None)


def _make(
    layer: Any, name: str, weight: PackedWeight, bits: Mapping[str, int], grid: Any, hadamard: bool
) -> nn.Module:
    gradients = bits["gradients"]
    made: IntLayer
    if isinstance(layer, nn.Embedding):
        made = IntEmbedding(weight, padding_idx=layer.padding_idx, gradients=gradients, name=name)
    elif isinstance(layer, nn.Linear):
        input = dynamic_range(bits["activations"], grid, image=False)
        more: dict[str, Any] = {"hadamard": hadamard, "gradients": gradients, "name": name}
        made = IntLinear(weight, input, layer.bias, **more)
    else:
        geometry = ConvGeometry(
            layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode, ()
        )
        input = dynamic_range(bits["activations"], grid, image=True)
        made = IntConv2d(weight, input, layer.bias, geometry, gradients=gradients, name=name)
    made.trainable = layer.weight.requires_grad
    return made.train(layer.training)


def replace_layers(model: nn.Module, made: Mapping[int, nn.Module]) -> None:
    """Put modules in place of others, by the id of the other."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and id(child) in made:
                setattr(module, name, made[id(child)])
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fast path in eval mode reads the weights of linear1 and linear2 past their forward.
            module.activation_relu_or_gelu = 0


def report(model: nn.Module, notes: tuple[str, ...] = ()) -> IntegerReport:
    """What `prepare_integer` and `resume_integer` say of a model."""
    layers = []
    for name, layer in int_layers(model).items():
        form = layer.weight.form
        what = f"weights {form}"
        if isinstance(layer, IntLinear | IntConv2d):
            what += f"; inputs {layer.input.form}; gradients {layer.gradients} bits"
        layers.append((name, what, math.prod(form.shape or ())))
    in_float = [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]
    return IntegerReport(tuple(layers), tuple(in_float), notes)
