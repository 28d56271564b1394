"""CIFAR-10, pretrained ResNet-20, weights and activations at 4, 3 and 2 bits: how much QAT gives back, and how fast.

    python benchmarks/cifar10.py --bits 2 --epochs 8           # one point; kill it and start it again: it resumes
    python benchmarks/cifar10.py --table                       # what has been measured so far

First and last layers have 8 bits. Every epoch's figure is taken on the test images with BatchNorm re-estimated
on a copy, for the curve only: nothing is chosen by it. `--validation` trains and scores without the test images
(2,000 training images held out): use it to try settings. Needs the shared CIFAR-10 sheets and weights.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import _results
import _shared_data
import torch

from bitsmith.quantization import Scheme, calibrate, measure, prepare, reestimate_batchnorm
from bitsmith.tasks import models
from bitsmith.tasks.classification import evaluate
from bitsmith.train.config import TrainConfig
from bitsmith.train.loop import train


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=2, help="of weights and activations")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--range-factor", type=float, default=1.0)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--distillation", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--ema", type=float, default=0.0)
    parser.add_argument("--grid", default="auto", help="of the weights")
    parser.add_argument("--limit", type=int, default=None, help="use only so many training images")
    parser.add_argument("--validation", action="store_true")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the step: a third less time, minutes to start"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


def point(options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one point."""
    train_x, train_y, test_x, test_y = _shared_data.load_arrays("cifar10")
    if options.validation:
        test_x, test_y, train_x, train_y = train_x[-2000:], train_y[-2000:], train_x[:-2000], train_y[:-2000]
    # Whole batches only: a ragged last one would be compiled again.
    whole = (options.limit or len(train_x)) // options.batch_size * options.batch_size
    train_x, train_y = train_x[:whole], train_y[:whole]
    teacher = models.build("resnet20", weights=_shared_data.resnet_weights(20)).eval()
    teacher = teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    float_accuracy = evaluate(teacher, test_x, test_y)["accuracy"]

    model = copy.deepcopy(teacher)
    scheme = Scheme(bits=options.bits, granularity="channel", grid=options.grid)
    prepare(model, scheme, Scheme(bits=options.bits), target="onnxruntime")
    some = [train_x[i : i + 256] / 255.0 for i in range(0, 1024, 256)]
    calibrate(model, some)
    post_training = evaluate(model, test_x, test_y)["accuracy"]
    print(
        f"W{options.bits}A{options.bits}: float {float_accuracy:.2%}, post-training {post_training:.2%}",
        flush=True,
    )

    if options.compile:
        model.compile()

    def statistics(count: int) -> list[torch.Tensor]:
        """Training images as training sees them, cropped and flipped: on plain ones W2A2 loses 3 points."""
        noise = torch.Generator().manual_seed(options.seed)
        batches = [train_x[i : i + 256] / 255.0 for i in range(0, min(count, len(train_x)), 256)]
        return [_shared_data.crop_and_flip(batch, noise) for batch in batches]

    def validate() -> float:
        """Accuracy of a copy with its BatchNorms re-estimated."""
        trial = copy.deepcopy(model)
        reestimate_batchnorm(trial, statistics(2048))
        return evaluate(trial, test_x, test_y)["accuracy"]

    def tell(progress: Any) -> None:
        if progress.record:
            print(
                {k: round(v, 5) for k, v in progress.record.items()},
                f"{time.strftime('%H:%M:%S')}",
                flush=True,
            )

    config = TrainConfig(
        epochs=options.epochs,
        batch_size=options.batch_size,
        optimizer=options.optimizer,
        learning_rate=options.learning_rate,
        range_learning_rate_factor=options.range_factor,
        weight_decay=options.weight_decay,
        distillation=options.distillation,
        temperature=options.temperature,
        ema=options.ema,
        seed=options.seed,
    )
    settings = {k: v for k, v in vars(options).items() if k not in ("table", "work", "out")}
    checkpoint = (
        options.work
        / f"w{options.bits}-e{options.epochs}-s{options.seed}{'-val' if options.validation else ''}.safetensors"
    )
    result = train(
        model,
        train_x,
        train_y,
        config,
        teacher=teacher if options.distillation else None,
        augment=_shared_data.crop_and_flip,
        validate=validate,
        progress=tell,
        checkpoint=None if options.validation else checkpoint,
        resume=True,
    )
    model = copy.deepcopy(model)  # a copy is eager: the last figures need no new compilation
    running = evaluate(model, test_x, test_y)["accuracy"]
    reestimate_batchnorm(model, statistics(10_240))
    accuracy = evaluate(model, test_x, test_y)["accuracy"]
    cost = measure(model, some[0]).report()
    return {
        "settings": settings,
        "float": float_accuracy,
        "post_training": post_training,
        "quantized": accuracy,
        "quantized_running_statistics": running,
        "drop_points": 100 * (float_accuracy - accuracy),
        "epochs": [100 * (float_accuracy - record["validation_accuracy"]) for record in result.history],
        "seconds": result.seconds,
        "weight_bytes": cost["weight_bytes"],
        "bops_share": cost["bops"] / cost["bops_float"],
    }


def table(points: dict[str, Any]) -> None:
    """Print what is there."""
    print(
        f"{'point':<16}{'epochs':>7}{'float':>9}{'nearest':>9}{'QAT':>9}{'drop':>7}   drop after each epoch (points)"
    )
    for name, p in sorted(points.items()):
        curve = " ".join(f"{d:.2f}" for d in p["epochs"])
        print(
            f"{name:<16}{p['settings']['epochs']:>7}{p['float']:>9.2%}{p['post_training']:>9.2%}{p['quantized']:>9.2%}"
            f"{p['drop_points']:>7.2f}   {curve}"
        )


def main() -> None:
    options = arguments()
    if not options.table:
        torch.set_num_threads(1)
        found = point(options)
        if options.validation:
            print(f"validation: drop {found['drop_points']:.2f} points in {found['seconds']:.0f} s")
            return
        results = _results.load("cifar10", options.out)
        points = results.get("points", {}) | {
            f"w{options.bits}a{options.bits} e{options.epochs} s{options.seed}": found
        }
        _results.save("cifar10", {"points": points}, options.out)
    table(_results.load("cifar10", options.out).get("points", {}))


if __name__ == "__main__":
    main()
