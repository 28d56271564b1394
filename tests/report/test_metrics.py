"""Reading a run directory: what is wrong with it is one line, never a traceback or a wrong figure."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitsmith.errors import FormatError
from bitsmith.report import write_report
from bitsmith.report.certificate import read_certificate
from bitsmith.report.metrics import mean_bits, read_run
from tests.report.runs import build_run, write


def refusal(run: Path) -> str:
    with pytest.raises(FormatError) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()
    return str(caught.value)


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    assert "no such run directory" in refusal(tmp_path / "nowhere")


def test_a_directory_without_metrics(tmp_path: Path) -> None:
    assert "metrics.json: there is no such metrics file" in refusal(tmp_path)


WRONG: dict[str, tuple[Any, str]] = {
    "another version": ({"version": 2}, "another version; got 2, expected 1"),
    "a foreign object": ({"float": {}, "quantized": {}}, "has no float.accuracy"),
    "percent": ({"quantized": {"accuracy": 97.8}}, "quantized.accuracy is not an accuracy; got 97.8"),
    "a string": ({"float": {"accuracy": "good"}}, "float.accuracy is not an accuracy"),
    "a section": ({"cost": [1]}, "cost is not an object"),
    "shift": ({"shift": {"float": {"noise": -0.1}}}, "shift.float.noise is not an accuracy"),
    "negative cost": ({"cost": {"bops": -3}}, "cost.bops is not a cost"),
    "export": ({"exported": {"onnx": 3}}, "exported.onnx is not an object"),
}  # fmt: skip


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_metrics_that_make_no_sense(tmp_path: Path, change: tuple[dict[str, Any], str]) -> None:
    run = build_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    write(run / "metrics.json", {**metrics, **change[0]})
    assert change[1] in refusal(run)


@pytest.mark.parametrize(
    "file",
    ["metrics.json", "plan.json", "coverage.json", "certificate.json", "history.json", "predictions.npz"],
)
@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, damage: str) -> None:
    run = build_run(tmp_path / "run")
    data = (run / file).read_bytes()
    (run / file).write_bytes(
        {"truncated": data[: len(data) // 2], "foreign": b"[1, 2]", "empty": b""}[damage]
    )
    assert str(run / file) in refusal(run)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("plan.json", {"sites": ["conv1.weight"]}),
        ("plan.json", {"sites": {"conv1.weight": 4}}),
        ("coverage.json", {"sites": ["conv1.weight"]}),
        ("coverage.json", {"leftovers": {"bias": 1}}),
        ("history.json", {"qat": [0.1, 0.2]}),
        ("certificate.json", {"exports": {"onnx": "fine"}}),
    ],
)
def test_json_of_another_shape_is_refused(tmp_path: Path, file: str, content: dict[str, Any]) -> None:
    run = build_run(tmp_path / "run")
    write(run / file, content)
    assert str(run / file) in refusal(run)


@pytest.mark.parametrize(
    "arrays",
    [
        {"float": np.zeros(3)},
        {"labels": np.zeros(3), "float": np.zeros(4)},
        {"labels": np.zeros(3), "images": np.zeros((2, 1, 8, 8)), "image_rows": np.array([0])},
        {"labels": np.zeros(3), "images": np.zeros((1, 1, 8, 8)), "image_rows": np.array([3])},
        {"labels": np.array([-1, 0])},
        {"labels": np.array([{"code": "that could run"}], dtype=object)},
    ],
)
def test_predictions_that_contradict_themselves(tmp_path: Path, arrays: dict[str, Any]) -> None:
    run = build_run(tmp_path / "run")
    np.savez(run / "predictions.npz", **arrays)
    assert "predictions.npz" in refusal(run)


def test_images_of_bytes_and_of_floats_are_the_same(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    bright = np.full((1, 1, 2, 2), 255, dtype=np.uint8)
    np.savez(run / "predictions.npz", labels=np.zeros(1), images=bright, image_rows=np.zeros(1))
    found = read_run(run).predictions
    assert found is not None
    assert found.images.tolist() == np.ones((1, 1, 2, 2)).tolist()
    assert found.classes == ("0",)


@pytest.mark.parametrize(
    ("bits", "mean"),
    [
        (4, 4.0),
        (2.5, 2.5),
        ([2] * 16 + [4] * 48, 3.5),
        ([3], 3.0),
        ([], None),
        (["a"], None),
        (None, None),
        ("many", None),
    ],
)
def test_mean_bits(bits: Any, mean: float | None) -> None:
    assert mean_bits(bits) == mean


def test_layers_come_from_the_plan_where_the_cost_names_none(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    listed = [(layer.name, layer.weight_bits, layer.activation_bits) for layer in read_run(run).layers]
    del metrics["cost"]["layers"]
    write(run / "metrics.json", metrics)
    assert [
        (layer.name, layer.weight_bits, layer.activation_bits) for layer in read_run(run).layers
    ] == listed


def test_a_product_shows_both_operands(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    entry = {
        "name": "scores",
        "kind": "MatMul",
        "weight_bits": None,
        "activation_bits": 4,
        "operand_bits": [3, 4],
    }
    metrics["cost"]["layers"] = [entry]
    write(run / "metrics.json", metrics)
    (layer,) = read_run(run).layers
    assert (layer.weight_bits, layer.activation_bits, layer.is_product) == (3, 4, True)


def test_nothing_passes_that_the_certificate_does_not_say() -> None:
    def passed(**entry: Any) -> bool | None:
        (certified,) = read_certificate({"version": 1, "exports": {"onnx": entry}})
        return certified.passed

    assert passed(runtime="onnxruntime") is None
    assert passed(codes_equal=False) is False
    assert passed(passed=True, checks=[{"name": "same predictions", "passed": False}]) is False
    assert passed(passed=False, codes_equal=True) is False
    assert passed(passed=True, codes_equal=True) is True


@pytest.mark.parametrize(
    ("check", "figures"),
    [
        ({"passed": True, "value": 1.0, "limit": 0.995}, "100 %, at least 99.5 %"),
        ({"passed": False, "value": 0.81, "limit": 0.995}, "81 %, at least 99.5 %"),
        ({"passed": True, "value": 2.5e-6, "limit": 3.0}, "2.5e-06, at most 3"),
        ({"passed": True, "value": 12}, "12"),
        ({"passed": True}, ""),
    ],
)
def test_a_limit_points_where_the_verdict_says(check: dict[str, Any], figures: str) -> None:
    (certified,) = read_certificate({"exports": {"onnx": {"checks": [{"name": "a", **check}]}}})
    assert certified.checks == (("a", check["passed"], figures.replace(" %", "\u202f%")),)


@pytest.mark.parametrize(("holds", "said"), [(True, "hold, too, and 98"), (False, "do NOT hold")])
def test_it_is_said_how_a_file_computes_by_default(holds: bool, said: str) -> None:
    found = {"options": "integer products (torch)", "rows_within_tolerance": 0.98, "holds": holds}
    (certified,) = read_certificate({"exports": {"native": {"default_options": found}}})
    (remark,) = certified.remarks
    assert "With integer products (torch)" in remark
    assert said in remark
