"""Fractional bits against plain training, uniform widths and budget search: the same steps, schedule, distillation.

    python benchmarks/fractional.py                                # digits CNN, 5 seeds, all three parts; resumes
    python benchmarks/fractional.py --task digits_vit --parts schedule
    python benchmarks/fractional.py --table                        # what has been measured so far

Units, optimizer and learning rates are those of budget_search.py: one seed (for digits also one fold), a float
model trained first, 20 epochs for every contender (fashion_mnist: 10 epochs on 6,400 images at 14 x 14; cifar10: the
pretrained ResNet-20, 3 epochs on 6,400).

    schedule   at once | through fractional widths (the paper's table) | the integer staircase with the same shares
               of the steps; weights alone to 4, 3, 2 bits with activations at 8, and both to 3 and 2
    widths     learned widths of tensors (mixed, and the other modes), of channels (of weights), of weights or
               activations alone, against uniform widths and budget search, all at the uniform plan's average bits
    rounding   nearest, ceil, floor and allocate, to any width and to 2, 4, 8 only: at the fractional point, after
               rounding, after recalibration, after the fine-tune
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import _results
import torch
from budget_search import CANDIDATES, TASKS, Unit
from torch import nn

from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.methods.fractional_bits import FractionalBits
from bitsmith.methods.progressive_bits import ON_THE_WAY, ProgressiveBits, paper_schedule
from bitsmith.quantization import Scheme, commit, measure, plan_of, prepare, reestimate_batchnorm
from bitsmith.tasks.classification import evaluate, to_float

SCHEDULES = ("at once", "fractional", "staircase")
GOALS = {"W4A8": (4, 8), "W3A8": (3, 8), "W2A8": (2, 8), "W3A3": (3, 3), "W2A2": (2, 2)}
WIDTHS = {  # name -> (tensors, options of FractionalBits, or None for a baseline)
    "uniform": ("both", None),
    "search": ("both", None),
    "tensor": ("both", {}),
    "channel": ("both", {"per": "channel"}),
    "tensor, sampled": ("both", {"mode": "sampled"}),
    "tensor, argmax": ("both", {"mode": "argmax"}),
    "tensor, real": ("both", {"mode": "real"}),
    "tensor, categorical": ("both", {"parametrization": "categorical", "mode": "sampled"}),
    "uniform, weights": ("weights", None),
    "tensor, weights": ("weights", {}),
    "channel, weights": ("weights", {"per": "channel"}),
    "uniform, activations": ("activations", None),
    "tensor, activations": ("activations", {}),
}
AVERAGES = (3, 2)
ROUNDINGS = [(r, s) for r in ("allocate", "nearest", "ceil", "floor") for s in ("free", "2, 4, 8")]
MOMENTS = ("fractional", "rounded", "recalibrated", "accuracy")


def prepared(unit: Unit, weights: int, activations: int) -> nn.Module:
    """The float model with sites of these widths, ends at 8."""
    model = copy.deepcopy(unit.model)
    prepare(model, Scheme(bits=weights, granularity="channel"), Scheme(bits=activations))
    return model


def staircase(goal: int) -> list[tuple[float, float]]:
    """8, 7, 6 ... down to the goal, in the share of the steps that the paper's table takes."""
    stairs = range(8, goal, -1)
    return [(float(b), ON_THE_WAY / len(stairs)) for b in stairs]


def scheduled(unit: Unit, contender: str, goal: str) -> dict[str, Any]:
    """Training to a goal at once, or through a schedule."""
    weights, activations = GOALS[goal]
    model, methods = prepared(unit, weights, activations), []
    if contender != "at once":
        steps = paper_schedule(weights) if contender == "fractional" else staircase(weights)
        tensors = "both" if activations < 8 else "weights"
        methods = [ProgressiveBits(schedule=steps, tensors=tensors)]
        methods[0].attach(model)
    unit.calibrate(model)
    return unit.train(model, methods)


def averages_of(unit: Unit, tensors: str, bits: int) -> tuple[nn.Module, dict[str, float]]:
    """A model at a uniform width of weights, activations or both (8 for the other), and its averages."""
    model = prepared(unit, *(bits if tensors in ("both", kind) else 8 for kind in ("weights", "activations")))
    cost = measure(model, unit.example)
    kinds = {"weights": ["weight"], "activations": ["activation"]}.get(tensors, ["weight", "activation"])
    return model, {f"average_{kind}_bits": cost.average_bits(cost.present, kind) for kind in kinds}


def learned(unit: Unit, contender: str, bits: int, options: dict[str, Any]) -> dict[str, Any]:
    """Training with learned widths, or one of their rivals, at the averages of a uniform width."""
    tensors, own = WIDTHS[contender]
    uniform, target = averages_of(unit, tensors, bits)
    if contender.startswith("uniform"):
        unit.calibrate(uniform)
        return {**unit.train(uniform, []), "averages": target, "target": target}
    model = prepared(unit, 8, 8)
    method: Any
    if own is None:
        method = BudgetSearch(target, unit.example, candidates=CANDIDATES, seed=unit.seed)
    else:
        ends = {"bits": (1, 8), "tensors": tensors, "seed": unit.seed}
        method = FractionalBits(unit.example, target=target, **{**ends, **own, **options})
    method.attach(model)
    unit.calibrate(model)
    if own is None:
        method.start_at(unit.start)
    result = unit.train(model, [method])
    cost = measure(model, unit.example)
    found = {kind: cost.average_bits(plan_of(model).bits, kind.split("_")[1]) for kind in target}
    return {**result, "averages": found, "target": target}


class Watched(FractionalBits):
    """Fractional bits that are evaluated before, between and after rounding and recalibration."""

    def watch(self, unit: Unit) -> None:
        """Remember what to evaluate on."""
        self.units, self.moments = [unit], {}

    def evaluated(self, moment: str, model: nn.Module) -> None:
        """Accuracy of a copy, its BatchNorm re-estimated."""
        unit, model = self.units[0], copy.deepcopy(model)
        reestimate_batchnorm(model, [to_float(unit.data.train_x[:4096])])
        self.moments[moment] = evaluate(model, unit.data.test_x, unit.data.test_y)["accuracy"]

    def _decide(self, bits: Any) -> None:
        self.moments["fractional bits"] = self.averages(self.learned).tolist()
        self.evaluated("fractional", self.models[0])
        rounded = copy.deepcopy(self.models[0])
        commit(rounded, bits)
        self.evaluated("rounded", rounded)
        super()._decide(bits)
        self.evaluated("recalibrated", self.models[0])
        self.models[0].train()


def rounded(unit: Unit, rounding: str, stored: str) -> dict[str, Any]:
    """Training with learned widths of tensors at an average of 3, rounded in one of the ways."""
    _, target = averages_of(unit, "both", 3)
    model = prepared(unit, 8, 8)
    method = Watched(unit.example, target=target, rounding=rounding, seed=unit.seed)
    method.attach(model)
    if stored != "free":
        method.storable = {name: [2, 4, 8] for name in method.storable}
    unit.calibrate(model)
    method.watch(unit)
    result = unit.train(model, [method])
    cost = measure(model, unit.example)
    found = [cost.average_bits(plan_of(model).bits, kind) for kind in ("weight", "activation")]
    return {**result, **method.moments, "averages": found, "target": list(target.values())}


def jobs(parts: str, averages: tuple[int, ...], wanted: list[str]) -> list[tuple[str, str, str]]:
    """(part, contender, point) of all that is to be trained, baselines first; of ``wanted`` contenders."""
    found = []
    for part in parts.split(","):
        if part == "schedule":
            found += [(part, c, goal) for goal in GOALS for c in SCHEDULES]
        elif part == "widths":
            found += [(part, c, str(bits)) for bits in averages for c in WIDTHS]
        elif part == "rounding":
            found += [(part, rounding, stored) for rounding, stored in ROUNDINGS]
    return [job for job in found if not wanted or job[1] in wanted]


def one(unit: Unit, part: str, contender: str, point: str, options: dict[str, Any]) -> dict[str, Any]:
    """One training."""
    if part == "schedule":
        return scheduled(unit, contender, point)
    if part == "widths":
        return learned(unit, contender, int(point), options)
    return rounded(unit, contender, point)


def table(results: dict[str, Any], task: str) -> None:
    """Differences in points: to float, and in pairs to the baseline, with standard errors."""
    units = list(results.get(task, {}).values())

    def cell(values: list[float]) -> str:
        if not values:
            return "-"
        mean, error = _results.mean_and_error(values)
        return f"{mean:+.2f} ± {error:.2f} ({len(values)})"

    def gaps(key: str, base: str | None = None, moment: str = "accuracy") -> str:
        pairs = [
            (u["points"][key][moment], u["float"] if base is None else u["points"][base]["accuracy"])
            for u in units
            if key in u["points"] and (base is None or base in u["points"])
        ]
        return cell([100 * (own - other) for own, other in pairs])

    print(f"\n{task}, schedule: points against float; in pairs against at once")
    for goal in GOALS:
        line = [gaps(f"schedule {c} {goal}") for c in SCHEDULES]
        line += [gaps(f"schedule {c} {goal}", f"schedule at once {goal}") for c in SCHEDULES[1:]]
        print(f"{goal:<8}" + "".join(f"{text:>20}" for text in line))
    print(
        f"\n{task}, widths: points against float; in pairs against the uniform width; average bits over target"
    )
    for bits in AVERAGES:
        for contender, (tensors, _) in WIDTHS.items():
            base = "uniform" if tensors == "both" else f"uniform, {tensors}"
            off = [
                max(abs(r["averages"][k] - v) for k, v in r["target"].items())
                for u in units
                if (r := u["points"].get(f"widths {contender} {bits}"))
            ]
            line = [
                gaps(f"widths {contender} {bits}"),
                gaps(f"widths {contender} {bits}", f"widths {base} {bits}"),
            ]
            line += [f"{max(off):.4f}" if off else "-"]
            print(f"{bits:<4}{contender:<24}" + "".join(f"{text:>20}" for text in line))
    print(
        f"\n{task}, rounding: points against float at the fractional point, rounded, recalibrated, finished"
    )
    for rounding, stored in ROUNDINGS:
        key = f"rounding {rounding} {stored}"
        print(f"{rounding:<10}{stored:<10}" + "".join(f"{gaps(key, None, m):>20}" for m in MOMENTS))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="digits_cnn", choices=TASKS)
    parser.add_argument("--parts", default="schedule,widths,rounding")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--averages", default="3,2")
    parser.add_argument("--contenders", nargs="*", default=[], help="only these, as the table names them")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="of FractionalBits")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = _results.load("fractional", options.out)
    units = results.setdefault(options.task, {})
    settings: dict[str, Any] = {}
    for item in options.set:
        key, _, value = item.partition("=")
        settings[key] = float(value) if value.replace(".", "").isdigit() else value
    averages = tuple(int(b) for b in options.averages.split(","))
    for seed in range(0 if options.table else options.seeds):
        entry = units.setdefault(str(seed), {"points": {}})
        todo = [
            job
            for job in jobs(options.parts, averages, options.contenders)
            if " ".join(job) not in entry["points"]
        ]
        if not todo:
            continue
        unit = Unit(options.task, seed)
        entry["float"] = evaluate(unit.model, unit.data.test_x, unit.data.test_y)["accuracy"]
        for job in todo:
            found = one(unit, *job, settings)
            entry["points"][" ".join(job)] = found
            gap = 100 * (found["accuracy"] - entry["float"])
            print(
                f"seed {seed}  {', '.join(job):<40} {gap:+.2f} points, {found['seconds']:.1f} s", flush=True
            )
            _results.save("fractional", results, options.out)
    table(results, options.task)


if __name__ == "__main__":
    main()
