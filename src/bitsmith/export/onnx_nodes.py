"""The placeholders of export.onnx written out as ONNX nodes and initializers, from the packed model.

Each node it writes is plain ONNX of opset 25. The layout of what is stored, and why, is in export.onnx; here
is how it is spelled. Graphs are edited as protobuf messages: a graph library would have to be learnt first.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitsmith.errors import MissingExtra
from bitsmith.numerics.affine import dequantize
from bitsmith.numerics.pack import pack
from bitsmith.quantization.integer_layers import FrozenQuantizer, packed_sites

DOMAIN = "bitsmith"  # of the placeholders; none is left in the file
METADATA = "bitsmith"  # key of the file's metadata: which tensor is which layer's output


def onnx_package() -> Any:
    """The onnx package. Raises MissingExtra where it or onnxscript is not installed."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra("onnx", str(error.name), "writing ONNX files") from None
    return onnx


def write_out(model: Any, packed: nn.Module) -> None:
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
    onnx_package().helper.set_model_props(model, {METADATA: json.dumps({"version": 1, "outputs": outputs})})


def _restore_outputs(graph: Any, nodes: list[Any], renamed: dict[str, str], outputs: dict[str, str]) -> None:
    """A graph output that was a placeholder's keeps its name: the tensor behind it takes it."""
    back = {renamed[value.name]: value.name for value in graph.output if value.name in renamed}
    for node in nodes:
        node.input[:] = [back.get(name, name) for name in node.input]
        node.output[:] = [back.get(name, name) for name in node.output]
    outputs.update({layer: back.get(name, name) for layer, name in outputs.items()})


def has_pair(q: FrozenQuantizer) -> bool:
    """Whether QuantizeLinear -> DequantizeLinear of 8 bits computes this quantizer."""
    _, (low, _, half), _ = q.form.runs[0]
    if q.scale is None or q.form.granularity != "tensor" or half:
        return False
    zero_point = 0 if q.zero_point is None else int(q.zero_point)
    return 0 <= zero_point <= 255 if low >= 0 else -128 <= zero_point <= 127


def _quantizer_nodes(graph: Any, site: str, q: Any, x: str, y: str) -> list[Any]:
    """x -> codes in uint8 or int8 -> values -> Clip to the ends of the grid."""
    make_node = onnx_package().helper.make_node
    _, (low, high, _), _ = q.form.runs[0]
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
    """DequantizeLinear of the packed codes, by tensor, channel (axis 0) or blocks of a row (axis 1); of codes
    that index a table of levels, a lookup."""
    if w.levels is not None:
        return _table_nodes(graph, site, w)
    onnx, form = onnx_package(), w.form
    low, half = min(low for _, (low, _, _), _ in form.runs), w.half_step()
    rows, length = w.shape[0], math.prod(w.shape[1:])
    shape: tuple[int, ...] = tuple(w.shape)
    match form.granularity:
        case "channel":
            scale, attributes = w.scale.view(rows), {"axis": 0}
        case "group":
            shape = (rows, length)
            scale, attributes = (
                w.scale.view(rows, -1),
                {"axis": 1, "block_size": min(form.group_size, length)},
            )
        case _:
            scale, attributes = w.scale.reshape(()), {}
    widest = form.runs[-1][0]  # ONNX has one type for a tensor
    container = 2 if widest <= 2 else 4 if widest <= 4 else 8
    kind = getattr(onnx.TensorProto, f"{'INT' if low < 0 else 'UINT'}{container}")
    graph.initializer.append(_integers(f"{site}.codes", w.integers().view(shape), kind, container))
    _add_once(graph, f"{site}.scale", scale.numpy())
    inputs = [f"{site}.codes", f"{site}.scale"]
    zeros = w.zero_points()
    if zeros is not None or container == 8:
        zeros = torch.zeros_like(scale) if zeros is None else zeros.view(scale.shape)
        graph.initializer.append(_integers(f"{site}.zero_point", zeros.short(), kind, container))
        inputs.append(f"{site}.zero_point")

    aside, chain = [], [onnx.helper.make_node("DequantizeLinear", inputs, [""], **attributes)]
    if isinstance(half, Tensor) or half:
        offset, grouped = f"{site}.offset", form.granularity == "group"
        _add_once(graph, offset, ((scale if grouped else w.scale) * half).numpy())
        if grouped:  # (rows, groups) -> (rows, length)
            aside.append(_by_value(graph, site, offset, length, form.group_size))
        chain.append(onnx.helper.make_node("Add", ["", f"{offset}s" if grouped else offset], [""]))
    if shape != tuple(w.shape):
        _add_once(graph, f"{site}.shape", np.array(w.shape, np.int64))
        chain.append(onnx.helper.make_node("Reshape", ["", f"{site}.shape"], [""]))
    return aside + _linked(chain, site)


def _table_nodes(graph: Any, site: str, w: Any) -> list[Any]:
    """Cast of the packed codes to indices -> Gather from the levels -> Mul by the scale."""
    onnx, form = onnx_package(), w.form
    container = 2 if form.bits <= 2 else 4
    kind = getattr(onnx.TensorProto, f"UINT{container}")
    rows, grouped = w.shape[0], form.granularity == "group"
    codes = w.integers().view(rows, -1) if grouped else w.integers()
    graph.initializer.append(_integers(f"{site}.codes", codes, kind, container))
    _add_once(graph, f"{site}.levels", w.levels.numpy())
    _add_once(graph, f"{site}.scale", (w.scale.view(rows, -1) if grouped else w.scale).numpy())
    aside, chain = (
        [],
        [
            onnx.helper.make_node("Cast", [f"{site}.codes"], [""], to=onnx.TensorProto.INT32),
            onnx.helper.make_node("Gather", [f"{site}.levels", ""], [""]),
            onnx.helper.make_node("Mul", ["", f"{site}.scales" if grouped else f"{site}.scale"], [""]),
        ],
    )
    if grouped:  # (rows, groups) -> (rows, length)
        aside = [_by_value(graph, site, f"{site}.scale", codes.shape[1], form.group_size)]
    if codes.shape != w.shape:
        _add_once(graph, f"{site}.shape", np.array(w.shape, np.int64))
        chain.append(onnx.helper.make_node("Reshape", ["", f"{site}.shape"], [""]))
    return aside + _linked(chain, site)


def _by_value(graph: Any, site: str, name: str, length: int, group_size: int) -> Any:
    """The node that spreads ``name`` (rows, groups) over the values of a row: ``name``s (rows, length)."""
    _add_once(graph, f"{site}.group", np.arange(length) // group_size)
    return onnx_package().helper.make_node("Gather", [name, f"{site}.group"], [f"{name}s"], axis=1)


def _linked(chain: list[Any], site: str) -> list[Any]:
    """The nodes of ``chain``, each on what the one before made; the last makes ``site``."""
    for i, (before, after) in enumerate(pairwise(chain)):
        before.output[0] = f"{site}.{i}"
        after.input[list(after.input).index("")] = f"{site}.{i}"
    chain[-1].output[0] = site
    return chain


def _integers(name: str, values: Tensor, kind: int, container: int) -> Any:
    """An initializer of 2, 4 or 8 bits a value: two's complement, the first value in the low bits."""
    data = pack(values & (2**container - 1), container, 0).numpy().tobytes()
    return onnx_package().helper.make_tensor(name, kind, values.shape, data, raw=True)


def _add_once(graph: Any, name: str, value: np.ndarray[Any, Any]) -> None:
    if all(i.name != name for i in graph.initializer):
        graph.initializer.append(onnx_package().numpy_helper.from_array(np.asarray(value), name))
