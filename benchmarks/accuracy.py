"""Digits: how close to float each way of training gets, at 4, 3 and 2 bits and with weights alone at 4 to 1.

    python benchmarks/accuracy.py                                   # CNN, 5 folds x 2 seeds; resumes where it stopped
    python benchmarks/accuracy.py --model digits_vit --seeds 1
    python benchmarks/accuracy.py --table                           # what has been measured so far

A unit is one fold and seed: a float model is trained on the other four folds, then every method starts from it
and trains as long again, with the same optimizer, learning rate and batches. The figure is the difference to
the float model on the fold that was left out, in points; mean and standard error over units. First and last
layers have 8 bits. Methods by other people have their papers' parts and nothing of ours:

    nearest   round to nearest after calibration by squared error, no training
    lsq       learned scales started at 2 mean|x|/sqrt(Qp) (1902.08153)
    lsq+      learned scales and zero points of activations, started by squared error (2004.09576)
    pact      DoReFa's weights, learned clipping of activations (1805.06085)
    dorefa    tanh weights, activations on the calibrated range (1606.06160); ours keeps the layer's range
    ewgs      lsq with element-wise gradient scaling (2104.00903)
    ours      the default: learned scales started by squared error, a grid without zero at 1 and 2 bits,
              distillation from the float model, BatchNorm re-estimated at the end
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import _results
import torch
from torch import nn

from bitsmith.quantization import Scheme, calibrate, prepare, reestimate_batchnorm
from bitsmith.tasks import data as tasks_data
from bitsmith.tasks import models
from bitsmith.tasks.classification import evaluate
from bitsmith.train.config import TrainConfig
from bitsmith.train.loop import train

LEARNING_RATES = {"digits_cnn": 4e-3, "digits_vit": 2e-3}

# name -> (fields of the weights' scheme, of the activations' scheme, of the training)
LSQ = {"grid": "symmetric", "calibration": "lsq"}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "nearest": ({}, {}, {}),
    "lsq": (LSQ, {"calibration": "lsq"}, {}),
    "lsq+": ({"grid": "symmetric"}, {"range": "lsq+"}, {}),
    "pact": ({"range": "dorefa"}, {"range": "pact", "calibration": "minmax"}, {}),
    "dorefa": ({"range": "dorefa"}, {"range": "static"}, {}),
    "ewgs": ({**LSQ, "estimator": "ewgs"}, {"calibration": "lsq", "estimator": "ewgs"}, {}),
    "ours": ({}, {}, {"distillation": 0.5}),
}
POINTS = {
    "W4A4": (4, 4),
    "W3A3": (3, 3),
    "W2A2": (2, 2),
    "W4": (4, None),
    "W3": (3, None),
    "W2": (2, None),
    "W1": (1, None),
}


def float_unit(model_name: str, fold: int, seed: int, epochs: int) -> tuple[nn.Module, Any]:
    """A trained float model and its data; all of the training part is used, as nothing is chosen by validation."""
    data = tasks_data.load("digits", seed=seed, fold=fold, validation=0)
    model = models.build(model_name, seed=seed)
    rate = LEARNING_RATES[model_name]
    train(
        model,
        data.train_x,
        data.train_y,
        TrainConfig(epochs=epochs, learning_rate=rate, weight_decay=1e-2, seed=seed),
    )
    return model, data


def quantized(
    model_name: str, teacher: nn.Module, data: Any, method: str, point: str, seed: int, epochs: int
) -> float:
    """Test accuracy of one method at one point."""
    weights, activations, settings = METHODS[method]
    weight_bits, activation_bits = POINTS[point]
    if weight_bits == 1 and weights.get("grid") == "symmetric":
        weights = {**weights, "grid": "seq"}  # one bit has no other grid: sign times scale
    model = copy.deepcopy(teacher)
    prepare(
        model,
        Scheme(bits=weight_bits, granularity="channel", **weights),
        None if activation_bits is None else Scheme(bits=activation_bits, **activations),
    )
    calibrate(model, [data.train_x[:512]])
    if method != "nearest":
        config = TrainConfig(
            epochs=epochs, learning_rate=LEARNING_RATES[model_name], weight_decay=1e-2, seed=seed, **settings
        )
        train(model, data.train_x, data.train_y, config, teacher=teacher)
        if method == "ours":
            reestimate_batchnorm(model, [data.train_x])
    return evaluate(model, data.test_x, data.test_y)["accuracy"]


def table(results: dict[str, Any], model_name: str) -> None:
    """Mean difference to float in points, with its standard error and the number of units."""
    units = results.get(model_name, {})
    if not units:
        return
    floats = [u["float"] for u in units.values()]
    print(
        f"\n{model_name}: float {_results.mean_and_error([100 * f for f in floats])[0]:.2f} % over {len(units)} units; points against it"
    )
    print(f"{'':<9}" + "".join(f"{p:>20}" for p in POINTS))
    for method in METHODS:
        cells = []
        for point in POINTS:
            found = [
                100 * (u["points"][f"{method} {point}"] - u["float"])
                for u in units.values()
                if f"{method} {point}" in u["points"]
            ]
            mean, error = _results.mean_and_error(found) if found else (0.0, 0.0)
            cells.append(f"{mean:+.2f} ± {error:.2f} ({len(found)})" if found else "-")
        print(f"{method:<9}" + "".join(f"{c:>20}" for c in cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(LEARNING_RATES), default="digits_cnn")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--points", default=",".join(POINTS), help="comma-separated")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        wanted = [f"{m} {p}" for p in options.points.split(",") for m in options.methods.split(",")]
        for seed in range(options.seeds):
            for fold in range(options.folds):
                results = _results.load("accuracy", options.out)
                unit = results.setdefault(options.model, {}).setdefault(
                    f"fold {fold} seed {seed}", {"points": {}}
                )
                missing = [name for name in wanted if name not in unit["points"]]
                if not missing:
                    continue
                model, data = float_unit(options.model, fold, seed, options.epochs)
                unit["float"] = evaluate(model, data.test_x, data.test_y)["accuracy"]
                for name in missing:
                    method, point = name.split()
                    unit["points"][name] = quantized(
                        options.model, model, data, method, point, seed, options.epochs
                    )
                print(f"{options.model} fold {fold} seed {seed}: float {unit['float']:.2%}", flush=True)
                _results.save("accuracy", {**results, "epochs": options.epochs}, options.out)
    results = _results.load("accuracy", options.out)
    for model_name in LEARNING_RATES:
        table(results, model_name)


if __name__ == "__main__":
    main()
