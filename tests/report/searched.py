"""Run directories of a budget search, made up: build_run's with a contest, budgets and traces."""

import json
from pathlib import Path
from typing import Any

from tests.report.runs import build_run, history, write

DECIDED = 80  # steps of the search; the run has 400


def build_searched(
    directory: Path,
    *,
    winner: str = "searched",
    uniform: bool = True,
    kinds: tuple[str, ...] = ("bops",),
    **options: Any,
) -> Path:
    """A finished run of a search: its plan beats the uniform 3 x 3 plan by 0.8 points, or loses by them."""
    run = build_run(directory, **options)
    metrics = json.loads((run / "metrics.json").read_text())
    layers = metrics["cost"]["layers"]
    delivered = metrics["quantized"]["accuracy"]
    lead = 0.0083 if winner == "searched" else -0.0083
    if winner == "uniform":
        for layer in layers:
            if layer["weight_bits"] != 8:
                layer |= {"weight_bits": 3, "activation_bits": 3, "bops": 9 * layer["macs"]}
        metrics["cost"]["bops"] = sum(layer["bops"] for layer in layers)
    cost = sum((9 if layer["weight_bits"] != 8 else 64) * layer["macs"] for layer in layers)
    used = {key: metrics["cost"][key] for key in ("bops", "weight_bytes", "average_weight_bits")}
    metrics["budget"] = [
        {"kind": kind, "limit": max(used[kind], cost * (kind == "bops")) / 0.996, "used": used[kind]}
        for kind in kinds
    ]
    other = {"accuracy": delivered - lead, "validation_accuracy": 0.9694}
    first = {"accuracy": delivered, "validation_accuracy": 0.9694 + abs(lead)}
    metrics["winner"] = winner
    metrics["searched"], metrics["uniform"] = (
        (first, other) if winner == "searched" else ({**other, "accuracy": delivered + lead}, first)
    )
    metrics["uniform"] |= {"bits": "3 x 3", "cost": {"bops": cost}}
    if not uniform:
        metrics["uniform"] = None
    write(run / "metrics.json", metrics)

    plan = json.loads((run / "plan.json").read_text())
    plan["cost"], plan["budget"] = metrics["cost"], {entry["kind"]: entry for entry in metrics["budget"]}
    coverage = json.loads((run / "coverage.json").read_text())
    for site in coverage["sites"]:  # as prepared: 4 bits, the ends 8
        site["bits"] = 8 if site["bits"] == 8 else 4
    traces = json.loads((run / "history.json").read_text())
    traces["traces"] = [{"step": step, **scalars(step, kinds)} for step in range(1, DECIDED + 1)]
    if uniform:
        traces["uniform"] = history(20, 0.6, delivered - lead, 7)
    for name, value in (("plan", plan), ("coverage", coverage), ("history", traces)):
        write(run / f"{name}.json", value)
    return run


def scalars(step: int, kinds: tuple[str, ...]) -> dict[str, float]:
    """As train.traces records them of BudgetSearch while it searches."""
    done = step / DECIDED
    found = {"BudgetSearch.entropy": 0.62 * 0.05**done, "BudgetSearch.temperature": 0.3**done}
    for index, kind in enumerate(kinds):
        found[f"BudgetSearch.multiplier_{kind}"] = 1.4 - 0.5 * done - 0.4 * index
        found[f"BudgetSearch.used_{kind}"] = 1.31 - 0.4 * done + 0.02 * index
    return found
