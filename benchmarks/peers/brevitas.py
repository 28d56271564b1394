"""Digits with Brevitas: the experiment of benchmarks/accuracy.py, on the layers of another QAT library.

    python -m venv build/brevitas
    build/brevitas/bin/pip install -r benchmarks/peers/requirements-brevitas.txt
    PYTHONPATH=src build/brevitas/bin/python benchmarks/peers/brevitas.py       # resumes where it stopped

Units, float start, epochs, optimizer, learning rate and batches are those of accuracy.py, whose float model and
training loop are used here; only the layers are Brevitas'. Quantized are the same tensors: weights per channel
and the inputs of all layers per tensor, signed at the first layer and unsigned after ReLU, 8 bits in the first
and last layer. As for all methods of others there is no distillation and BatchNorm is not re-estimated.

    default     Int8WeightPerChannelFloat (scale = max|w| at every step), Int8- and Uint8ActPerTensorFloat
                (99.999th percentile for 300 of the 460 steps, then a learned scale from its average)
    calibrated  the same after `calibration_mode` on the rows that our methods calibrate on: activation scales
                are learned from the first step
    learned     calibrated, and weights have learned scales that start at the least squared error
                (Int8WeightPerChannelFloatMSE with `parameter_from_stats`), which a user must ask for

Needs Brevitas 0.13.4, which knows that PyTorch 2.13 has no `Tensor.rename`; no stand-in for it is made here.
"""

from __future__ import annotations

import argparse
import copy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

# `import brevitas` must not find this file, which has the name of what it measures.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import _results  # noqa: E402
import torch  # noqa: E402
from accuracy import LEARNING_RATES, POINTS, float_unit  # noqa: E402
from brevitas import config as brevitas_config  # noqa: E402
from brevitas import nn as brevitas_nn  # noqa: E402
from brevitas.graph.calibrate import calibration_mode  # noqa: E402
from brevitas.quant import (  # noqa: E402
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerChannelFloatMSE,
    Uint8ActPerTensorFloat,
)
from torch import nn  # noqa: E402

from bitsmith.tasks.classification import evaluate  # noqa: E402
from bitsmith.train.config import TrainConfig  # noqa: E402
from bitsmith.train.loop import train  # noqa: E402

NAME, MODEL = "peer_brevitas", "digits_cnn"
VERSIONS = ("W4A4", "W3A3", "W2A2")
# name -> (calibrated before training, arguments of every layer)
METHODS: dict[str, tuple[bool, dict[str, Any]]] = {
    "default": (False, {"weight_quant": Int8WeightPerChannelFloat}),
    "calibrated": (True, {"weight_quant": Int8WeightPerChannelFloat}),
    "learned": (
        True,
        {
            "weight_quant": Int8WeightPerChannelFloatMSE,
            "weight_scaling_impl_type": "parameter_from_stats",
        },
    ),
}


def quantized_copy(
    model: nn.Module, weight_bits: int, activation_bits: int, arguments: dict[str, Any]
) -> nn.Module:
    """A copy of ``model``, its convolutions and linear layers Brevitas' with the same weights."""
    copied = copy.deepcopy(model)
    names = [name for name, m in copied.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for name in names:
        layer = copied.get_submodule(name)
        outer = name in (names[0], names[-1])
        settings = {
            **arguments,
            "bias": layer.bias is not None,
            "weight_bit_width": 8 if outer else weight_bits,
            "input_quant": Int8ActPerTensorFloat if name == names[0] else Uint8ActPerTensorFloat,
            "input_bit_width": 8 if outer else activation_bits,
        }
        if isinstance(layer, nn.Conv2d):
            made = brevitas_nn.QuantConv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                stride=layer.stride,
                padding=layer.padding,
                **settings,
            )
        else:
            made = brevitas_nn.QuantLinear(layer.in_features, layer.out_features, **settings)
        made.load_state_dict(layer.state_dict())  # scales of weights are made anew from the weights loaded
        copied.set_submodule(name, made)
    return copied


def accuracy(teacher: nn.Module, data: Any, method: str, point: str, seed: int, epochs: int) -> float:
    """Test accuracy of one method at one point."""
    calibrated, arguments = METHODS[method]
    weight_bits, activation_bits = POINTS[point]
    assert weight_bits is not None
    assert activation_bits is not None
    model = quantized_copy(teacher, weight_bits, activation_bits, arguments)
    if calibrated:
        model.eval()
        with torch.no_grad(), calibration_mode(model):
            model(data.train_x[:512])
    rate = LEARNING_RATES[MODEL]
    train(
        model,
        data.train_x,
        data.train_y,
        TrainConfig(epochs=epochs, learning_rate=rate, weight_decay=1e-2, seed=seed),
    )
    return evaluate(model, data.test_x, data.test_y)["accuracy"]


def table(results: dict[str, Any]) -> None:
    """Mean difference to float in points, with its standard error and the number of units."""
    units = results.get(MODEL, {})
    if not units:
        return
    mean, _ = _results.mean_and_error([100 * u["float"] for u in units.values()])
    print(f"\n{MODEL} with Brevitas: float {mean:.2f} % over {len(units)} units; points against it")
    print(f"{'':<11}" + "".join(f"{p:>20}" for p in VERSIONS))
    for method in METHODS:
        cells = []
        for point in VERSIONS:
            name = f"{method} {point}"
            found = [100 * (u["points"][name] - u["float"]) for u in units.values() if name in u["points"]]
            mean, error = _results.mean_and_error(found) if found else (0.0, 0.0)
            cells.append(f"{mean:+.2f} ± {error:.2f} ({len(found)})" if found else "-")
        print(f"{method:<11}" + "".join(f"{c:>20}" for c in cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--points", default=",".join(VERSIONS), help="comma-separated")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    brevitas_config.IGNORE_MISSING_KEYS = True  # a float model has no scales to be loaded
    wanted = [f"{m} {p}" for p in options.points.split(",") for m in options.methods.split(",")]
    for seed in range(0 if options.table else options.seeds):
        for fold in range(options.folds):
            results = _results.load(NAME, options.out)
            unit = results.setdefault(MODEL, {}).setdefault(f"fold {fold} seed {seed}", {"points": {}})
            missing = [name for name in wanted if name not in unit["points"]]
            if not missing:
                continue
            model, data = float_unit(MODEL, fold, seed, options.epochs)
            unit["float"] = evaluate(model, data.test_x, data.test_y)["accuracy"]
            for name in missing:
                method, point = name.split()
                unit["points"][name] = accuracy(model, data, method, point, seed, options.epochs)
                settings = {"epochs": options.epochs, "brevitas": version("brevitas")}
                _results.save(NAME, {**results, **settings}, options.out)
            print(f"{MODEL} fold {fold} seed {seed}: float {unit['float']:.2%}", flush=True)
    table(_results.load(NAME, options.out))


if __name__ == "__main__":
    main()
