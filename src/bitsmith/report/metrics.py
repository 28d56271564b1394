"""Reads a run directory into one value, `Run`, which every page of the report is drawn from.

All reading and all doubt live here: what is missing (but metrics.json) is left out of the pages, what is
corrupted or foreign is a FormatError of one line, and what comes out can be formatted without looking twice.
Nothing here draws, computes an accuracy or touches a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import FormatError
from bitsmith.files import read_json
from bitsmith.report.arrays import read_arrays
from bitsmith.report.certificate import Certified, is_number, read_certificate
from bitsmith.report.samples import Sample, read_samples

VERSION = 1
FLOAT_BITS = 32
SHARES = ("accuracy", "validation_accuracy", "exact_match", "mean_iou", "validation_mean_iou")
APART = ("version", "traces", "learned_bits")  # in history.json, and no trainings
EXPORTED_FILES = {"native": "model/model.safetensors", "onnx": "model.onnx", "gguf": "model.gguf"}


@dataclass(frozen=True)
class Layer:
    """One multiplying layer. Bits are None where it has no such operand, 32 where that stays in float.

    Of a product of two activations, `weight_bits` is the left operand's, `activation_bits` the right one's.
    Where output channels have widths of their own, `weight_bits` is their mean and `channel_bits` has them
    all.
    """

    name: str
    kind: str
    weight_bits: float | None = None
    activation_bits: float | None = None
    weight_bytes: float | None = None
    bops: float | None = None
    macs: float | None = None
    weight_elements: float | None = None
    channel_bits: tuple[float, ...] = ()

    @property
    def is_product(self) -> bool:
        """Of two activations (attention), without a weight."""
        return self.kind.lower().endswith("matmul")


@dataclass(frozen=True)
class Predictions:
    """Answers on the test set, (n,) int64 each, and misread images (k, channels, height, width) in 0..1."""

    labels: NDArray[np.int64]
    answers: Mapping[str, NDArray[np.int64]]  # "float", "quantized", "exported": those that are known
    images: NDArray[np.float64]
    image_rows: NDArray[np.int64]  # (k,) rows of `labels` that the images belong to
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """Everything that a run directory says."""

    directory: Path
    name: str
    metrics: Mapping[str, Any]
    plan: Mapping[str, Any] = field(default_factory=dict)
    coverage: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    traces: Sequence[Mapping[str, Any]] = ()  # of the methods, over the steps
    learned_bits: Mapping[str, Sequence[float]] = field(default_factory=dict)  # site -> real, of its groups
    layers: tuple[Layer, ...] = ()
    certified: tuple[Certified, ...] = ()
    not_checked: tuple[str, ...] = ()
    predictions: Predictions | None = None
    samples: tuple[Sample, ...] = ()  # text that the models wrote
    recipe: str = ""
    files: Mapping[str, int] = field(default_factory=dict)  # exported file -> bytes on disk

    def accuracy(self, stage: str) -> float | None:
        """Accuracy in 0..1 of "float", "post_training", "quantized", "searched", "uniform" or "exported"."""
        return self.figure(stage, "accuracy")

    def figure(self, stage: str, key: str) -> float | None:
        """A metric of a stage."""
        if stage == "exported":
            exports = self.metrics.get("exported") or {}
            order = sorted(exports, key=lambda name: name == "native")  # other people's runtimes first
            found = [exports[name].get(key) for name in order]
            return next((float(value) for value in found if is_number(value)), None)
        value = (self.metrics.get(stage) or {}).get(key)
        return float(value) if is_number(value) else None

    def cost(self, key: str) -> float | None:
        value = (self.metrics.get("cost") or {}).get(key)
        return float(value) if is_number(value) else None

    @property
    def budgets(self) -> list[Mapping[str, Any]]:
        """The budgets that had a limit: none, one or several."""
        return [one for one in _listed(self.metrics.get("budget")) if one.get("limit") is not None]

    @property
    def test_images(self) -> int | None:
        return len(self.predictions.labels) if self.predictions else None

    @property
    def verified(self) -> bool | None:
        """False when any export failed, True when at least one passed, None when nothing was verified."""
        verdicts = [entry.passed for entry in self.certified if entry.passed is not None]
        return all(verdicts) if verdicts else None


def read_run(directory: str | Path) -> Run:
    """Read and validate a run directory; only metrics.json must be there."""
    directory = Path(directory)
    if not directory.is_dir():
        raise FormatError(
            "there is no such run directory",
            where=str(directory),
            remedy="Give the --out of a `bitsmith run`",
        )
    metrics = _read_metrics(directory / "metrics.json")
    plan = _optional(directory / "plan.json", "plan")
    coverage = _optional(directory / "coverage.json", "coverage report")
    _check_objects(directory / "plan.json", "sites", (plan.get("sites") or {}), dict)
    for key in ("sites", "leftovers"):
        _check_objects(directory / "coverage.json", key, (coverage.get(key) or []), list)
    certificate = _optional(directory / "certificate.json", "certificate")
    _check_objects(directory / "certificate.json", "exports", (certificate.get("exports") or {}), dict)
    history = _optional(directory / "history.json", "training history")
    for phase, entries in history.items():
        if phase not in ("version", "learned_bits") and not (
            isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
        ):
            raise FormatError(
                f"the trace of {phase} is not a list of objects", where=str(directory / "history.json")
            )
    _check_learned(directory / "history.json", history.get("learned_bits", {}))
    recipe = directory / "recipe.yaml"
    sizes = {
        path: (directory / path).stat().st_size
        for path in EXPORTED_FILES.values()
        if (directory / path).is_file()
    }
    return Run(
        directory=directory,
        name=directory.resolve().name,
        metrics=metrics,
        plan=plan,
        coverage=coverage,
        history={phase: entries for phase, entries in history.items() if phase not in APART},
        traces=history.get("traces") or (),
        learned_bits=history.get("learned_bits", {}),
        layers=_layers(metrics, plan),
        certified=read_certificate(certificate),
        not_checked=tuple(str(item) for item in certificate.get("not_checked") or ()),
        predictions=_read_predictions(directory / "predictions.npz"),
        samples=read_samples(directory / "samples.json"),
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        files=sizes,
    )


def mean_bits(bits: Any) -> float | None:
    """A bit-width as plans write it, 4, or its mean over the channels where each has its own: [2, 2, 8]."""
    if is_number(bits):
        return float(bits)
    if isinstance(bits, list) and bits and all(is_number(width) for width in bits):
        return sum(float(width) for width in bits) / len(bits)
    return None


def _optional(path: Path, what: str) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = read_json(path, what)
    _check_version(path, what, value)
    return value


def _check_version(path: Path, what: str, value: Mapping[str, Any]) -> None:
    if value.get("version", VERSION) != VERSION:
        raise FormatError(
            f"this {what} is of another version",
            where=str(path),
            got=value["version"],
            expected=VERSION,
            remedy="Read it with the Bitsmith that wrote it, or run again",
        )


def _check_objects(path: Path, key: str, value: Any, kind: type[dict[str, Any]] | type[list[Any]]) -> None:
    """`value` must be a list of objects, or an object of objects."""
    entries = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(value, kind) or not all(isinstance(entry, dict) for entry in entries):
        raise FormatError(
            f"{key} is not {'a list' if kind is list else 'an object'} of objects",
            where=str(path),
            remedy="The file is corrupted or not one of ours: delete it, or run again",
        )


def _check_learned(path: Path, learned: Any) -> None:
    if not isinstance(learned, dict):
        raise FormatError("learned_bits is not an object of sites", where=str(path), got=learned)
    for site, each in learned.items():
        known = isinstance(each, list) and each
        # float32 may leave an end by its last digit
        wrong = [b for b in each if not (is_number(b) and 0.999 <= b <= 8.001)] if known else [each]
        if wrong:
            raise FormatError(
                f"learned_bits of {site} are no list of widths",
                where=str(path),
                got=wrong[0],
                expected="numbers from 1 to 8",
            )


def _read_metrics(path: Path) -> dict[str, Any]:
    metrics = read_json(path, "metrics file")
    _check_version(path, "metrics file", metrics)
    for section in (
        "float",
        "post_training",
        "quantized",
        "searched",
        "uniform",
        "exported",
        "shift",
        "flatness",
        "cost",
        "time",
        "environment",
    ):
        if not isinstance(metrics.get(section) or {}, dict):
            raise FormatError(f"{section} is not an object", where=str(path), got=metrics[section])
    for stage in ("float", "quantized"):
        if "accuracy" not in (metrics.get(stage) or {}):
            raise FormatError(
                f"this metrics file has no {stage}.accuracy",
                where=str(path),
                remedy="Give the directory of a finished `bitsmith run`",
            )
    accuracies: list[tuple[str, Any]] = [
        (f"{stage}.{key}", (metrics.get(stage) or {}).get(key))
        for stage in ("float", "post_training", "quantized", "searched", "uniform")
        for key in SHARES
    ]
    for group in ("exported", "shift"):
        for name, entry in (metrics.get(group) or {}).items():
            if not isinstance(entry, dict):
                raise FormatError(f"{group}.{name} is not an object", where=str(path), got=entry)
            values = {key: entry.get(key) for key in SHARES} if group == "exported" else entry
            accuracies += [(f"{group}.{name}.{key}", value) for key, value in values.items()]
    for key, value in accuracies:
        if value is not None and not (is_number(value) and 0 <= value <= 1):
            raise FormatError(f"{key} is not an accuracy", where=str(path), got=value, expected="0 to 1")
    for key, value in (metrics.get("cost") or {}).items():
        figure = value is not None and not isinstance(value, (dict, list, str))
        if figure and not (is_number(value) and value >= 0):
            raise FormatError(f"cost.{key} is not a cost", where=str(path), got=value, expected=">= 0")
    _check_contest(path, metrics)
    return metrics


def _check_contest(path: Path, metrics: Mapping[str, Any]) -> None:
    """The parts of a metrics file that a search under budgets adds."""
    if metrics.get("winner") not in (None, "searched", "uniform"):
        raise FormatError(
            "winner is no contender", where=str(path), got=metrics["winner"], expected="searched or uniform"
        )
    if not isinstance(metrics.get("budget") or [], (dict, list)):
        raise FormatError("budget is not a list", where=str(path), got=metrics["budget"])
    for entry in _listed(metrics.get("budget")):
        if not isinstance(entry, dict):
            raise FormatError("budget holds what is not an object", where=str(path), got=entry)
        for key in ("limit", "used"):
            value = entry.get(key)
            if value is not None and not (is_number(value) and value >= 0):
                raise FormatError(f"budget.{key} is not a cost", where=str(path), got=value, expected=">= 0")


def _listed(found: Any) -> list[Any]:
    """One budget is an object of its own in older files."""
    return [found] if isinstance(found, dict) else found or []


def _layer(entry: Mapping[str, Any]) -> Layer:
    """One entry of the cost report; a product of two activations has its widths in `operand_bits`."""
    first, second = entry.get("operand_bits") or (entry.get("weight_bits"), entry.get("activation_bits"))
    return Layer(
        name=str(entry.get("name", "?")),
        kind=str(entry.get("kind", "")),
        weight_bits=mean_bits(first),
        activation_bits=mean_bits(second),
        weight_bytes=entry.get("weight_bytes"),
        bops=entry.get("bops"),
        macs=entry.get("macs"),
        weight_elements=entry.get("weight_elements"),
        channel_bits=_each(first),
    )


def _each(bits: Any) -> tuple[float, ...]:
    return (
        tuple(float(width) for width in bits)
        if isinstance(bits, list) and mean_bits(bits) is not None
        else ()
    )


def _layers(metrics: Mapping[str, Any], plan: Mapping[str, Any]) -> tuple[Layer, ...]:
    """Layers with their costs where the cost report lists them, else as the plan's site names give them."""
    for source in (metrics, plan):
        entries = (source.get("cost") or {}).get("layers")
        if entries:
            return tuple(_layer(entry) for entry in entries)
    widths: dict[str, dict[str, Any]] = {}
    for site, entry in (plan.get("sites") or {}).items():
        layer, _, operand = site.rpartition(".")
        widths.setdefault(layer, {})[operand] = entry.get("bits")
    return tuple(
        Layer(
            name=name,
            kind="matmul" if "left" in operands else "layer",
            weight_bits=mean_bits(operands.get("weight", operands.get("left"))),
            activation_bits=mean_bits(operands.get("input", operands.get("right"))),
            channel_bits=_each(operands.get("weight")),
        )
        for name, operands in widths.items()
    )


def _read_predictions(path: Path) -> Predictions | None:
    if not path.exists():
        return None
    arrays = read_arrays(path, "predictions")
    if "labels" not in arrays:
        raise FormatError(
            "these predictions have no labels", where=str(path), got=", ".join(sorted(arrays)) or "nothing"
        )
    labels = arrays["labels"].astype(np.int64).reshape(-1)
    answers: dict[str, NDArray[np.int64]] = {
        name: arrays[name].astype(np.int64).reshape(-1)
        for name in ("float", "quantized", "exported")
        if name in arrays
    }
    for name, values in (("labels", labels), *answers.items()):
        if values.min(initial=0) < 0:
            raise FormatError(f"{name} holds a negative class", where=str(path), got=int(values.min()))
        if len(values) != len(labels):
            raise FormatError(
                f"the {name} predictions do not match the labels",
                where=str(path),
                got=len(values),
                expected=f"{len(labels)}",
            )
    images = np.asarray(arrays.get("images", np.zeros((0, 1, 1, 1))))
    rows = np.asarray(arrays.get("image_rows", np.zeros(0))).astype(np.int64).reshape(-1)
    if images.ndim == 3:
        images = images[:, None]
    if (
        images.ndim != 4
        or len(rows) != len(images)
        or (rows.size and not 0 <= rows.min() <= rows.max() < len(labels))
    ):
        raise FormatError(
            "the misread images do not match their rows",
            where=str(path),
            got=f"images {images.shape}, image_rows {rows.shape}",
            expected="images (k, channels, height, width), image_rows (k,) into the test set",
        )
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    top = int(max([labels.max(initial=0), *(a.max(initial=0) for a in answers.values())])) + 1
    classes = [str(name) for name in arrays.get("classes", np.arange(top)).reshape(-1)]
    classes += [str(index) for index in range(len(classes), top)]
    return Predictions(labels, answers, images.astype(np.float64) / scale, rows, tuple(classes))
