"""verify: run every exported file in its own runtime and compare it with the model that was trained.

Per file, in this order, and the first that does not hold is the error: (1) the codes in the file equal the
trained codes, bit for bit, and scales and zero points those of the packed model, all read back by readers
that share no code with training; (2) the output of every quantized layer; (3) the outputs of the whole test
set: same predictions on at least 99.5 % of the rows, and on at least 99 % within 1e-3 of their standard
deviation. Agreement alone has passed exports that were broken; rows are allowed to differ at all because a
float32 sum in another order can round an activation to the next code.

The result is certificate.json: {"version", "rows", "exports": {name: {"passed", "runtime", "codes_equal",
"checks", "sites", ...}}, "not_checked"}. ExportMismatch carries it as ``certificate``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitsmith.errors import ExportMismatch, FormatError
from bitsmith.export import native, onnx
from bitsmith.export.readers import Array, StoredSite, read_native, read_onnx
from bitsmith.numerics.blocks import from_groups
from bitsmith.quantization.integer_layers import PackedWeight, packed_layers, packed_sites
from bitsmith.quantization.layers import QuantLayer, QuantMatMul

AGREEMENT = 0.995  # rows with the same prediction
WITHIN = 0.99  # rows within the tolerance
TOLERANCE = 1e-3  # of the standard deviation of the reference
LAYER_ROWS = 256  # rows on which the layers' outputs are compared
NOT_CHECKED = (
    "inputs outside the test set",
    "runtimes, versions and processors other than those named here",
    "speed and memory use",
)


@dataclass(frozen=True)
class Opened:
    """An exported file, opened in its runtime. layers: outputs of the quantized layers by name."""

    runtime: str
    version: str
    bytes: int
    stored: dict[str, StoredSite]
    predict: Callable[[Tensor], Tensor]
    layers: Callable[[Tensor], dict[str, Tensor]]
    options: dict[str, str]
    predict_default: Callable[[Tensor], Tensor] | None = None


@torch.no_grad()
def verify(
    trained: nn.Module,
    packed: nn.Module,
    exports: Mapping[str, str | PathLike[str]],
    x: Tensor,
    y: Tensor | None = None,
) -> dict[str, Any]:
    """The certificate of ``exports`` ({"native": directory, "onnx": path}).

    trained: the prepared model; packed: ``finalize`` of it; x: inputs (N, ...) of the test set; y: labels
    (N,), for accuracies. Raises ExportMismatch.
    """
    reference = _outputs(trained, x)
    expected = _layer_outputs(packed, x[:LAYER_ROWS])
    certificate: dict[str, Any] = {
        "version": 1,
        "rows": len(x),
        "reference": "the trained model in eval mode, PyTorch float32 with fake quantization",
        "exports": {},
        "not_checked": list(NOT_CHECKED),
    }
    mismatches = []
    for name, path in exports.items():
        entry = certificate["exports"][name] = {"passed": False, "file": Path(path).name, "failure": ""}
        try:
            opened = OPENERS[name](Path(path), trained)
            entry |= {
                "runtime": opened.runtime,
                "runtime_version": opened.version,
                "options": opened.options,
                "file_bytes": opened.bytes,
            }
            _check(entry, opened, trained, packed, reference, expected, x, y)
            entry["passed"] = True
        except (ExportMismatch, FormatError) as error:
            error.where = f"{fspath(path)}: {error.where}" if isinstance(error, ExportMismatch) else error.where
            entry["failure"] = str(error)
            mismatches.append(error)
    if mismatches:
        first = mismatches[0]
        failure = first if isinstance(first, ExportMismatch) else ExportMismatch(first.what, where=first.where)
        failure.certificate = certificate  # type: ignore[attr-defined]
        raise failure
    return certificate


def _check(
    entry: dict[str, Any],
    opened: Opened,
    trained: nn.Module,
    packed: nn.Module,
    reference: Tensor,
    expected: dict[str, Tensor],
    x: Tensor,
    y: Tensor | None,
) -> None:
    """Fill ``entry`` check by check. Raises ExportMismatch at the first that does not hold."""
    entry["codes_equal"] = False
    entry["codes"] = _check_stored(opened.stored, trained, packed)
    entry["codes_equal"] = True

    entry["sites"] = {}
    layers = opened.layers(x[:LAYER_ROWS])
    for name, want in expected.items():
        error, within = _difference(layers.get(name), want)
        entry["sites"][name] = error
        if within < WITHIN:
            raise ExportMismatch(
                f"the output of this layer is not the trained one on {1 - within:.1%} of the rows",
                where=name,
                got=f"an error of {error:.2g} of its standard deviation",
                expected=f"at most {TOLERANCE:g} on {WITHIN:.0%} of the rows",
                remedy="Do not use the file; please report this model and runtime",
            )
    output = opened.predict(x)
    _check_outputs(entry, output, reference)
    if y is not None:
        entry["accuracy"] = _accuracy(output, y)
        entry["accuracy_trained"] = _accuracy(reference, y)
    if opened.predict_default is not None:
        rows = x[:LAYER_ROWS]
        error, within = _difference(opened.predict_default(rows), reference[:LAYER_ROWS])
        entry["default_options"] = {"rows": len(rows), "rows_within_tolerance": within, "holds": within >= WITHIN}


def _check_stored(stored: Mapping[str, StoredSite], trained: nn.Module, packed: nn.Module) -> int:
    """Compare what the file holds with what was trained; returns the number of codes that were compared."""
    codes, count = trained_codes(trained), 0
    for name, site in packed_sites(packed).items():
        found = stored.get(name, StoredSite())
        if isinstance(site, PackedWeight):
            want = codes[name].numpy().reshape(-1)
            count += want.size
            _equal(name, "codes", found.codes, want)
        for part in ("scale", "zero_point"):
            tensor = getattr(site, part)
            values = getattr(found, part)
            if tensor is None and values is not None:
                tensor = torch.zeros(values.shape)  # a runtime may ask for zeros that we do not store
            # An activation that is not per tensor is plain operators in ONNX; its output is compared instead.
            if tensor is not None and (values is not None or isinstance(site, PackedWeight)):
                _equal(name, part.replace("_", " ") + "s", values, tensor.numpy().reshape(-1))
    return count


def _equal(site: str, what: str, got: Array | None, want: Array) -> None:
    if got is None or got.shape != want.shape:
        raise ExportMismatch(
            f"the file does not hold the {what} of this site",
            where=site,
            got="none" if got is None else f"{got.size}",
            expected=want.size,
        )
    wrong = np.flatnonzero(got != want)
    if wrong.size:
        first = int(wrong[0])
        raise ExportMismatch(
            f"{wrong.size} of {want.size} stored {what} differ from the trained ones, the first at {first}",
            where=site,
            got=f"{got[first].item():.9g}",
            expected=f"{want[first].item():.9g}",
            remedy="Do not use the file; export again",
        )


def _check_outputs(entry: dict[str, Any], output: Tensor, reference: Tensor) -> None:
    error, within = _difference(output, reference)
    same = (output.argmax(-1) == reference.argmax(-1)).double().mean().item() if output.shape == reference.shape else 0.0
    entry["agreement"] = same
    entry["rows_within_tolerance"] = within
    entry["max_abs_difference"] = (output - reference).abs().max().item() if output.shape == reference.shape else None
    entry["output_std"] = reference.std().item()
    entry["checks"] = [
        {"name": "same predictions", "passed": same >= AGREEMENT, "value": same, "limit": AGREEMENT},
        {
            "name": f"rows within {TOLERANCE:g} of the outputs' standard deviation",
            "passed": within >= WITHIN,
            "value": within,
            "limit": WITHIN,
        },
    ]
    for check in entry["checks"]:
        if not check["passed"]:
            raise ExportMismatch(
                f"{check['name']}: too few",
                where="output",
                got=f"{check['value']:.2%} (error {error:.2g})",
                expected=f"at least {check['limit']:.1%}",
                remedy="Do not use the file; please report this model and runtime",
            )


def trained_codes(trained: nn.Module) -> dict[str, Tensor]:
    """Weight site -> stored codes (int16, the weight's shape) of a prepared model, from its own quantizers."""
    codes = {}
    for layer in trained.modules():
        if isinstance(layer, QuantLayer) and not isinstance(layer, QuantMatMul) and layer.weight_quantizer is not None:
            blocks = layer.weight_quantizer.codes(layer.weight)
            grouped = layer.weight_quantizer.scheme.group_size is not None
            codes[layer.weight_quantizer.name] = from_groups(blocks, layer.weight, True) if grouped else blocks
    return codes


def _difference(got: Tensor | None, want: Tensor) -> tuple[float, float]:
    """(99th percentile over rows of the largest difference, share of rows within TOLERANCE), in units of std."""
    if got is None or got.shape != want.shape:
        return float("inf"), 0.0
    rows = (got - want).abs().flatten(1).amax(1) / want.std().clamp(min=1e-12)
    rows = rows.nan_to_num(nan=float("inf"))
    return float(np.quantile(rows.numpy(), WITHIN, method="lower")), (rows <= TOLERANCE).double().mean().item()


def _outputs(model: nn.Module, x: Tensor, batch_size: int = 256) -> Tensor:
    was_training = model.training
    model.eval()
    result = torch.cat([model(x[i : i + batch_size]) for i in range(0, len(x), batch_size)])
    model.train(was_training)
    return result


def _layer_outputs(packed: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs of the packed layers by name, in the order of their first calls."""
    found: dict[str, Tensor] = {}
    names = {layer: name for name, layer in packed_layers(packed).items()}

    def keep(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        found.setdefault(names[layer], output)

    hooks = [layer.register_forward_hook(keep) for layer in names]
    try:
        packed(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _accuracy(output: Tensor, y: Tensor) -> float:
    return (output.argmax(-1) == y).double().mean().item()


# ---- the runtimes


def _open_native(path: Path, trained: nn.Module) -> Opened:
    # A model that is not built in needs a model of its architecture to be loaded into: the trained one is one.
    into = None if hasattr(trained, "bitsmith_model") else copy.deepcopy(trained)
    loaded = native.load(path, into=into)
    return Opened(
        runtime="bitsmith",
        version=f"format {native.VERSION}, PyTorch {torch.__version__}",
        bytes=sum((path / name).stat().st_size for name in (native.TENSORS, native.CONFIG)),
        stored=read_native(path),
        predict=lambda x: _outputs(loaded, x),
        layers=lambda x: _layer_outputs(loaded, x),
        options={},
    )


def _open_onnx(path: Path, trained: nn.Module) -> Opened:
    stored = read_onnx(path)
    session = onnx.session(path)
    import onnxruntime

    return Opened(
        runtime="onnxruntime",
        version=onnxruntime.__version__,
        bytes=path.stat().st_size,
        stored=stored,
        predict=lambda x: onnx.run(session, x)[0],
        layers=lambda x: onnx.layer_outputs(path, x),
        options={"graph_optimization_level": "all", **onnx.CURES},
        predict_default=lambda x: onnx.run(onnx.session(path, cures=False), x)[0],
    )


OPENERS: dict[str, Callable[[Path, nn.Module], Opened]] = {"native": _open_native, "onnx": _open_onnx}
