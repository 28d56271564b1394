"""sensitivity.html: what it says and what it leaves out, from made-up scores."""

from pathlib import Path
from typing import Any

import pytest

from bitsmith.report import words
from bitsmith.report.sensitivity import figure, headline, price_text, render, write_sensitivity
from tests.report.runs import write
from tests.report.test_html import Document


def findings(**changes: Any) -> dict[str, Any]:
    def site(
        name: str, bits: int, scores: list[float], share: float | None, free: bool = True
    ) -> dict[str, Any]:
        price = [] if share is None else [{"kind": "bops", "cost": 100.0, "share": share}]
        wider = None if bits == 8 else {"bits": 8, "score": scores[-1], "with": [], "price": price}
        return {
            "name": name, "kind": "weight" if name.endswith("weight") else "activation", "free": free,
            "candidates": [2, 4, 8], "scores": scores, "bits": bits, "score": 0.1, "next": wider,
        }  # fmt: skip

    return {
        "version": 1, "model": "digits_cnn", "data": "digits", "target": "native", "seed": 0,
        "plan_from": "budget", "samples": {"scores": 512, "measured": 179},
        "budget": [{"kind": "bops", "limit": 3.2e6, "used": 3.1e6}],
        "sites": [
            site("conv1.weight", 8, [0.5, 0.01, 0.0], None, free=False),
            site("conv2.<b>.input", 4, [0.2, 0.02, 1e-6], 0.21),
            site("conv3.weight", 2, [0.1, 1e-3, 1e-5], None),
        ],
        "float": {"loss": 0.071, "accuracy": 0.98},
        "measured": [
            {"site": "conv1.weight", "bits": 2, "score": 0.5, "loss": 1.2, "increase": 1.129, "accuracy": 0.5}
        ],
    } | changes  # fmt: skip


def test_the_page_says_what_hurts_what_was_chosen_and_what_more_costs(tmp_path: Path) -> None:
    write(tmp_path / "sensitivity.json", findings())
    page = write_sensitivity(tmp_path).read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    text = Document(page).text
    for fragment in (
        "conv1.weight at 2 bits hurts most",
        "from 0.071 to 1.200",
        "the plan within the budget",
        "conv2.<b>.input",
        f"+21.0{words.SPACE}%",
        "not on this target",
        "asked for by name",
        "+1.129",
    ):
        assert fragment in text, fragment
    assert page.count('class="planned"') == 2
    assert page.count('class="fixed"') == 1


def test_heat_grows_with_the_score() -> None:
    row = render(findings()).split('<th scope="row">conv3')[1]
    heats = [int(part.split('"')[0]) for part in row.split("--heat:")[1:4]]
    assert heats == sorted(heats, reverse=True)
    assert heats[0] > heats[-1] == 0


def test_without_a_budget_or_measurements_nothing_is_made_up() -> None:
    found = findings(plan_from="recipe", measured=[])
    text = Document(render(found)).text
    assert "within the budget" not in text
    assert "no budget: the recipe's own widths" in text
    assert "Measured" not in text
    assert "nothing was measured" in headline(found)[1]


@pytest.mark.parametrize(
    ("score", "text"), [(0, "0"), (0.0854, "0.085"), (0.00097, "1e−3"), (3.1e-7, "3e−7"), (123.4, "123")]
)
def test_scores_are_short(score: float, text: str) -> None:
    assert figure(score) == text


def test_prices_of_several_budgets_name_their_kinds() -> None:
    price = [{"kind": "bops", "cost": 1, "share": 0.1}, {"kind": "weight_bytes", "cost": 1, "share": 0.002}]
    assert price_text(price).replace(words.SPACE, " ") == "+10.0 % BOPs, +0.2 % weight bytes"


def test_32_bits_are_called_float() -> None:
    found = findings()
    site = found["sites"][2]
    site |= {"candidates": [2, 4, 32], "scores": [0.1, 1e-3, 0.0], "bits": 32, "next": None}
    text = Document(render(found)).text
    assert "float" in text
    assert "32" not in text
