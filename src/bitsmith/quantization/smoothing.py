"""Transformations that leave a float model's function alone and make it easier to quantize, learned.

    Y = [(X - d) / s] [s W] + [b + d W]        s, d of each input channel   (SmoothQuant, OmniQuant's LET)
    W in [sigmoid(l) min W, sigmoid(u) max W]  u, l of each scale, 3 at first   (OmniQuant's LWC, 2308.13137)

as ZeroQAT (2509.00031, eq. 4) trains them: outliers of X go to W, and what is rare in W is clipped. s =
2^smooth, so that it is positive. Layers that read one norm share s and d, because `fold` puts them into
that norm: its gain / s, its bias (bias - d) / s, weights s W, biases b + d W; the clipped range becomes the
weight's stored one. Nothing of it is left in the exported model. Only where the norm can take it is X
transformed: whether it can is tried, not read off names, with s = 2, by which everything is exact. The
paper's pairs of linear layers (v and out, q and k) are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import DataError, SiteError, check_value, matching
from bitsmith.numerics import affine, blocks
from bitsmith.numerics.calibrate import EMPTY
from bitsmith.quantization.layers import QuantLinear, in_eval_mode
from bitsmith.quantization.observe import calibrate
from bitsmith.quantization.quantizer import Quantizer, sites

CLIP_START = 3.0  # sigmoid(3) = 0.95
LEAST = 1e-5  # of the largest input of a channel: no scale becomes 0


class ClippedQuantizer(Quantizer):
    """A weight's quantizer whose range is a learned share of the weight's own."""

    clip_high: nn.Parameter  # (C,), one for each scale
    clip_low: nn.Parameter

    def forward(self, x: Tensor, of: Tensor | None = None) -> Tensor:
        """x (out, in) fake-quantized within its clipped range."""
        scale, zero_point = self.clipped_range(x)
        size, row = self.scheme.group_size, self.levels()
        v = x if size is None else blocks.to_groups(x, size, flatten=True)
        like = scale.new_tensor
        half = like([row.half]) if row.half else None
        y = affine.fake_quantize(
            v,
            scale.view(self.view),
            like([row.low]),
            like([row.high]),
            half,
            zero_point.view(self.view),
        )
        return y if size is None else blocks.from_groups(y, x, flatten=True)

    def clipped_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(scale (C,), zero point (C,)) of the range from sigmoid(l) min to sigmoid(u) max of x's rows."""
        row, scheme = self.levels(), self.scheme
        values = blocks.rows_of(x, scheme.granularity, scheme.group_size, 0, True)
        highest = torch.sigmoid(self.clip_high) * values.amax(1)
        lowest = torch.sigmoid(self.clip_low) * values.amin(1)
        if scheme.grid == "asymmetric":
            highest, lowest = highest.clamp(min=0), lowest.clamp(max=0)
            scale = ((highest - lowest) / (row.high - row.low)).clamp(min=EMPTY)
            return scale, torch.round(row.low - lowest / scale).clamp(row.low, row.high)
        top, bottom = row.high + row.half, row.low + row.half
        scale = torch.maximum(highest / top, lowest / bottom).clamp(min=EMPTY)
        return scale, torch.zeros_like(scale)

    @torch.no_grad()
    def stored_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `Quantizer.stored_range`."""
        scale, zero_point = self.clipped_range(x)
        return scale.view(self.view), zero_point.view(self.view)


class SmoothedLinear(QuantLinear):
    """QuantLinear of transformed operands."""

    smooth: nn.Parameter  # (in,): log2 s, shared by the layers that read one norm
    shift: nn.Parameter | None  # (in,): d

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        s = torch.exp2(self.smooth)
        x = (x if self.shift is None else x - self.shift) / s
        weight = self.weight * s
        weight = weight if self.weight_quantizer is None else self.weight_quantizer(weight)
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return F.linear(x, weight, self.smoothed_bias())

    def smoothed_bias(self) -> Tensor | None:
        """b + d W (out,)."""
        if self.shift is None or self.bias is None:
            return self.bias
        return self.bias + F.linear(self.shift, self.weight)


def transformations(model: nn.Module) -> dict[str, nn.Parameter]:
    """All that is learned here, by name; what layers share once."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        own = ("smooth", "shift") if isinstance(module, SmoothedLinear) else ()
        own = ("clip_high", "clip_low") if isinstance(module, ClippedQuantizer) else own
        for part in own:
            parameter = getattr(module, part)
            if parameter is not None and all(parameter is not other for other in found.values()):
                found[f"{name}.{part}"] = parameter
    return found


@contextlib.contextmanager
def in_float(model: nn.Module) -> Iterator[None]:
    """Inside, every quantizer lets its input pass; the model is in eval mode."""
    hooks = [q.register_forward_hook(lambda _, given, __: given[0]) for q in sites(model).values()]
    try:
        with in_eval_mode(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def smooth(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] = ("*",),
    strength: float = 0.5,
    shift: bool = True,
) -> dict[str, str]:
    """Give the linear layers of a prepared ``model`` learned clipping, and behind norms a transformation.

    batches: of inputs, from which s = max|X|^a / max|W|^(1-a) of each input channel (a = ``strength``) and
    d, the middle of the channel, come; all activation ranges are calibrated anew. shift: train d too, where
    the norm and its layers have biases. Returns what became of each layer that matches a glob of
    ``layers``: the norm that it is smoothed with, or why it is only clipped, or left. Raises SiteError (no
    such layer), SchemeError (strength), DataError (no batch).
    """
    check_value("strength", strength, 0 <= strength <= 1, "0 to 1")
    held = list(batches)
    if not held:
        raise DataError("there is no batch to smooth by", where="smooth")
    linear = {name: m for name, m in model.named_modules() if type(m) is QuantLinear}
    if not linear:
        raise SiteError("this model has no linear layer to smooth", where=type(model).__name__)
    outcome: dict[str, str] = {}
    for name in matching("layers", layers, linear, "linear layer"):
        outcome[name] = _clip(linear[name].weight_quantizer) or "clipped; it does not read a norm"
    for norm_name, (norm, readers, lowest, highest) in _readers(model, linear, held).items():
        if not set(readers) <= set(outcome):
            continue
        if not _folds(model, norm, [linear[name] for name in readers], held[0]):
            for name in readers:
                outcome[name] = f"clipped; others read {norm_name} too"
            continue
        members = [linear[name] for name in readers]
        shifts = shift and _bias(norm) is not None and all(m.bias is not None for m in members)
        middle = (lowest + highest) / 2 if shifts else torch.zeros_like(lowest)
        reach = torch.maximum(highest - middle, middle - lowest).clamp(min=LEAST)
        heaviest = torch.stack([m.weight.abs().amax(0) for m in members]).amax(0).clamp(min=LEAST)
        s = reach**strength / heaviest ** (1 - strength)
        shared = nn.Parameter(torch.log2(s))
        moved = nn.Parameter(middle) if shifts else None
        for name, layer in zip(readers, members, strict=True):
            layer.__class__ = SmoothedLinear
            layer.smooth, layer.shift = shared, moved  # type: ignore[assignment]
            layer.bitsmith_norm = norm_name  # type: ignore[assignment]
            outcome[name] = norm_name
    calibrate(model, held, overwrite=True)
    return outcome


@torch.no_grad()
def fold(model: nn.Module) -> list[str]:
    """Put what `smooth` added into norms, weights, biases and ranges, in place; the layers' names. Outputs
    stay what they were up to the rounding of floats, and the model is an ordinary prepared one again."""
    folded, norms = [], set()
    for name, layer in model.named_modules():
        if isinstance(layer, SmoothedLinear):
            s, d, norm = torch.exp2(layer.smooth), layer.shift, layer.bitsmith_norm
            if norm not in norms:
                norms.add(norm)
                _divide(model.get_submodule(str(norm)), s, d)
            bias = layer.smoothed_bias()
            if bias is not None and layer.bias is not None:
                layer.bias.copy_(bias)
            layer.weight.mul_(s)
            del layer.smooth, layer.shift, layer.bitsmith_norm
            layer.__class__ = QuantLinear  # type: ignore[assignment]
            folded.append(name)
        if isinstance(layer, QuantLinear) and isinstance(layer.weight_quantizer, ClippedQuantizer):
            quantizer = layer.weight_quantizer
            quantizer.set_range(*quantizer.clipped_range(layer.weight))
            del quantizer.clip_high, quantizer.clip_low
            quantizer.__class__ = Quantizer  # type: ignore[assignment]
            folded += [name] if name not in folded else []
    return folded


def _clip(quantizer: Quantizer | None) -> str:
    """Let a weight's quantizer clip; why it cannot, else nothing."""
    if quantizer is None or quantizer.bits.in_float:
        return "left: its weight is in float"
    if quantizer.scheme.range not in ("lsq", "static", "pact") or quantizer.table is not None:
        return "left: its grid is not a range of its weight's values"
    if len(quantizer.bits.candidates) > 1 or quantizer.bits.candidates.ndim > 1:
        return "left: its width is not decided, or differs by channel"
    if type(quantizer) is Quantizer:
        for name in ("clip_high", "clip_low"):
            start = torch.full((quantizer.range.shape[1],), CLIP_START, device=quantizer.range.device)
            quantizer.register_parameter(name, nn.Parameter(start))
        quantizer.__class__ = ClippedQuantizer
    return ""


def _readers(
    model: nn.Module, linear: dict[str, QuantLinear], batches: Sequence[Any]
) -> dict[str, tuple[Any, list[str], Tensor, Tensor]]:
    """Norm -> (module, linear layers that read its output, least and largest value of each channel)."""
    norms = {n: m for n, m in model.named_modules() if "Norm" in type(m).__name__ and _gain(m) is not None}
    seen: dict[str, Tensor] = {}
    found: dict[str, tuple[Any, list[str], Tensor, Tensor]] = {}

    def after(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            seen[name] = output

    def before(name: str, x: Any) -> None:
        for norm, output in seen.items():
            if output is x:
                rows = x.flatten(0, -2)
                low, high = rows.amin(0), rows.amax(0)
                module, readers, lowest, highest = found.get(norm, (norms[norm], [], low, high))
                readers += [name] if name not in readers else []
                found[norm] = (module, readers, torch.minimum(low, lowest), torch.maximum(high, highest))

    hooks = [m.register_forward_hook(lambda _, __, out, n=n: after(n, out)) for n, m in norms.items()]
    hooks += [
        m.register_forward_pre_hook(lambda _, given, n=n: before(n, given[0])) for n, m in linear.items()
    ]
    try:
        with in_float(model):
            for batch in batches:
                _run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _folds(model: nn.Module, norm: nn.Module, layers: Sequence[QuantLinear], batch: Any) -> bool:
    """Whether halving the norm's output and doubling the weights behind it changes nothing: not a bit, as
    both are exact. It does where anything else reads the norm, or the norm uses its gain otherwise."""
    two = torch.tensor(2.0, device=layers[0].weight.device)

    def scaled(by: Tensor) -> None:
        _divide(norm, by, None)
        for layer in layers:
            layer.weight.mul_(by)

    with in_float(model):
        plain = _run(model, batch)
        scaled(two)
        try:
            other = _run(model, batch)
        finally:
            scaled(1 / two)
    first, second = (_tensors(out) for out in (plain, other))
    return bool(first) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _divide(norm: nn.Module, s: Tensor, d: Tensor | None) -> None:
    """norm(x) -> (norm(x) - d) / s."""
    gain, bias = _gain(norm), _bias(norm)
    assert gain is not None
    gain.div_(s)
    if bias is not None:
        bias.copy_((bias if d is None else bias - d) / s)


def _gain(norm: nn.Module) -> Tensor | None:
    gain = getattr(norm, "weight", None)
    return gain if isinstance(gain, Tensor) and gain.ndim == 1 else None


def _bias(norm: nn.Module) -> Tensor | None:
    bias = getattr(norm, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _run(model: nn.Module, batch: Any) -> Any:
    return model(*(batch if isinstance(batch, tuple) else (batch,)))


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of what a model gives: one, a tuple, a dictionary."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [t for v in values for t in _tensors(v)] if isinstance(output, dict | list | tuple) else []
