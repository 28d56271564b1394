"""`bitsmith bench run`: every form of a model that there is, with figures, or one line."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitsmith.bench import contenders, speed
from bitsmith.bench.memory import peak_memory, resident_peak
from bitsmith.bench.rounds import percentile
from bitsmith.bench.speed import SINGLES, measure, summary
from bitsmith.export import save
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.observe import calibrate
from bitsmith.quantization.prepare import prepare
from bitsmith.quantization.scheme import Scheme
from bitsmith.recipe.reopen import data_of_run
from bitsmith.tasks.models import build
from tests.cli.conftest import Bitsmith

QUICKLY = ("--rounds", 2, "--batch-size", 7, "--no-memory")


def test_a_run_is_measured_in_all_its_forms(bitsmith: Bitsmith, finished: Path, tmp_path: Path) -> None:
    result = bitsmith("bench", "run", finished, *QUICKLY, "--out", tmp_path / "bench.json")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found["models"]) == ["float32", "native", "dequantized"]
    assert (
        found["models"]["float32"]["latency_speedup"] == found["models"]["float32"]["throughput_speedup"] == 1
    )
    for name, one in found["models"].items():
        p50, p95, p99 = (one["latency_ms"][p] for p in ("p50", "p95", "p99"))
        assert 0 < p50 <= p95 <= p99
        assert one["throughput"] > 0
        assert name in result.out
    assert "model.onnx" in found["not_measured"]["onnxruntime"]
    assert "onnxruntime is not measured" in result.out
    assert "images/s" in result.out
    assert (found["batch_size"], found["rounds"], found["calls"]) == (7, 2, 2 * SINGLES)
    assert found["environment"]["kernels"]


def test_json_is_the_figures_and_nothing_else(bitsmith: Bitsmith, finished: Path) -> None:
    result = bitsmith("bench", "run", finished / "model", *QUICKLY, "--json")  # which lies in its run
    assert set(json.loads(result.out)["models"]) == {"float32", "native", "dequantized"}
    assert result.err == ""


def test_an_onnx_file_runs_in_its_runtime(finished: Path, tmp_path: Path, bitsmith: Bitsmith) -> None:
    pytest.importorskip("onnxruntime")
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    assert bitsmith("export", copy, "--to", "onnx").code == 0
    data = data_of_run(copy)
    batch = data.inputs(data.test_x[:20])
    answers = {}
    for name in contenders.NAMES:
        predict = contenders.contender(copy, name)
        assert not isinstance(predict, str)
        with torch.inference_mode():
            made = predict(batch)
        answers[name] = made[0] if isinstance(made, list) else made
    for name in ("native", "onnxruntime"):
        apart = (answers[name] - answers["dequantized"]).abs().amax(1)
        assert apart.median() < 1e-5
        assert not torch.equal(answers[name], answers["float32"])


def test_a_native_model_alone_needs_data(bitsmith: Bitsmith, finished: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(finished / "model", tmp_path / "alone")
    refused = bitsmith("bench", "run", alone, *QUICKLY)
    assert refused.code == 2
    assert "Give --data" in refused.err
    result = bitsmith("bench", "run", alone, *QUICKLY, "--data", "digits", "--json")
    assert set(json.loads(result.out)["models"]) == {"native", "dequantized"}


def test_a_language_model_is_measured_in_tokens(bitsmith: Bitsmith, tmp_path: Path) -> None:
    model, tokens = build("byte_llama", seed=0, width=16, depth=1, heads=2), torch.randint(0, 256, (2, 32))
    prepare(model.eval(), Scheme(bits=4), Scheme(bits=8, granularity="token", range="dynamic"))
    calibrate(model, [tokens])
    save(finalize(model, tokens), tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    asked = ("bench", "run", tmp_path / "model", *QUICKLY, "--data", f"text:{tmp_path}/text.txt")
    found = json.loads(bitsmith(*asked, "--json").out)
    assert found["unit"] == "tokens"
    assert found["per_input"] > 1
    written = found["generation"]
    assert written["written"] == 32
    assert written["prompt"] + written["written"] == found["per_input"]
    for one in written["models"].values():
        p50, p95, p99 = (one["step_ms"][p] for p in ("p50", "p95", "p99"))
        assert 0 < p50 <= p95 <= p99
        assert one["decode_per_s"] == pytest.approx(1e3 / p50, rel=0.5)
        assert one["prefill_per_s"] > 0
        assert not one["cache"]  # keys have a range over all positions
    assert list(written["models"]) == ["native", "dequantized"]
    shown = bitsmith(*asked, "--tokens", 3).out
    assert "tokens/s" in shown
    assert "3 tokens written after 125" in shown
    assert "native (no cache)" in shown


def test_what_is_no_model_is_one_line(bitsmith: Bitsmith, finished: Path, tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "there is no such directory"), (tmp_path, "no run and no model")):
        result = bitsmith("bench", "run", path)
        assert result.code == 2
        assert words in result.err
    (tmp_path / "recipe.yaml").write_bytes((finished / "recipe.yaml").read_bytes())
    result = bitsmith("bench", "run", tmp_path)
    assert "this run has no native model" in result.err
    assert bitsmith("bench", "run", finished, "--rounds", 0).code == 2
    assert bitsmith("bench", "run").code == 2


def test_memory_is_that_of_a_process_of_its_own(finished: Path) -> None:
    found = peak_memory(finished, "native", torch.rand(3, 1, 8, 8))
    assert found["peak_bytes"] == found["libraries_bytes"] + found["model_bytes"]
    assert 0 <= found["model_bytes"] < found["libraries_bytes"] < 2**33


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_grows_with_what_is_held() -> None:
    before = resident_peak()
    now = int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # it may lie below an earlier peak
    held = torch.ones((before - now) // 4 + 2**24)
    assert resident_peak() >= before + 2**25
    assert held[-1] == 1


def test_forms_take_turns_and_each_round_begins_with_another() -> None:
    calls: list[tuple[str, int]] = []

    def form(name: str):
        def predict(x: Tensor) -> None:
            calls.append((name, len(x)))

        return predict

    timed = measure({"a": form("a"), "b": form("b")}, torch.zeros(9, 2), 9, 2)
    rounds = calls[4 * speed.WARM :]
    turn = {name: [(name, 1)] * SINGLES + [(name, 9)] for name in "ab"}
    assert rounds == turn["a"] + turn["b"] + turn["b"] + turn["a"]
    assert [len(times) for times in timed["a"]] == [2 * SINGLES, 2]


def test_figures_are_medians_and_nearest_ranks() -> None:
    assert [percentile([float(i) for i in range(1, 101)], q) for q in (50, 95, 99)] == [50, 95, 99]
    assert [percentile([3.0, 1.0, 2.0], q) for q in (50, 99)] == [2, 3]
    found = summary(([0.001, 0.002, 0.003], [0.5, 0.25, 9]), ([0.004, 0.004, 0.003], [1, 1, 1]), 64)
    assert found["throughput"] == 128
    assert found["latency_ms"]["p50"] == pytest.approx(2)
    assert (found["latency_speedup"], found["throughput_speedup"]) == (2, 2)
