"""Run directories as `bitsmith run` leaves them, made up: a digits CNN, a ViT, a failed verification."""

import json
from pathlib import Path
from typing import Any

import numpy as np

CNN = [  # name, kind, MACs, weights, weight bits, activation bits
    ("conv1", "QuantConv2d", 73_728, 72, 8, 8),
    ("conv2", "QuantConv2d", 147_456, 1_152, 3, 3),
    ("conv3", "QuantConv2d", 73_728, 2_304, 3, 3),
    ("conv4", "QuantConv2d", 18_432, 1_152, 2, 3),
    ("conv5", "QuantConv2d", 16_384, 1_024, 2, 4),
    ("head", "QuantLinear", 320, 320, 8, 8),
]


def vit() -> list[tuple[str, str, int, int, int, int]]:
    layers = [("patches", "QuantConv2d", 16_384, 128, 8, 8)]
    for block in range(4):
        prefix = f"blocks.{block}"
        layers += [
            (f"{prefix}.attention.{name}", "QuantLinear", 16_384, 1_024, 4, 4) for name in ("query", "key")
        ]
        layers += [
            (f"{prefix}.attention.value", "QuantLinear", 16_384, 1_024, 3, 4),
            (f"{prefix}.attention.scores", "QuantMatMul", 8_192, 0, 4, 4),
            (f"{prefix}.attention.mix", "QuantMatMul", 8_192, 0, 4, 4),
            (f"{prefix}.attention.output", "QuantLinear", 16_384, 1_024, 2, 4),
            (f"{prefix}.up", "QuantLinear", 32_768, 2_048, 2, 4),
            (f"{prefix}.down", "QuantLinear", 32_768, 2_048, 2, 6),
        ]
    return [*layers, ("head", "QuantLinear", 320, 320, 8, 8)]


def build_run(
    directory: Path,
    *,
    layers: list[tuple[str, str, int, int, int, int]] | None = None,
    model: str = "digits_cnn",
    accuracy: tuple[float, float, float] = (0.9806, 0.9306, 0.9778),
    verified: bool = True,
    optional: bool = True,
    images: tuple[Any, Any] | None = None,
    classes: tuple[str, ...] = tuple("0123456789"),
    narrower: int = 0,
    seed: int = 0,
) -> Path:
    """Write a run directory; ``optional=False`` leaves metrics.json alone in it."""
    directory.mkdir(parents=True, exist_ok=True)
    layers = CNN if layers is None else layers
    layers = [(n, k, m, w, max(wb - narrower, 1) if wb < 8 else wb, ab) for n, k, m, w, wb, ab in layers]
    before, rounded, after = accuracy
    costs: list[dict[str, Any]] = [
        {"name": name, "kind": kind, "macs": macs, "weight_bits": wb, "activation_bits": ab,
         "weight_elements": weights, "weight_bytes": weights * wb / 8 + 40 * (weights > 0),
         "bops": macs * wb * ab}
        for name, kind, macs, weights, wb, ab in layers
    ]  # fmt: skip
    weights = sum(layer[3] for layer in layers)
    cost: dict[str, Any] = {
        "bops": sum(entry["bops"] for entry in costs),
        "bops_float": 1024 * sum(layer[2] for layer in layers),
        "weight_bytes": round(sum(entry["weight_bytes"] for entry in costs)),
        "weight_bytes_float": 4 * weights + 400,
        "average_weight_bits": sum(layer[3] * layer[4] for layer in layers) / weights,
        "average_activation_bits": sum(layer[5] for layer in layers) / len(layers),
        "layers": costs,
    }
    shift = {
        "noise": 0.93,
        "blur": 0.86,
        "contrast": 0.964,
        "rotation": 0.912,
        "translation": 0.741,
        "mean": 0.8814,
    }
    metrics = {
        "version": 1,
        "seed": seed,
        "model": model,
        "data": "digits",
        "environment": {
            "bitsmith": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "onnxruntime": "1.24.1",
            "cpu": "AMD EPYC 9R14 (avx512_vnni)", "threads": 2, "platform": "Linux-6.1-x86_64",
        },
        "float": {"accuracy": before, "loss": 0.0713},
        "post_training": {"accuracy": rounded, "loss": 0.2954},
        "quantized": {"accuracy": after, "loss": 0.0941},
        "exported": {"onnx": {"accuracy": after, "max_abs_difference": 3.1e-6, "agreement": 1.0}},
        "shift": {"float": shift, "quantized": {name: value - 0.011 for name, value in shift.items()}},
        "cost": cost,
        "time": {"float": 7.93, "post_training": 0.41, "qat": 15.2, "export": 3.62, "verify": 0.84,
                 "shift": 1.1, "total": 29.4},
    }  # fmt: skip
    write(directory / "metrics.json", metrics)
    if not optional:
        return directory
    sites, floats = {}, [{"name": "normalize", "elements": 2, "reason": "normalisation of inputs"}]
    for name, kind, _, _, wb, ab in layers:
        matmul = kind == "QuantMatMul"
        for operand, bits in (("left" if matmul else "weight", wb), ("right" if matmul else "input", ab)):
            weight = operand == "weight"
            sites[f"{name}.{operand}"] = {
                "kind": "weight" if weight else "activation", "bits": bits,
                "grid": "seq" if bits == 2 and weight else "balanced" if weight else "unsigned",
                "granularity": "channel" if weight else "tensor", "group_size": None, "signed": weight,
            }  # fmt: skip
        if not matmul:
            floats.append({"name": f"{name}.bias", "elements": 16, "reason": "bias: added in float"})
    write(directory / "plan.json", {"version": 1, "sites": sites, "cost": {}, "target": "onnxruntime"})
    write(directory / "coverage.json", {
        "sites": [{"name": name, "elements": 1024, "range": "lsq", **site} for name, site in sites.items()],
        "leftovers": floats,
    })  # fmt: skip
    write(directory / "certificate.json", certificate([layer[0] for layer in layers], verified))
    write(
        directory / "history.json",
        {"float": history(20, 2.3, before, seed), "qat": history(20, 0.5, after, seed + 1)},
    )
    write_predictions(directory, accuracy, images, classes, seed)
    (directory / "recipe.yaml").write_text(
        f"model: {model}\ndata: digits\ntarget: onnxruntime\nseed: {seed}\n"
    )
    (directory / "model").mkdir(exist_ok=True)
    (directory / "model" / "model.safetensors").write_bytes(bytes(int(cost["weight_bytes"]) + 800))
    (directory / "model.onnx").write_bytes(bytes(int(cost["weight_bytes"]) + 6100))
    return directory


def certificate(layers: list[str], verified: bool) -> dict[str, Any]:
    """As export.verify writes it; a failed one stops at the first check that does not hold."""
    failure = "conv4.weight: 31 of 1152 stored codes differ from the trained ones, the first at 7"
    native = {
        "passed": True,
        "file": "model",
        "failure": "",
        "runtime": "bitsmith",
        "runtime_version": "format 1, PyTorch 2.13.0",
        "options": {},
        "codes_equal": True,
        "codes": 6024,
        "sites": dict.fromkeys(layers, 0.0),
        "max_abs_difference": 0.0,
        "checks": checks(1.0, 1.0),
    }
    onnx = {
        "passed": verified,
        "file": "model.onnx",
        "failure": "" if verified else failure,
        "runtime": "onnxruntime",
        "runtime_version": "1.24.1",
        "options": {"graph_optimization_level": "all", "session.disable_quant_qdq": "1"},
        "codes_equal": verified,
    }
    if verified:
        onnx |= {
            "codes": 6024,
            "sites": {name: 1e-7 * (index + 1) for index, name in enumerate(layers)},
            "max_abs_difference": 3.1e-6,
            "checks": checks(1.0, 0.9972),
            "default_options": {
                "options": "the runtime's default options",
                "rows": 256,
                "rows_within_tolerance": 0.21,
                "holds": False,
            },
        }
    not_checked = ["inputs outside the test set", "speed and memory use"]
    return {
        "version": 1,
        "rows": 360,
        "exports": {"native": native, "onnx": onnx},
        "not_checked": not_checked,
    }


def checks(agreement: float, within: float) -> list[dict[str, Any]]:
    return [
        {"name": "same predictions", "passed": agreement >= 0.995, "value": agreement, "limit": 0.995},
        {
            "name": "rows within 0.001 of the outputs' standard deviation",
            "passed": within >= 0.99,
            "value": within,
            "limit": 0.99,
        },
    ]


def history(epochs: int, start: float, end: float, seed: int) -> list[dict[str, Any]]:
    noise = np.random.default_rng(seed)
    return [
        {
            "step": 20 * (epoch + 1),
            "epoch": epoch + 1,
            "loss": float(0.02 + start * np.exp(-epoch / 4) * noise.uniform(0.9, 1.1)),
            "learning_rate": 1e-3,
            "validation_accuracy": float(min(1, end + 0.003 - 0.55 * start / 2.3 * np.exp(-epoch / 2.2))),
        }
        for epoch in range(epochs)
    ]


def write_predictions(
    directory: Path,
    accuracy: tuple[float, float, float],
    images: tuple[Any, Any] | None,
    classes: tuple[str, ...],
    seed: int,
) -> None:
    generator = np.random.default_rng(seed)
    pictures, labels = images or (generator.random((360, 1, 8, 8)), generator.integers(0, len(classes), 360))
    count = len(labels)
    order = generator.permutation(count)
    answers: dict[str, Any] = {}
    for name, right in (("float", accuracy[0]), ("quantized", accuracy[2])):
        answer = labels.copy()
        wrong = order[: round(count * (1 - right))]
        answer[wrong] = (labels[wrong] + generator.choice([1, 3, 7], len(wrong))) % len(classes)
        answers[name] = answer
    rows = np.flatnonzero((answers["quantized"] != labels) | (answers["float"] != labels))[:24]
    arrays: dict[str, Any] = {
        "labels": labels,
        **answers,
        "exported": answers["quantized"],
        "images": pictures[rows].astype(np.float32),
        "image_rows": rows,
        "classes": np.array(classes),
    }
    np.savez(directory / "predictions.npz", **arrays)


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
