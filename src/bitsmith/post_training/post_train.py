"""post_train: round the weights of a prepared model, layer by layer, so that outputs stay the float model's.

Without training: each weight is moved to where it gives the float model's outputs from the inputs that come
in truth (output_matching), then rounded with what its inputs are (rounding), in the order in which the layers
run, so that each sees the errors of those before it. The model then holds weights on their grids: an answer,
and a start for training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import DataError, SchemeError, SiteError, check_choice, check_value
from bitsmith.post_training.output_matching import (
    Moments,
    choose,
    correction,
    matched,
    relative_error,
)
from bitsmith.post_training.rounding import ROUNDINGS, Grid
from bitsmith.post_training.streams import HELD_OUT, FloatStream, samples, sums
from bitsmith.post_training.structure import Structure, structure_of
from bitsmith.quantization.quantizer import Quantizer, check_calibrated
from bitsmith.quantization.rows import observe_weight

Progress = Callable[["LayerFacts", int, int], None]


@dataclass(frozen=True)
class LayerFacts:
    """What became of a layer.

    error_nearest, error: |X̂Q - target|² / |target|² on the calibration rows, of the weight rounded to nearest
    as it was, and of the one that the model has now. The target is the float model's output with the error
    of the residual stream where a float stream ran, else X̂W. alpha, beta: None where they played no part.
    left: why the layer was left to its quantizer, empty where it was not.
    """

    name: str
    rows: int = 0
    seconds: float = 0.0
    error_nearest: float | None = None
    error: float | None = None
    alpha: float | None = None
    beta: float | None = None
    left: str = ""


@torch.no_grad()
def post_train(
    model: nn.Module,
    float_model: nn.Module,
    batches: Iterable[Any],
    *,
    rounding: str = "gptq",
    matching: bool = True,
    alpha: float | None = None,
    beta: float | None = None,
    norm: bool = True,
    damping: float = 0.01,
    order: bool = True,
    refit: bool = True,
    correction: float = 1.0,
    progress: Progress | None = None,
) -> list[LayerFacts]:
    """Round the weights of ``model``, prepared and calibrated, in place; see the module's docstring.

    float_model: what it was prepared from. batches: of inputs, a tensor or a tuple of arguments each; all are
    gone through once for every group of layers. rounding: a name in rounding.ROUNDINGS. alpha, beta: None
    finds them on every fourth batch. norm: count tokens as the norm behind the addition does. damping: μ, a
    share of mean(diag H). order: columns of strong inputs first. refit: calibrate each range anew on the
    weight that is to be rounded. correction: the share of P that gptaq takes. progress: called with (facts,
    layers done, layers) after each layer.

    Layers that cannot be handled are left as they are, rounded to nearest by their quantizer, and come last
    in the list with the reason. Raises SiteError (not prepared, not calibrated, nothing to round),
    SchemeError (an option out of range; a weight whose grid moves with it), DataError (too few batches or
    rows).
    """
    check_options(rounding, alpha, beta, damping, correction)
    held = list(batches)
    held_out = HELD_OUT if matching and (alpha is None or beta is None) else 0
    shape = checked_structure(model, float_model, held, held_out)
    count = sum(map(len, shape.groups))
    two = matching or rounding in ("gptaq", "qronos")
    stream = FloatStream(float_model, held, shape) if two else None
    options = {"damping": damping, "order": order} | (
        {"correction": correction} if rounding == "gptaq" else {}
    )
    facts: list[LayerFacts] = []
    for group in shape.groups:
        start = time.perf_counter()
        of = sums(group, model, stream, held, shape, norm=norm and matching, held_out=held_out)
        shared = (time.perf_counter() - start) / len(group)
        for name in group:
            start = time.perf_counter()
            fit, rest = of[name]
            whole = fit if rest is None else fit + rest
            layer: Any = model.get_submodule(name)
            weight = layer.weight.flatten(1)
            target: Tensor = weight
            found: tuple[float | None, float | None] = (None, None)
            cross: Tensor | None = whole.cross
            if matching:
                target, found = _matched(weight, fit, rest, whole, (alpha, beta), damping)
                cross = None
            quantizer: Quantizer = layer.weight_quantizer
            before = relative_error(quantizer(layer.weight).flatten(1), weight, _with_energy(whole, weight))
            if refit:
                quantizer.calibrate(*observe_weight(quantizer, target.view_as(layer.weight)))
            rounded = ROUNDINGS[rounding](
                target, grid_of(quantizer, layer.weight), whole.hessian, cross, **options
            )
            after = relative_error(rounded, weight, _with_energy(whole, weight))
            layer.weight.copy_(rounded.view_as(layer.weight))
            seconds = shared + time.perf_counter() - start
            facts.append(LayerFacts(name, whole.rows, seconds, before, after, *found))
            if progress is not None:
                progress(facts[-1], len(facts), count)
    return facts + [LayerFacts(name, left=reason) for name, reason in shape.left.items()]


def check_options(
    rounding: str, alpha: float | None, beta: float | None, damping: float, correction: float
) -> None:
    """Refuse what is out of range. Raises SchemeError."""
    check_choice("rounding", rounding, tuple(ROUNDINGS))
    for option, value in (("alpha", alpha), ("beta", beta)):
        check_value(option, value, value is None or 0 <= value <= 1, "0 to 1, or None to find it")
    check_value("damping", damping, damping >= 0, "0 or more")
    check_value("correction", correction, 0 <= correction <= 1, "0 to 1")


def _matched(
    weight: Tensor,
    fit: Moments,
    rest: Moments | None,
    whole: Moments,
    asked: tuple[float | None, float | None],
    damping: float,
) -> tuple[Tensor, tuple[float | None, float | None]]:
    """(W*, (α, β)): α and β from the held-out rows, W* from all of them."""
    alpha, beta = asked
    if rest is not None:
        chosen = choose(weight, correction(weight, fit, damping), rest)
        alpha = chosen[0] if alpha is None else alpha
        beta = chosen[1] if beta is None else beta
    assert alpha is not None
    assert beta is not None
    target = matched(weight, whole, alpha, beta, damping)
    return target, (alpha, beta if whole.residual is not None else None)


def _with_energy(of: Moments, weight: Tensor) -> Moments:
    """The sums with the energy of X̂W where no float stream told it."""
    if of.cross is not None:
        return of
    w = weight.double()
    return Moments(of.hessian, None, None, float((w @ of.hessian * w).sum()), of.rows)


def grid_of(quantizer: Quantizer, weight: Tensor) -> Grid:
    """The grid of a weight's quantizer, for the weight as (out, in)."""
    at, inputs = quantizer.levels(), weight[0].numel()

    def by_column(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if quantizer.scheme.granularity == "group":
            assert quantizer.scheme.group_size is not None
            groups = value.view(len(weight), -1)
            return groups.repeat_interleave(quantizer.scheme.group_size, 1)[:, :inputs]
        return value.reshape(-1, 1)

    ranged = Grid(*(by_column(v) for v in (at.scale, at.low, at.high, at.half, at.zero_point)))
    return ranged._replace(table=at.table)


def checked_structure(
    model: nn.Module, float_model: nn.Module, batches: Sequence[Any], held_out: int = HELD_OUT
) -> Structure:
    """The structure of the model, when all is there that rounding needs: one forward of the first batch.

    held_out: as many batches must be there. Raises as `post_train`.
    """
    check_calibrated(model)
    if not batches:
        raise DataError("there is no batch to calibrate on", where="post_train")
    shape = structure_of(model, float_model, batches[0])
    if not shape.groups:
        raise SiteError(
            "this model has no weight to round",
            where=type(model).__name__,
            remedy="Call bs.prepare(model, weights=bs.Scheme(bits=...)) first",
        )
    if len(batches) < held_out:
        raise DataError(
            "too few batches to hold some out",
            where="post_train",
            got=len(batches),
            expected=f"{held_out} or more: every {held_out}th decides alpha and beta",
            remedy="Split the calibration data into smaller batches, or pass alpha and beta",
        )
    first, every = (sum(samples(b) for b in some) for some in (batches[:1], batches))
    for name in shape.calls:
        layer: Any = model.get_submodule(name)
        _check_range(name, layer.weight_quantizer)
        rows, inputs = shape.rows[name] * every // first, layer.weight[0].numel()
        if rows < inputs:
            raise DataError(
                "fewer calibration rows than inputs",
                where=name,
                got=f"{rows} rows (tokens, or positions of images) in {len(batches)} batches",
                expected=f"{inputs} or more",
                remedy=f"Give about {-(-inputs // max(rows, 1))} times as much calibration data",
            )
    return shape


def _check_range(name: str, quantizer: Quantizer) -> None:
    if quantizer.scheme.range in ("dorefa", "dynamic"):
        raise SchemeError(
            "the grid of this weight moves with the weight, so that nothing stays on it",
            where=f"{name}.weight.range",
            got=quantizer.scheme.range,
            expected="lsq, lsq+, pact or static",
        )
