"""A latency table of this machine: what each layer of a model takes at each pair of widths, measured.

    predicted time of a plan = constant + sum over layers of entry(kind, MACs, shape; the plan's two widths)

Models are timed as a whole, each with all its free layers at one pair of widths; all of them take turns in
every round, so that whatever else the machine does falls on all alike. An entry is the median over rounds of
its layers' mean; the constant is what a whole inference took beside its layers (norms, softmax, lookups,
Python), the median over models. Unlike tables of single operators (HAQ, 1811.08886), which are measured in
a loop by themselves, layers are timed inside of their model where the runtime allows it (`layer_times`).

The file is a cost table (quantization.cost_table), so that budgets take it as it is.
"""

from __future__ import annotations

import copy
import itertools
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.bench.layer_times import RUNTIMES, Files, Stopwatch, Times, stopwatch
from bitsmith.bench.rounds import in_turn, percentile
from bitsmith.bench.speed import WARM
from bitsmith.errors import FormatError, RecipeError, check_choice
from bitsmith.files import read_json, write_json
from bitsmith.kernels.choose import describe
from bitsmith.quantization import calibrate, measure, sites
from bitsmith.quantization.candidates import free_sites, site_candidates
from bitsmith.quantization.cost import CostModel, LayerCost
from bitsmith.quantization.cost_kinds import used
from bitsmith.quantization.cost_table import VERSION, CostTable
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.scheme import FLOAT
from bitsmith.recipe.competition import at_widths
from bitsmith.recipe.environment import environment
from bitsmith.recipe.job import prepare_sites, read_inputs
from bitsmith.recipe.limits import CANDIDATES, search_options, without_search
from bitsmith.recipe.schema import Recipe
from bitsmith.tasks import Examples

Widths = dict[str, int]  # site -> bits
Samples = dict[str, list[Times]]  # name of a plan -> its rounds
SAVED_EVERY = 2.0  # seconds
TRIES = 100


@dataclass(frozen=True)
class Subject:
    """What is measured. plans: name -> widths of all sites, those of one pair ("4 x 8") and then mixed ones;
    batch: inputs as the model takes them."""

    model: nn.Module
    recipe: Recipe
    data: Examples
    batch: Tensor
    cost: CostModel
    plans: dict[str, Widths]
    mixed: tuple[str, ...]


def bench_latency(
    recipe: Recipe,
    out: Path,
    *,
    runtime: str | None = None,
    candidates: Sequence[int] | None = None,
    rounds: int = 20,
    batch_size: int = 1,
    check: int = 0,
    resume: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure the layers of the recipe's model and write the table to ``out``; returns it as written.

    runtime: one of RUNTIMES, by default that of the recipe's target. candidates: widths of the free sites; by
    default those of its search. check: so many plans of widths drawn at random are measured as well, against
    what the table predicts. resume: go on with the rounds that an interrupted measurement has kept beside
    ``out``. Raises RecipeError, SchemeError, TargetError, MissingExtra, FormatError.
    """
    runtime = runtime or ("onnxruntime" if recipe.target == "onnxruntime" else "native")
    check_choice("runtime", runtime, RUNTIMES)
    for option, value in (("--rounds", rounds), ("--batch-size", batch_size)):
        if value < 1:
            raise RecipeError("nothing would be measured", where=option, got=value, expected="1 or more")
    if runtime == "onnxruntime":
        recipe = recipe.model_copy(update={"target": "onnxruntime"})
    asked: dict[str, Any] = {
        "recipe": {**recipe.to_dict(), "methods": []},
        "runtime": runtime,
        "candidates": sorted(candidates or _candidates(recipe)),
        "batch_size": batch_size,
        "check": check,
        "environment": environment() | describe(),
    }
    kept = out.with_name(f"{out.stem}.rounds.json")
    samples = _kept(kept, asked) if resume else {}
    with torch.random.fork_rng(devices=[]):
        subject = _subject(recipe, asked["candidates"], batch_size, check)
        layers = [layer.name for layer in subject.cost.layers if len(layer.sites) == 2]
        watches: dict[str, Stopwatch] = {}
        files: Files = {}
        for done, (name, widths) in enumerate(subject.plans.items()):
            tell(f"making the model at {name} ({done + 1} of {len(subject.plans)})")
            packed, watched = _packed(subject, widths), [] if name in subject.mixed else layers
            watches[name] = stopwatch(runtime, packed, subject.batch, watched, files)
        tell(f"measuring {len(watches)} models")
        samples = _rounds(watches, rounds, samples, lambda now: _keep(kept, asked, now), progress)
    found = _table(subject, samples, asked)
    write_json(out, found)
    kept.unlink(missing_ok=True)
    return found


def parse_widths(text: str) -> list[int]:
    """``"2,4,8"`` as widths. Raises RecipeError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) in (*range(1, 9), FLOAT) for part in parts):
        raise RecipeError(
            "these are no bit-widths",
            where="--candidates",
            got=text,
            expected="1 to 8, or 32, between commas",
            remedy="Write --candidates 2,4,8",
        )
    return sorted({int(part) for part in parts})


def _candidates(recipe: Recipe) -> Sequence[int]:
    options = search_options(recipe) or {}
    return options.get("candidates") or CANDIDATES


# ---- the models


def _subject(recipe: Recipe, candidates: Sequence[int], batch_size: int, check: int) -> Subject:
    options = search_options(recipe) or {}
    plain = without_search(recipe)
    data, model = read_inputs(plain)
    data = data.limited(max(batch_size, plain.quantize.calibration_samples))
    rows = torch.arange(batch_size) % len(data.test_x)
    prepared = copy.deepcopy(model.eval())
    prepare_sites(plain, prepared, None, data.example(), check_pairs=False)
    _calibrate(plain, prepared, data)
    present: Widths = {name: int(q.bits.whole()) for name, q in sites(prepared).items()}  # type: ignore[arg-type]
    free = free_sites(prepared, options.get("sites"), "budget_search")
    known = site_candidates(prepared, free, candidates)
    cost = measure(prepared, data.example())
    plans = _uniform(cost, present, known)
    mixed = _mixed(cost, present, known, check)
    return Subject(model, plain, data, data.inputs(data.test_x[rows]), cost, plans | mixed, tuple(mixed))


def _uniform(cost: CostModel, present: Widths, known: Mapping[str, Sequence[int]]) -> dict[str, Widths]:
    """Plans in which every layer meets each pair of widths that it may have at least once; and floats."""
    products = [layer for layer in cost.layers if len(layer.sites) == 2]
    firsts, seconds = ({s for layer in products for s in layer.operands[i : i + 1]} for i in (0, 1))
    widths = [sorted({b for site in side for b in known.get(site, ())}) for side in (firsts, seconds)]
    found: dict[str, Widths] = {}
    for first, second in itertools.product(widths[0] or [FLOAT], widths[1] or [FLOAT]):
        plan = dict(present)
        for side, bits in ((firsts, first), (seconds, second)):
            plan |= {site: bits for site in side if bits in known.get(site, ())}
        found[f"{first} x {second}"] = plan
    found[f"{FLOAT} x {FLOAT}"] = dict.fromkeys(present, FLOAT)
    return found


def _mixed(
    cost: CostModel, present: Widths, known: Mapping[str, Sequence[int]], count: int
) -> dict[str, Widths]:
    """Plans with a width for each site by lot, every layer again until the target multiplies its pair."""
    draw = random.Random(0)
    found = {}
    for i in range(count):
        plan = present | {site: draw.choice(widths) for site, widths in known.items()}
        for layer in cost.layers:
            for _ in range(TRIES):
                if layer.is_held_by(cost.target, *(plan.get(site, FLOAT) for site in layer.operands)):
                    break
                plan |= {site: draw.choice(known[site]) for site in layer.sites if site in known}
        found[f"mixed {i + 1}"] = plan
    return found


def _packed(subject: Subject, widths: Widths) -> nn.Module:
    model = copy.deepcopy(subject.model)
    recipe = at_widths(subject.recipe, widths)
    prepare_sites(recipe, model, None, subject.data.example(), check_pairs=False)
    _calibrate(recipe, model, subject.data)
    return finalize(model, subject.data.example())


def _calibrate(recipe: Recipe, model: nn.Module, data: Examples) -> None:
    calibrate(model, [x for x, _ in data.drawn(recipe.quantize.calibration_samples, recipe.train.seed)])


# ---- the rounds


def _rounds(
    watches: Mapping[str, Stopwatch],
    rounds: int,
    samples: Samples,
    keep: Callable[[Samples], None],
    progress: Callable[[int, int], None],
) -> Samples:
    """``rounds`` of each, every round beginning with another; those of ``samples`` are done already."""
    samples = {name: list(samples.get(name, ())) for name in watches}
    last = time.monotonic()
    for _ in range(WARM):
        for watch in watches.values():
            watch()
    for turn in range(min(map(len, samples.values())), rounds):
        for name in in_turn(list(watches), turn):
            samples[name].append(watches[name]())
        if time.monotonic() - last > SAVED_EVERY:
            keep(samples)
            last = time.monotonic()
        progress(turn + 1, rounds)
    return samples


def _keep(path: Path, asked: Mapping[str, Any], samples: Samples) -> None:
    write_json(path, {"version": 1, "asked": asked, "samples": samples})


def _kept(path: Path, asked: Mapping[str, Any]) -> Samples:
    """The rounds of an interrupted measurement; none where there is no file. Raises FormatError where
    something else was measured, or on another machine."""
    if not path.exists():
        return {}
    found = read_json(path, "interrupted measurement")
    before = found.get("asked") or {}
    differs = [key for key in asked if before.get(key) != asked[key]]
    if found.get("version") != 1 or differs:
        raise FormatError(
            f"these rounds were measured with another {differs[0] if differs else 'version'}",
            where=str(path),
            remedy="Measure anew, without --resume",
        )
    return {name: [(whole, layers) for whole, layers in rows] for name, rows in found["samples"].items()}


# ---- the table


def _table(subject: Subject, samples: Samples, asked: Mapping[str, Any]) -> dict[str, Any]:
    each = 1e6 / len(subject.batch)  # microseconds of one input
    count = min(map(len, samples.values()))
    uniform = [name for name in subject.plans if name not in subject.mixed]
    taken: dict[tuple[Any, ...], list[list[float]]] = defaultdict(lambda: [[] for _ in range(count)])
    for name in uniform:
        for layer in subject.cost.layers:
            if len(layer.sites) == 2:
                key = _key(layer, subject.plans[name])
                for turn in range(count):
                    taken[key][turn].append(samples[name][turn][1][layer.name] * each)
    rounds = {key: [statistics.mean(found) for found in rows] for key, rows in taken.items()}
    entries = []
    for key in sorted(rounds, key=str):
        kind, macs, shape, first, second = key
        entry = {"kind": kind, "macs": macs, "weight_bits": first, "activation_bits": second}
        entries.append(
            entry | ({"shape": list(shape)} if shape else {}) | {"per_layer": _median(rounds[key])}
        )
    layer_times = {key: _median(rows) for key, rows in rounds.items()}
    wholes = {name: _median([whole * each for whole, _ in samples[name]]) for name in samples}
    rests = {
        name: wholes[name]
        - sum(layer_times[_key(la, subject.plans[name])] for la in subject.cost.layers if len(la.sites) == 2)
        for name in uniform
    }
    table = {
        "version": VERSION,
        "name": f"latency_{asked['runtime']}",
        "unit": "us",
        "source": _source(asked, subject),
        "constant": max(_median(list(rests.values())), 0.0),
        "entries": entries,
    }
    known = CostTable.from_dict(table)
    table["measured"] = {
        "runtime": asked["runtime"],
        "model": subject.recipe.model.name,
        "batch_size": asked["batch_size"],
        "rounds": count,
        "spread": {
            "entries": _median([_spread(rows) for rows in rounds.values()]),
            "constant_us": [min(rests.values()), max(rests.values())],
        },
        "plans": [
            {
                "plan": name,
                "predicted_us": (predicted := float(used(subject.cost, "table:", plan, known))),
                "measured_us": wholes[name],
                "ratio": predicted / wholes[name],
                "spread": _spread([whole for whole, _ in samples[name]]),
            }
            for name, plan in subject.plans.items()
        ],
        "environment": asked["environment"],
    }
    return table


def _key(layer: LayerCost, plan: Widths) -> tuple[Any, ...]:
    first, second = (plan.get(site, FLOAT) for site in layer.operands)
    return layer.kind, layer.layer_macs, layer.weight_shape, first, second


def _source(asked: Mapping[str, Any], subject: Subject) -> str:
    facts = asked["environment"]
    return (
        f"measured by bitsmith bench latency: {subject.recipe.model.name}, batches of {asked['batch_size']}, "
        f"{asked['runtime']}, {facts.get('processor', 'unknown processor')}, {facts['threads']} thread(s)"
    )


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def _spread(values: Sequence[float]) -> float:
    """Half of the rounds lie within so much of each other, as a share of the median."""
    median = _median(values)
    return (percentile(list(values), 75) - percentile(list(values), 25)) / median if median else 0.0
