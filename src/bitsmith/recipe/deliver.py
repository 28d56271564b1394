"""The second half of a run: from the trained quantized model to files, figures and a report.

Pack, export, verify in the runtime, measure under shifts, count the cost; write plan.json, certificate.json,
metrics.json, the models' answers and, last of all, report.html. Nothing is trained and nothing is tuned
here: all figures are of the test split.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitsmith.errors import BudgetError, ExportMismatch, RecipeError, listing, nearest
from bitsmith.export import save, to_onnx, verify
from bitsmith.files import write_json
from bitsmith.quantization import CostModel, CostTable, measure, plan_of
from bitsmith.quantization.cost_kinds import used
from bitsmith.quantization.coverage import coverage
from bitsmith.quantization.finalize import finalize
from bitsmith.recipe import flatness, modes, shifts
from bitsmith.recipe.competition import Outcome
from bitsmith.recipe.environment import environment
from bitsmith.recipe.progress import Event, Progress
from bitsmith.recipe.schema import EXPORTS, Recipe
from bitsmith.report import write_report
from bitsmith.report.flatness import FILE as FLATNESS
from bitsmith.tasks import Examples


@dataclass(frozen=True)
class Coded:
    """What was trained where codes were: the packed model, and what metrics.json says of its training."""

    packed: nn.Module
    training: Mapping[str, Any]


COMPARED = ("max_abs_difference", "agreement", "rows_within_tolerance", "file_bytes")


def deliver(
    recipe: Recipe,
    out: Path,
    data: Examples,
    float_model: nn.Module,
    trained: nn.Module,
    post_training: Mapping[str, float],
    outcome: Outcome | None,
    seconds: Mapping[str, float],
    tell: Progress,
    coded: Coded | None = None,
) -> dict[str, Any]:
    """Write everything that a finished run holds; returns the metrics. Of ``coded`` come codes and figures,
    and of ``trained``, the prepared model, what is counted.

    Where an export does not hold, all files are written all the same, so that the report shows it; then
    ExportMismatch is raised.
    """
    example = data.example()
    tell(Event("export", 0))
    write_json(out / "coverage.json", coverage(trained).to_dict())  # a search may leave sites in float
    counted = measure(trained, example)
    cost = counted.report() | estimates(counted, outcome.tables if outcome else ())
    plan = plan_of(trained, cost)
    if outcome is not None:
        plan = replace(plan, budget={entry["kind"]: entry for entry in outcome.budget})
    plan.save(out / "plan.json")

    started = time.perf_counter()
    packed = finalize(trained, example) if coded is None else coded.packed
    paths = write_exports(packed, recipe.export, out, example)
    certificate, mismatch = _verify(trained, packed, paths, data, coded is not None)
    write_json(out / "certificate.json", certificate)
    # Where memory allowed fewer rows than the test split has, the figures do not compare with the others.
    measured = data.figures if certificate["rows"] == len(data.test_x) else ()
    exported = {
        name: {key: entry[key] for key in (*measured, *COMPARED) if key in entry}
        # other runtimes first: "exported" without a name means the file that leaves the house
        for name, entry in sorted(certificate["exports"].items(), key=lambda item: item[0] == "native")
    }
    export_seconds = time.perf_counter() - started
    tell(
        Event(
            "export",
            values={
                f"{name} {key.replace('_', ' ')}": e[key]
                for name, e in exported.items()
                for key in measured[:1]
                if key in e
            },
        )
    )

    tell(Event("shift", 0))
    started = time.perf_counter()
    models = {"float": float_model, "quantized": packed}
    figures, answers = _both({name: data.answers(model) for name, model in models.items()})
    asked = recipe.shift
    source = {"quantized": trained if coded is None else modes.with_gradients(packed)}  # of attacks
    found = shifts.measure(models, source, data, asked.suite, asked.severities, plain=figures)
    shifts.write(found, models | source, data, out)
    shift = shifts.accuracies(found)
    shown = data.figures[0].replace("_", " ") if "mean_iou" in data.figures else "accuracy"
    took = {"export": export_seconds, "shift": time.perf_counter() - started}
    flat: dict[str, Any] = {}
    if recipe.flatness is not None:
        started = time.perf_counter()
        both = {"float": float_model, "quantized": trained}
        flat = flatness.measure(both, data, recipe.flatness, recipe.train.seed)
        write_json(out / FLATNESS, flat)
        took["flatness"] = time.perf_counter() - started
    tell(Event("shift", values={f"{name} {shown}": each["mean"] for name, each in shift.items()}))

    metrics: dict[str, Any] = {
        "version": 1,
        "seed": recipe.train.seed,
        "model": recipe.model.name,
        "data": data.name,
        "environment": environment(),
        **data.facts(),
        "float": figures["float"],
        "post_training": dict(post_training),
        "quantized": figures["quantized"],
        "searched": outcome and outcome.searched,
        "uniform": outcome and outcome.uniform,  # the competitor of a search
        "winner": outcome and outcome.winner,
        "training": {"mode": recipe.train.mode} if coded is None else dict(coded.training),
        "exported": exported,
        "shift": shift,
        "flatness": flatness.figures(flat) if flat else {},  # where the recipe asks for it
        "cost": cost,
        "budget": outcome.budget if outcome else [],  # none where every width was asked for
        "time": {**seconds, **took},
    }
    metrics["time"]["total"] = sum(metrics["time"].values())
    tell(Event("report", 0))
    del metrics["cost"]["layers"]  # they are in plan.json
    write_json(out / "metrics.json", metrics)
    data.write_answers(out, answers)
    write_report(out)
    if mismatch is not None:
        raise mismatch
    tell(Event("report"))
    return metrics


def _both(found: Mapping[str, tuple[dict[str, float], Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics of each model, and its answers."""
    return {name: pair[0] for name, pair in found.items()}, {name: pair[1] for name, pair in found.items()}


def estimates(cost: CostModel, tables: Sequence[CostTable]) -> dict[str, Any]:
    """Latency in microseconds and energy in microjoules of one inference, by the target's tables or those of
    a budget, each with its source; None where there is no table, or it does not know a pair of widths."""
    found: dict[str, Any] = {"latency_us": None, "energy_uj": None}
    for table in (cost.target.latency, cost.target.energy, *tables):
        key, factor = UNITS.get(table.unit, ("", 0.0)) if table is not None else ("", 0.0)
        if table is not None and key and found[key] is None:
            with contextlib.suppress(BudgetError):
                found[key] = factor * used(cost, f"table:{table.name}", cost.present, table)
                found[key.rpartition("_")[0] + "_source"] = table.source or table.name
    return found


# unit of a table -> (key of metrics.json, what one unit is there)
UNITS = {
    "us": ("latency_us", 1.0),
    "ms": ("latency_us", 1e3),
    "ns": ("latency_us", 1e-3),
    "pJ": ("energy_uj", 1e-6),
    "nJ": ("energy_uj", 1e-3),
    "uJ": ("energy_uj", 1.0),
}


def check_exports(names: Sequence[str]) -> None:
    """Refuse a format that there is not, with the nearest name. Raises RecipeError."""
    for name in names:
        if name not in EXPORTS:
            near = nearest(name, EXPORTS, 1)
            raise RecipeError(
                "there is no such export format",
                where="--to",
                got=name,
                expected=listing(EXPORTS),
                remedy=f"Did you mean {near[0]}?" if near else "",
            )


def write_exports(packed: nn.Module, formats: Sequence[str], out: Path, example: Tensor) -> dict[str, Path]:
    """Write ``packed`` in each format; returns format -> path."""
    paths = {name: out / EXPORTED_PATHS[name] for name in formats}
    for name, path in paths.items():
        if name == "native":
            save(packed, path)
        else:
            to_onnx(packed, path, example)
    return paths


EXPORTED_PATHS = {"native": "model", "onnx": "model.onnx"}


def _verify(
    trained: nn.Module, packed: nn.Module, paths: Mapping[str, Path], data: Examples, coded: bool
) -> tuple[dict[str, Any], ExportMismatch | None]:
    """The certificate, and the mismatch that it records, if any."""
    try:
        return verify(trained, packed, paths, *data.verified(), score=data.score, coded=coded), None
    except ExportMismatch as mismatch:
        return mismatch.certificate, mismatch  # type: ignore[attr-defined]
