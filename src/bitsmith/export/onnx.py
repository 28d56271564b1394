"""ONNX: a packed model as a file that ONNX Runtime runs as it was trained, weights at 2, 4 or 8 bits.

torch.onnx traces a twin of the model in which every weight, quantizer and layer output is a placeholder node
that only carries its site's name; export.onnx_nodes then writes the placeholders out from the packed model.
So stored codes never pass through a float, and no constant folding can touch them. The usual way (fake
quantization translated operator by operator, constants repacked afterwards) has to find the weights again.

    weight       DequantizeLinear(INT2 | INT4 | INT8), per tensor, channel or block; `seq`: + scale/2;
                 a table of levels: Cast(UINT2 | UINT4) -> Gather(levels) -> Mul(scale)
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
from bitsmith.export.onnx_nodes import DOMAIN, METADATA, has_pair, onnx_package, write_out
from bitsmith.files import write_atomic
from bitsmith.quantization.integer_layers import (
    IntegerConv,
    IntegerLinear,
    PackedWeight,
    packed_layers,
    packed_sites,
)

OPSET = 25  # the first with INT2
CURES = {"session.qdq_matmulnbits_accuracy_level": "0", "session.x64quantprecision": "1"}


def to_onnx(packed: nn.Module, path: str | os.PathLike[str], example: Any, *, opset: int = OPSET) -> Path:
    """Write a finalized model to ``path``. ``example``: a batch of inputs, or a tuple of arguments.

    The first dimension of every input becomes dynamic. Raises TargetError for what ONNX cannot hold.
    """
    onnx = onnx_package()
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
    if any(not value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input):
        # torch.onnx falls back to the example's size without a word.
        raise TargetError(
            "forward() works for one batch size only",
            where=type(packed).__name__,
            remedy="Take the batch size from the input's shape, or export native only",
        )
    write_out(model, packed)
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


def open_probe(
    path: str | os.PathLike[str], sites: Iterable[str] = ()
) -> Callable[[Tensor], dict[str, Tensor]]:
    """A function from inputs to the outputs of the quantized layers (by layer name) and the quantized
    activations (by site name) inside the runtime: the file with more outputs asked of it."""
    onnx = onnx_package()
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
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(f"{name}/seen", onnx.TensorProto.FLOAT, None)
        )
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

    def rows(self, index: Tensor) -> Tensor:
        return torch.nn.functional.embedding(index, self())


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

    def forward(self, x: Tensor, right: Tensor | None = None) -> Tensor:
        if isinstance(self.layer, IntegerLinear) and x.ndim > 2:
            y = self.layer(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        else:
            y = self.layer(x) if right is None else self.layer(x, right)
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
        elif has_pair(site):
            memo[id(site)] = _QuantizerNode(name)
    for name, layer in packed_layers(packed).items():
        memo[id(layer)] = _Layer(name, copy.deepcopy(layer, memo.copy()))
    twin: nn.Module = copy.deepcopy(packed, memo)
    return twin.eval()


# ---- surroundings


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
