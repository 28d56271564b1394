"""A run that searches: its uniform competitor, who is delivered, and what the budget promises."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitsmith.errors import BudgetError
from bitsmith.quantization import Plan
from bitsmith.recipe import job as job_module
from bitsmith.recipe import load_recipe, run
from bitsmith.recipe.reopen import export_run, flatness_of_run
from bitsmith.tasks import Data

SETTINGS = (
    "train.epochs=3",
    "train.batch_size=320",
    "float.epochs=3",
    "export=[native]",
    "quantize.weights.calibration=minmax",
    "quantize.activations.calibration=minmax",
    "methods.0.budget_search.search_share=0.5",
)


def searched(out: Path, *settings: str) -> dict[str, Any]:
    run(load_recipe(None, [*SETTINGS, *settings]), out)
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("searched") / "run"
    searched(out)
    return out


@pytest.fixture(scope="module")
def metrics(finished: Path) -> dict[str, Any]:
    return json.loads((finished / "metrics.json").read_text())


def test_the_delivered_plan_is_within_the_budget(finished: Path, metrics: dict[str, Any]) -> None:
    (budget,) = metrics["budget"]
    assert budget["kind"] == "bops"
    assert budget["limit"] == pytest.approx(0.0055 * metrics["cost"]["bops_float"])
    assert budget["used"] == metrics["cost"]["bops"] <= budget["limit"]
    assert Plan.load(finished / "plan.json").budget["bops"]["used"] == budget["used"]


def test_the_validation_split_decides(metrics: dict[str, Any]) -> None:
    ours, theirs = (metrics[name]["validation_accuracy"] for name in ("searched", "uniform"))
    assert metrics["winner"] == ("uniform" if theirs >= ours else "searched")  # the cheaper one, at a draw
    assert metrics["quantized"]["accuracy"] == metrics[metrics["winner"]]["accuracy"]


def test_the_competitor_is_the_dearest_uniform_plan_and_trains_as_long(
    finished: Path, metrics: dict[str, Any]
) -> None:
    history = json.loads((finished / "history.json").read_text())
    assert [r["step"] for r in history["uniform"]] == [r["step"] for r in history["qat"]]
    free = {b for site, b in metrics["uniform"]["sites"].items() if not site.startswith(("conv1", "fc"))}
    assert free == {1}
    assert metrics["uniform"]["cost"]["bops"] <= metrics["budget"][0]["limit"]


def test_the_search_leaves_its_traces(finished: Path) -> None:
    records = json.loads((finished / "history.json").read_text())["qat"]
    traced = records[0]["methods"]
    assert {"BudgetSearch.entropy", "BudgetSearch.temperature", "BudgetSearch.used_bops"} <= set(traced)
    assert records[-1]["methods"]["BudgetSearch.temperature"] < traced["BudgetSearch.temperature"]
    steps = [row["step"] for row in json.loads((finished / "history.json").read_text())["traces"]]
    assert steps == list(range(1, len(steps) + 1))
    assert 1 <= len(steps) < records[-1]["step"]


def test_the_uniform_plan_is_delivered_where_it_is_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = iter([0.5, 0.9])  # what the validation split says of the searched plan, then of the uniform one
    real = job_module.competition.standing

    def standing(model: torch.nn.Module, data: Any) -> dict[str, Any]:
        return {**real(model, data), "validation_accuracy": next(stages)}

    monkeypatch.setattr(job_module.competition, "standing", standing)
    metrics = searched(tmp_path / "run")
    assert metrics["winner"] == "uniform"
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert plan.bits == metrics["uniform"]["sites"]
    assert metrics["budget"][0]["used"] == metrics["uniform"]["cost"]["bops"]
    assert set(flatness_of_run(tmp_path / "run", rows=16)["models"]) == {"float", "quantized"}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics | {"winner": "searched"}))
    models = flatness_of_run(tmp_path / "run", rows=16)["models"]
    assert models["uniform"] == models["quantized"], "the competitor, opened as such and as what is delivered"
    certificate, _ = export_run(tmp_path / "run", ["native"])
    assert certificate["exports"]["native"]["accuracy"] == pytest.approx(metrics["quantized"]["accuracy"])


@pytest.mark.parametrize(
    ("uniform", "ahead"),
    [
        ({"validation_accuracy": 0.9, "validation_loss": 0.1}, True),  # more accurate
        ({"validation_accuracy": 0.7, "validation_loss": 0.1}, False),
        ({"validation_accuracy": 0.8, "validation_loss": 0.1}, True),  # as accurate, at a lower loss
        ({"validation_accuracy": 0.8, "validation_loss": 0.3}, False),
        ({"validation_accuracy": 0.8, "validation_loss": 0.2}, True),  # alike, and cheaper
    ],
)
def test_validation_accuracy_decides_then_loss_then_cost(uniform: dict[str, float], ahead: bool) -> None:
    class Cost:
        def exact(self, bits: dict[str, int]) -> dict[str, int]:
            return {"bops": bits["a"]}

    searched = {"validation_accuracy": 0.8, "validation_loss": 0.2}
    rank = partial(Data.rank, None)  # of images; it looks at no data  # type: ignore[arg-type]
    found = job_module.competition.is_ahead(uniform, searched, Cost(), {"a": 2}, {"a": 3}, rank)  # type: ignore[arg-type]
    assert found is ahead


def test_a_searched_run_is_exported_again(finished: Path, metrics: dict[str, Any]) -> None:
    before = load_file(finished / "model" / "model.safetensors")
    certificate, _ = export_run(finished, ["native"])
    assert certificate["exports"]["native"]["accuracy"] == pytest.approx(metrics["quantized"]["accuracy"])
    after = load_file(finished / "model" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_impossible_budget_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="cheapest plan costs"):
        searched(tmp_path / "run", "methods.0.budget_search.budget={bops: 0.001}")
    assert not (tmp_path / "run" / "checkpoints" / "float.safetensors").exists()


def test_two_budgets_are_both_kept(tmp_path: Path) -> None:
    metrics = searched(
        tmp_path / "run", "methods.0.budget_search.budget={bops: 0.02, average_weight_bits: 3.2}"
    )
    assert {entry["kind"] for entry in metrics["budget"]} == {"bops", "average_weight_bits"}
    assert all(entry["used"] <= entry["limit"] for entry in metrics["budget"])
    assert metrics["cost"]["average_weight_bits"] <= 3.2


@pytest.mark.slow
def test_energy_is_estimated_by_the_table_of_the_budget(tmp_path: Path) -> None:
    metrics = searched(
        tmp_path / "run",
        "methods.0.budget_search.budget={tables: [{table: energy_45nm, limit: 0.05}]}",
    )
    (budget,) = metrics["budget"]
    assert metrics["cost"]["energy_uj"] == pytest.approx(budget["used"] * 1e-6)
    assert "ISSCC" in metrics["cost"]["energy_source"]
    assert metrics["cost"]["latency_us"] is None


@pytest.mark.slow
def test_a_run_by_channel_group_delivers_and_exports_a_plan_with_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        job_module.competition, "is_ahead", lambda *_: False
    )  # whatever the uniform one achieves
    settings = ("target=native", "methods.0.budget_search.channel_groups=4", "train.epochs=2")
    metrics = searched(tmp_path / "run", *settings)
    assert metrics["winner"] == "searched"
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert any(isinstance(bits, tuple) for bits in plan.bits.values())
    assert plan.budget["bops"]["used"] == metrics["cost"]["bops"] <= metrics["budget"][0]["limit"]
    assert " on average" in (tmp_path / "run" / "report.html").read_text()
    certificate, _ = export_run(tmp_path / "run", ["native", "onnx"])
    assert all(entry["passed"] for entry in certificate["exports"].values())
    assert not certificate["exports"]["native"]["wider_containers"]
    assert certificate["exports"]["onnx"]["wider_containers"]


def test_sites_left_in_float_reach_the_files_and_every_account_of_them(tmp_path: Path) -> None:
    """A generous budget: whoever wins, it is committed, dropped, packed, verified, and opened again."""
    out = tmp_path / "run"
    metrics = searched(
        out,
        "methods.0.budget_search.candidates=[2, 8, 32]",
        "methods.0.budget_search.budget={bops: 0.6}",
    )
    plan = Plan.load(out / "plan.json")
    in_float = {site for site, bits in plan.bits.items() if bits == 32}
    assert in_float
    (budget,) = metrics["budget"]
    assert budget["used"] == metrics["cost"]["bops"] <= budget["limit"]
    coverage = json.loads((out / "coverage.json").read_text())
    assert {site["name"] for site in coverage["sites"]} == set(plan.bits) - in_float
    assert in_float <= {left["name"] for left in coverage["leftovers"]}
    certificate, _ = export_run(out, ["native"])
    assert certificate["exports"]["native"]["passed"]
    assert "float" in (out / "report.html").read_text()

    again = tmp_path / "again"
    again.mkdir()
    recipe = load_recipe(None, [*SETTINGS[:-1], "methods=[]", f"plan={out / 'plan.json'}"])
    run(recipe, again / "run")
    assert Plan.load(again / "run" / "plan.json").bits == plan.bits


def test_the_competitor_may_be_float(tmp_path: Path) -> None:
    metrics = searched(
        tmp_path / "run",
        "methods.0.budget_search.candidates=[2, 32]",
        "methods.0.budget_search.budget={bops: 1.0}",
    )
    assert metrics["uniform"]["bits"] == "float x float"
