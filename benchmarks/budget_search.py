"""Budget search against every other way of choosing widths, at the same cost and the same number of steps.

    python benchmarks/budget_search.py                                 # digits CNN, 5 seeds; resumes
    python benchmarks/budget_search.py --task digits_vit
    python benchmarks/budget_search.py --task cifar10 --seeds 2 --points 2,2.5 --contenders uniform,sensitivity,search
    python benchmarks/budget_search.py --table                         # what has been measured so far

A unit is one seed (for digits also one fold): a float model is trained, then every contender starts from it and
trains equally long, with the same optimizer, learning rate, batches and distillation. Budgets are BOPs: the
exact costs of uniform (b, b) plans, and halfway between two of them. First and last layers have 8 bits. Task
cifar10 is the pretrained ResNet-20 trained for 3 epochs on 6,400 images, tested on 4,983; fashion_mnist is the
CNN of digits trained for 10 epochs on 6,400 images at 14x14, tested on 5,000.

    uniform       the dearest (b, b) plan within the budget
    random        a random plan that uses at least 98 % of what the best plan would use
    greedy        from the widest plan, lower the site that loses least sensitivity per BOP saved, until it fits
    sensitivity   the exact best plan by Fisher-weighted output error (what other tools do before training)
    start         the exact best plan by these scores made fit for training (sensitivity.after_training)
    search        ours: starts there, learns the widths in the first part of the steps
    search, cold  ours from uniform logits
    chosen        the better of search and uniform on the validation split (what `bitsmith run` ships)
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import _results
import _shared_data
import torch
import torch.nn.functional as F
from torch import nn

from bitsmith.methods import Method
from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.quantization import (
    Scheme,
    calibrate,
    measure,
    prepare,
    reestimate_batchnorm,
)
from bitsmith.quantization.allocate import allocate, uniform_plan
from bitsmith.quantization.bits import FixedBits
from bitsmith.quantization.budget import Budget, BudgetCost
from bitsmith.quantization.candidates import free_sites, site_candidates
from bitsmith.quantization.cost import CostModel
from bitsmith.quantization.plan import set_bits
from bitsmith.quantization.quantizer import sites
from bitsmith.quantization.sensitivity import after_training, sensitivity
from bitsmith.tasks import data as tasks_data
from bitsmith.tasks import models
from bitsmith.tasks.classification import evaluate, to_float
from bitsmith.train.config import TrainConfig
from bitsmith.train.loop import train

CANDIDATES = (1, 2, 3, 4, 6, 8)
POINTS = (1.5, 2.0, 2.5, 3.0)
CONTENDERS = ("uniform", "random", "greedy", "sensitivity", "start", "search", "search, cold")
TASKS = {  # model, learning rate, epochs
    "digits_cnn": ("digits_cnn", 4e-3, 20),
    "digits_vit": ("digits_vit", 2e-3, 20),
    "fashion_mnist": ("digits_cnn", 4e-3, 10),
    "cifar10": ("resnet20", 2e-3, 3),
}
NEAR = 0.5  # points below float
SHEET_IMAGES = 6400  # for training, of the two sets that are sheets of images


def float_unit(task: str, seed: int) -> tuple[nn.Module, Any]:
    """A trained float model and its data, with a validation split."""
    model_name, rate, epochs = TASKS[task]
    if task in _shared_data.SHEETS:
        data = _shared_data.load(task, seed=seed)
        rows = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(seed))[:SHEET_IMAGES]
        data = replace(data, train_x=data.train_x[rows], train_y=data.train_y[rows])
    else:
        data = tasks_data.load("digits", seed=seed, fold=seed % 5)
    if task == "cifar10":
        model = models.build("resnet20", weights=_shared_data.resnet_weights(20)).eval()
        return model.to(memory_format=torch.channels_last), data
    arguments = {}
    if task == "fashion_mnist":
        images = {f"{split}_x": halved(data.split(split)[0]) for split in ("train", "val", "test")}
        data = replace(data, **images)
        arguments = {"mean": (data.train_x.mean().item(),), "std": (data.train_x.std().item(),)}
    model = models.build(model_name, seed=seed, **arguments)
    config = TrainConfig(epochs=epochs, learning_rate=rate, weight_decay=1e-2, seed=seed)
    train(model, data.train_x, data.train_y, config)
    return model, data


def halved(images: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W) at half their side."""
    return F.avg_pool2d(to_float(images), 2)


class Unit:
    """A float model ready for contenders."""

    def __init__(self, task: str, seed: int) -> None:
        self.task, self.seed = task, seed
        self.model, self.data = float_unit(task, seed)
        self.example = self.data.example()
        free = self.prepared()
        names = free_sites(free, None, "benchmark")
        candidates = site_candidates(free, names, CANDIDATES)
        set_bits(free, {name: FixedBits(c[-1], c) for name, c in candidates.items()})
        self.calibrate(free)
        rows = torch.randperm(len(self.data.train_x), generator=torch.Generator().manual_seed(seed))[:512]
        batches = [(to_float(self.data.train_x[part]), self.data.train_y[part]) for part in rows.split(128)]
        scores = sensitivity(free, batches, F.cross_entropy)
        fit = after_training(scores, [name for name in candidates if name.endswith("weight")])
        self.values = {name: -scores[name] for name in candidates}
        self.start = {name: -fit[name] for name in candidates}
        self.candidates = {n: q.bits.candidates.int().tolist() for n, q in sites(free).items()}
        self.cost = measure(free, self.example)

    def prepared(self) -> nn.Module:
        """The float model with sites of four bits, not calibrated."""
        model = copy.deepcopy(self.model)
        prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=4))
        return model

    def calibrate(self, model: nn.Module) -> None:
        """On 512 training images."""
        calibrate(model, [to_float(self.data.train_x[:512])])

    def budget(self, point: float) -> BudgetCost:
        """BOPs of uniform (point, point), or halfway between its neighbours."""
        free = {n for n, c in self.candidates.items() if len(c) > 1}
        return BudgetCost(self.cost, Budget(bops=bops_at(self.cost, free, point)), self.candidates)

    def train(self, model: nn.Module, methods: list[Any]) -> dict[str, float]:
        """Quantization-aware training; accuracies on the test and validation split."""
        _, rate, epochs = TASKS[self.task]
        config = TrainConfig(
            epochs=epochs,
            batch_size=128 if self.task in _shared_data.SHEETS else 64,
            learning_rate=rate,
            weight_decay=1e-4 if self.task == "cifar10" else 1e-2,
            seed=self.seed,
            distillation=0.5,
        )
        started = time.perf_counter()
        x, y, augment = self.data.train_x, self.data.train_y, self.data.augment
        train(model, x, y, config, methods=methods, teacher=self.model, augment=augment)
        seconds = time.perf_counter() - started
        images, noise = to_float(x[:4096]), torch.Generator().manual_seed(self.seed)
        batches = images.split(256) if augment else (images,)
        reestimate_batchnorm(model, [augment(b, noise) if augment else b for b in batches])
        return {
            "accuracy": evaluate(model, self.data.test_x, self.data.test_y)["accuracy"],
            "validation": evaluate(model, self.data.val_x, self.data.val_y)["accuracy"],
            "seconds": seconds,
        }

    def fixed(self, bits: dict[str, int]) -> dict[str, float]:
        """Training at a fixed plan."""
        model = copy.deepcopy(self.model)
        overrides = {name: {"bits": b} for name, b in bits.items()}
        prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=4), overrides=overrides)
        self.calibrate(model)
        return self.train(model, [])

    def searched(self, cost: BudgetCost, cold: bool, **options: Any) -> tuple[dict[str, Any], dict[str, int]]:
        """Training with the search."""
        model = self.prepared()
        budget = Budget(**{k: float(v) for k, v in zip(cost.kinds, cost.limits, strict=True)})
        search = BudgetSearch(budget, self.example, candidates=CANDIDATES, seed=self.seed, **options)
        search.attach(model)
        self.calibrate(model)
        if not cold:
            search.start_at(self.start)
        trace = Trace(search)
        result: dict[str, Any] = self.train(model, [search, trace])
        return {**result, "lambda_varies": trace.varies()}, search.plan().bits


def bops_at(cost: CostModel, free: Collection[str], point: float) -> float:
    """BOPs of uniform (point, point) of the free sites, or halfway between its neighbours."""
    ends = [
        cost.bops({n: b if n in free else own for n, own in cost.present.items()})
        for b in (int(point), int(point + 0.5))
    ]
    return sum(ends) / 2


class Trace(Method):
    """lambda after every step of the search."""

    def __init__(self, search: BudgetSearch) -> None:
        super().__init__()
        self.searches, self.values = [search], []

    def after_step(self, step: int, steps: int) -> None:
        if self.searches[0].is_searching():
            self.values.append(float(self.searches[0].multipliers.value[0]))

    def varies(self) -> float:
        """Range of the last tenth of the search against its mean."""
        last = self.values[-max(2, len(self.values) // 10) :]
        return (max(last) - min(last)) / max(sum(last) / len(last), 1e-9)


def random_plan(cost: BudgetCost, seed: int) -> dict[str, int]:
    """The best plan by random values uses nearly all of the budget and prefers nothing."""
    generator = torch.Generator().manual_seed(seed)
    best = allocate(cost, {n: [float(b) for b in cost.candidates[n]] for n in cost.sites})
    used = best.used["bops"]
    for _ in range(200):
        values = {n: torch.rand(len(cost.candidates[n]), generator=generator).tolist() for n in cost.sites}
        plan = allocate(cost, values)
        if plan.used["bops"] >= 0.98 * used:
            break
    return plan.bits


def greedy_plan(cost: BudgetCost, values: dict[str, torch.Tensor]) -> dict[str, int]:
    """Lower the site that loses least per BOP saved, until the plan fits."""
    row = {n: len(cost.candidates[n]) - 1 for n in cost.sites}
    fixed = {n: c[0] for n, c in cost.candidates.items() if n not in row}

    def bits(rows: dict[str, int]) -> dict[str, int]:
        return fixed | {n: cost.candidates[n][r] for n, r in rows.items()}

    limit = float(cost.limits[0])
    now = cost.exact(bits(row))["bops"]
    while now > limit:
        choices = []
        for n, r in row.items():
            if r > 0:
                saved = now - cost.exact(bits(row | {n: r - 1}))["bops"]
                choices.append(((float(values[n][r]) - float(values[n][r - 1])) / max(saved, 1e-9), n))
        row[min(choices)[1]] -= 1
        now = cost.exact(bits(row))["bops"]
    return bits(row)


def contend(unit: Unit, contender: str, point: float, options: dict[str, Any]) -> dict[str, Any]:
    """One training of one contender at one budget."""
    cost = unit.budget(point)
    if contender.startswith("search"):
        result, bits = unit.searched(cost, cold="cold" in contender, **options)
    else:
        plans = {
            "uniform": partial(uniform_plan, cost),
            "random": partial(random_plan, cost, unit.seed),
            "greedy": partial(greedy_plan, cost, unit.values),
            "sensitivity": lambda: allocate(cost, {n: v.tolist() for n, v in unit.values.items()}).bits,
            "start": lambda: allocate(cost, {n: v.tolist() for n, v in unit.start.items()}).bits,
        }
        bits = plans[contender]()
        result = unit.fixed(bits)
    used = cost.exact(bits)["bops"] / float(cost.limits[0])
    assert used <= 1, f"{contender} is over its budget: {used}"
    return {**result, "used": used, "bits": bits}


def table(results: dict[str, Any], task: str) -> None:
    """Mean difference to float in points with its standard error, for every contender and budget."""
    units = results.get(task, {})
    print(f"\n{task}: points against float, mean ± standard error (units)")
    print(f"{'budget of uniform':<18}" + "".join(f"{c:>18}" for c in (*CONTENDERS, "chosen")))
    for point in POINTS:
        cells = []
        for contender in (*CONTENDERS, "chosen"):
            found = []
            for unit in units.values():
                if contender == "chosen":
                    pair = [unit["points"].get(f"{c} {point}") for c in ("search", "uniform")]
                    if None not in pair:
                        best = max(pair, key=lambda r: r["validation"])
                        found.append(100 * (best["accuracy"] - unit["float"]))
                elif r := unit["points"].get(f"{contender} {point}"):
                    found.append(100 * (r["accuracy"] - unit["float"]))
            mean, error = _results.mean_and_error(found) if found else (0.0, 0.0)
            cells.append(f"{mean:+.2f} ± {error:.2f} ({len(found)})" if found else "-")
        print(f"{point:<18}" + "".join(f"{c:>18}" for c in cells))
    shares = budget_shares(task)
    print(
        f"\n% of float's BOPs at which the mean comes within {NEAR} points of float; the budgets are "
        + ", ".join(f"{100 * share:.3f}" for share in shares.values())
    )
    for contender in CONTENDERS:
        print(f"{contender:<18}{reached(units, contender, shares):>18}")


def reached(units: dict[str, Any], contender: str, shares: dict[float, float]) -> str:
    """The share of float's BOPs at which a contender's mean comes within half a point of float, in percent:
    interpolated between budgets."""
    found = []
    for point in POINTS:
        gaps = [
            100 * (u["points"][key]["accuracy"] - u["float"])
            for u in units.values()
            if (key := f"{contender} {point}") in u["points"]
        ]
        if gaps:
            found.append((100 * shares[point], sum(gaps) / len(gaps)))
    for at, (share, gap) in enumerate(found):
        if gap >= -NEAR:
            if at == 0:
                return f"<= {share:.3f}"
            before, low = found[at - 1]
            return f"{before + (share - before) * (-NEAR - low) / (gap - low):.3f}"
    return f"> {found[-1][0]:.3f}" if found else "-"


def budget_shares(task: str) -> dict[float, float]:
    """Point -> budget as a share of the float model's BOPs."""
    size, channels = {"cifar10": (32, 3), "fashion_mnist": (14, 1)}.get(task, (8, 1))
    model = models.build(TASKS[task][0])
    prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=4))
    cost = measure(model, torch.rand(1, channels, size, size))
    free = set(free_sites(model, None, "benchmark"))
    return {point: bops_at(cost, free, point) / cost.bops_float for point in POINTS}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(TASKS), default="digits_cnn")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--points", default=",".join(map(str, POINTS)))
    parser.add_argument("--contenders", default=",".join(c for c in CONTENDERS))
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=NUMBER", help="of BudgetSearch")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = _results.load("budget_search", options.out)
    units = results.setdefault(options.task, {})
    settings = {k: float(v) for k, v in (item.split("=") for item in options.set)}
    contenders = [c.strip() for c in options.contenders.replace("search, cold", "search; cold").split(",")]
    contenders = [c.replace(";", ",") for c in contenders]
    if not options.table:
        for seed in range(options.seeds):
            entry = units.setdefault(str(seed), {"points": {}})
            todo = [
                (c, float(p))
                for p in options.points.split(",")
                for c in contenders
                if f"{c} {float(p)}" not in entry["points"]
            ]
            if not todo:
                continue
            unit = Unit(options.task, seed)
            entry["float"] = evaluate(unit.model, unit.data.test_x, unit.data.test_y)["accuracy"]
            for contender, point in todo:
                r = contend(unit, contender, point, settings)
                entry["points"][f"{contender} {point}"] = r
                print(
                    f"seed {seed}  {point}  {contender:<14} {100 * (r['accuracy'] - entry['float']):+.2f} points, "
                    f"validation {r['validation']:.4f}, used {r['used']:.4f}, {r['seconds']:.1f} s",
                    flush=True,
                )
                _results.save("budget_search", results, options.out)
    table(results, options.task)


if __name__ == "__main__":
    main()
