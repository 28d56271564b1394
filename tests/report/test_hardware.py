"""The hardware profile: nothing is lost between the layers, the table and the picture."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from bitsmith.report import hardware, write_report
from bitsmith.report.metrics import read_run
from tests.report.runs import build_run, vit, write


def table(run: Path) -> list[dict[str, float]]:
    with (run / "hardware_profile.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def change_cost(run: Path, **entries: Any) -> dict[str, Any]:
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["cost"] |= entries
    write(run / "metrics.json", metrics)
    return metrics["cost"]


def test_every_pair_of_widths_is_a_row_and_rows_sum_to_the_whole(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    layers = json.loads((run / "metrics.json").read_text())["cost"]["layers"]
    write_report(run)
    rows = table(run)
    assert list(rows[0]) == list(hardware.COLUMNS)
    pairs = [(row["weight_bits"], row["activation_bits"]) for row in rows]
    assert pairs == sorted({(layer["weight_bits"], layer["activation_bits"]) for layer in layers})
    for row in rows:
        same = [
            x
            for x in layers
            if (x["weight_bits"], x["activation_bits"]) == (row["weight_bits"], row["activation_bits"])
        ]
        assert row["macs"] == sum(layer["macs"] for layer in same)
        assert row["weight_bytes"] == sum(layer["weight_bytes"] for layer in same)
    for share in ("mac_share", "byte_share"):
        assert sum(row[share] for row in rows) == pytest.approx(1)


def test_channels_of_several_widths_are_counted_at_each_of_them(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", layers=[("head", "Linear", 400, 100, 4, 8)])
    metrics = json.loads((run / "metrics.json").read_text())
    entry = metrics["cost"]["layers"][0]
    entry["weight_bits"], entry["weight_bytes"] = [2, 2, 2, 8], 140
    entry.pop("operand_bits", None)
    change_cost(run, layers=[entry], weight_bytes=140)
    (layer,) = read_run(run).layers
    assert (layer.weight_bits, layer.channel_bits) == (3.5, (2, 2, 2, 8))
    write_report(run)
    rows = [(r["weight_bits"], r["macs"], r["weight_bytes"]) for r in table(run)]
    assert rows == [(2, 300, 60), (8, 100, 80)]
    page = (run / "report.html").read_text()
    assert "2-8, 3.5 on average" in page


def test_what_stays_in_float_is_float_by_float(tmp_path: Path) -> None:
    run = build_run(
        tmp_path / "run", layers=[("conv", "Conv2d", 600, 80, 32, 32), ("head", "Linear", 300, 40, 4, 8)]
    )
    cost = change_cost(run, float_macs=100, weight_bytes=600)
    listed = sum(layer["weight_bytes"] for layer in cost["layers"])
    write_report(run)
    (low, floating) = table(run)
    assert (low["weight_bits"], low["activation_bits"], low["macs"], low["mac_share"]) == (4, 8, 300, 0.3)
    assert (floating["weight_bits"], floating["activation_bits"], floating["macs"]) == (32, 32, 700)
    assert low["weight_bytes"] + floating["weight_bytes"] == 600 > listed


def test_a_product_of_activations_has_macs_and_no_bytes(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", layers=vit(), model="digits_vit")
    change_cost(
        run, layers=[{"name": "scores", "kind": "MatMul", "macs": 50, "operand_bits": [3, 5]}], weight_bytes=0
    )
    (row,) = hardware.profile(read_run(run))
    assert (row.weight_bits, row.activation_bits, row.macs, row.weight_bytes) == (3, 5, 50, 0)


def test_the_picture_shows_each_pair_once(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    drawn = hardware.card(read_run(run))
    for row in hardware.profile(read_run(run)):
        assert drawn.count(f"weights {row.weight_bits:g}, activations {row.activation_bits:g}: ") == 2
    assert "hardware_profile.csv" in drawn


def test_without_layers_there_is_no_profile(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", optional=False)
    change_cost(run, layers=[])
    assert "Hardware profile" not in write_report(run).read_text()
    assert not (run / "hardware_profile.csv").exists()
