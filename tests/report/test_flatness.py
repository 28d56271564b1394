"""The part of the report about flatness, and the page of its own: every figure is there, damage is named."""

import json
import math
import re

import pytest

from bitsmith.errors import FormatError
from bitsmith.report import write_flatness_page
from bitsmith.report.flatness import (
    FILE,
    card,
    contour,
    contour_levels,
    number,
    read_flatness,
    rows,
)


def bowl(depth, points=5):
    middle = points // 2
    return [
        [depth * (1 + (i - middle) ** 2 + (j - middle) ** 2) for j in range(points)] for i in range(points)
    ]


def document(**changes):
    models = {
        "float": {"loss": 0.0832, "sharpness": 0.1048, "top_eigenvalue": 3.562, "surface": bowl(0.0832)},
        "quantized": {"loss": 0.0057, "sharpness": 0.0958, "top_eigenvalue": -0.59, "surface": bowl(0.0057)},
    }
    return {
        "version": 1,
        "data": "digits",
        "unit": "images",
        "rows": 512,
        "seed": 0,
        "radius": 0.005,
        "span": 0.25,
        "models": models,
        **changes,
    }


def test_a_run_without_flatness_has_no_such_part(tmp_path):
    assert read_flatness(tmp_path) is None
    assert card(None) == ""


def test_the_card_has_the_figures_of_the_file(tmp_path):
    (tmp_path / FILE).write_text(json.dumps(document()))
    shown = card(read_flatness(tmp_path))
    for figure in ("0.0832", "0.105", "3.56", "0.00570", "0.0958", "\u22120.590"):
        assert f">{figure}</td>" in shown
    assert "512 training images" in shown
    assert "within 0.5\u202f% of every tensor" in shown
    assert shown.count('class="surface"') == 2
    assert shown.count("<rect") == 2 * 25


def test_both_maps_share_one_colour_scale():
    """The deepest point is palest, the highest hottest, wherever it is; between them by the logarithm."""
    shown = card(document())
    heats = [[int(heat) for heat in re.findall(r"--heat:(\d+)", part)] for part in shown.split("<h3>")[1:]]
    assert min(heats[0]) > min(heats[1]) == 0
    assert max(heats[1]) < max(heats[0]) == 100
    share = math.log(0.0832 / 0.0057) / math.log(9 * 0.0832 / 0.0057)
    assert heats[0][12] == round(100 * share)
    assert "logarithmic" in shown


def test_a_loss_of_nearly_nothing_does_not_take_the_whole_scale():
    surface = [[3.0, 3.0, 3.0], [0.3, 0.0, 0.03], [3.0, 1e-20, 3.0]]
    models = {"quantized": {"loss": 0.0, "sharpness": 0.1, "top_eigenvalue": 1.0, "surface": surface}}
    shown = card(document(models=models))
    assert re.findall(r"--heat:(\d+)", shown) == ["100", "100", "100", "75", "0", "50", "100", "0", "100"]
    assert "0.000300 or less" in shown


def test_a_narrow_range_is_linear():
    models = {"quantized": {"loss": 1.0, "sharpness": 0.1, "top_eigenvalue": 1.0, "surface": bowl(1.0, 3)}}
    shown = card(document(models=models))
    assert "logarithmic" not in shown
    assert re.findall(r"--heat:(\d+)", shown)[4:6] == ["0", "50"]  # 1 and 2 of 1 to 3


def test_figures_without_surfaces_are_a_table():
    models = {name: {**each, "surface": []} for name, each in document()["models"].items()}
    assert "<svg" not in card(document(models=models))


def test_what_was_not_finite_is_a_dash_and_a_cell_of_its_own():
    found = document()
    found["models"]["float"]["top_eigenvalue"] = None
    found["models"]["float"]["surface"][0][0] = None
    shown = card(found)
    assert ">\u2013</td>" in shown
    assert shown.count('class="none"') == 1


def test_a_page_of_its_own_escapes_what_it_is_told(tmp_path):
    path = tmp_path / "page.html"
    models = document()["models"] | {"uniform": document()["models"]["float"]}
    write_flatness_page(document(models=models), path, "runs/<x>")
    page = path.read_text()
    assert "runs/&lt;x&gt;" in page
    assert page.count('class="surface"') == 3
    assert "Sharpness 0.0958" in page


def test_the_table_names_every_model_once():
    columns, cells = rows(document())
    assert columns == ["", "Loss", "Sharpness", "Top eigenvalue"]
    assert [row[0] for row in cells] == ["Float", "Quantized"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.1, "0.100"), (112.3, "112"), (-0.59, "\u22120.590"), (1.2e-5, "1.20e\u22125"), (None, "\u2013")],
)
def test_figures_have_three_digits(value, shown):
    assert number(value) == shown


def test_a_contour_of_a_cone_is_a_circle():
    values = [[math.hypot(x - 10, y - 10) for x in range(21)] for y in range(21)]
    pieces = list(contour(values, 6.5))
    assert all(
        math.hypot(x - 10, y - 10) == pytest.approx(6.5, abs=0.05) for piece in pieces for x, y in piece
    )
    ends = [tuple(round(v, 9) for v in point) for piece in pieces for point in piece]
    assert all(ends.count(point) == 2 for point in ends), "closed: every end is one other piece's"
    assert sum(math.dist(*piece) for piece in pieces) == pytest.approx(2 * math.pi * 6.5, rel=0.01)


@pytest.mark.parametrize("high", [(0, 2), (1, 3)])
def test_a_saddle_joins_the_corners_that_its_middle_is_on_the_side_of(high):
    corners = {
        at: (2.0 if at in high else -1.0) for at in range(4)
    }  # the middle is above 0: the highs hang on
    values = [[corners[0], corners[1]], [corners[3], corners[2]]]
    places = [(0, 0), (1, 0), (1, 1), (0, 1)]
    for piece in contour(values, 0.0):
        middle = [(a + b) / 2 for a, b in zip(*piece, strict=True)]
        nearest = min(range(4), key=lambda at: math.dist(middle, places[at]))
        assert nearest not in high, "a line goes round each low corner"


def test_a_contour_leaves_out_what_is_not_known():
    assert list(contour([[0.0, 1.0], [math.nan, 1.0]], 0.5)) == []


def test_levels_are_round_and_inside():
    assert contour_levels(0.3, 2.7, True) == [0.5, 1.0, 2.0]
    assert contour_levels(0.004, 3.0, True) == [0.01, 0.03, 0.1, 0.3, 1.0]
    assert contour_levels(1.0, 1.9, False) == [1.2, 1.4, 1.6, 1.8]
    assert contour_levels(1.0, 1.0, False) == []


def models(**changes):
    return {"models": {"quantized": {**document()["models"]["quantized"], **changes}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "of another version; got 2"),
        ({"models": {}}, "no figures of its models"),
        ({"radius": "wide"}, "no figures of its models"),
        (models(sharpness="steep"), "no figures of its models"),
        (models(surface=[[1.0, 2.0], [1.0]]), "no figures of its models"),
        (models(surface=[[1.0, 2.0, 3.0]]), "no figures of its models"),
        (models(surface=[[1.0] * 4] * 4), "no figures of its models"),
        (models(surface=3), "no figures of its models"),
    ],
)
def test_a_damaged_file_is_one_clear_error(change, message, tmp_path):
    (tmp_path / FILE).write_text(json.dumps(document(**change)))
    with pytest.raises(FormatError, match=message) as caught:
        read_flatness(tmp_path)
    assert str(tmp_path) in str(caught.value)
    (tmp_path / FILE).write_text(json.dumps(document())[:100])
    with pytest.raises(FormatError, match="not valid JSON"):
        read_flatness(tmp_path)
