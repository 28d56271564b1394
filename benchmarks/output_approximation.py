"""Output approximation: what weights that match the float model's outputs are worth, without training and with it.

    python benchmarks/output_approximation.py                                # the byte model, 3 seeds; resumes
    python benchmarks/output_approximation.py --task resnet20 --parts b
    python benchmarks/output_approximation.py --table                        # what has been measured so far

    a   while training: the term against self, teacher and blocks' outputs, against plain training of 200 steps
    b   closed form: rounding to nearest, GPTQ, GPTAQ, Qronos and output matching before nearest and GPTQ, on the same
        calibration samples and grids; divergence (KL) from the float model and loss on samples apart, processor time
    c   start of training: the byte model's validation loss along the same 400 steps from nearest, GPTQ and matching
    d   widths: allocated by errors measured while training (once, again and again, greedily, by evolution), against
        uniform widths and budget search, at equal average bits of weights, activations at 8; 200 steps

A seed decides the calibration sample, and of the byte model the float model, too, which is kept beside the results.
byte_llama: trained on pydoc, 128 windows of 128 bytes, tested on its test split. aidreams260k (in $BITSMITH_DATA): 64
sequences that the float model writes at temperature 1, tested on 64 others. resnet20 (CIFAR-10, weights as they
circulate): 256 training images, tested on 2,000 test images. First and last layers have 8 bits. GPTAQ's authors take a
quarter of its correction (alpha=0.25 in their code), their paper all of it: both run, and the table shows the
better one, by the figure that is shown.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _results
import _shared_data
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.files import load_tensors, save_tensors
from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.methods.output_approximation import OutputApproximation
from bitsmith.post_training.post_train import post_train
from bitsmith.quantization import (
    Scheme,
    calibrate,
    measure,
    plan_of,
    prepare,
    reestimate_batchnorm,
    sites,
)
from bitsmith.quantization.layers import in_eval_mode
from bitsmith.tasks import build, load
from bitsmith.tasks.dataset import to_float
from bitsmith.train.config import TrainConfig
from bitsmith.train.loop import Progress, train

CONTENDERS: dict[str, dict[str, Any]] = {  # name -> options of post_train
    "nearest": {"rounding": "nearest", "matching": False},
    "gptq": {"matching": False},
    "gptaq": {"rounding": "gptaq", "matching": False},
    "gptaq 1/4": {"rounding": "gptaq", "matching": False, "correction": 0.25},
    "qronos": {"rounding": "qronos", "matching": False},
    "matching, nearest": {"rounding": "nearest"},
    "matching, gptq": {},
}
POINTS: dict[
    str, tuple[int, int | None, int | None]
] = {  # name -> bits of weights, values in a group, activations
    "W4": (4, None, None),
    "W3": (3, None, None),
    "W2": (2, None, None),
    "W4g64": (4, 64, None),
    "W3g64": (3, 64, None),
    "W2g64": (2, 64, None),
    "W4A4": (4, None, 4),
}
STARTS, START_POINTS = ("nearest", "gptq", "matching, gptq"), ("W3", "W2")
SEEN = (0, 25, 50, 100, 200, 400)  # steps after which part c looks
TASKS = ("byte_llama", "aidreams260k", "resnet20")
LENGTH, WRITTEN = 128, 64  # tokens of a sequence, sequences that aidreams260k writes for each purpose
IMAGES, TESTED = 256, 2000


class Unit:
    """A float model, the batches that rounding looks at, and what a rounded model is judged by."""

    def __init__(self, task: str, seed: int, beside: Path) -> None:
        self.task, self.seed = task, seed
        self.model, rows, self.x, self.y, size = MAKERS[task](self, seed, beside)
        self.model.eval()
        self.batches: list[Tensor] = list(rows.split(size))
        self.logits = self.answers(self.model)

    def answers(self, model: nn.Module) -> Tensor:
        """Log-probabilities of the test samples (rows, classes)."""
        with torch.no_grad(), in_eval_mode(model):
            return torch.cat([model(x).log_softmax(-1).flatten(0, -2) for x in self.x.split(32)])

    def judged(self, model: nn.Module) -> dict[str, float]:
        """KL from the float model, loss and accuracy."""
        mine, y = self.answers(model), self.y.flatten()
        return {
            "kl": F.kl_div(mine, self.logits, log_target=True, reduction="batchmean").item(),
            "loss": F.nll_loss(mine, y).item(),
            "accuracy": (mine.argmax(-1) == y).double().mean().item(),
        }

    def prepared(self, point: str, activations: int | None = None) -> nn.Module:
        """A calibrated copy at the widths of a point."""
        bits, group, inputs = POINTS[point]
        shared: dict[str, Any] = {"granularity": "group", "group_size": group} if group else {}
        scheme = Scheme(bits=bits, **{"granularity": "channel", **shared})
        model = copy.deepcopy(self.model)
        inputs = inputs or activations
        prepare(model, scheme, None if inputs is None else Scheme(bits=inputs))
        calibrate(model, self.batches)
        return model


def byte_llama(unit: Unit, seed: int, beside: Path) -> tuple[nn.Module, Tensor, Tensor, Tensor, int]:
    """The byte model of this seed, trained once."""
    unit.data = data = load("pydoc")  # type: ignore[attr-defined]
    model = build("byte_llama", seed=seed)
    path = beside / f"oa_byte_llama_{seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_tensors(path, "float model", mark="seed")[0])
    else:
        config = TrainConfig(epochs=4, batch_size=16, learning_rate=4e-3, weight_decay=0.1, seed=seed)
        train(model, data.train_x, data.train_y, config)
        save_tensors(path, dict(model.state_dict()), {"seed": str(seed)})
    rows = torch.cat([x for x, _ in data.drawn(128, seed)])
    unit.train_x, unit.train_y = data.train_x, data.train_y  # type: ignore[attr-defined]
    return model, rows, data.test_x, data.test_y, 16


def aidreams260k(unit: Unit, seed: int, beside: Path) -> tuple[nn.Module, Tensor, Tensor, Tensor, int]:
    """The pretrained model, and what it writes."""
    model = build(f"hf:{_shared_data.root() / 'lm' / 'aidreams260k'}").eval()
    rows, test = (written(model, number) for number in (seed, 10_000))
    return model, rows[:, :-1], test[:, :-1], test[:, 1:], 8


@torch.no_grad()
def written(model: Any, seed: int) -> Tensor:
    """WRITTEN sequences (WRITTEN, LENGTH + 1) that the model draws at temperature 1, after its first token."""
    config, generator = model.lm.config, torch.Generator().manual_seed(seed)
    found = torch.full((WRITTEN, 1), config.bos_token_id)
    past = None
    for _ in range(LENGTH):
        done = model.lm(input_ids=found[:, -1:], past_key_values=past, use_cache=True)
        past = done.past_key_values
        drawn = torch.multinomial(done.logits[:, -1].softmax(-1), 1, generator=generator)
        found = torch.cat([found, drawn], 1)
    return found


def resnet20(unit: Unit, seed: int, beside: Path) -> tuple[nn.Module, Tensor, Tensor, Tensor, int]:
    """The pretrained network, training images of this seed, and the first test images."""
    train_x, train_y, test_x, test_y = _shared_data.load_arrays("cifar10")
    unit.train_x, unit.train_y = train_x, train_y  # type: ignore[attr-defined]
    rows = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    model = build("resnet20", weights=_shared_data.resnet_weights(20))
    return model, to_float(train_x[rows]), to_float(test_x[:TESTED]), test_y[:TESTED], 32


MAKERS: dict[str, Callable[..., tuple[nn.Module, Tensor, Tensor, Tensor, int]]] = {
    "byte_llama": byte_llama,
    "aidreams260k": aidreams260k,
    "resnet20": resnet20,
}


# ---- a: a term of the loss while training

TERMS: dict[str, dict[str, Any] | None] = {  # name -> options of OutputApproximation
    "plain": None,
    "self": {},
    "teacher": {"against": "teacher"},
    "blocks": {"against": "teacher", "layers": "block"},
    "blocks, 1": {"against": "teacher", "layers": "block", "strength": 1.0},
    "teacher, cosine": {"against": "teacher", "loss": "cosine"},
    "teacher, as it is": {"against": "teacher", "normalise": False},
}
TERM_POINTS = {"W3A8": (3, 8), "W2A8": (2, 8), "W3A3": (3, 3), "W2A2": (2, 2)}
STEPS = 200


def jobs_a(task: str) -> list[tuple[str, str]]:
    """(term, point); aidreams260k has no text to train on."""
    return [(term, point) for point in TERM_POINTS for term in TERMS] if task != "aidreams260k" else []


def one_a(unit: Any, term: str, point: str) -> dict[str, Any]:
    """STEPS of training with distillation, with the term or without it."""
    weights, activations = TERM_POINTS[point]
    model, options = copy.deepcopy(unit.model), TERMS[term]
    prepare(model, Scheme(bits=weights, granularity="channel"), Scheme(bits=activations))
    methods = [] if options is None else [OutputApproximation(**options)]
    for method in methods:
        method.attach(model)
    calibrate(model, unit.batches)
    return trained(unit, model, methods)


def trained(unit: Any, model: nn.Module, methods: list[Any]) -> dict[str, Any]:
    """STEPS of training, and how the model is judged then."""
    size, rate = (16, 1e-3) if unit.task == "byte_llama" else (128, 2e-3)
    order = torch.randperm(len(unit.train_x), generator=torch.Generator().manual_seed(unit.seed))
    rows = order[: size * STEPS // 4]
    config = TrainConfig(
        epochs=4, batch_size=size, learning_rate=rate, gradient_clip=1.0, distillation=0.5, seed=unit.seed
    )
    started = time.process_time()
    train(model, unit.train_x[rows], unit.train_y[rows], config, methods=methods, teacher=unit.model)
    seconds = time.process_time() - started
    if unit.task == "resnet20":
        reestimate_batchnorm(model, [to_float(unit.train_x[rows[:2048]])])
    return {**unit.judged(model), "seconds": seconds}


def table_a(units: list[dict[str, Any]], task: str) -> None:
    """Loss, and in pairs the gain over plain training."""
    if not jobs_a(task):
        return
    print(f"\na, {task}: test loss; below, plain training's minus it, in pairs")
    print(f"{'':<20}" + "".join(f"{point:>22}" for point in TERM_POINTS))
    for term in TERMS:
        cells = [cell(measured(units, "a", term, point, "loss")) for point in TERM_POINTS]
        print(f"{term:<20}" + "".join(f"{one:>22}" for one in cells))
    for term in list(TERMS)[1:]:
        cells = [cell(gains(units, "a", term, "plain", point)) for point in TERM_POINTS]
        print(f"{term:<20}" + "".join(f"{one:>22}" for one in cells))


def gains(units: list[dict[str, Any]], part: str, contender: str, base: str, point: str) -> list[float]:
    """By how much the loss of a contender is below a baseline's, in the units that have both."""
    found = []
    for unit in units:
        own, other = (unit["points"].get(f"{part} {name} {point}") for name in (contender, base))
        if own and other:
            found.append(other["loss"] - own["loss"])
    return found


# ---- d: widths

ALLOCATIONS: dict[str, dict[str, Any] | None] = {  # name -> options of OutputApproximation
    "uniform": None,
    "search": None,
    "exact": {},
    "exact, again": {"every": 0.1},
    "greedy": {"allocation": "greedy"},
    "evolutionary": {"allocation": "evolutionary"},
}
AVERAGES = {"3.0": 3.0, "2.5": 2.5}


def jobs_d(task: str) -> list[tuple[str, str]]:
    """(contender, average bits); there is no uniform plan of 2.5."""
    jobs = [(name, point) for point in AVERAGES for name in ALLOCATIONS]
    return [job for job in jobs if job != ("uniform", "2.5")] if task != "aidreams260k" else []


def one_d(unit: Any, name: str, point: str) -> dict[str, Any]:
    """STEPS of training, the widths of the weights decided on the way."""
    model, options = copy.deepcopy(unit.model), ALLOCATIONS[name]
    uniform = name == "uniform"
    overrides = {"*.input": {"bits": 8}, "*.left": {"bits": 8}, "*.right": {"bits": 8}}
    overrides = {k: v for k, v in overrides.items() if k == "*.input" or unit.task == "byte_llama"}
    prepare(
        model, Scheme(bits=3 if uniform else 8, granularity="channel"), Scheme(bits=8), overrides=overrides
    )
    # the average over weights that are not pinned to 8 bits is asked for, so that uniform 3 bits meet it
    cost = measure(model, unit.batches[0][:1])
    free = [name for name, q in sites(model).items() if q.kind == "weight"][1:-1]
    plan = dict(cost.present) | dict.fromkeys(free, AVERAGES[point])
    budget = {"average_weight_bits": cost.average_bits(plan, "weight")}
    methods: list[Any] = []
    if name == "search":
        methods = [BudgetSearch(budget, unit.batches[0][:1], candidates=(2, 3, 4, 6, 8), seed=unit.seed)]
    elif options is not None:
        methods = [
            OutputApproximation(unit.batches[0][:1], strength=0.0, budget=budget, seed=unit.seed, **options)
        ]
    for method in methods:
        method.attach(model)
    calibrate(model, unit.batches)
    found = trained(unit, model, methods)
    average = measure(model, unit.batches[0][:1]).average_bits(plan_of(model).bits, "weight")
    return {**found, "average": average, "target": budget["average_weight_bits"]}


def table_d(units: list[dict[str, Any]], task: str) -> None:
    """Loss by contender and average."""
    if not jobs_d(task):
        return
    print(f"\nd, {task}: test loss at an average of so many bits a weight")
    print(f"{'':<20}" + "".join(f"{point:>22}" for point in AVERAGES))
    for name in ALLOCATIONS:
        cells = [cell(measured(units, "d", name, point, "loss")) for point in AVERAGES]
        print(f"{name:<20}" + "".join(f"{one:>22}" for one in cells))


# ---- b: without training


def jobs_b(task: str) -> list[tuple[str, str]]:
    """(contender, point); groups of 64 inputs are for language models."""
    points = [name for name, (_, group, _) in POINTS.items() if group is None or task != "resnet20"]
    return [(contender, point) for point in points for contender in CONTENDERS]


def one_b(unit: Unit, contender: str, point: str) -> dict[str, Any]:
    """One rounding."""
    model = unit.prepared(point)
    started = time.process_time()
    facts = post_train(model, unit.model, unit.batches, **CONTENDERS[contender])
    seconds = time.process_time() - started
    layers = sum(not fact.left for fact in facts)
    return {**unit.judged(model), "seconds_per_layer": seconds / layers, "layers": layers}


def table_b(units: list[dict[str, Any]], task: str) -> None:
    """KL and loss (accuracy of images) by contender and point, and the time against GPTQ's."""
    shown = ["kl", "loss"] + (["accuracy"] if task == "resnet20" else [])
    points = list(dict.fromkeys(point for _, point in jobs_b(task)))
    names = [name for name in CONTENDERS if name != "gptaq 1/4"]
    floats = [unit["float"]["loss"] for unit in units if "float" in unit]
    if floats:
        print(f"\nb, {task}: the float model's loss is {cell(floats)}")
    for key in shown:
        print(f"{key:<20}" + "".join(f"{point:>22}" for point in points))
        for name in names:
            both = [name, "gptaq 1/4"] if name == "gptaq" else [name]
            cells = []
            for point in points:
                found = [values for each in both if (values := measured(units, "b", each, point, key))]
                best = min(
                    found, key=lambda v: (-1 if key == "accuracy" else 1) * sum(v) / len(v), default=[]
                )
                cells.append(cell(best))
            print(f"{name:<20}" + "".join(f"{one:>22}" for one in cells))
    print("time a layer / GPTQ's" + "".join(f"{point:>12}" for point in points))
    for name in names:
        ratios = []
        for point in points:
            own, base = (measured(units, "b", n, point, "seconds_per_layer") for n in (name, "gptq"))
            ratios.append(f"{sum(own) / sum(base):.2f}" if own and len(own) == len(base) else "-")
        print(f"{name:<21}" + "".join(f"{one:>12}" for one in ratios))


# ---- c: as the start of training


def jobs_c(task: str) -> list[tuple[str, str]]:
    """(start, point) of the byte model."""
    return [(start, point) for point in START_POINTS for start in STARTS] if task == "byte_llama" else []


def one_c(unit: Any, start: str, point: str) -> dict[str, Any]:
    """400 steps of training at 8-bit activations, and the validation loss on the way."""
    model, data, seen = unit.prepared(point, 8), unit.data, {}
    post_train(model, unit.model, unit.batches, **CONTENDERS[start])

    def look(now: Progress) -> None:
        if now.step in SEEN and str(now.step) not in seen:
            seen[str(now.step)] = data.validate(model)["loss"]
            model.train()

    seen["0"] = data.validate(model)["loss"]
    config = TrainConfig(
        epochs=4, batch_size=16, learning_rate=1e-3, gradient_clip=1.0, distillation=0.5, seed=unit.seed
    )
    train(model, data.train_x[:1600], data.train_y[:1600], config, teacher=unit.model, progress=look)
    return {"losses": seen}


def table_c(units: list[dict[str, Any]], task: str) -> None:
    """Validation losses by step, and when the loss is reached that nearest ends with."""
    for point in START_POINTS if jobs_c(task) else ():
        print(f"\nc, {task}, {point}: validation loss after so many steps")
        print(f"{'start':<20}" + "".join(f"{step:>20}" for step in SEEN) + f"{'reaches nearest':>20}")
        for start in STARTS:
            runs = [u["points"][key]["losses"] for u in units if (key := f"c {start} {point}") in u["points"]]
            ends = [
                reached(u["points"][key]["losses"], u["points"][base]["losses"][str(SEEN[-1])])
                for u in units
                if (key := f"c {start} {point}") in u["points"]
                and (base := f"c nearest {point}") in u["points"]
            ]
            cells = [cell([run[str(step)] for run in runs]) for step in SEEN]
            print(f"{start:<20}" + "".join(f"{one:>20}" for one in [*cells, cell(ends, ".0f")]))


def reached(losses: dict[str, float], goal: float) -> float:
    """The step at which a loss is reached, between two looks interpolated; the last one where it never is."""
    before = 0
    for step in SEEN:
        if losses[str(step)] <= goal:
            fall = losses[str(before)] - losses[str(step)]
            share = (losses[str(before)] - goal) / fall if fall > 0 else 0.0
            return before + (step - before) * share
        before = step
    return float(SEEN[-1])


# ---- all parts

PARTS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {  # jobs, one, table
    "a": (jobs_a, one_a, table_a),
    "b": (jobs_b, one_b, table_b),
    "c": (jobs_c, one_c, table_c),
    "d": (jobs_d, one_d, table_d),
}


def measured(units: list[dict[str, Any]], part: str, contender: str, point: str, key: str) -> list[float]:
    """A figure of every unit that has it."""
    name = f"{part} {contender} {point}"
    return [unit["points"][name][key] for unit in units if name in unit["points"]]


def cell(values: list[float], form: str = ".4f") -> str:
    """Mean and standard error, with the number of units."""
    if not values:
        return "-"
    mean, error = _results.mean_and_error(values)
    return f"{mean:{form}} ± {error:{form}} ({len(values)})"


def jobs(parts: str, task: str, wanted: list[str]) -> list[tuple[str, str, str]]:
    """(part, contender, point) of all that is to be measured; of ``wanted`` contenders."""
    found = [(part, *job) for part in parts.split(",") for job in PARTS[part][0](task)]
    return [job for job in found if not wanted or job[1] in wanted]


def one(unit: Unit, part: str, contender: str, point: str) -> dict[str, Any]:
    """One measurement."""
    return PARTS[part][1](unit, contender, point)


def table(results: dict[str, Any], task: str, parts: str) -> None:
    """What has been measured."""
    for part in parts.split(","):
        PARTS[part][2](list(results.get(task, {}).values()), task)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="byte_llama", choices=TASKS)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contenders", nargs="*", default=[], help="only these, as the table names them")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = _results.load("output_approximation", options.out)
    units = results.setdefault(options.task, {})
    beside = options.out.parent if options.out else _results.RESULTS
    for seed in range(0 if options.table else options.seeds):
        entry = units.setdefault(str(seed), {"points": {}})
        todo = [
            job
            for job in jobs(options.parts, options.task, options.contenders)
            if " ".join(job) not in entry["points"]
        ]
        if not todo:
            continue
        unit = Unit(options.task, seed, beside)
        entry["float"] = unit.judged(unit.model)
        for job in todo:
            found = one(unit, *job)
            entry["points"][" ".join(job)] = found
            figures = ", ".join(f"{k} {v:.4f}" for k, v in found.items() if isinstance(v, float))
            print(f"seed {seed}  {', '.join(job):<32} {figures or found}", flush=True)
            _results.save("output_approximation", results, options.out)
    table(results, options.task, options.parts)


if __name__ == "__main__":
    main()
