"""The comparison page, and its Pareto front against brute force."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitsmith.errors import BitsmithError, FormatError
from bitsmith.report import write_comparison
from bitsmith.report.compare import pareto_front
from tests.report.runs import CNN, build_run
from tests.report.test_html import Document

COSTS = st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0])
POINTS = st.lists(st.tuples(COSTS, st.sampled_from([0.1, 0.5, 0.7, 0.9, 0.97])), max_size=12)


@given(POINTS)
def test_the_front_is_what_no_other_point_dominates(points: list[tuple[float, float]]) -> None:
    expected = {
        index
        for index, (cost, accuracy) in enumerate(points)
        if not any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in points)
    }
    front = pareto_front(points)
    assert set(front) == expected
    assert len(front) == len(expected)
    assert [points[index] for index in front] == sorted(points[index] for index in front)


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [
        build_run(
            tmp_path / "wide", accuracy=(0.98, 0.93, 0.9778), layers=[(*layer[:4], 8, 8) for layer in CNN]
        ),
        build_run(tmp_path / "narrow", accuracy=(0.98, 0.80, 0.9611)),
        build_run(tmp_path / "worse", accuracy=(0.98, 0.75, 0.9011), verified=False),
    ]
    page = write_comparison(runs, tmp_path / "compare.html")
    assert page == tmp_path / "compare.html"
    html = page.read_text(encoding="utf-8")
    document = Document(html)
    assert "http" not in html.replace("http-equiv", "")
    for text in (
        "3 runs compared",
        "Most accurate: wide",
        "97.8",
        "96.1",
        "90.1",
        "failed",
        "conv3",
        "3 / 3",
        "8 / 8",
    ):
        assert text in document.text
    assert html.count("On the front: narrow and wide") >= 2
    assert html.count("hollow") >= 2


def test_a_table_that_is_wider_than_a_phone_shows_that_it_goes_on(tmp_path: Path) -> None:
    html = write_comparison([build_run(tmp_path / "run", optional=False)], tmp_path / "c.html").read_text(
        "utf-8"
    )
    assert '<div class="scroll" tabindex="0" role="region" aria-label="Runs side by side">' in html
    box = html.partition("\n.scroll {")[2].partition("}")[0]
    # the shade stays at the edge of the box; its cover moves with the table, and lies over it at either end
    assert box.count("var(--shade)") == box.count("no-repeat local") == 2
    assert html.count("--shade:") == 2, "one for light pages, one for dark ones"


def test_one_run_and_a_bare_run_can_be_compared(tmp_path: Path) -> None:
    bare = build_run(tmp_path / "bare", optional=False)
    Document(write_comparison([bare], tmp_path / "one.html").read_text(encoding="utf-8"))
    twice = write_comparison([bare, bare], tmp_path / "two.html").read_text(encoding="utf-8")
    assert "2 runs compared" in Document(twice).text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [build_run(tmp_path / folder / "run", optional=False) for folder in ("monday", "tuesday")]
    text = Document(write_comparison(runs, tmp_path / "out.html").read_text(encoding="utf-8")).text
    assert "monday/run" in text
    assert "tuesday/run" in text


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="metrics file"):
        write_comparison([tmp_path], tmp_path / "out.html")
    with pytest.raises(BitsmithError, match="nothing to compare"):
        write_comparison([], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()
