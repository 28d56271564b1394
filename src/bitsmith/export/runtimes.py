"""Runtimes: an exported file opened where it will run, in the one form that `verify` asks questions of.

One function per export, and the table of them. A runtime answers with tensors; what they should be is not
known here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bitsmith.errors import FormatError
from bitsmith.export import native, onnx
from bitsmith.export.readers import StoredSite, read_native, read_onnx
from bitsmith.export.ties import probe, values_of
from bitsmith.kernels.choose import best
from bitsmith.quantization.quantizer import sites


@dataclass(frozen=True)
class Opened:
    """An exported file in its runtime.

    stored: what independent readers found in it. predict: its output. probe: outputs of the quantized layers
    by layer, quantized activations by site. predict_default: its output as it runs by default, without the
    options that keep it exact or let it be looked into; ``default`` says how that is.
    """

    runtime: str
    version: str
    file_bytes: int
    stored: dict[str, StoredSite]
    predict: Callable[[Tensor], Tensor]
    probe: Callable[[Tensor], dict[str, Tensor]]
    options: dict[str, str]
    predict_default: Callable[[Tensor], Tensor]
    default: str


@torch.no_grad()
def outputs_of(model: nn.Module, x: Tensor, batch_size: int = 256) -> Tensor:
    """The model's outputs (N, ...), batch by batch."""
    return torch.cat([model(x[i : i + batch_size]) for i in range(0, len(x), batch_size)])


def open_native(path: Path, trained: nn.Module) -> Opened:
    """A native folder, multiplying floats as the trained model does, so that every activation can be seen."""
    # A model that is not built in is loaded into one of its architecture: the trained one is one.
    into = None if hasattr(trained, "bitsmith_model") else copy.deepcopy(trained)
    fast = native.load(path, into=copy.deepcopy(into))
    loaded = native.load(path, into=into, kernels=False)

    def look(x: Tensor) -> dict[str, Tensor]:
        seen = probe(loaded, x)
        return {layer: output for layer, (output, _) in seen.outputs.items()} | values_of(loaded, seen)

    return Opened(
        runtime="bitsmith",
        version=f"format {native.VERSION}, PyTorch {torch.__version__}",
        file_bytes=sum((path / name).stat().st_size for name in (native.TENSORS, native.CONFIG)),
        stored=read_native(path),
        predict=lambda x: outputs_of(loaded, x),
        probe=look,
        options={"kernels": "off"},
        predict_default=lambda x: outputs_of(fast, x),
        default=f"integer products ({best().name})",
    )


def open_onnx(path: Path, trained: nn.Module) -> Opened:
    """An ONNX file in ONNX Runtime, at full optimization, with the options that keep it exact."""
    stored = read_onnx(path)
    try:
        session = onnx.session(path)
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        what = f"ONNX Runtime refuses this file ({onnx.first_line(error)})"
        raise FormatError(what, where=str(path)) from None
    import onnxruntime

    return Opened(
        runtime="onnxruntime",
        version=onnxruntime.__version__,
        file_bytes=path.stat().st_size,
        stored=stored,
        predict=lambda x: onnx.run(session, x)[0],
        probe=onnx.open_probe(
            path, [n for n, q in sites(trained).items() if q.kind == "activation" and not q.bits.in_float]
        ),
        options={"graph_optimization_level": "all", **onnx.CURES},
        predict_default=lambda x: onnx.run(onnx.session(path, cures=False), x)[0],
        default="the runtime's default options",
    )


OPENERS: dict[str, Callable[[Path, nn.Module], Opened]] = {"native": open_native, "onnx": open_onnx}
