"""Learned widths in the report: how they moved, what they became, how channels spread; the curriculum."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bitsmith.errors import FormatError
from bitsmith.quantization.channel_groups import even_sizes
from bitsmith.report import fractional, write_report
from bitsmith.report.metrics import read_run
from tests.report.fractions import DECIDED, LEARNED, build_fractional, build_progressive
from tests.report.runs import build_run, vit, write
from tests.report.test_html import Document

S = "\u202f"
EACH = [2.0, 2.2, 2.3, 4.0, 8.0]  # of groups of channels
STORED = [2] * 4 + [3] * 3 + [4, 4, 8]


def in_channels(directory: Path, **options: Any) -> Path:
    return build_fractional(
        directory, learned={"conv3.weight": EACH}, stored={"conv3.weight": STORED}, **options
    )


# ---- words


@pytest.mark.parametrize(
    ("learned", "stored", "words"),
    [
        (5.3, 5, f"5.3 bits = 70{S}% 5-bit + 30{S}% 6-bit, stored as 5"),
        (2.6147, 2, f"2.61 bits = 39{S}% 2-bit + 61{S}% 3-bit, stored as 2"),
        (1.5, 2, f"1.5 bits = 50{S}% 1-bit + 50{S}% 2-bit, stored as 2"),
        (5.0, 5, "5 bits, stored as 5"),
        (4.998, 5, "5 bits, stored as 5"),
        (1.0, 1, "1 bit, stored as 1"),
        (8.0000005, 8, "8 bits, stored as 8"),
        (3.5, None, f"3.5 bits = 50{S}% 3-bit + 50{S}% 4-bit"),
    ],
)
def test_a_width_is_a_mixture_of_its_neighbours(learned: float, stored: Any, words: str) -> None:
    assert fractional.sentence([learned], stored) == words


@pytest.mark.parametrize(
    ("learned", "stored", "words"),
    [
        ([2, 2.2, 8, 1.4], [2, 2, 8, 2], "1.4-8 bits, 3.4 on average; stored 3.5"),
        ([2, 2.1, 3.3, 8], [2, 2, 3, 8], "2-8 bits, 3.8 on average; stored 3.8"),
        ([2, 8, 2, 2, 3], 3, "2-8 bits, 3.4 on average; stored 3"),
        ([3.02, 2.98], 3, "3 bits; stored 3"),
        ([2, 4], None, "2-4 bits, 3 on average"),
    ],
)
def test_channels_are_a_range_and_their_mean(learned: list[float], stored: Any, words: str) -> None:
    assert fractional.sentence(learned, stored) == words


# ---- the card


def test_the_table_says_what_each_site_learned_and_is_stored_as(tmp_path: Path) -> None:
    drawn = fractional.card(read_run(build_fractional(tmp_path / "run")))
    text = Document(drawn).text
    assert "Learned and stored bits of 4 sites" in text
    assert f"conv2.weight3.25 bits = 75{S}% 3-bit + 25{S}% 4-bit, stored as 3" in text
    assert f"conv2.input5.3 bits = 70{S}% 5-bit + 30{S}% 6-bit, stored as 3" in text
    assert "conv3.weight3 bits, stored as 3" in text
    assert "<details open>" in drawn


def test_the_motion_ends_at_the_decision(tmp_path: Path) -> None:
    drawn = fractional.card(read_run(build_fractional(tmp_path / "run")))
    assert f"4 tensors learned a real number of bits for {DECIDED} of 400 steps;" in drawn
    assert f"the other {400 - DECIDED} steps trained at exactly these." in drawn
    assert drawn.count(">decided</text>") == drawn.count(">optimizer step</text>") == 2
    assert "Weights from 7.94 to 3.4, decided plan from" in drawn
    curves = re.findall(r'<polyline points="([^"]*)"', drawn)
    assert [len(curve.split()) for curve in curves] == [DECIDED, 2, DECIDED]


def test_an_average_that_does_not_move_has_no_curve(tmp_path: Path) -> None:
    drawn = fractional.card(read_run(build_fractional(tmp_path / "run")))
    assert 'class="curve s-quant"' in drawn
    assert 'class="curve s-acts"' not in drawn


def test_without_a_target_the_averages_stand_alone(tmp_path: Path) -> None:
    run = build_fractional(tmp_path / "run")
    history = json.loads((run / "history.json").read_text())
    for row in history["traces"]:
        del row["FractionalBits.used_average_weight_bits"]
    write(run / "history.json", history)
    drawn = fractional.card(read_run(run))
    assert "Bits of the model on average" in drawn
    assert "target" not in drawn


def test_every_site_has_a_row_of_colours_in_the_colour_of_its_kind(tmp_path: Path) -> None:
    drawn = fractional.card(read_run(build_fractional(tmp_path / "run")))
    rows = re.findall(r'preserveAspectRatio="none" shape-rendering="crispEdges">(.*?)</svg>', drawn)
    named = {re.findall("<title>(.*?) from", row)[0]: row for row in rows}
    assert set(named) == set(LEARNED)
    for site, row in named.items():
        assert set(re.findall('class="f-(.*?)"', row)) == {"quant" if "weight" in site else "acts"}
        widths = [float(wide) for wide in re.findall(r"h([\d.]+)v1", row)]
        assert sum(widths) == pytest.approx(fractional.CELLS, abs=0.01)
        depth = [float(deep) for deep in re.findall('fill-opacity="(.*?)"', row)]
        assert depth == sorted(depth, reverse=True)
        assert depth[0] == 1.0
    assert "conv2.input from 7.97 to 5.3" in drawn


def test_without_traces_the_table_stands_alone(tmp_path: Path) -> None:
    run = build_fractional(tmp_path / "run")
    history = json.loads((run / "history.json").read_text())
    write(run / "history.json", {**history, "traces": []})
    drawn = fractional.card(read_run(run))
    assert "4 tensors learned a real number of bits; a width" in drawn
    assert "a whole one." in drawn
    assert "over the steps" not in drawn
    assert "stored as 3" in drawn


def test_many_sites_are_folded_and_all_there(tmp_path: Path) -> None:
    sites = [f"{name}.{operand}" for name, *_ in vit() for operand in ("weight", "input")]
    learned = {site: [3.5] for site in sites}
    run = build_fractional(tmp_path / "run", learned=learned, layers=vit(), model="digits_vit")
    document = Document(fractional.card(read_run(run)))
    assert all(site in document.text for site in sites)
    assert ("details", "open", "") not in document.attributes


# ---- channels


def test_groups_of_channels_are_those_of_the_training() -> None:
    learned, stored, what = fractional.by_channel(EACH, [3] * 13)
    sizes = even_sizes(13, len(EACH))
    assert learned == [b for b, size in zip(EACH, sizes, strict=True) for _ in range(size)]
    assert stored == [3] * 13
    assert what == "channels"


def test_a_plan_with_one_width_for_all_leaves_the_groups_to_count() -> None:
    assert fractional.by_channel(EACH, 3) == (EACH, [3] * 5, "groups of channels")
    assert fractional.by_channel(EACH, None) == (EACH, [], "groups of channels")


@pytest.mark.parametrize(
    ("widths", "counts"),
    [
        ([2, 2.2, 2.3, 4, 8], {2: 2, 2.5: 1, 4: 1, 8: 1}),
        ([2.24, 2.25, 2.74, 2.75], {2: 1, 2.5: 2, 3: 1}),
        ([7.9999999], {8: 1}),
        ([], {}),
    ],
)
def test_a_histogram_counts_to_the_nearest_half_bit(widths: list[float], counts: dict[float, int]) -> None:
    assert fractional.bins(widths) == counts


def test_channels_have_a_histogram_of_learned_and_of_stored_widths(tmp_path: Path) -> None:
    drawn = fractional.channels(read_run(in_channels(tmp_path / "run")))
    label = (
        "conv3.weight, channels: learned 4 at 2, 2 at 2.5, 2 at 4, 2 at 8, mean 3.7; "
        "stored 4 at 2, 3 at 3, 2 at 4, 1 at 8, mean 3.3"
    )
    assert f'aria-label="{label}"' in drawn
    text = Document(drawn).text
    assert "10 channels: 2-8 bits, 3.7 on average; stored 3.3." in text
    assert drawn.count('class="f-quant learned"') == drawn.count('class="f-quant stored"') == 4
    assert drawn.count('class="mean"') == 2


def test_the_tallest_bars_are_equally_tall(tmp_path: Path) -> None:
    drawn = fractional.channels(read_run(in_channels(tmp_path / "run")))
    for name in ("learned", "stored"):
        heights = re.findall(rf'height="([\d.]+)" rx="2" class="f-quant {name}"', drawn)
        assert max(float(height) for height in heights) == fractional.BAR


def test_the_table_counts_channels_and_not_groups(tmp_path: Path) -> None:
    run = read_run(in_channels(tmp_path / "run"))
    assert "conv3.weight2-8 bits, 3.7 on average; stored 3.3" in Document(fractional.card(run)).text
    assert "mean of its channels" in fractional.card(run)


def test_tensors_with_one_width_have_no_histogram(tmp_path: Path) -> None:
    assert fractional.channels(read_run(build_fractional(tmp_path / "run"))) == ""


# ---- the curriculum


def test_a_curriculum_is_a_staircase(tmp_path: Path) -> None:
    drawn = fractional.curriculum(read_run(build_progressive(tmp_path / "run")))
    assert "<h2>Bits over the steps</h2>" in drawn
    assert "stepped down together: 8, 5.5, 4.25 and 2 bits." in drawn
    assert f"The last 25{S}% of the steps trained at 2 bits." in drawn
    (curve,) = re.findall(r'<polyline points="([^"]*)"', drawn)
    points = [tuple(map(float, point.split(","))) for point in curve.split()]
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairwise(points))


def test_a_width_that_never_moves_is_no_curriculum(tmp_path: Path) -> None:
    assert fractional.curriculum(read_run(build_progressive(tmp_path / "run", [2]))) == ""


# ---- the page


@pytest.mark.parametrize(
    "build", [build_fractional, in_channels, build_progressive], ids=lambda f: f.__name__
)
def test_the_page_nests_and_every_picture_has_words(tmp_path: Path, build: Any) -> None:
    document = Document(write_report(build(tmp_path / "run")).read_text())
    assert "script" not in document.tags
    named = sum((tag, name) == ("svg", "aria-label") for tag, name, _ in document.attributes)
    assert named == sum((tag, name) == ("svg", "role") for tag, name, _ in document.attributes)
    assert all(value for _, name, value in document.attributes if name == "aria-label")


def test_a_run_without_learned_widths_shows_nothing_of_them(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    read = read_run(run)
    cards = (fractional.card, fractional.channels, fractional.curriculum, fractional.style)
    assert [card(read) for card in cards] == ["", "", "", ""]
    page = write_report(run).read_text()
    assert "Fractional" not in page
    assert ".motion" not in page


def test_names_of_sites_are_escaped(tmp_path: Path) -> None:
    evil = '<b>"&.weight'
    run = build_fractional(tmp_path / "run", learned={evil: EACH})
    document = Document(write_report(run).read_text())
    assert evil in document.text
    assert ("section", "class", "card wide") in document.attributes


# ---- reading


@pytest.mark.parametrize(
    ("learned", "message"),
    [
        ([3.5], "learned_bits is not an object of sites; got [3.5]"),
        (None, "learned_bits is not an object of sites"),
        ({"conv2.weight": 3.5}, "learned_bits of conv2.weight are no list of widths; got 3.5"),
        (
            {"conv2.weight": []},
            "learned_bits of conv2.weight are no list of widths; got [], expected numbers",
        ),
        ({"conv2.weight": [3, 0.5]}, "got 0.5, expected numbers from 1 to 8"),
        ({"conv2.weight": [9]}, "got 9, expected numbers from 1 to 8"),
        ({"conv2.weight": [float("nan")]}, "got nan, expected numbers from 1 to 8"),
        ({"conv2.weight": [True]}, "got True, expected numbers from 1 to 8"),
        ({"conv2.weight": ["4"]}, "got 4, expected numbers from 1 to 8"),
    ],
    ids=str,
)
def test_learned_bits_that_make_no_sense(tmp_path: Path, learned: Any, message: str) -> None:
    run = build_run(tmp_path / "run")
    history = json.loads((run / "history.json").read_text())
    write(run / "history.json", {**history, "learned_bits": learned})
    with pytest.raises(FormatError) as caught:
        write_report(run)
    assert str(caught.value).startswith(f"{run / 'history.json'}: learned_bits")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_learned_bits_are_no_training(tmp_path: Path) -> None:
    run = read_run(build_fractional(tmp_path / "run"))
    assert run.learned_bits == LEARNED
    assert set(run.history) == {"float", "qat"}
