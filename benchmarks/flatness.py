"""Flatness: what sharpness and weight anchors are worth under shift, at the same bits and the same steps.

    python benchmarks/flatness.py                          # digits, 5 seeds; resumes
    python benchmarks/flatness.py --task mnist --points W4A4 W2A2
    python benchmarks/flatness.py --table                  # what has been measured so far, all tasks

    digits    the CNN on a fold of the digits; all corruptions of bitsmith.tasks.shifts, severities 1, 3, 5
    vit       the small transformer, the same
    scenes    the U-Net on the scenes of digits (mean IoU); noise, blur, contrast and their kin
    cifar10   the pretrained ResNet-20, 3 epochs on 6,400 images; all corruptions, on 1,000 test images
    mnist     the CNN, trained on 6,000 images of MNIST at 16x16; USPS and MNIST-M (2,000 images each)
    pacs      a ResNet-8 on three domains at 32x32, tested on the fourth; the seed is the domain

Every contender starts from the float model of its seed and trains as many steps by the same optimizer, first and last
layer at 8 bits, the model of the last step counts: nothing is chosen by what happens under shift. `twice`: plain
training of twice the steps, which cost what sharpness costs. `averaged`: plain, with averaged weights. `augmented`:
plain, images moved by up to a pixel in eight. `distilled`: plain, half of the loss against the float model's
outputs. Flatness is measured on 512 training images.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import _results
import _shared_data
import torch
from torch import Tensor, nn

from bitsmith.methods.sharpness import Sharpness
from bitsmith.methods.weight_anchor import WeightAnchor
from bitsmith.quantization import Scheme, calibrate, prepare, reestimate_batchnorm
from bitsmith.tasks import build, load
from bitsmith.tasks.augment import crop_and_flip
from bitsmith.tasks.dataset import Data
from bitsmith.tasks.examples import Examples
from bitsmith.tasks.flatness import measure_flatness
from bitsmith.tasks.normalize import Normalize
from bitsmith.tasks.resnet import ResNet
from bitsmith.tasks.shifts import Shift
from bitsmith.tasks.suites import figures, measure_shifts
from bitsmith.train.config import TrainConfig
from bitsmith.train.loop import train

POINTS = {"W4A4": 4, "W3A3": 3, "W2A2": 2}


@dataclass(frozen=True)
class Contender:
    """How one trains: its methods, and what it changes in the settings."""

    methods: Callable[[], list[Any]] = list
    epochs: float = 1.0  # factor
    ema: float = 0.0
    augmented: bool = False
    distillation: float = 0.0


def sharp(*arguments: Any, **options: Any) -> Contender:
    return Contender(lambda: [Sharpness(*arguments, **options)])


def anchored(*arguments: Any, **options: Any) -> Contender:
    return Contender(lambda: [WeightAnchor(*arguments, **options)])


RADIUS = 0.01  # the default
CONTENDERS = {
    "plain": Contender(),
    "twice": Contender(epochs=2.0),
    "averaged": Contender(ema=0.99),
    "augmented": Contender(augmented=True),
    "distilled": Contender(distillation=0.5),
    "sharpness": sharp(),
    "sharpness / 4": sharp(RADIUS / 4),
    "sharpness / 2": sharp(RADIUS / 2),
    "sharpness x 2": sharp(RADIUS * 2),
    "sharpness x 4": sharp(RADIUS * 4),
    "sharpness, tensors": sharp(0.05, relative_to="tensor"),
    "sharpness, every 5": sharp(every=5),
    "sagm": sharp(kind="sagm"),
    "sharpness, averaged": Contender(lambda: [Sharpness()], ema=0.99),
    "sharpness, distilled": Contender(lambda: [Sharpness()], distillation=0.5),
    "anchor": anchored(),
    "anchor, constant": anchored(0.01, schedule="constant"),
    "anchor, literal": anchored(0.1, pull="anchor", requantize=True, schedule="constant"),
    "anchor, sharpness": Contender(lambda: [Sharpness(), WeightAnchor()]),
}
BASELINES = ("plain", "averaged")


# ---- tasks


@dataclass(frozen=True)
class Task:
    """A float model and its data by seed, and how long and fast it trains."""

    make: Callable[[int], tuple[nn.Module, Examples]]
    suite: tuple[str, ...]  # suites or names of shifts
    epochs: int = 20
    rate: float = 4e-3
    metric: str = "accuracy"
    batch_size: int = 64


def trained(model: nn.Module, data: Any, epochs: int, rate: float, seed: int) -> nn.Module:
    """The float model."""
    config = TrainConfig(epochs=epochs, learning_rate=rate, weight_decay=1e-2, seed=seed)
    train(model, data.train_x, data.train_y, config, augment=data.augment)
    return model


def digits(seed: int) -> tuple[nn.Module, Examples]:
    """The CNN on a fold."""
    data = load("digits", seed=seed, fold=seed % 5)
    return trained(build("digits_cnn", seed=seed), data, 20, 4e-3, seed), data


def vit(seed: int) -> tuple[nn.Module, Examples]:
    """The transformer on a fold."""
    data = load("digits", seed=seed, fold=seed % 5)
    return trained(build("digits_vit", seed=seed), data, 20, 2e-3, seed), data


def scenes(seed: int) -> tuple[nn.Module, Examples]:
    """The U-Net on scenes of digits."""
    data = load("digit_scenes", seed=seed)
    return trained(build("unet", seed=seed), data, 10, 4e-3, seed), data


def cifar10(seed: int) -> tuple[nn.Module, Examples]:
    """The pretrained ResNet-20."""
    data = _shared_data.load("cifar10", seed=seed)
    rows = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(seed))[:6400]
    data = replace(
        data,
        train_x=data.train_x[rows],
        train_y=data.train_y[rows],
        test_x=data.test_x[:1000],
        test_y=data.test_y[:1000],
    )
    return build("resnet20", weights=_shared_data.resnet_weights(20)).eval(), data


@dataclass(frozen=True, eq=False)
class HandsElsewhere(Data):
    """MNIST, and the same digits by other hands as its shifts."""

    elsewhere: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def shifts(self) -> tuple[Shift, ...]:
        def rows(name: str, *_: Any) -> tuple[Tensor, Tensor]:
            return self.inputs(self.elsewhere[name][0]), self.elsewhere[name][1]

        return tuple(Shift(name, "domains", partial(rows, name), graded=False) for name in self.elsewhere)


def mnist(seed: int) -> tuple[nn.Module, Examples]:
    """The CNN on MNIST."""
    train_x, train_y, test_x, test_y = _shared_data.digits_as("mnist", 16)
    rows = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed))
    splits = {
        "train": (train_x[rows[:6000]], train_y[rows[:6000]]),
        "val": (train_x[rows[6000:7000]], train_y[rows[6000:7000]]),
        "test": (test_x, test_y),
    }
    parts = [tensor for split in splits.values() for tensor in split]
    others = {name: _shared_data.digits_as(name, 16)[2:] for name in ("usps", "mnist_m")}
    data = HandsElsewhere(*parts, tuple("0123456789"), "mnist", None, elsewhere=others)
    statistics = {"mean": (0.15,) * 3, "std": (0.28,) * 3}
    return trained(build("digits_cnn", seed=seed, **statistics), data, 8, 4e-3, seed), data


def pacs(seed: int) -> tuple[nn.Module, Examples]:
    """A ResNet-8 on three domains."""
    data = _shared_data.pacs(_shared_data.PACS[seed % 4], side=32, seed=seed // 4)
    data = replace(data, augment=partial(crop_and_flip, padding=4))
    torch.manual_seed(seed)
    model = ResNet(Normalize((0.5,) * 3, (0.25,) * 3), 1, len(data.classes))
    return trained(model, data, 20, 4e-3, seed), data


PIXELWISE = (
    "noise",
    "blur",
    "contrast",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "brightness",
    "pixelate",
    "jpeg",
)
TASKS = {
    "digits": Task(digits, ("corruptions",)),
    "vit": Task(vit, ("corruptions",), rate=2e-3),
    "scenes": Task(scenes, PIXELWISE, epochs=10, metric="mean_iou"),
    "cifar10": Task(cifar10, ("corruptions",), epochs=3, rate=2e-3, batch_size=128),
    "mnist": Task(mnist, ("domains",), epochs=6),
    "pacs": Task(pacs, ("domains",), epochs=8, rate=2e-3),
}


class Unit:
    """The float model of one seed."""

    def __init__(self, task: str, seed: int) -> None:
        self.task, self.seed = TASKS[task], seed
        self.model, self.data = self.task.make(seed)
        self.shifts = [s for s in self.data.shifts() if {s.name, s.suite} & set(self.task.suite)]
        self.batches = self.data.drawn(512, seed)

    def judged(self, model: nn.Module) -> dict[str, Any]:
        """The metric in distribution and under each shift; flatness."""
        metric = self.task.metric
        found = measure_shifts({"it": model}, self.data, self.shifts)
        return {
            "clean": self.data.evaluate(model, *self.data.split("test"))[metric],
            "shift": figures(found, "it", metric),
            **measure_flatness(model, self.batches),
        }

    def run(self, contender: str, bits: int) -> dict[str, Any]:
        """One contender, trained and judged."""
        how, task = CONTENDERS[contender], self.task
        model = copy.deepcopy(self.model)
        prepare(model, Scheme(bits=bits, granularity="channel"), Scheme(bits=bits))
        methods = how.methods()
        for method in methods:
            method.attach(model)
        calibrate(model, [x for x, _ in self.batches])
        config = TrainConfig(
            epochs=round(task.epochs * how.epochs),
            batch_size=task.batch_size,
            learning_rate=task.rate,
            weight_decay=1e-4,
            distillation=how.distillation,
            ema=how.ema,
            seed=self.seed,
        )
        data: Any = self.data
        side = data.train_x.shape[-1]
        moved = partial(crop_and_flip, padding=max(1, side // 8)) if how.augmented else data.augment
        started = time.process_time()
        train(
            model,
            data.train_x,
            data.train_y,
            config,
            methods=methods,
            teacher=self.model if how.distillation else None,
            augment=moved,
        )
        seconds = time.process_time() - started
        reestimate_batchnorm(model, data.as_trained(1024, self.seed))
        return {**self.judged(model), "seconds": seconds}


# ---- tables


def shown(values: list[float], scale: float = 100.0, form: str = "+.1f") -> str:
    """Mean and standard error, with the number of seeds."""
    if not values:
        return "-"
    mean, error = _results.mean_and_error([scale * value for value in values])
    return f"{mean:{form}} ± {error:{form.replace('+', '')}} ({len(values)})"


def table(results: dict[str, Any], task: str) -> None:
    """In distribution and under shift, against plain and averaged training in pairs; flatness; time."""
    units = [unit for unit in results.get(task, {}).values() if "float" in unit]
    if not units:
        return
    floats = [unit["float"] for unit in units]
    print(
        f"\n{task}: float {shown([f['clean'] for f in floats], form='.1f')} in distribution, "
        f"{shown([f['shift']['mean'] for f in floats], form='.1f')} under shift"
    )
    for point in POINTS:
        rows = [name for name in CONTENDERS if any(f"{name} {point}" in unit["runs"] for unit in units)]
        if rows:
            heads = (
                "in distribution",
                "to plain",
                "under shift",
                "to plain",
                "to averaged",
                "sharpness",
                "eigenvalue",
                "time",
            )
            print(f"\n{point:<26}" + "".join(f"{head:>18}" for head in heads))
        for name in rows:
            print(f"{name:<26}" + "".join(f"{one:>18}" for one in cells(units, name, point)))
        correlations(units, point)


def cells(units: list[dict[str, Any]], name: str, point: str) -> list[str]:
    """One row: a contender by itself, and in pairs with the baselines of its seed."""
    pairs = {
        base: [
            (own, other)
            for unit in units
            if (own := unit["runs"].get(f"{name} {point}")) and (other := unit["runs"].get(f"{base} {point}"))
        ]
        for base in BASELINES
    }
    mine = [own for unit in units if (own := unit["runs"].get(f"{name} {point}"))]
    return [
        shown([m["clean"] for m in mine], form=".1f"),
        shown([own["clean"] - other["clean"] for own, other in pairs["plain"]]),
        shown([m["shift"]["mean"] for m in mine], form=".1f"),
        shown([own["shift"]["mean"] - other["shift"]["mean"] for own, other in pairs["plain"]]),
        shown([own["shift"]["mean"] - other["shift"]["mean"] for own, other in pairs["averaged"]]),
        shown([m["sharpness"] for m in mine], 1, ".3f"),
        shown([m["top_eigenvalue"] for m in mine], 1, ".2f"),
        shown([own["seconds"] / other["seconds"] for own, other in pairs["plain"]], 1, ".2f"),
    ]


def correlations(units: list[dict[str, Any]], point: str) -> None:
    """Of flatness with what holds under shift, over the contenders of each seed, by rank (Spearman)."""
    from scipy.stats import spearmanr

    for measure in ("sharpness", "top_eigenvalue", "loss"):
        found = []
        for unit in units:
            runs = [run for key, run in unit["runs"].items() if key.endswith(point)]
            if len(runs) >= 4:
                found.append(
                    spearmanr([r[measure] for r in runs], [r["shift"]["mean"] for r in runs]).statistic
                )
        if found:
            print(f"rank correlation of {measure} with the metric under shift: {shown(found, 1, '+.2f')}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="digits", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--points", nargs="*", default=list(POINTS), choices=POINTS)
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = _results.load("flatness", options.out)
    units = results.setdefault(options.task, {})
    for seed in range(0 if options.table else options.seeds):
        entry = units.setdefault(str(seed), {"runs": {}})
        todo = [(c, p) for p in options.points for c in options.contenders if f"{c} {p}" not in entry["runs"]]
        if not todo:
            continue
        unit = Unit(options.task, seed)
        entry["float"] = unit.judged(unit.model)
        for contender, point in todo:
            found = unit.run(contender, POINTS[point])
            entry["runs"][f"{contender} {point}"] = found
            print(
                f"seed {seed}  {point}  {contender:<26} in distribution {found['clean']:.4f}, under shift "
                f"{found['shift']['mean']:.4f}, sharpness {found['sharpness']:.3f}, {found['seconds']:.1f} s",
                flush=True,
            )
            _results.save("flatness", results, options.out)
    for task in TASKS if options.table else (options.task,):
        table(results, task)


if __name__ == "__main__":
    main()
