"""Composition: methods together against each of them alone, at the same budget and the same steps.

    python benchmarks/composition.py                       # digits ViT, 3 seeds; resumes
    python benchmarks/composition.py --task digits
    python benchmarks/composition.py --table               # what has been measured so far

Tasks, shifts and training are those of flatness.py. Whoever decides widths does so for the average bits of the uniform
plan (W3A3, W2A2: first and last layer at 8 bits), of weights and of activations: a budget search within it, fractional
bits on it. Against it runs the uniform plan itself, alone and with the same partner.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _results
import torch
from flatness import POINTS, TASKS, Unit, shown

from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.methods.fractional_bits import FractionalBits
from bitsmith.methods.output_approximation import OutputApproximation
from bitsmith.methods.sharpness import Sharpness
from bitsmith.methods.weight_anchor import WeightAnchor
from bitsmith.quantization import Scheme, calibrate, measure, plan_of, prepare, reestimate_batchnorm
from bitsmith.train.config import TrainConfig
from bitsmith.train.loop import train

AVERAGES = ("average_weight_bits", "average_activation_bits")
Maker = Callable[[Any, dict[str, float], int], Any]  # (example, averages of the uniform plan, seed) -> method
MAKERS: dict[str, Maker] = {
    "search": lambda example, averages, seed: BudgetSearch(averages, example, seed=seed),
    "fractional": lambda example, averages, seed: FractionalBits(example, target=averages, seed=seed),
    "sharpness": lambda *_: Sharpness(),
    "anchor": lambda *_: WeightAnchor(),
    "output": lambda *_: OutputApproximation(),
}
CONTENDERS = (
    "uniform",
    "sharpness",
    "anchor",
    "output",
    "search",
    "search + sharpness",
    "search + anchor",
    "fractional",
    "fractional + output",
    "fractional + sharpness",
)


def composed(unit: Unit, contender: str, bits: int) -> dict[str, Any]:
    """Train one composition and judge it."""
    names = [] if contender == "uniform" else contender.split(" + ")
    task, data = unit.task, unit.data
    example = unit.batches[0][0][:1]
    uniform = copy.deepcopy(unit.model)
    prepare(uniform, Scheme(bits=bits, granularity="channel"), Scheme(bits=bits))
    cost = measure(uniform, example)
    averages = {
        f"average_{kind}_bits": cost.average_bits(cost.present, kind) for kind in ("weight", "activation")
    }
    model = copy.deepcopy(unit.model)
    prepare(model, Scheme(bits=bits, granularity="channel"), Scheme(bits=bits))
    methods = [MAKERS[name](example, averages, unit.seed) for name in names]
    for method in methods:
        method.attach(model)
    calibrate(model, [x for x, _ in unit.batches])
    config = TrainConfig(
        epochs=task.epochs,
        batch_size=task.batch_size,
        learning_rate=task.rate,
        weight_decay=1e-4,
        distillation=0.5,
        seed=unit.seed,
    )
    rows: Any = data
    started = time.process_time()
    train(
        model, rows.train_x, rows.train_y, config, methods=methods, teacher=unit.model, augment=rows.augment
    )
    seconds = time.process_time() - started
    reestimate_batchnorm(model, data.as_trained(1024, unit.seed))
    found = measure(model, example)
    used = {kind: found.average_bits(plan_of(model).bits, kind) for kind in ("weight", "activation")}
    return {**unit.judged(model), "seconds": seconds, "averages": used}


def table(results: dict[str, Any], task: str) -> None:
    """Each contender, and in pairs with each of its parts."""
    units = list(results.get(task, {}).values())
    for point in POINTS:
        rows = [c for c in CONTENDERS if any(f"{c} {point}" in unit["runs"] for unit in units)]
        if not rows:
            continue
        print(
            f"\n{task}, {point:<20}{'in distribution':>20}{'under shift':>20}   in distribution, under shift, to its parts"
        )
        for name in rows:
            mine = [run for unit in units if (run := unit["runs"].get(f"{name} {point}"))]
            parts = name.split(" + ") if " + " in name else ["uniform"]
            against = []
            for part in parts:
                pairs = [
                    (own, other)
                    for unit in units
                    if (own := unit["runs"].get(f"{name} {point}"))
                    and (other := unit["runs"].get(f"{part} {point}"))
                ]
                clean = shown([own["clean"] - other["clean"] for own, other in pairs])
                shift = shown([own["shift"]["mean"] - other["shift"]["mean"] for own, other in pairs])
                against.append(f"{part}: {clean}, {shift}")
            cells = (
                shown([run["clean"] for run in mine], form=".1f"),
                shown([run["shift"]["mean"] for run in mine], form=".1f"),
            )
            print(f"{name:<26}" + "".join(f"{one:>20}" for one in cells) + "   " + "; ".join(against))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="vit", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--points", nargs="*", default=["W2A2"], choices=POINTS)
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = _results.load("composition", options.out)
    units = results.setdefault(options.task, {})
    for seed in range(0 if options.table else options.seeds):
        entry = units.setdefault(str(seed), {"runs": {}})
        todo = [(c, p) for p in options.points for c in options.contenders if f"{c} {p}" not in entry["runs"]]
        if not todo:
            continue
        unit = Unit(options.task, seed)
        for contender, point in todo:
            found = composed(unit, contender, POINTS[point])
            entry["runs"][f"{contender} {point}"] = found
            print(
                f"seed {seed}  {point}  {contender:<26} in distribution {found['clean']:.4f}, under shift "
                f"{found['shift']['mean']:.4f}, {found['seconds']:.1f} s",
                flush=True,
            )
            _results.save("composition", results, options.out)
    for task in TASKS if options.table else (options.task,):
        table(results, task)


if __name__ == "__main__":
    main()
