"""Rounding before training on the page: every layer with its figures, or why it has none."""

from pathlib import Path
from typing import Any

import pytest

from bitsmith.errors import FormatError
from bitsmith.report import write_report
from bitsmith.report.rounding import FILE, card, read_rounding, sentence
from tests.report.runs import build_run, write

LAYER = {"name": "a.<b>", "error_nearest": 0.4, "error": 0.1, "alpha": 0.75, "rows": 1000, "seconds": 0.5}
LEFT = {"name": "head", "rows": 0, "seconds": 0.0, "error": None, "left": "its weight is tied"}
OTHER = {**LAYER, "name": "c", "error_nearest": 0.2, "error": 0.3, "beta": 0.25, "seconds": 1.5}


def test_layers_are_shown_with_their_figures_and_the_others_with_the_reason(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    write(run / FILE, {"version": 1, "layers": [LAYER, OTHER, LEFT]})
    page = write_report(run).read_text()
    assert "Rounding before training" in page
    assert "a.<wbr>&lt;b&gt;" in page
    assert "<b>0.1</b>" in page
    assert "head (its weight is tied)" in page
    assert sentence(read_rounding(run / FILE)).startswith("2 layers in 2.0")
    assert sentence(read_rounding(run / FILE)).endswith("output error 0.2 instead of 0.3 on average")


def test_a_run_that_rounded_nothing_has_no_such_card(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    assert read_rounding(run / FILE) == ()
    assert "Rounding before training" not in write_report(run).read_text()
    write(run / FILE, {"version": 1, "layers": [LEFT]})
    assert card(read_rounding(run / FILE)) == sentence(read_rounding(run / FILE)) == ""


WRONG: dict[str, tuple[Any, str]] = {
    "another version": ({"version": 2, "layers": []}, "another version; got 2, expected 1"),
    "no list": ({"version": 1, "layers": {}}, "not a list of layers"),
    "no name": ({"version": 1, "layers": [{"error": 1}]}, "not a list of layers"),
    "no number": ({"version": 1, "layers": [{**LAYER, "alpha": "x"}]}, "not a list of layers"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_a_foreign_file_is_one_line(content: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / FILE, content)
    with pytest.raises(FormatError, match=message):
        read_rounding(tmp_path / FILE)
