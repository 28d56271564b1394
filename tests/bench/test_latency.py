"""A latency table: every layer at every pair of widths that a search may choose, as budgets read it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitsmith.bench import latency, layer_times
from bitsmith.bench.latency import bench_latency, parse_widths
from bitsmith.errors import BudgetError, FormatError, RecipeError, SchemeError
from bitsmith.quantization import Scheme, calibrate, measure, prepare
from bitsmith.quantization.cost_kinds import constant, float_cost, used
from bitsmith.quantization.cost_table import CostTable
from bitsmith.quantization.finalize import finalize
from bitsmith.recipe import load_recipe, parse_recipe, run
from bitsmith.recipe.job import prepare_sites, read_inputs

QUICK = {"rounds": 2, "candidates": [4, 8]}
SMALL: dict[str, Any] = {
    "model": "mlp",
    "data": {"name": "breast_cancer", "arguments": {"validation": 0.2}},
    "quantize": {"calibration_samples": 32},
    "train": {"epochs": 1, "batch_size": 128},
    "float": {"epochs": 1},
    "export": ["native"],
}


def slowed(monkeypatch: pytest.MonkeyPatch, seconds: dict[tuple[int, int], float], rest: float) -> None:
    """A runtime of which the times are known: of a layer by its pair of widths, and what comes beside."""

    def stopwatch(runtime: str, packed: Any, batch: Any, layers: Any, files: Any) -> Any:
        def width(site: Any) -> int:
            return 32 if site is None or not hasattr(site, "form") else site.form.bits

        known = {
            name: seconds[width(layer.weight), width(layer.input)]
            for name, layer in packed.named_modules()
            if hasattr(layer, "input")
        }
        return lambda: (len(batch) * (sum(known.values()) + rest), {n: len(batch) * known[n] for n in layers})

    monkeypatch.setattr(latency, "stopwatch", stopwatch)


PAIRS = {(a, b): 1e-6 * (10 * a + b) for a in (4, 8, 32) for b in (4, 8, 32)}


def test_times_add_up_to_those_of_whole_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(monkeypatch, PAIRS, 50e-6)
    found = bench_latency(
        parse_recipe(SMALL), tmp_path / "t.json", runtime="native", check=3, batch_size=5, **QUICK
    )
    assert found["constant"] == pytest.approx(50)
    for entry in found["entries"]:
        pair = entry["weight_bits"], entry["activation_bits"]
        assert entry["per_layer"] == pytest.approx(10 * pair[0] + pair[1])
    plans = found["measured"]["plans"]
    assert [one["plan"] for one in plans] == [
        *("4 x 4", "4 x 8", "8 x 4", "8 x 8", "32 x 32"),
        *("mixed 1", "mixed 2", "mixed 3"),
    ]
    assert all(one["ratio"] == pytest.approx(1) for one in plans)
    assert plans[-1]["spread"] == 0


def test_the_table_lists_every_pair_that_a_layer_may_have(tmp_path: Path) -> None:
    recipe = parse_recipe(SMALL)
    bench_latency(recipe, tmp_path / "t.json", runtime="native", **QUICK)
    table = CostTable.load(tmp_path / "t.json")
    data, model = read_inputs(recipe)
    prepare_sites(recipe, model, None, data.example())
    cost = measure(model, data.example())
    ends = {cost.layers[0].name, cost.layers[-1].name}
    for layer in cost.layers:
        listed = {
            pair
            for pair in [(a, b) for a in (2, 4, 8, 32) for b in (2, 4, 8, 32)]
            if table.lists(layer.kind, layer.macs, layer.weight_shape, *pair)
        }
        free = {(4, 4), (4, 8), (8, 4), (8, 8), (32, 32)}
        assert listed == ({(8, 8), (32, 32)} if layer.name in ends else free)
    assert table.dearest == (32, 32)
    layers = sum(table.cost(la.name, la.kind, la.macs, la.weight_shape, 32, 32) for la in cost.layers)
    assert float_cost(cost, "table:t", table) == pytest.approx(table.constant + layers)
    assert used(cost, "table:t", cost.present, table) > constant(cost, "table:t", table) == table.constant


def test_the_file_says_what_was_measured_and_where(tmp_path: Path) -> None:
    found = bench_latency(parse_recipe(SMALL), tmp_path / "t.json", runtime="native", **QUICK)
    assert json.loads((tmp_path / "t.json").read_text()) == found
    measured = found["measured"]
    assert (measured["runtime"], measured["rounds"], measured["batch_size"]) == ("native", 2, 1)
    assert {"torch", "threads", "processor", "kernels"} <= set(measured["environment"])
    assert measured["spread"]["entries"] >= 0
    assert all(one["measured_us"] > 0 for one in measured["plans"])
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_a_search_keeps_to_a_measured_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times by which narrow is quick, as this machine may say the contrary of so small a model."""
    slowed(monkeypatch, PAIRS, 50e-6)
    budget = {"tables": [{"table": str(tmp_path / "t.json"), "limit": 0.3}]}
    recipe = parse_recipe(
        SMALL
        | {"methods": [{"budget_search": {"budget": budget, "candidates": [4, 8]}}]}
        | {"quantize": {"calibration_samples": 32, "first_last_bits": None}}
    )
    bench_latency(recipe, tmp_path / "t.json", runtime="native", rounds=2)  # before there is such a table
    metrics = run(recipe, tmp_path / "run")
    (entry,) = metrics["budget"]
    count = len(json.loads((tmp_path / "run" / "plan.json").read_text())["cost"]["layers"])
    assert entry["kind"] == "table:latency_native"
    assert entry["limit"] == pytest.approx(0.3 * (50 + count * 352))
    assert 50 < entry["used"] <= entry["limit"]
    assert metrics["cost"]["latency_us"] == pytest.approx(entry["used"])
    assert "bench latency" in metrics["cost"]["latency_source"]


def test_an_interrupted_measurement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, kept = tmp_path / "t.json", tmp_path / "t.rounds.json"
    recipe = parse_recipe(SMALL)
    monkeypatch.setattr(latency, "SAVED_EVERY", -1.0)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench_latency(recipe, out, runtime="native", rounds=3, candidates=[8], progress=stop)
    assert not out.exists()
    before = json.loads(kept.read_text())["samples"]
    assert {len(rows) for rows in before.values()} == {2}
    with pytest.raises(FormatError, match="measured with another candidates"):
        bench_latency(recipe, out, runtime="native", rounds=3, candidates=[4], resume=True)
    done: list[int] = []
    found = bench_latency(
        recipe,
        out,
        runtime="native",
        rounds=3,
        candidates=[8],
        resume=True,
        progress=lambda n, _: done.append(n),
    )
    assert done == [3]
    assert found["measured"]["rounds"] == 3
    assert not kept.exists()


def test_layers_are_timed_where_they_stand() -> None:
    first, second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), second, second.__class__(2, 2))
    watch = layer_times.stopwatch("native", model, torch.rand(2, 3), ["0", "2"], {})
    whole, layers = watch()
    assert set(layers) == {"0", "2"}
    assert sum(layers.values()) > 0
    assert whole > 0
    assert not first._forward_hooks


def test_layers_alike_are_one_file_of_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    written: list[Path] = []
    to_onnx = layer_times.to_onnx
    monkeypatch.setattr(layer_times, "to_onnx", lambda *given: written.append(given[1]) or to_onnx(*given))
    x = torch.rand(3, 8)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)).eval()
    prepare(model, Scheme(bits=4), Scheme(bits=8, grid="symmetric"), target="onnxruntime")
    calibrate(model, [x])
    watch = layer_times.stopwatch("onnxruntime", finalize(model, x), x, ["0", "2"], {})
    assert len(written) == 2  # the whole model, and one layer
    assert not any(path.exists() for path in written)
    whole, layers = watch()
    assert whole > 0
    assert layers["0"] == layers["2"] >= 0


@pytest.mark.slow
def test_layers_are_measured_as_the_runtime_runs_them(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    recipe = parse_recipe(SMALL | {"target": "onnxruntime"})
    found = bench_latency(recipe, tmp_path / "t.json", rounds=2, candidates=[8], check=1)
    assert len({(e["kind"], tuple(e["shape"])) for e in found["entries"]}) == 3
    assert CostTable.load(tmp_path / "t.json").name == "latency_onnxruntime"
    assert [one["plan"] for one in found["measured"]["plans"]] == ["8 x 8", "32 x 32", "mixed 1"]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    recipe = parse_recipe(SMALL)
    with pytest.raises(SchemeError, match="native or onnxruntime"):
        bench_latency(recipe, tmp_path / "t.json", runtime="tensorrt")
    with pytest.raises(RecipeError, match="nothing would be measured"):
        bench_latency(recipe, tmp_path / "t.json", rounds=0)
    for text in ("", "4,", "9", "four"):
        with pytest.raises(RecipeError, match="no bit-widths"):
            parse_widths(text)
    assert parse_widths("8, 2,2") == [2, 8]


def test_a_pair_that_was_not_measured_is_refused(tmp_path: Path) -> None:
    bench_latency(parse_recipe(SMALL), tmp_path / "t.json", runtime="native", rounds=1, candidates=[4])
    budget = {"tables": [{"table": str(tmp_path / "t.json"), "limit": 0.9}]}
    methods = [{"budget_search": {"budget": budget, "candidates": [2, 4]}}]
    with pytest.raises(BudgetError, match="Add an entry for 2 x"):
        run(parse_recipe(SMALL | {"methods": methods}), tmp_path / "run")


def test_a_table_with_a_constant_takes_products_outside_of_layers_for_part_of_it() -> None:
    document = {
        "version": 1, "name": "t", "unit": "us", "constant": 7.5, "measured": {"anything": [1]},
        "entries": [{"weight_bits": 32, "activation_bits": 32, "per_mac": 1.0}],
    }  # fmt: skip
    recipe = load_recipe(None, ["methods=[]"])
    data, model = read_inputs(recipe)
    prepare_sites(recipe, model, None, data.example())
    cost = measure(model, data.example())
    table = CostTable.from_dict(document)
    assert constant(cost, "table:t", table) == 7.5
    assert float_cost(cost, "table:t", table) == pytest.approx(7.5 + sum(la.macs for la in cost.layers))
    for wrong in (-1, "2", True):
        with pytest.raises(FormatError, match="no cost"):
            CostTable.from_dict(document | {"constant": wrong})
