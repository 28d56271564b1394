"""`bitsmith sweep`: one run per budget, from the same float model: accuracy over cost in one command.

Each point is a whole `run` in a directory of its own, with the budget of the recipe's search replaced. The
points go from the largest budget to the smallest. The first search starts from sensitivities, as a run does;
each later one starts around the plan b that the search before it found, measured in the same scores:

    value_l(k) = -max(d, 0) + GAIN max(-d, 0),   d = S_l(k) - S_l(b_l)

What a site gains counts less than what it loses, so that within the smaller budget the sites keep their
widths but for those whose bits are missed least. A point that is finished is never done again.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import BudgetError, FormatError, RecipeError
from bitsmith.files import read_json, write_json
from bitsmith.quantization import Plan
from bitsmith.quantization.bits import Width, mean_width, one_or_each
from bitsmith.quantization.budget import BudgetCost
from bitsmith.quantization.cost_kinds import float_cost
from bitsmith.recipe import competition
from bitsmith.recipe.baseline import float_model, lend
from bitsmith.recipe.directory import load_stage, open_run
from bitsmith.recipe.job import prepare_sites, read_inputs, run
from bitsmith.recipe.limits import budget_of, check_kind, parse_number, with_budget
from bitsmith.recipe.progress import Event, Progress, silent
from bitsmith.recipe.schema import Recipe, relocated
from bitsmith.recipe.sensitivity import Sites, wanted_budget
from bitsmith.report.front import write_front
from bitsmith.report.metrics import SHARES
from bitsmith.report.words import share
from bitsmith.tasks import Examples

FILE = "sweep.json"
GAIN = 0.5
Watch = Callable[[str], AbstractContextManager[Progress]]  # what a part is called -> who watches it


@contextlib.contextmanager
def unwatched(part: str) -> Iterator[Progress]:
    """Watch nothing."""
    yield silent


@dataclass(frozen=True)
class Point:
    """One budget of a sweep: its run directory's name, its recipe, and its cost model."""

    budget: float
    name: str
    recipe: Recipe
    cost: BudgetCost

    @property
    def kind(self) -> str:
        """The kind of cost, as the cost model calls it."""
        return self.cost.kinds[0]

    @property
    def limit(self) -> float:
        """The budget, absolute."""
        return float(self.cost.limits[0])


def parse_budgets(text: str) -> list[float]:
    """``"0.02,0.03"`` as numbers. Raises BudgetError where there is none, or one that is no limit."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise BudgetError(
            "there is no budget to sweep over",
            where="--budgets",
            got=repr(text),
            expected="numbers between commas",
            remedy="Write --budgets 0.02,0.03,0.05",
        )
    return [parse_number(part, "--budgets") for part in parts]


def sweep(
    recipe: Recipe,
    budgets: Sequence[float],
    out: str | Path,
    *,
    kind: str = "bops",
    resume: bool = False,
    warm: bool = True,
    watch: Watch = unwatched,
) -> dict[str, Any]:
    """Run ``recipe`` once per budget in ``out``/NAME and return the front (sweep.json).

    warm: start each search but the first around the plan found before. resume: go on with an interrupted
    sweep, or add budgets to a finished one.
    Raises BudgetError, before anything is trained, where a budget is impossible; RecipeError where the recipe
    searches nothing or ``out`` is taken; whatever `run` raises.
    """
    check_kind(kind, "--kind")
    if not budgets:
        raise BudgetError(
            "there is no budget to sweep over", where="--budgets", remedy="Write --budgets 0.02,0.03"
        )
    out = Path(out)
    if (out / FILE).exists() and not resume:
        raise RecipeError(
            "this directory already holds a sweep",
            where=f"--out {out}",
            remedy="Go on with it, or add budgets, with --resume; or choose another --out",
        )
    data, model = read_inputs(recipe)
    points = _points(recipe, kind, budgets, data, model)
    with open_run(out, recipe, resume) as directory:
        with watch("float model, shared by all budgets") as tell:
            tell(Event("data"))
            float_model(recipe, model, data, directory, tell)
        sites = Sites(points[0].recipe, copy.deepcopy(model), data, wanted_budget(points[0].recipe))
        scores = sites.scores() if warm and len(points) > 1 else {}
        found: list[dict[str, Any]] = []
        before = _entries(directory)
        previous: Point | None = None
        for number, point in enumerate(points, 1):
            start = previous.name if warm and previous is not None else "sensitivity"
            values = None
            if warm and previous is not None:
                values = around(sites.candidates, scores, _searched_bits(directory, previous))
            lend(directory, directory / point.name)
            with watch(f"{point.name} ({number} of {len(points)})") as tell:
                metrics = run(
                    point.recipe,
                    directory / point.name,
                    resume=(directory / point.name / "recipe.yaml").exists(),
                    progress=tell,
                    start_values=values,
                )
            entry = _entry(point, directory, metrics)
            found.append({**entry, "start": before.get(point.name, {}).get("start", start)})
            previous = point
            result = _result(recipe, data, found, metrics, point)
            write_json(directory / FILE, result)
            write_front(directory)
        return result


def _points(
    recipe: Recipe, kind: str, budgets: Sequence[float], data: Examples, model: nn.Module
) -> list[Point]:
    """The points of a sweep, the largest budget first. Raises BudgetError for one that no plan meets."""
    plan = Plan.load(recipe.plan) if recipe.plan is not None else None
    points = []
    for budget in sorted(set(budgets), reverse=True):
        try:
            one = with_budget(recipe, budget_of({kind: budget}))
            _, methods = prepare_sites(one, copy.deepcopy(model), plan, data.example())
        except BudgetError as error:
            raise relocated(error, f"--budgets {budget:g}") from None
        cost = competition.searcher(methods).cost
        points.append(Point(budget, f"{kind.replace(':', '-').replace('/', '-')}-{budget:g}", one, cost))
    return points


def around(
    candidates: Mapping[str, Sequence[int]], scores: Mapping[str, Tensor], bits: Mapping[str, Width]
) -> dict[str, Tensor]:
    """Site -> the worth of each candidate (K,), seen from the plan ``bits``, where it is 0; a site whose
    channels have widths of their own is seen from the candidate nearest to their mean."""
    values = {}
    for name, score in scores.items():
        width = bits[name]
        if not isinstance(width, int):
            mean = mean_width(width)
            width = sorted((abs(b - mean), b) for b in candidates[name])[0][1]
        if width in candidates[name]:
            lost = score - score[list(candidates[name]).index(width)]
            values[name] = -torch.where(lost > 0, lost, GAIN * lost)
    return values


def _searched_bits(directory: Path, point: Point) -> dict[str, Width]:
    """What the search of a finished point decided, whoever won there."""
    found = load_stage(directory / point.name, "qat")
    if found is None or not found[1].get("bits"):
        raise FormatError(
            "this finished run has lost its checkpoint",
            where=str(directory / point.name),
            expected="checkpoints/qat.safetensors with the plan that was searched",
            remedy="Delete this directory; --resume then does it again",
        )
    return {name: one_or_each(b) for name, b in found[1]["bits"].items()}


def _entries(directory: Path) -> dict[str, dict[str, Any]]:
    """The points that an earlier, interrupted or finished, sweep wrote, by name."""
    if not (directory / FILE).exists():
        return {}
    return {entry["name"]: entry for entry in read_json(directory / FILE, "sweep file")["points"]}


def _entry(point: Point, directory: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    bits = _searched_bits(directory, point)
    uniform = metrics["uniform"]
    if uniform:
        uniform = {key: uniform[key] for key in ("bits", *SHARES) if key in uniform} | {
            "used": uniform["cost"][point.kind]
        }
    return {
        "name": point.name,
        "budget": point.budget,
        "limit": point.limit,
        "searched": {**metrics["searched"], "used": point.cost.exact(bits)[point.kind], "bits": bits},
        "uniform": uniform,
        "winner": metrics["winner"],
        "delivered": metrics["quantized"][share(metrics).key],
    }


def _result(
    recipe: Recipe, data: Examples, found: Sequence[dict[str, Any]], metrics: Mapping[str, Any], point: Point
) -> dict[str, Any]:
    task = "segmentation" if share(metrics).key == "mean_iou" else None
    return {
        "version": 1,
        "model": recipe.model.name,
        "data": data.name,
        "target": recipe.target,
        "seed": recipe.train.seed,
        "test_images": len(data.test_y) if task else data.test_y.numel(),  # or tokens: an accuracy's share
        **({"counted": "tokens"} if data.unit != "images" else {}),
        **({"task": task} if task else {}),
        "kind": point.kind,
        "unit": point.cost.tables[point.kind].unit if point.kind in point.cost.tables else None,
        "float": {key: metrics["float"][key] for key in SHARES if key in metrics["float"]}
        | {"used": _float_cost(point)},
        "points": list(found),
    }


def _float_cost(point: Point) -> float:
    return float(float_cost(point.cost.cost, point.kind, point.cost.tables.get(point.kind)))
