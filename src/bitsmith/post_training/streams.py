"""Two streams: the float model and the partly quantized one, over the same calibration batches.

For the layers of one group the batches are run through both models, each only as far as that group, and
what comes by is added to the sums of output_matching. So any module will do. The quantized model changes from
group to group: it costs a forward for each, of half a model on average, and the memory of one batch. The
float model does not: what it shows is kept for as many groups as `MEMORY` holds, and one forward serves them.
Activations are what the layer multiplies with: inputs behind their quantizer, patches of a convolution.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.post_training.output_matching import Moments, moments
from bitsmith.post_training.structure import Additions, Structure, Writer
from bitsmith.quantization.layers import in_eval_mode

HELD_OUT = 4  # every fourth batch
MEMORY = 2**28  # bytes of the float stream that are kept: 256 MB


class _Reached(Exception):
    """All that was to be seen in this forward was seen."""


@dataclass
class Seen:
    """Of one forward, by layer and call: what goes in (behind the input quantizer), what comes out, and of
    writers (other summand, sum)."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    additions: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)  # as they were when they were seen

    def note(self, *tensors: Tensor) -> None:
        """Remember how often these were written to."""
        self.versions += [(tensor, tensor._version) for tensor in tensors]

    def overwritten(self) -> bool:
        """Whether a layer further on did its work in place."""
        return any(tensor._version != version for tensor, version in self.versions)


def look(
    model: nn.Module,
    layers: Sequence[str],
    calls: Mapping[str, int],
    writers: Mapping[str, Writer],
    batch: Any,
) -> Seen:
    """Run ``model`` on a batch until all calls of ``layers`` (and additions of ``writers``) were seen."""
    seen = Seen(*({name: [] for name in layers} for _ in range(3)))  # type: ignore[arg-type]

    def check() -> None:
        done = all(
            len(seen.outputs[name]) >= calls[name]
            and (name not in writers or len(seen.additions[name]) >= calls[name])
            for name in layers
        )
        if done:
            raise _Reached

    def added(name: str, other: Tensor, total: Tensor) -> None:
        seen.additions[name].append((other, total))
        seen.note(other, total)
        check()

    additions = Additions(added)

    def after(name: str, module: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
        if name in seen.outputs:
            quantizer = getattr(module, "input_quantizer", None)
            x = arguments[0]
            seen.inputs[name].append(x if quantizer is None else quantizer(x))
            seen.outputs[name].append(output)
            seen.note(seen.inputs[name][-1], output)
        if name in sources:
            if not watching:  # not from the start: it costs time at every operation
                stack.enter_context(additions)
                watching.append(True)
            additions.expect(sources[name], output)
        check()

    sources = {writers[name].batchnorm or name: name for name in layers if name in writers}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, arguments, output, name=name: after(name, module, arguments, output)
        )
        for name in {*layers, *sources}
    ]
    watching: list[bool] = []
    try:
        with contextlib.suppress(_Reached), contextlib.ExitStack() as stack:
            model(*(batch if isinstance(batch, tuple) else (batch,)))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


class FloatStream:
    """What the float model shows of every batch, for several groups at once as ``memory`` (bytes) allows.

    Nothing is kept where a single group takes more than the memory, or where the model changes in place what
    it has shown.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], shape: Structure, memory: int = MEMORY
    ) -> None:
        self.model, self.batches, self.shape, self.memory = model, batches, shape, memory
        self.share = sum(map(samples, batches)) / max(samples(batches[0]), 1) if batches else 0.0
        self.kept: dict[int, Seen] = {}  # by batch
        self.layers: list[str] = []  # of which these are

    def of(self, group: Sequence[str], index: int) -> Seen:
        """What batch ``index`` shows of ``group``."""
        if not set(group) <= set(self.layers):
            self.kept = {}  # let go before others take its place
            self.layers = self._ahead(group)
        if index not in self.kept:
            seen = self._look(self.layers, index)
            if seen.overwritten():
                self.memory, self.layers = 0, list(group)
                seen = self._look(group, index)
            if self._size(self.layers) > self.memory:
                return seen
            self.kept[index] = seen
        return self.kept[index]

    def _look(self, layers: Sequence[str], index: int) -> Seen:
        return look(self.model, layers, self.shape.calls, self.shape.writers, self.batches[index])

    def _ahead(self, group: Sequence[str]) -> list[str]:
        """The layers of ``group``, and of the groups behind it that fit with it."""
        start = self.shape.groups.index(tuple(group))
        layers = list(group)
        for after in self.shape.groups[start + 1 :]:
            if self._size([*layers, *after]) > self.memory:
                break
            layers += after
        return layers

    def _size(self, layers: Sequence[str]) -> float:
        return self.share * sum(self.shape.bytes[name] for name in layers)


def samples(batch: Any) -> int:
    """How many inputs a batch has."""
    return len(batch[0] if isinstance(batch, tuple) else batch)


def patches(layer: Any, x: Tensor) -> Tensor:
    """The rows (tokens, in) that ``layer`` multiplies its weight (out, in) with, of its input x."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2) if x.ndim > 1 else x[None]
    stride, dilation, kernel = layer.stride, layer.dilation, layer.kernel_size
    padding = layer._reversed_padding_repeated_twice
    if any(padding):
        x = F.pad(x, padding, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    if isinstance(layer, nn.Conv1d):
        x, stride, dilation, kernel = x.unsqueeze(-2), (1, *stride), (1, *dilation), (1, *kernel)
    return F.unfold(x, kernel, dilation=dilation, stride=stride).transpose(1, 2).flatten(0, 1)


def rows_of(layer: Any, y: Tensor) -> Tensor:
    """An output (or what it is added to) as rows (tokens, out)."""
    if isinstance(layer, nn.Linear):
        return y.flatten(0, -2) if y.ndim > 1 else y[None]
    return y.flatten(2).transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def sums(
    group: Sequence[str],
    model: nn.Module,
    stream: FloatStream | None,
    batches: Sequence[Any],
    shape: Structure,
    *,
    norm: bool = True,
    held_out: int = HELD_OUT,
) -> dict[str, tuple[Moments, Moments | None]]:
    """(sums of the rows to fit, of those held out: every ``held_out``-th batch, 0: none) of the layers of one
    group; they share H and C. Without the float model's ``stream`` only H. norm: see `token_weights`.
    """
    totals: dict[str, list[Moments | None]] = {name: [None, None] for name in group}
    with in_eval_mode(model), contextlib.ExitStack() as stack:
        if stream is not None:
            stack.enter_context(in_eval_mode(stream.model))
        for index, batch in enumerate(batches):
            part = int(held_out > 0 and index % held_out == held_out - 1)
            here = None if stream is None else stream.of(group, index)
            of_batch = _of_batch(group, model, here, batch, shape, norm)
            del here  # before the next is there
            for name, found in of_batch.items():
                old = totals[name][part]
                totals[name][part] = found if old is None else old + found
    done = {}
    for name, (fit, held) in totals.items():
        if fit is None:
            raise DataError("no batch reached this layer", where=name, remedy="Give more calibration batches")
        done[name] = (fit, held)
    return done


def _of_batch(
    group: Sequence[str],
    model: nn.Module,
    here: Seen | None,
    batch: Any,
    shape: Structure,
    norm: bool,
) -> dict[str, Moments]:
    """The sums of one batch, of which the float model showed ``here``. H and C are computed once, of the
    first layer."""
    none: dict[str, Writer] = {}
    there = look(model, group, shape.calls, none if here is None else shape.writers, batch)
    found: dict[str, Moments] = {}
    shared: Moments | None = None
    for name in group:
        layer: Any = model.get_submodule(name)
        total: Moments | None = None
        for call, x in enumerate(there.inputs[name]):
            if here is None:
                total = _plus(total, shared or moments(patches(layer, x)))
                continue
            bias = 0.0 if layer.bias is None else layer.bias
            target = rows_of(layer, here.outputs[name][call]) - bias
            residual = weights = None
            if name in shape.writers:
                (r, total_here), (r_hat, _) = here.additions[name][call], there.additions[name][call]
                residual = rows_of(layer, (r - r_hat) / _factor(model, shape.writers[name], r.ndim))
                target = target + residual
                if norm and shape.writers[name].norm:
                    weights = token_weights(rows_of(layer, total_here), shape.writers[name].norm == "layer")
            squares = target.square().sum(1)
            energy = float((squares if weights is None else squares * weights).sum(dtype=torch.float64))
            if shared is not None:
                total = _plus(total, Moments(shared.hessian, shared.cross, None, energy, shared.rows))
                continue
            difference = patches(layer, here.inputs[name][call] - x)
            total = _plus(total, moments(patches(layer, x), difference, residual, weights, energy))
        assert total is not None
        found[name] = total
        if len(there.inputs[name]) == 1:
            shared = total
    return found


def _plus(total: Moments | None, more: Moments) -> Moments:
    return more if total is None else total + more


def token_weights(stream: Tensor, centred: bool = False) -> Tensor:
    """1 / rms² of each token of the sum (tokens, width) that a norm reads (``centred``: 1 / variance)."""
    power = stream.var(1, unbiased=False) if centred else stream.square().mean(1)
    return 1 / (power + 1e-6 * power.mean()).clamp(min=torch.finfo(power.dtype).tiny)


def _factor(model: nn.Module, writer: Writer, ndim: int) -> Tensor | float:
    """gamma / sigma of the BatchNorm between a writer and its addition, to be divided by; far from 0."""
    if writer.batchnorm is None:
        return 1.0
    norm: Any = model.get_submodule(writer.batchnorm)
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    # a channel that the norm switches off would ask for an endless output: it is left alone
    least = 1e-2 * factor.abs().max()
    factor = torch.where(factor.abs() > least, factor, torch.inf)
    return factor.view(-1, *[1] * (ndim - 2)) if ndim > 2 else factor


@torch.no_grad()
def output_errors(
    model: nn.Module, float_model: nn.Module, batches: Sequence[Any], shape: Structure
) -> dict[str, float]:
    """Layer -> |ŷ - y|² / |y|² of its outputs in the two models, each running by itself."""
    names = [name for group in shape.groups for name in group]
    wrong, all_of_it = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    with in_eval_mode(model), in_eval_mode(float_model):
        for batch in batches:
            there, here = (look(m, names, shape.calls, {}, batch) for m in (model, float_model))
            for name in names:
                for y_hat, y in zip(there.outputs[name], here.outputs[name], strict=True):
                    wrong[name] += float((y_hat - y).square().sum(dtype=torch.float64))
                    all_of_it[name] += float(y.square().sum(dtype=torch.float64))
    return {name: wrong[name] / max(all_of_it[name], 1e-300) for name in names}
