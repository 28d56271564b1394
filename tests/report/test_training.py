"""A line about how codes trained: what is known of it, and nothing about what is not."""

from pathlib import Path
from typing import Any

import pytest

from bitsmith.report.metrics import Run
from bitsmith.report.training import sentence

FOUND = {
    "mode": "integer",
    "codes": 5596,
    "changed": 0.052,
    "saturated": 0.307,
    "saturated_before": 0.302,
    "state_bytes_per_weight": 1.6555,
    "frozen": [],
}


def said(**training: Any) -> str:
    run = Run(directory=Path(), name="run", metrics={"training": training})
    return sentence(run).replace("\u202f", " ")


def test_the_mode_the_codes_and_the_state_are_said_in_a_line() -> None:
    assert said(**FOUND) == (
        "Trained on integer codes: 5.2 % of 5,596 codes changed, 30.7 % lie at an end of their grid "
        "(30.2 % before); 1.66 bytes of state a weight"
    )
    assert said(**{**FOUND, "frozen": ["conv3", "<b>"]}).endswith("; frozen: conv3 and <b>")
    assert said(mode="zeroth_order") == "Trained by forward passes alone"


@pytest.mark.parametrize(
    "training", [{}, {"mode": "float"}, {"mode": ["integer"]}, {"mode": None}, {"changed": 0.5}], ids=str
)
def test_nothing_is_said_where_float_weights_trained_or_nothing_is_known(training: Any) -> None:
    assert said(**training) == ""
    assert sentence(Run(directory=Path(), name="run", metrics={"training": "integer"})) == ""
    assert sentence(Run(directory=Path(), name="run", metrics={})) == ""


def test_what_is_no_number_is_left_out() -> None:
    assert said(**{**FOUND, "changed": "<b>", "state_bytes_per_weight": None}) == (
        "Trained on integer codes: 30.7 % lie at an end of their grid (30.2 % before)"
    )
    assert said(**{**FOUND, "codes": "many", "saturated": None, "frozen": "conv3"}) == (
        "Trained on integer codes; 1.66 bytes of state a weight"
    )
