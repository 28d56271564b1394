"""verify: run every exported file in its own runtime and compare it with the model that was trained.

Per file, in this order, and the first that does not hold is the error:
1. The codes in the file equal the trained codes, bit for bit, and scales and zero points those of the packed
   model; all are read back by readers that share no code with training (export.readers). Weights that the
   file holds in wider containers than they were trained for are named.
2. Inside the runtime, every quantized activation has the trained codes, and every quantized layer the output
   of the packed model, on the rows where its inputs do.
3. On the whole test set at least 99.5 % of the predictions are the same, and on at least 99 % of the rows the
   outputs are within 1e-3 of their standard deviation. A row may be further away only where its first
   difference is a rounding tie (export.ties); the certificate counts these rows apart.

The result is certificate.json: {"version", "rows", "exports": {name: {"passed", "runtime", "codes_equal",
"checks", "sites", ...}}, "not_checked"}. ExportMismatch carries it as ``certificate``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitsmith.errors import ExportMismatch, FormatError, listing
from bitsmith.export.readers import Array, StoredSite
from bitsmith.export.runtimes import OPENERS, Opened, outputs_of
from bitsmith.export.ties import by_row, first_differences, probe
from bitsmith.numerics.blocks import from_groups
from bitsmith.quantization.bits import in_words, mean_width
from bitsmith.quantization.integer_layers import PackedWeight, packed_sites
from bitsmith.quantization.layers import WITH_WEIGHTS, weight_of
from bitsmith.train.distillation import classes_last

AGREEMENT = 0.995  # rows with the same prediction
WITHIN = 0.99  # rows within the tolerance
TOLERANCE = 1e-3  # of the standard deviation of the reference
LAYER_TOLERANCE = 1e-4  # the same, of one layer on equal inputs; 5e-6 is seen
LAYER_ROWS = 256  # rows on which the layers are compared
TIE_ROWS = 256  # of the rows that are further away, at least so many are examined; the rest is extrapolated
NOT_CHECKED = (
    "inputs outside the test set",
    "runtimes, versions and processors other than those named here",
    "speed and memory use",
)


@torch.no_grad()
def verify(
    trained: nn.Module,
    packed: nn.Module,
    exports: Mapping[str, str | PathLike[str]],
    x: Tensor,
    y: Tensor | None = None,
    score: Callable[[Tensor, Tensor], Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """The certificate of ``exports`` ({"native": directory, "onnx": path}).

    trained: the prepared model; packed: ``finalize`` of it; x: inputs (N, ...) of the test set; y: targets
    (N, ...), for accuracies, or for what ``score(outputs, y)`` makes of them. Raises ExportMismatch (exit
    code 1) after all files were looked at.
    """
    for name in exports:
        if name not in OPENERS:
            raise FormatError("no such export", where="verify", got=name, expected=listing(OPENERS))
    was_training = trained.training
    trained.eval()
    reference = outputs_of(trained, x)
    certificate: dict[str, Any] = {
        "version": 1,
        "rows": len(x),
        "reference": "the trained model in eval mode: PyTorch, float32, fake quantization",
        "exports": {},
        "not_checked": list(NOT_CHECKED),
    }
    failure: ExportMismatch | None = None
    for name, path in exports.items():
        entry = certificate["exports"][name] = {"passed": False, "file": Path(path).name, "failure": ""}
        try:
            opened = OPENERS[name](Path(path), trained)
            entry |= {"runtime": opened.runtime, "runtime_version": opened.version}
            entry |= {"options": opened.options, "file_bytes": opened.file_bytes}
            _check_stored(entry, opened.stored, trained, packed)
            _check_layers(entry, opened, packed, x[:LAYER_ROWS])
            output = opened.predict(x)
            _check_outputs(entry, opened, trained, output, reference, x)
            if y is not None:
                measure = score or _accuracy
                entry |= measure(output, y)
                entry |= {f"{name}_trained": value for name, value in measure(reference, y).items()}
            entry["passed"] = True
        except (ExportMismatch, FormatError) as error:
            entry["failure"] = str(error)
            failure = failure or _at(error, fspath(path))
    trained.train(was_training)
    if failure is not None:
        failure.certificate = certificate  # type: ignore[attr-defined]
        raise failure
    return certificate


def _check_stored(
    entry: dict[str, Any], stored: Mapping[str, StoredSite], trained: nn.Module, packed: nn.Module
) -> None:
    """Compare what the file holds with what was trained."""
    entry["codes_equal"] = False
    codes, count, wider = trained_codes(trained), 0, {}
    for name, site in packed_sites(packed).items():
        found = stored.get(name, StoredSite())
        if isinstance(site, PackedWeight):
            want = codes[name].numpy().reshape(-1)
            count += want.size
            _equal(name, "codes", found.codes, want)
            if found.container is not None and found.container > mean_width(site.form.bits):
                wider[name] = f"{in_words(site.form.bits)} bits in {found.container}"
        for part in ("scale", "zero_point", "levels"):
            tensor = getattr(site, part, None)  # activations have no levels
            if part == "zero_point" and isinstance(site, PackedWeight):
                tensor = site.zero_points()
            values = getattr(found, part)
            if tensor is None and values is not None:
                tensor = torch.zeros(values.shape)  # a runtime may want the zeros that we do not store
            # In ONNX an activation that is not per tensor is plain operators: its layer's output is compared.
            if tensor is not None and (values is not None or isinstance(site, PackedWeight)):
                _equal(
                    name, part.replace("_", " ").removesuffix("s") + "s", values, tensor.numpy().reshape(-1)
                )
    entry["codes_equal"], entry["codes"], entry["wider_containers"] = True, count, wider


def trained_codes(trained: nn.Module) -> dict[str, Tensor]:
    """Weight site -> codes (int16, the weight's shape) of a prepared model, by its own quantizers."""
    codes = {}
    for layer in trained.modules():
        if isinstance(layer, WITH_WEIGHTS):
            q, weight = layer.weight_quantizer, weight_of(layer)
            if q is not None and not q.bits.in_float:
                grouped = q.scheme.group_size is not None
                codes[q.name] = from_groups(q.codes(weight), weight, True) if grouped else q.codes(weight)
    return codes


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


def _check_layers(entry: dict[str, Any], opened: Opened, packed: nn.Module, x: Tensor) -> None:
    """Activations and layer outputs inside the runtime, in the order of the packed model."""
    seen, got = probe(packed, x), opened.probe(x)
    first, tied = first_differences(seen, got, packed)
    names = list(seen.steps)
    entry["activation_sites_compared"] = sum(name in got for name in names)
    wrong = int(first[~tied].min()) if bool((~tied).any()) else len(names)
    errors: dict[str, float | None] = {}
    entry["sites"] = errors
    for layer, (want, sites_before) in seen.outputs.items():
        if wrong < sites_before:
            rows = int(((first == wrong) & ~tied).sum())
            raise ExportMismatch(
                f"inside {opened.runtime}, activations of this site have other codes than trained, "
                f"and not at rounding ties, on {rows} of {len(x)} rows",
                where=names[wrong],
                remedy="Do not use the file; please report this model and runtime",
            )
        equal = first >= sites_before
        output = got.get(layer, torch.empty(0))
        known = output.shape == want.shape
        if known and not bool(equal.any()):
            errors[layer] = None  # every row had a tie before
            continue
        error = float("inf")
        if known:
            error = _error(by_row(output, len(x)), by_row(want, len(x)))[equal].max().item()
        if error > LAYER_TOLERANCE:
            raise ExportMismatch(
                f"inside {opened.runtime}, this layer's output differs from the trained one",
                where=layer,
                got=f"{error:.3g} of its standard deviation",
                expected=f"at most {LAYER_TOLERANCE:g}",
                remedy="Do not use the file; please report this model and runtime",
            )
        errors[layer] = error


def _check_outputs(
    entry: dict[str, Any], opened: Opened, trained: nn.Module, output: Tensor, reference: Tensor, x: Tensor
) -> None:
    """The ``output`` of all rows against ``reference``."""
    if output.shape != reference.shape:
        raise ExportMismatch(
            "the outputs have another shape",
            where="output",
            got=tuple(output.shape),
            expected=tuple(reference.shape),
        )
    within = _error(output, reference) <= TOLERANCE
    outside = (~within).nonzero().flatten()
    examined = outside[:: max(1, len(outside) // TIE_ROWS)]
    found = sum(_count_ties(opened, trained, x[rows]) for rows in examined.split(64) if len(rows))
    tied = round(found / max(1, len(examined)) * len(outside))
    answers, wanted = (classes_last(tensor).argmax(-1) for tensor in (output, reference))
    agreement = (answers == wanted).double().mean().item()
    explained = (int(within.sum()) + tied) / len(x)
    entry |= {
        "agreement": agreement,
        "rows_within_tolerance": within.double().mean().item(),
        "rows_with_ties": tied,
        "rows_examined_for_ties": len(examined),
        "max_abs_difference": (output - reference).abs().max().item(),
        "output_std": reference.std().item(),
    }
    name = f"rows within {TOLERANCE:g} of the outputs' standard deviation"
    name += ", or further only after a rounding tie" if tied else ""
    entry["checks"] = [
        {
            "name": "same predictions",
            "passed": agreement >= AGREEMENT,
            "value": agreement,
            "limit": AGREEMENT,
        },
        {"name": name, "passed": explained >= WITHIN, "value": explained, "limit": WITHIN},
    ]
    for check in entry["checks"]:
        if not check["passed"]:
            raise ExportMismatch(
                f"too few {check['name']}",
                where="output",
                got=f"{check['value']:.2%}, differing by up to {entry['max_abs_difference']:.3g}",
                expected=f"at least {check['limit']:.1%}",
                remedy="Do not use the file; please report this model and runtime",
            )
    entry["default_options"] = _by_default(opened, x[:LAYER_ROWS], reference[:LAYER_ROWS])


def _by_default(opened: Opened, x: Tensor, reference: Tensor) -> dict[str, Any]:
    """How the file computes where nothing is done for exactness: integer kernels, a runtime's own options.
    Ties are not looked for there, so rows after one count as different."""
    plain = opened.predict_default(x)
    agreement = (classes_last(plain).argmax(-1) == classes_last(reference).argmax(-1)).double().mean().item()
    return {
        "options": opened.default,
        "rows": len(plain),
        "agreement": agreement,
        "rows_within_tolerance": (_error(plain, reference) <= TOLERANCE).double().mean().item(),
        "holds": agreement >= AGREEMENT,
    }


def _count_ties(opened: Opened, trained: nn.Module, x: Tensor) -> int:
    """Rows of x whose first difference from the trained model is a rounding tie."""
    seen = probe(trained, x)
    first, tied = first_differences(seen, opened.probe(x), trained)
    return int((tied & (first < len(seen.steps))).sum())


def _error(got: Tensor, want: Tensor) -> Tensor:
    """Per row the largest difference, in standard deviations of ``want``; infinite where not a number."""
    rows = (got - want).abs().flatten(1).amax(1) / want.std().clamp(min=1e-12)
    return rows.nan_to_num(nan=float("inf"))


def _accuracy(output: Tensor, y: Tensor) -> dict[str, float]:
    return {"accuracy": (classes_last(output).argmax(-1) == y).double().mean().item()}


def _at(error: ExportMismatch | FormatError, path: str) -> ExportMismatch:
    """The error as ExportMismatch, with the file before the site."""
    where = error.where if path in error.where else f"{path}: {error.where}"
    return ExportMismatch(
        error.what, where=where, got=error.got, expected=error.expected, remedy=error.remedy
    )
