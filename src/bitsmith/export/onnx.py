"""ONNX: a packed model as a file that ONNX Runtime runs as it was trained, weights at 2, 4 or 8 bits.

torch.onnx traces a twin of the model in which every weight, quantizer and layer output is a placeholder node
that only carries its site's name; `_lower` then writes the placeholders out from the packed model. So stored
codes never pass through a float, and no constant folding can touch them. The usual way (fake-quantize
operators translated one by one, constants repacked afterwards) has to find the weights again in the graph.

    weight       DequantizeLinear(INT2 | INT4 | INT8), per tensor, channel or block; `seq`: + scale/2
    activation   QuantizeLinear -> DequantizeLinear (uint8 or int8) -> Clip to the grid's ends
    layer        Conv or Gemm without bias, then Add

Four of these are there for ONNX Runtime 1.31, whose optimizer otherwise computes something else (measured):
Clip *behind* the pair, also at 8 bits: it keeps DequantizeLinear away from the product, so that neither
u8*s8 kernels (16-bit saturation without VNNI, errors of 10-23 %) nor int32 biases come in. Linear layers as
two-dimensional Gemm: DequantizeLinear -> MatMul becomes MatMulNBits with int8 activations at 8 bits (4e-3).
A separate bias: see int32 biases. A zero point of zeros at INT8: without it, session.x64quantprecision=1
gives a graph that fails to run. Products are therefore in float: the file is small, not fast.
Activations that are not per tensor and static stay the plain operators of their formula.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitsmith.errors import FormatError, MissingExtra, TargetError
from bitsmith.files import write_atomic
from bitsmith.numerics.affine import dequantize
from bitsmith.numerics.grid import bounds
from bitsmith.numerics.pack import pack
from bitsmith.quantization.integer_layers import (
    FrozenQuantizer,
    IntegerConv,
    IntegerLinear,
    PackedWeight,
    packed_layers,
    packed_sites,
)

OPSET = 25  # the first with INT2
DOMAIN = "bitsmith"  # of the placeholders; none is left in the file
METADATA = "bitsmith"  # key of the file's metadata: which tensor is which layer's output
CURES = {"session.qdq_matmulnbits_accuracy_level": "0", "session.x64quantprecision": "1"}


def to_onnx(packed: nn.Module, path: str | os.PathLike[str], example: Any, *, opset: int = OPSET) -> Path:
    """Write a finalized model to ``path``. ``example``: a batch of inputs, or a tuple of arguments.

    The first dimension of every input becomes dynamic. Raises TargetError for what ONNX cannot hold.
    """
    onnx = _onnx()
    arguments = example if isinstance(example, tuple) else (example,)
    # torch.export takes a dimension of 1 for a constant.
    arguments = tuple(torch.cat([a, a]) if a.shape[0] == 1 else a for a in arguments)
    batch = torch.export.Dim("batch")
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                _twin(packed),
                arguments,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=tuple({0: batch} for _ in arguments),
                input_names=["input", *(f"input_{i}" for i in range(1, len(arguments)))],
                output_names=["output"],
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise TargetError(
                f"torch.onnx cannot write this model ({first_line(error.__cause__ or error)})",
                where=type(packed).__name__,
                remedy="See that forward() depends on no batch size, or export native only",
            ) from error
    model = program.model_proto
    _lower(model, packed)
    model.producer_name, model.producer_version, model.doc_string = "bitsmith", "", ""
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for(model.opset_import))
    onnx.checker.check_model(model)
    write_atomic(path, model.SerializeToString())
    return Path(path)


def session(model: str | os.PathLike[str] | bytes, *, cures: bool = True) -> Any:
    """An ONNX Runtime session at full optimization, on the CPU. ``cures``: the options that keep it exact."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("onnx", "onnxruntime", "running ONNX files") from None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    for key, value in CURES.items() if cures else ():
        options.add_session_config_entry(key, value)
    source = model if isinstance(model, bytes) else os.fspath(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(model: Any, inputs: Tensor | tuple[Tensor, ...], batch_size: int = 256) -> list[Tensor]:
    """All outputs of a session on (N, ...) inputs, batch by batch."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    names = [i.name for i in model.get_inputs()]
    parts = []
    for start in range(0, len(tensors[0]), batch_size):
        chunk = (t[start : start + batch_size].numpy() for t in tensors)
        parts.append(model.run(None, dict(zip(names, chunk, strict=True))))
    return [torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)]


def open_probe(path: str | os.PathLike[str], sites: Iterable[str] = ()) -> Callable[[Tensor], dict[str, Tensor]]:
    """A function from inputs to the outputs of the quantized layers (by layer name) and the quantized
    activations (by site name) inside the runtime: the file with more outputs asked of it."""
    onnx = _onnx()
    model = onnx.load(path)
    named = {p.key: p.value for p in model.metadata_props}
    try:
        wanted: dict[str, str] = json.loads(named[METADATA])["outputs"]
    except (KeyError, ValueError):
        raise FormatError("this ONNX file was not written by Bitsmith", where=os.fspath(path)) from None
    present = {name for node in model.graph.node for name in node.output}
    wanted |= {site: site for site in sites if site in present}
    for name, tensor in wanted.items():
        # Behind an Identity: a tensor that is asked for itself may come back quantized, because the optimizer
        # moves QuantizeLinear before transpositions.
        model.graph.node.append(onnx.helper.make_node("Identity", [tensor], [f"{name}/seen"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}/seen", onnx.TensorProto.FLOAT, None))
    opened = session(model.SerializeToString())
    names = [o.name.removesuffix("/seen") for o in opened.get_outputs()]
    return lambda x: {n: t for n, t in zip(names, run(opened, x), strict=True) if n in wanted}


# ---- the twin: the packed model with placeholders


class _WeightNode(nn.Module):
    def __init__(self, site: str, shape: torch.Size) -> None:
        super().__init__()
        self.site, self.shape = site, shape

    def forward(self) -> Tensor:
        return _placeholder("Weight", (), self.site, self.shape)


class _QuantizerNode(nn.Module):
    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        return _placeholder("Quantizer", (x,), self.site, x.shape)


class _Layer(nn.Module):
    """A layer whose bias is an Add, whose matrix product is two-dimensional, and whose output has a name."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.name, self.layer, self.bias = name, layer, getattr(layer, "bias", None)
        if self.bias is not None:
            layer.bias = None  # type: ignore[assignment]
        if isinstance(layer, IntegerConv) and self.bias is not None:
            self.bias = self.bias.view(-1, *[1] * (len(layer.weight.shape) - 2))

    def forward(self, *operands: Tensor) -> Tensor:
        x = operands[0]
        if isinstance(self.layer, IntegerLinear) and x.ndim > 2:
            y = self.layer(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        else:
            y = self.layer(*operands)
        y = y if self.bias is None else y + self.bias
        return _placeholder("Output", (y,), self.name, y.shape)


def _placeholder(kind: str, inputs: tuple[Tensor, ...], site: str, shape: Any) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", inputs, {"site": site}, dtype=torch.float32, shape=shape, version=1
    )
    return result


def _twin(packed: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for name, site in packed_sites(packed).items():
        if isinstance(site, PackedWeight):
            memo[id(site)] = _WeightNode(name, site.shape)
        elif _has_pair(site):
            memo[id(site)] = _QuantizerNode(name)
    for name, layer in packed_layers(packed).items():
        memo[id(layer)] = _Layer(name, copy.deepcopy(layer, memo.copy()))
    twin: nn.Module = copy.deepcopy(packed, memo)
    return twin.eval()


# ---- the placeholders written out


def _lower(model: Any, packed: nn.Module) -> None:
    """Replace the placeholders in the graph of ``model`` (a ModelProto), in place."""
    sites, graph = packed_sites(packed), model.graph
    nodes: list[Any] = []
    renamed: dict[str, str] = {}  # tensors that are now called otherwise
    calls: dict[str, int] = {}  # site -> how often it was met
    outputs: dict[str, str] = {}  # layer -> its output
    for node in graph.node:
        del node.metadata_props[:]  # stack traces with the paths of this machine
        node.input[:] = [renamed.get(name, name) for name in node.input]
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        site = node.attribute[0].s.decode()
        if node.op_type == "Output":
            renamed[node.output[0]] = node.input[0]
            outputs.setdefault(site, node.input[0])
        elif node.op_type == "Quantizer":
            calls[site] = calls.get(site, 0) + 1
            name = site if calls[site] == 1 else f"{site}.{calls[site]}"
            nodes += _quantizer_nodes(graph, site, sites[site], node.input[0], name)
            renamed[node.output[0]] = name
        else:
            if site not in calls:
                nodes += _weight_nodes(graph, site, sites[site])
            calls[site] = 1
            renamed[node.output[0]] = site
    _restore_outputs(graph, nodes, renamed, outputs)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output, *graph.initializer, graph, model):
        del value.metadata_props[:]
    for opset in [o for o in model.opset_import if o.domain == DOMAIN]:
        model.opset_import.remove(opset)
    _onnx().helper.set_model_props(model, {METADATA: json.dumps({"version": 1, "outputs": outputs})})


def _restore_outputs(graph: Any, nodes: list[Any], renamed: dict[str, str], outputs: dict[str, str]) -> None:
    """A graph output that was a placeholder's keeps its name: the tensor behind it takes it."""
    back = {renamed[value.name]: value.name for value in graph.output if value.name in renamed}
    for node in nodes:
        node.input[:] = [back.get(name, name) for name in node.input]
        node.output[:] = [back.get(name, name) for name in node.output]
    outputs.update({layer: back.get(name, name) for layer, name in outputs.items()})


def _has_pair(q: FrozenQuantizer) -> bool:
    """Whether QuantizeLinear -> DequantizeLinear of 8 bits computes this quantizer."""
    low, _, half = bounds(q.form.grid, q.form.bits)
    if q.scale is None or q.form.granularity != "tensor" or half:
        return False
    zero_point = 0 if q.zero_point is None else int(q.zero_point)
    return 0 <= zero_point <= 255 if low >= 0 else -128 <= zero_point <= 127


def _quantizer_nodes(graph: Any, site: str, q: Any, x: str, y: str) -> list[Any]:
    """x -> codes in uint8 or int8 -> values -> Clip to the ends of the grid."""
    make_node = _onnx().helper.make_node
    low, high, _ = bounds(q.form.grid, q.form.bits)
    zero_point = torch.zeros(()) if q.zero_point is None else q.zero_point.view(())
    scale, kind = q.scale.view(()), np.uint8 if low >= 0 else np.int8
    numbers = {
        "scale": scale.numpy(),
        "zero_point": zero_point.numpy().astype(kind),
        "low": dequantize(torch.tensor(low), scale, zero_point=zero_point).numpy(),
        "high": dequantize(torch.tensor(high), scale, zero_point=zero_point).numpy(),
    }
    for name, value in numbers.items():
        _add_once(graph, f"{site}.{name}", value)
    names = [f"{site}.scale", f"{site}.zero_point"]
    return [
        make_node("QuantizeLinear", [x, *names], [f"{y}.quantized"]),
        make_node("DequantizeLinear", [f"{y}.quantized", *names], [f"{y}.values"]),
        make_node("Clip", [f"{y}.values", f"{site}.low", f"{site}.high"], [y]),
    ]


def _weight_nodes(graph: Any, site: str, w: Any) -> list[Any]:
    """DequantizeLinear of the packed codes, by tensor, channel (axis 0) or blocks of a row (axis 1)."""
    onnx, form = _onnx(), w.form
    low, _, half = bounds(form.grid, form.bits)
    rows, length = w.shape[0], math.prod(w.shape[1:])
    scale, layout, attributes = w.scale.view(()) if w.scale.numel() == 1 else w.scale.flatten(), w.shape, {}
    if form.granularity == "channel":
        scale, attributes = w.scale.view(rows), {"axis": 0}
    elif form.granularity == "group":
        layout = torch.Size([rows, length])
        scale, attributes = w.scale.view(rows, -1), {"axis": 1, "block_size": min(form.group_size, length)}
    container = 2 if form.bits <= 2 else 4 if form.bits <= 4 else 8
    kind = getattr(onnx.TensorProto, f"{'INT' if low < 0 else 'UINT'}{container}")
    graph.initializer.append(_integers(f"{site}.codes", w.integers().view(layout), kind, container))
    inputs = [f"{site}.codes", f"{site}.scale"]
    graph.initializer.append(onnx.numpy_helper.from_array(scale.numpy(), inputs[1]))
    if w.zero_point is not None or container == 8:
        zeros = torch.zeros_like(scale) if w.zero_point is None else w.zero_point.view(scale.shape)
        graph.initializer.append(_integers(f"{site}.zero_point", zeros.short(), kind, container))
        inputs.append(f"{site}.zero_point")

    nodes = [onnx.helper.make_node("DequantizeLinear", inputs, [""], **attributes)]
    if half:
        offset = w.scale * half
        if form.granularity == "group":
            if length % form.group_size:
                raise TargetError(
                    f"ONNX cannot hold {length} input values in groups of {form.group_size} on the grid seq",
                    where=site,
                    remedy="Choose a group_size that divides them, grid: symmetric, or granularity: channel",
                )
            nodes.append(_reshape(graph, site, (rows, -1, form.group_size)))
        graph.initializer.append(onnx.numpy_helper.from_array(offset.numpy(), f"{site}.offset"))
        nodes.append(onnx.helper.make_node("Add", ["", f"{site}.offset"], [""]))
    if form.granularity == "group" and (half or len(w.shape) > 2):
        nodes.append(_reshape(graph, site, tuple(w.shape)))
    for i, (before, after) in enumerate(zip(nodes, nodes[1:], strict=False)):
        before.output[0] = after.input[0] = f"{site}.{i}"
    nodes[-1].output[0] = site
    return nodes


def _reshape(graph: Any, site: str, shape: tuple[int, ...]) -> Any:
    name = f"{site}.shape{len(shape)}"
    _add_once(graph, name, np.array(shape, np.int64))
    return _onnx().helper.make_node("Reshape", ["", name], [""])


def _integers(name: str, values: Tensor, kind: int, container: int) -> Any:
    """An initializer of 2, 4 or 8 bits a value: two's complement, the first value in the low bits."""
    data = pack(values & (2**container - 1), container, 0).numpy().tobytes()
    return _onnx().helper.make_tensor(name, kind, values.shape, data, raw=True)


def _add_once(graph: Any, name: str, value: np.ndarray[Any, Any]) -> None:
    if all(i.name != name for i in graph.initializer):
        graph.initializer.append(_onnx().numpy_helper.from_array(np.asarray(value), name))


# ---- surroundings


def _onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra("onnx", str(error.name), "writing ONNX files") from None
    return onnx


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx warns of its own deprecations and of a torchvision that nobody asked for."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that follow in some of torch's."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
