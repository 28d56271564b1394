"""Integer and forward-only training against float QAT: what is lost without float weights, trick by trick.

    python benchmarks/adapt_quality.py                                   # the byte model, 3 seeds; resumes
    python benchmarks/adapt_quality.py --task digits
    python benchmarks/adapt_quality.py --contenders "float QAT @2e-3"    # any contender at another learning rate
    python benchmarks/adapt_quality.py --table                           # what has been measured so far

    byte_llama    from scratch, 250 steps of 8 windows of 64 bytes of pydoc: the loss of 96 windows of its test split
    digits        the CNN, trained by float QAT and packed; then 160 steps on images that are turned, or low in
                  contrast, and the loss and accuracy on a fold that is so, too (severity 5). `start` is the packed model

Weights have 8, 4, 3 or 2 bits, one scale for each channel, activations 8; first and last layer 8. Of digits activations
have the stored ranges of the packed model. Every contender takes as many steps on the same batches in the same order, by
the same schedule (warm-up, then a cosine to 0), but for `6 times`, which takes so many more: forward passes alone learn
less from each. Learning rates are those of RATES. Of byte_llama: the best mean of W4 and
W2 on seed 0 of 0.004, 0.008, 0.012 and 0.018 for QAT, and of the last three for integer training (with the estimator
`clipped`). Of digits: the best on seed 0 and W4 of 0.002, 0.008 and 0.02 for QAT, of 0.002 to 0.04 for integer training,
and of 0.01, 0.03 and 0.1 for `zeroth order`. The others were not searched. A row differs from `integer`, IntegerAdam as
it comes, in what it is called by. `float QAT` is AdamW; `no momentum` is nearer to IntegerAdam, which has none: a gain
over the first alone may be the optimizer's.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.optim import IntegerAdam, IntegerOptimizer, IntegerSGD, IntegerSign, ZerothOrder
from bitsmith.optim.estimators import ESTIMATORS
from bitsmith.quantization.integer_packed import resume_integer
from bitsmith.quantization.integer_prepare import prepare_integer
from bitsmith.tasks import build, load
from bitsmith.tasks.classification import to_float
from bitsmith.tasks.shifts import shifted
from bitsmith.tasks.text import pydoc
from bitsmith.train.config import TrainConfig
from bitsmith.train.loop import train

WARM_UP = 20  # steps


@dataclass(frozen=True)
class Contender:
    """How one trains: its family, what it changes in the optimizer, and in the layers."""

    family: str = "integer"  # of RATES
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)
    points: tuple[str, ...] = ()  # none: all of the task's
    times: int = 1  # as many steps


def changed(**options: Any) -> Contender:
    return Contender(options=options)


FEW = ("W4", "W3", "W2")
CONTENDERS = {
    "float": Contender("float", points=("W8",)),
    "start": Contender("start"),
    "float QAT": Contender("qat"),
    "float QAT, no momentum": Contender("qat", {"betas": (0.0, 0.99)}),  # nearer to what `integer` does
    "integer": Contender(),
    "eco": changed(carry="eco", momentum=0.9),
    "eco, momentum 0.5": changed(carry="eco", momentum=0.5),
    "residual, no momentum": changed(carry="residual", momentum=0.0),
    "residual, momentum": changed(carry="residual", momentum=0.9),
    "neither": changed(carry="none", momentum=0.0),
    "scales fixed": changed(scales="fixed"),
    "scales refit": changed(scales="refit"),
    "hadamard": Contender(layers={"hadamard": True}),
    "activations 4": Contender(layers={"activations": 4}),
    "gradients 4": Contender(layers={"gradients": 4}),
    "gradients 4, hadamard": Contender(layers={"gradients": 4, "hadamard": True}),
    **{name: Contender(options={"estimator": name}, points=FEW) for name in ESTIMATORS},
    "sgd": Contender("sgd"),
    "sign": Contender("sign"),
    "zeroth order": Contender("zeroth_order"),
    "zeroth order, 6 times": Contender("zeroth_order", times=6),
    "zeroth order, codes": Contender(
        "zeroth_order_codes", {"parts": ("weights", "biases"), "residual": True, "normalize": True}
    ),
}
ONLY = {
    "byte_llama": {"float"},
    "digits": {"start", "zeroth order", "zeroth order, 6 times", "zeroth order, codes"},
}  # of one task
LEFT_OUT = {
    "digits": {"hadamard", "activations 4", "gradients 4, hadamard"}
}  # the file decides, or Linear only


# ---- the loop


def run(
    model: nn.Module, optimizer: Any, rate: float, steps: int, batch: Callable[[Tensor], Tensor], count: int,
    seed: int, size: int,
) -> float:  # fmt: skip
    """So many steps on rows drawn by ``seed``, the learning rates following the schedule; CPU seconds."""
    generator, started = torch.Generator().manual_seed(seed), time.process_time()
    ratios = [group["lr"] / rate for group in optimizer.param_groups]
    for step in range(steps):
        factor = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = rate * ratio * factor
        rows = torch.randint(count, (size,), generator=generator)
        if isinstance(optimizer, ZerothOrder):
            optimizer.step(lambda rows=rows: batch(rows).item())
            continue
        optimizer.zero_grad()
        batch(rows).backward()
        optimizer.step()
    return time.process_time() - started


def optimizer_of(family: str, model: nn.Module, rate: float, options: Mapping[str, Any]) -> Any:
    """The optimizer of a family, for a model in its form."""
    if family in ("float", "qat"):
        groups = bs.parameter_groups(model, learning_rate=rate)
        return torch.optim.AdamW(groups, lr=rate, weight_decay=0.0, **options)
    if family in INTEGER:
        return INTEGER[family](model, lr=rate, **options)
    settings: dict[str, Any] = {"eps": 0.02, "unit": "rms", "normalize": True}
    settings |= {"parts": ("scales", "biases", "others")}
    if "residual" in options:
        settings = {"eps": {"weights": 0.5, "biases": 0.02}, "unit": "rms"}
    return ZerothOrder(model, lr=rate, **{**settings, **options})


INTEGER: dict[str, Any] = {"integer": IntegerAdam, "sgd": IntegerSGD, "sign": IntegerSign}


def told(optimizer: Any) -> dict[str, float]:
    """What an integer optimizer counted in its last step, at a learning rate of about 0."""
    names = ("saturated", "moved") if isinstance(optimizer, IntegerOptimizer) else ()
    return {name: getattr(optimizer, name) for name in names}


# ---- the byte model from scratch


class ByteLlama:
    """Two blocks of width 64 on 64 bytes, from scratch."""

    points = ("W8", "W4", "W3", "W2")
    steps, size, context = 250, 8, 64

    def __init__(self, seed: int) -> None:
        self.seed, self.data = seed, pydoc(context=self.context)
        self.x, self.y = self.data.train_x, self.data.train_y
        self.test_x, self.test_y = self.data.test_x[:96], self.data.test_y[:96]

    def one(self, contender: Contender, point: str, rate: float) -> dict[str, float]:
        torch.manual_seed(self.seed)
        model = build("byte_llama", width=64, depth=2, heads=4, context=self.context)
        bits = int(point[1:])
        if contender.family == "qat":
            tokens = bs.Scheme(bits=8, granularity="token", range="dynamic")
            products = {f"*.{name}.*": {"bits": 32} for name in ("scores", "context")}
            names = [name for name, _ in model.named_modules()]
            products = {k: v for k, v in products.items() if any(k.split(".")[1] in n for n in names)}
            bs.prepare(model, bs.Scheme(bits=bits, granularity="channel"), tokens, overrides=products)
            bs.calibrate(model, [self.x[:4]])
        elif contender.family != "float":
            prepare_integer(model, bits, **contender.layers)

        def loss(rows: Tensor) -> Tensor:
            return F.cross_entropy(model(self.x[rows]).flatten(0, 1), self.y[rows].flatten())

        optimizer = optimizer_of(contender.family, model, rate, contender.options)
        seconds = run(model, optimizer, rate, self.steps, loss, len(self.x), self.seed, self.size)
        with torch.no_grad():
            found = F.cross_entropy(model.eval()(self.test_x).flatten(0, 1), self.test_y.flatten()).item()
        return {"loss": found, "seconds": seconds, **told(optimizer)}


# ---- a packed model that meets another world


class Digits:
    """The CNN after float QAT, and images of a world that it does not know."""

    points = tuple(f"{shift} {bits}" for shift in ("rotation", "contrast") for bits in ("W4", "W3", "W2"))
    steps, size, severity = 160, 32, 5
    network, epochs, decay = "digits_cnn", 12, 1e-2  # of the float model

    def __init__(self, seed: int) -> None:
        self.seed, self.data = seed, load("digits", seed=seed, fold=seed % 5)
        self.trained: dict[str, nn.Module] = {}

    def prepared(self, point: str) -> nn.Module:
        """A copy of the model as it is before the shift, trained once for each width."""
        bits = point.split()[-1]
        if bits not in self.trained:
            torch.manual_seed(self.seed)
            model, data = build(self.network, seed=self.seed), self.data
            config = TrainConfig(
                epochs=self.epochs, learning_rate=4e-3, weight_decay=self.decay, seed=self.seed
            )
            train(model, data.train_x, data.train_y, config)
            bs.prepare(model, bs.Scheme(bits=int(bits[1:]), granularity="channel"), bs.Scheme(bits=8))
            bs.calibrate(model, [to_float(data.train_x[:256])])
            config = TrainConfig(epochs=6, learning_rate=2e-3, seed=self.seed)
            train(model, data.train_x, data.train_y, config)
            self.trained[bits] = model.eval()
        return copy.deepcopy(self.trained[bits])

    def one(self, contender: Contender, point: str, rate: float) -> dict[str, float]:
        shift, data, family = point.split()[0], self.data, contender.family
        x, test_x = (
            shifted(shift, to_float(part), self.severity, self.seed) for part in (data.train_x, data.test_x)
        )
        model = self.prepared(point)
        if family != "qat":
            model = bs.finalize(model, to_float(data.train_x[:8]))
        if family in INTEGER:
            resume_integer(model, **contender.layers)
        seconds = 0.0
        if family != "start":
            optimizer = optimizer_of(family, model, rate, contender.options)

            def loss(rows: Tensor) -> Tensor:
                return F.cross_entropy(model(x[rows]), data.train_y[rows])

            model.train()
            steps = self.steps * contender.times
            seconds = run(model, optimizer, rate, steps, loss, len(x), self.seed, self.size)
        with torch.no_grad():
            logits = model.eval()(test_x)
        right = (logits.argmax(1) == data.test_y).double().mean().item()
        return {"loss": F.cross_entropy(logits, data.test_y).item(), "accuracy": right, "seconds": seconds}


TASKS: dict[str, Any] = {"byte_llama": ByteLlama, "digits": Digits}
RATES = {  # by task and family
    "byte_llama": {"float": 4e-3, "qat": 8e-3, "integer": 12e-3, "sgd": 1.0, "sign": 2e-3},
    "digits": {
        "start": 0.0, "qat": 2e-2, "integer": 2e-2, "sgd": 0.05, "sign": 1e-3,
        "zeroth_order": 0.01, "zeroth_order_codes": 0.01,
    },
}  # fmt: skip


def named(task: str, names: list[str]) -> dict[str, tuple[Contender, float]]:
    """Name -> contender and learning rate, of those asked for, or of all that the task knows."""
    elsewhere = set().union(*(found for other, found in ONLY.items() if other != task))
    known = [name for name in CONTENDERS if name not in elsewhere | LEFT_OUT.get(task, set())]
    chosen = {}
    for name in names or known:
        base, _, rate = name.partition(" @")
        contender = CONTENDERS[base]
        chosen[name] = (contender, float(rate or RATES[task][contender.family]))
    return chosen


def table(entries: Mapping[str, Any], task: str) -> None:
    """Figures by contender and point, and the loss against float QAT's of the same seed in per cent."""
    points = TASKS[task].points
    names = dict.fromkeys(job.rpartition(" | ")[0] for entry in entries.values() for job in entry)
    for key in ("loss", "accuracy"):
        if not any(key in found for entry in entries.values() for found in entry.values()):
            continue
        print(f"\n{task}: {key}, mean ± standard error (seeds)")
        print(f"{'':<26}" + "".join(f"{point:>22}" for point in points))
        for name in names:
            print(f"{name:<26}" + "".join(f"{cell(entries, name, p, key):>22}" for p in points))
    print(f"\n{task}: loss over float QAT's, per cent, in pairs")
    for name in names:
        print(f"{name:<26}" + "".join(f"{cell(entries, name, p, 'over'):>22}" for p in points))


def cell(entries: Mapping[str, Any], name: str, point: str, key: str) -> str:
    """Mean and error of the seeds that have this figure."""
    values = []
    for entry in entries.values():
        own, base = entry.get(f"{name} | {point}"), entry.get(f"float QAT | {point}")
        if own and key == "over" and base:
            values.append(100 * (own["loss"] / base["loss"] - 1))
        elif own and key in own:
            values.append(100 * own[key] if key == "accuracy" else own[key])
    if not values:
        return "-"
    mean, error = _results.mean_and_error(values)
    return f"{mean:.{4 if key == 'loss' else 2}f} ± {error:.{4 if key == 'loss' else 2}f} ({len(values)})"


def main() -> None:
    """Measure what is missing, seed by seed, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="byte_llama", choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contenders", nargs="*", default=[], help="only these, as the table names them")
    parser.add_argument("--points", nargs="*", default=[], help="only these, as the table names them")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = _results.load("adapt_quality", options.out)
    entries = results.setdefault(options.task, {})
    chosen = named(options.task, options.contenders)
    points = [p for p in TASKS[options.task].points if not options.points or p in options.points]
    for seed in range(0 if options.table else options.seeds):
        entry = entries.setdefault(str(seed), {})
        unit = TASKS[options.task](seed)
        for name, (contender, rate) in chosen.items():
            for point in points:
                job = f"{name} | {point}"
                if job in entry or (contender.points and point.split()[-1] not in contender.points):
                    continue
                entry[job] = {**unit.one(contender, point, rate), "rate": rate}
                figures = ", ".join(f"{k} {v:.4f}" for k, v in entry[job].items())
                print(f"seed {seed}  {job:<34} {figures}", flush=True)
                _results.save("adapt_quality", results, options.out)
    table(entries, options.task)


if __name__ == "__main__":
    main()
