"""The search's traces and what its plan gave up against the uniform one."""

import json
import re
from pathlib import Path

import pytest

from bitsmith.report import search, uniform, write_report
from bitsmith.report.metrics import read_run
from tests.report.runs import vit, write
from tests.report.searched import DECIDED, build_searched
from tests.report.test_html import Document


def rewrite(run: Path, file: str, change: object) -> None:
    value = json.loads((run / file).read_text())
    assert callable(change)
    change(value)
    write(run / file, value)


def test_the_traces_end_at_the_decision(tmp_path: Path) -> None:
    drawn = search.traces(read_run(build_searched(tmp_path / "run")))
    assert f"for {DECIDED} of 400 steps" in drawn
    assert "the other 320 steps trained at exactly these" in drawn
    assert drawn.count(">decided</text>") == drawn.count(">optimizer step</text>") == 4
    curves = re.findall(r'<polyline points="([^"]*)"', drawn)
    assert [len(curve.split()) for curve in curves if len(curve.split()) > 2] == [DECIDED] * 4
    assert drawn.count(">budget</text>") == 1


def test_the_decided_plan_continues_the_cost_only_where_it_was_delivered(tmp_path: Path) -> None:
    assert "decided plan from 98." in search.traces(read_run(build_searched(tmp_path / "won")))
    lost = build_searched(tmp_path / "lost", winner="uniform")
    assert "decided plan" not in search.traces(read_run(lost))


def test_a_search_up_to_the_last_step_is_decided_there(tmp_path: Path) -> None:
    run = build_searched(tmp_path / "run")
    rewrite(run, "history.json", lambda value: value.update(qat=value["qat"][: DECIDED // 20]))
    drawn = search.traces(read_run(run))
    assert f"for {DECIDED} of {DECIDED} steps; then the widths were decided." in drawn


def test_each_budget_has_its_curve_and_its_colour(tmp_path: Path) -> None:
    drawn = search.traces(read_run(build_searched(tmp_path / "run", kinds=("bops", "weight_bytes"))))
    assert "Bit operations" in drawn
    assert "Weight bytes" in drawn
    assert drawn.count('class="curve s-acts"') >= 2


def test_records_of_something_else_are_no_search(tmp_path: Path) -> None:
    run = build_searched(tmp_path / "run")

    def damage(value: dict) -> None:  # type: ignore[type-arg]
        value["traces"] = [{"step": 1, "Other.strength": 1.0}, {"step": 2, "BudgetSearch.entropy": "none"}]

    rewrite(run, "history.json", damage)
    assert search.traces(read_run(run)) == ""


def test_the_competitor_has_its_own_curve_of_the_loss(tmp_path: Path) -> None:
    page = write_report(build_searched(tmp_path / "run")).read_text()
    training = page[page.index("<h2>Training</h2>") :]
    assert training.count('class="curve s-uniform"') == 2
    assert "Uniform plan" in training


def test_what_was_saved_is_measured_against_the_uniform_plan(tmp_path: Path) -> None:
    run = read_run(build_searched(tmp_path / "run"))
    layers = {layer.name: layer for layer in run.layers}
    text = Document(search.savings(run)).text
    whole = run.metrics["uniform"]["cost"]["bops"]
    share = (9 - 2 * 3) * (layers["conv4"].macs or 0) / whole
    stored = {
        name: (8 if name in ("conv1", "head") else 3) * (x.weight_elements or 0) for name, x in layers.items()
    }
    kept = (3 - 2) * (layers["conv4"].weight_elements or 0) / sum(stored.values())
    assert f"conv43 × 3 → 2 × 3−{100 * share:.2g}\u202f%−{100 * kept:.2g}\u202f%" in text
    assert "conv1" not in text
    assert "conv2" not in text


def test_what_was_spent_elsewhere_is_named(tmp_path: Path) -> None:
    run = read_run(build_searched(tmp_path / "run", layers=vit(), model="digits_vit"))
    text = Document(search.savings(run)).text
    assert "more bits elsewhere, most of all in blocks.0.attention.query (+" in text
    assert len(re.findall(r"3 × 3 → 2 × [46]", text)) == search.MOST


def test_widths_that_the_run_gives_go_before_those_deduced(tmp_path: Path) -> None:
    run = build_searched(tmp_path / "run")
    deduced = uniform.widths(read_run(run))
    assert deduced is not None
    assert deduced["conv1"] == (8, 8)
    assert deduced["conv4"] == (3, 3)
    sites = {
        f"{name}.{o}": bits
        for name, pair in deduced.items()
        for o, bits in zip(("weight", "input"), pair, strict=True)
    }
    (run / "coverage.json").unlink()
    assert uniform.widths(read_run(run)) is None
    rewrite(run, "metrics.json", lambda value: value["uniform"].update(sites=sites))
    assert uniform.widths(read_run(run)) == deduced


def test_a_deduction_that_contradicts_the_reported_cost_is_not_shown(tmp_path: Path) -> None:
    run = build_searched(tmp_path / "run")
    rewrite(run, "metrics.json", lambda value: value["uniform"]["cost"].update(bops=1000))
    assert search.savings(read_run(run)) == ""


@pytest.mark.parametrize(
    "options", [{}, {"winner": "uniform"}, {"uniform": False}, {"layers": vit()}], ids=str
)
def test_the_page_of_a_search_nests(tmp_path: Path, options: dict) -> None:  # type: ignore[type-arg]
    document = Document(write_report(build_searched(tmp_path / "run", **options)).read_text())
    assert "Hardware profile" in document.text
    assert "Search" in document.text
