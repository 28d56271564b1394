"""Seconds of a packed model and of each of its layers, in one of the runtimes.

native        layers are timed where they stand, in a second forward with a clock around each: the weights of
              the others have been through the cache in between, as in use. Nothing is made up of parts
onnxruntime   its optimizer merges nodes, so that no layer of a file can be told from the next: each layer is
              a file of its own, written as the whole model is, and what an empty file takes is taken off

Layers alike in kind, shapes and grids are one file there. Whole models run without any clock inside.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.export.onnx import OPSET, session, to_onnx
from bitsmith.export.onnx_nodes import onnx_package
from bitsmith.quantization.integer_products import run_on_kernels

Times = tuple[float, dict[str, float]]  # seconds of a whole inference, and of each layer in it
Stopwatch = Callable[[], Times]
Run = Callable[[], object]
Files = dict[str, tuple[Run, Run]]  # what a layer's time depends on -> the layer, and an empty file
RUNTIMES = ("native", "onnxruntime")


def stopwatch(
    runtime: str, packed: nn.Module, batch: Tensor, layers: Iterable[str], files: Files
) -> Stopwatch:
    """A function that runs ``packed`` on ``batch`` in the runtime and says how long it and ``layers`` took.

    The model is the stopwatch's own from here on; ``files`` are those of layers, shared by stopwatches.
    Raises MissingExtra, and TargetError for what ONNX cannot hold.
    """
    known = dict(packed.named_modules())
    chosen = {name: known[name] for name in layers}
    if runtime == "native":
        return _native(packed, batch, chosen)
    return _onnxruntime(packed, batch, chosen, files)


def _native(packed: nn.Module, batch: Tensor, layers: dict[str, nn.Module]) -> Stopwatch:
    run_on_kernels(packed)

    @torch.inference_mode()
    def once() -> Times:
        started = time.perf_counter()
        packed(batch)
        whole = time.perf_counter() - started
        return whole, _watched(packed, batch, layers)

    return once


def _watched(packed: nn.Module, batch: Tensor, layers: dict[str, nn.Module]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    begun: list[float] = []
    hooks = []
    for name, layer in layers.items():

        def after(*_: Any, name: str = name) -> None:
            found[name] += time.perf_counter() - begun.pop()

        hooks.append(layer.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter())))
        hooks.append(layer.register_forward_hook(after))
    try:
        packed(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(found)


def _onnxruntime(packed: nn.Module, batch: Tensor, layers: dict[str, nn.Module], files: Files) -> Stopwatch:
    whole = _opened(packed, (batch,))
    keys = {}
    for name, inputs in _inputs(packed, batch, layers).items():
        key = keys[name] = _likeness(layers[name], inputs)
        if key not in files:
            files[key] = _opened(_Alone(layers[name]), inputs), _runner(_empty(inputs[0]), inputs[:1])

    def once() -> Times:
        total = _seconds(whole)
        taken = {}
        for key in set(keys.values()):
            layer, empty = files[key]
            taken[key] = max(_seconds(layer) - _seconds(empty), 0.0)
        return total, {name: taken[key] for name, key in keys.items()}

    return once


def _opened(model: nn.Module, inputs: tuple[Tensor, ...]) -> Run:
    with TemporaryDirectory() as folder:
        return _runner(session(to_onnx(model, Path(folder) / "model.onnx", inputs)), inputs)


class _Alone(nn.Module):
    """One layer as a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, right: Tensor | None = None) -> Tensor:
        made: Tensor = self.layer(x) if right is None else self.layer(x, right)
        return made


@torch.inference_mode()
def _inputs(packed: nn.Module, batch: Tensor, layers: dict[str, nn.Module]) -> dict[str, tuple[Tensor, ...]]:
    """What each layer reads, in its first call."""
    seen: dict[str, tuple[Tensor, ...]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(name, tuple(x.clone() for x in inputs)) and None
        )
        for name, layer in layers.items()
    ]
    try:
        packed(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _likeness(layer: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """What the time of a layer depends on."""
    forms = [str(getattr(getattr(layer, part, None), "form", "")) for part in ("weight", "input")]
    forms += [str(getattr(getattr(layer, part, None), "form", "")) for part in ("left", "right")]
    shapes = [tuple(x.shape) for x in inputs]
    weight, geometry = getattr(layer, "weight", None), getattr(layer, "geometry", None)
    shape = None if weight is None else tuple(weight.shape)
    bias = getattr(layer, "bias", None) is not None
    return str((type(layer).__name__, shapes, shape, forms, geometry, bias))


def _empty(x: Tensor) -> Any:
    """A session of a file that hands its input on."""
    onnx = onnx_package()
    kind = {torch.float32: onnx.TensorProto.FLOAT, torch.int64: onnx.TensorProto.INT64}[x.dtype]
    ends = [onnx.helper.make_tensor_value_info(name, kind, None) for name in ("input", "output")]
    node = onnx.helper.make_node("Identity", ["input"], ["output"])
    graph = onnx.helper.make_graph([node], "empty", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)])
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    return session(model.SerializeToString())


def _runner(opened: Any, inputs: tuple[Tensor, ...]) -> Run:
    names = [i.name for i in opened.get_inputs()]
    feed = dict(zip(names, (x.contiguous().numpy() for x in inputs), strict=True))
    return lambda: opened.run(None, feed)


def _seconds(run: Run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
