"""The part of the report about shifts, and the page of its own: every figure is there, damage is named."""

import json

import numpy as np
import pytest

from bitsmith.errors import FormatError
from bitsmith.report import write_shift_page
from bitsmith.report.shifts import FILE, PICTURES, card, read_shifts, rows


def document(metric="accuracy", shift_names=("noise", "domain sketch"), models=("float", "quantized")):
    def entry(base, graded):
        values = {
            name: [{metric: base - 0.01 * (at + 5 * place)} for at in range(3 if graded else 1)]
            for place, name in enumerate(models)
        }
        suite = "corruptions" if graded else "domains"
        return {"suite": suite, "severities": [1, 3, 5] if graded else [], **values}

    shifts = {name: entry(0.8 - 0.2 * at, " " not in name) for at, name in enumerate(shift_names)}
    means = {
        model: {name: np.mean([one[metric] for one in shifts[name][model]]) for name in shifts}
        for model in models
    }
    return {
        "version": 1,
        "suite": "all",
        "data": "digits",
        "unit": "images" if metric == "accuracy" else "sequences",
        "metric": metric,
        "severities": [1, 3, 5],
        "plain": {name: {metric: 0.9} for name in models},
        "figures": {name: {**each, "mean": np.mean(list(each.values()))} for name, each in means.items()},
        "shifts": shifts,
        "texts": {},
    }


def pictures():
    ramp = np.arange(64, dtype=np.uint8).reshape(1, 1, 8, 8)
    return {"plain": ramp, "noise": ramp.repeat(5, 0), "domain sketch": ramp.repeat(5, 0)}


def test_the_table_has_a_row_a_shift_and_a_column_a_severity():
    columns, cells = rows(document())
    assert columns == ["", "float", "quantized", "points", "1", "3", "5"]
    assert [row[0] for row in cells] == ["as it is", "noise", "domain sketch", "mean"]
    assert [text.replace("\u202f", " ") for text in cells[1]] == [
        "noise", "79.0 %", "74.0 %", "\u22125.0", "75.0", "74.0", "73.0"
    ]  # fmt: skip
    assert cells[2][4:] == ["", "", ""]


def test_without_a_float_model_there_is_no_difference():
    columns, cells = rows(document(models=("quantized",)))
    assert columns[:3] == ["", "quantized", "1"]
    assert {len(row) for row in cells} == {len(columns)}


def test_a_page_pictures_every_shift_and_draws_the_graded_ones(tmp_path):
    path = tmp_path / "page.html"
    write_shift_page(document(), pictures(), path, "runs/<x>")
    page = path.read_text()
    assert page.count("data:image/png") == 6 + 5
    assert page.count("<polyline") == 2  # noise, float and quantized; a domain has no severities
    assert "runs/&lt;x&gt;" in page
    assert "Domain sketch" in page
    assert "64.5\u202f% under shift" in page


def test_losses_are_nats_and_text_is_escaped():
    found = document("loss", ("typos",)) | {"texts": {"typos": ["<b>teh</b>"]}}
    drawn = card((found, {}))
    assert "nats" in drawn
    assert "&lt;b&gt;teh" in drawn


def test_a_run_without_shifts_has_no_such_part(tmp_path):
    assert read_shifts(tmp_path) is None
    assert card(None) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "another version; got 2"),
        ({"shifts": []}, "no figures of its shifts"),
        ({"shifts": {"noise": {"severities": [1], "float": []}}}, "no figures of its shifts"),
        ({"plain": {"float": {}}}, "no figures of its shifts"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, change, message):
    (tmp_path / FILE).write_text(json.dumps(document() | change))
    with pytest.raises(FormatError, match=message):
        read_shifts(tmp_path)


def test_damaged_pictures_are_named(tmp_path):
    (tmp_path / FILE).write_text(json.dumps(document()))
    (tmp_path / PICTURES).write_bytes(b"PK\x03\x04")
    with pytest.raises(FormatError, match="corrupted, truncated or not an"):
        read_shifts(tmp_path)
