"""sweep.html and its verdicts, from made-up sweeps."""

from pathlib import Path
from typing import Any

import pytest

from bitsmith.report import words
from bitsmith.report.front import Spot, dominator, render, spots, verdicts, write_front
from tests.report.runs import write
from tests.report.test_html import Document

Plan = tuple[float, float]  # what it uses, and its accuracy


def sweep(*points: tuple[float, Plan, tuple[str, float, float] | None], **changes: Any) -> dict[str, Any]:
    """points: (budget, searched, (name, use, accuracy) of the uniform plan)."""
    entries = []
    for budget, (used, accuracy), uniform in points:
        other = None
        if uniform is not None:
            other = {
                "bits": uniform[0],
                "used": uniform[1],
                "accuracy": uniform[2],
                "validation_accuracy": 0.9,
            }
        entries.append(
            {
                "name": f"bops-{budget:g}", "budget": budget, "limit": budget * 1e8, "winner": "searched",
                "searched": {"used": used, "accuracy": accuracy, "validation_accuracy": 0.9, "bits": {}},
                "uniform": other, "delivered": accuracy, "start": "sensitivity",
            }
        )  # fmt: skip
    return {
        "version": 1, "model": "digits_cnn", "data": "digits", "target": "native", "seed": 0,
        "test_images": 360, "kind": "bops", "unit": None, "float": {"accuracy": 0.985, "used": 1e8},
        "points": entries,
    } | changes  # fmt: skip


DOMINATED = sweep(
    (0.05, (4.9e6, 0.98), ("4 x 4", 4.5e6, 0.976)), (0.03, (2.9e6, 0.974), ("2 x 2", 2.1e6, 0.978))
)


def plain(lines: list[str]) -> str:
    return " ".join(lines).replace(words.SPACE, " ")


def test_a_uniform_plan_that_is_better_is_said_plainly() -> None:
    assert plain(verdicts(DOMINATED)) == (
        "At 2.10 M BOPs the uniform 2 x 2 plan is better by 0.4 points than the plan searched within 3.0 % "
        "(97.8 % against 97.4 % at 2.90 M BOPs)."
    )


def test_a_uniform_plan_that_is_as_accurate_is_said_once() -> None:
    found = sweep((0.05, (4.9e6, 0.98), ("2 x 2", 2e6, 0.98)), (0.03, (2.9e6, 0.98), ("2 x 2", 2e6, 0.98)))
    assert plain(verdicts(found)) == (
        "At 2.00 M BOPs the uniform 2 x 2 plan is as accurate (98.0 %) and no dearer than what was searched "
        "within 5.0 % and 3.0 %."
    )
    assert [spot.budgets for spot in spots(found)] == [(0.05,), (0.03,), (0.05, 0.03)]


def test_a_front_that_no_uniform_plan_dominates_is_said_too() -> None:
    assert "No uniform plan dominates" in plain(verdicts(sweep((0.05, (4e6, 0.98), ("4 x 4", 4.5e6, 0.99)))))
    assert "No uniform plan fits" in plain(verdicts(sweep((0.05, (4e6, 0.98), None))))


def test_no_point_dominates_itself() -> None:
    same = Spot("uniform", "", 1.0, 0.9, ())
    assert dominator(same, [same, Spot("uniform", "", 1.0, 0.9, ())]) is None
    assert dominator(same, [Spot("uniform", "", 0.9, 0.9, ())]) is not None
    assert dominator(same, [Spot("uniform", "", 1.1, 0.99, ())]) is None


def test_the_page_draws_every_plan_and_marks_what_is_dominated(tmp_path: Path) -> None:
    write(tmp_path / "sweep.json", DOMINATED)
    page = write_front(tmp_path).read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "")
    text = Document(page).text.replace(words.SPACE, " ")
    assert "better by 0.4 points" in text
    assert "98.0 % at 4.90 M BOPs" in text
    assert "360 test images" in text
    assert page.count("hollow") >= 2  # the plan within 3 %, and 4 x 4 which 2 x 2 beats
    for label in ("5.0 %", "3.0 %", "4 x 4", "2 x 2", "float"):
        assert f">{label}<" in page.replace(words.SPACE, " "), label


@pytest.mark.parametrize(
    ("kind", "unit", "text"),
    [
        ("weight_bytes", None, "4.90 MB"),
        ("average_weight_bits", None, "bits"),
        ("table:energy", "pJ", "4.90 MpJ"),
    ],
)
def test_costs_carry_their_unit(kind: str, unit: str | None, text: str) -> None:
    page = Document(render({**DOMINATED, "kind": kind, "unit": unit})).text.replace(words.SPACE, " ")
    assert text in page.replace("4.90 M pJ", "4.90 MpJ")


def test_one_point_alone_can_be_drawn() -> None:
    Document(render(sweep((0.05, (4e6, 0.98), None))))
