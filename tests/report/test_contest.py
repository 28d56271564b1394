"""Who won and what is said of it: both outcomes, a draw, no competitor, a test set that disagrees."""

import json
from pathlib import Path
from typing import Any

import pytest

from bitsmith.errors import FormatError
from bitsmith.report import contest, outcome, write_report
from bitsmith.report.metrics import read_run
from tests.report.runs import build_run, write
from tests.report.searched import build_searched

S = "\u202f"


def said(run: Path) -> str:
    found = contest.result(read_run(run))
    assert found is not None
    return ": ".join(found)


def change(run: Path, **entries: dict[str, Any]) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    write(run / "metrics.json", {**metrics, **{key: {**metrics[key], **entries[key]} for key in entries}})


def test_the_first_screen_says_that_the_search_won_and_by_how_much(tmp_path: Path) -> None:
    run = build_searched(tmp_path / "run")
    text = said(run)
    assert text.startswith(
        f"The searched plan won: 97.8{S}% against 96.9{S}% for the uniform 3{S}×{S}3-bit plan "
        "of the same budget on validation, which decided (0.8 points ahead); "
        f"97.8{S}% against 97.0{S}% on test (0.8 points ahead). It uses "
    )
    assert "% of the budget (the uniform plan 99.6" in text
    page = write_report(run).read_text()
    assert page.index("The searched plan won") < page.index('class="tiles"')


def test_a_uniform_plan_that_won_is_said_to_be_what_was_delivered(tmp_path: Path) -> None:
    run = build_searched(tmp_path / "run", winner="uniform")
    text = said(run)
    assert text.startswith(
        f"The uniform 3{S}×{S}3-bit plan won and was delivered: 97.8{S}% against 96.9{S}% "
        "for the searched plan on validation, which decided"
    )
    assert "All figures below are the uniform plan's." in text
    assert "Where bits were saved" not in write_report(run).read_text()


def test_a_test_set_that_disagrees_is_not_hidden(tmp_path: Path) -> None:
    run = build_searched(tmp_path / "run")
    change(run, uniform={"accuracy": 0.9878})
    assert f"97.8{S}% against 98.8{S}% on test (1.0 points behind)" in said(run)


def test_a_draw_and_a_hair(tmp_path: Path) -> None:
    run = build_searched(tmp_path / "run")
    change(run, searched={"validation_accuracy": 0.97}, uniform={"validation_accuracy": 0.97})
    assert said(run).startswith(
        f"The searched plan drew and was kept: 97.0{S}% against as much for the uniform"
    )
    change(run, uniform={"validation_accuracy": 0.9699})
    assert "(less than 0.1 points ahead)" in said(run)


def test_of_plans_as_accurate_on_validation_the_loss_decides(tmp_path: Path) -> None:
    run = build_searched(tmp_path / "run")
    change(run, searched={"validation_accuracy": 0.97, "validation_loss": 0.061})
    change(run, uniform={"validation_accuracy": 0.97, "validation_loss": 0.0834})
    assert said(run).startswith(
        f"The searched plan won: 97.0{S}% against as much for the uniform 3{S}×{S}3-bit plan of the same "
        "budget on validation (loss 0.061 against 0.0834, which decided)"
    )


def test_a_uniform_plan_that_drew_is_delivered_as_the_cheaper_one(tmp_path: Path) -> None:
    run = build_searched(tmp_path / "run", winner="uniform")
    change(run, searched={"validation_accuracy": 0.97}, uniform={"validation_accuracy": 0.97})
    assert said(run).startswith(
        f"The uniform 3{S}×{S}3-bit plan drew, costs no more and was delivered: 97.0{S}% against as much "
        "for the searched plan"
    )


def test_a_search_without_a_competitor_says_so(tmp_path: Path) -> None:
    run = build_searched(tmp_path / "run", uniform=False)
    assert said(run).startswith(
        f"The searched plan was delivered unopposed: no uniform plan fits the budget. 97.8{S}% on validation "
        f"and 97.8{S}% on test. It uses "
    )
    assert "Uniform plan" not in write_report(run).read_text()


def test_each_of_several_budgets_is_named(tmp_path: Path) -> None:
    run = build_searched(tmp_path / "run", kinds=("bops", "weight_bytes"))
    text = said(run)
    assert f"of the budget of bit operations (the uniform plan 99.6{S}%) and " in text
    assert text.endswith(f"99.6{S}% of the budget of weight bytes.")


def test_a_run_without_a_search_says_nothing_of_a_contest(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    assert contest.result(read_run(run)) is None
    page = write_report(run).read_text()
    for word in ("searched", "Searched", "Uniform", "plan won", "bits were saved", "Price of the budget"):
        assert word not in page.partition("<body>")[2]


@pytest.mark.parametrize(("winner", "loser"), [("searched", "Uniform plan"), ("uniform", "Searched plan")])
def test_the_loser_stands_beside_the_delivered_model(tmp_path: Path, winner: str, loser: str) -> None:
    drawn = outcome.accuracy(read_run(build_searched(tmp_path / "run", winner=winner)))
    shown = {"Uniform plan", "Searched plan"} & {part.split("<")[0] for part in drawn.split('class="name">')}
    assert shown == {loser}


def test_estimates_name_their_table(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    change(run, cost={"latency_us": 12.31, "latency_source": "timed on <a> board", "energy_uj": 0.5})
    text = outcome.cost(read_run(run))
    assert f"12.31{S}µs per inference, estimated</dd>" in text
    assert f"0.5{S}µJ per inference, estimated</dd>" in text
    assert (
        "Latency is estimated from a table: timed on &lt;a&gt; board. Energy is estimated from a table.</p>"
        in text
    )


def test_a_search_that_ended_at_the_uniform_plan_says_so(tmp_path: Path) -> None:
    layers = [
        ("conv1", "Conv2d", 700, 72, 8, 8),
        ("conv2", "Conv2d", 900, 90, 3, 3),
        ("head", "Linear", 30, 30, 8, 8),
    ]
    assert "Both plans have the same widths" in said(build_searched(tmp_path / "same", layers=layers))
    assert "Both plans" not in said(build_searched(tmp_path / "other"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"winner": "float"}, "winner is no contender; got float"),
        ({"searched": {"accuracy": 97.8}}, "searched.accuracy is not an accuracy"),
        ({"uniform": {"validation_accuracy": "good"}}, "uniform.validation_accuracy is not an accuracy"),
        ({"budget": "3 %"}, "budget is not a list"),
        ({"budget": [3]}, "budget holds what is not an object"),
        ({"budget": [{"kind": "bops", "limit": "many"}]}, "budget.limit is not a cost"),
    ],
)
def test_a_contest_that_makes_no_sense_is_one_line(
    tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    run = build_searched(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    write(run / "metrics.json", {**metrics, **entries})
    with pytest.raises(FormatError, match=message):
        write_report(run)


def test_a_uniform_plan_in_float_is_called_that(tmp_path: Path) -> None:
    run = build_searched(tmp_path / "run")
    change(run, uniform={"bits": "float x float"})
    assert "for the uniform plan in float of the same budget" in said(run)
