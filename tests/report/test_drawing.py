"""Plots and pictures: axes that cover their data, widths that say the bits, PNGs that read back."""

import struct
import zlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitsmith.report import svg
from bitsmith.report.png import data_uri, png

ENDS = st.tuples(st.floats(-1e6, 1e6), st.floats(1e-4, 1e6))


@given(ENDS, st.integers(2, 8))
def test_ticks_are_few_even_and_cover_the_data(ends: tuple[float, float], about: int) -> None:
    low, high = ends[0], ends[0] + ends[1]
    found = svg.ticks(low, high, about)
    steps = [b - a for a, b in pairwise(found)]
    slack = 1e-6 * (high - low) + 1e-9 * max(abs(low), abs(high))
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= about + 3
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)


@given(st.floats(1e-9, 1e9), st.floats(1.0, 1e6))
def test_powers_cover_the_data_and_are_few(low: float, ratio: float) -> None:
    found = svg.powers(low, low * ratio)
    assert found[0] <= low * 1.001
    assert found[-1] >= low * ratio * 0.999
    assert 2 <= len(found) <= 10
    assert found == sorted(set(found))


def test_a_constant_has_an_axis() -> None:
    assert len(svg.ticks(0.97, 0.97)) >= 2
    svg.lines([svg.Series("flat", "float", [(0, 1.0), (1, 1.0)])], str, "step", "flat")
    svg.lines([svg.Series("one", "float", [(3, 0.0)])], str, "step", "one point")


@pytest.mark.parametrize("bits", [1, 2, 3.5, 8])
def test_a_width_bar_is_filled_by_its_bits(bits: float) -> None:
    drawn = svg.width_bar(bits, "quant", "label")
    filled = [float(part.split('%"')[0]) for part in drawn.split('width="')[1:] if 'class="f-quant"' in part]
    assert sum(filled) == pytest.approx(11 * bits)
    assert drawn.count('class="track"') == 8


def test_float_and_nothing_are_not_bits() -> None:
    assert "f-quant" not in svg.width_bar(32, "quant", "label")
    assert svg.width_bar(None, "quant", "label") == ""


def test_a_bar_is_as_long_as_its_value() -> None:
    drawn = svg.bars([("shift", [svg.Mark("float", 0.25, "float", "25 %")])], 1.0, "label")
    assert 'width="25.00%"' in drawn


@pytest.mark.parametrize("size", [1, 2, 10, 30, 100])
def test_the_confusion_matrix_shows_each_count_once(size: int) -> None:
    counts = (np.arange(size * size).reshape(size, size) % 7).tolist()
    names = [f"class number {index}" for index in range(size)]
    drawn = svg.heat(counts, names, "label")
    assert drawn.count("<rect") == size * size
    assert f"{names[0]} read as {names[-1]}: {counts[0][-1]}" in drawn


def decode(data: bytes) -> np.ndarray:
    """An independent reader of unfiltered 8-bit PNGs; checks every chunk's checksum."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, pixels, shape = 8, b"", (0, 0, 0)
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            assert depth == 8
            shape = (height, width, {0: 1, 2: 3}[colour])
        pixels += body if kind == b"IDAT" else b""
        at += 12 + length
    rows = np.frombuffer(zlib.decompress(pixels), dtype=np.uint8).reshape(shape[0], -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(shape).transpose(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_reads_back(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (channels, 5, 7))
    assert (decode(png(image / 255)) == image).all()
    assert data_uri(image / 255).startswith("data:image/png;base64,")


def test_a_png_stretches_what_is_not_in_0_to_1() -> None:
    assert decode(png(np.array([[[-2.0, 0.0], [1.0, 2.0]]]))).tolist() == [[[0, 128], [191, 255]]]
    assert decode(png(np.full((2, 1, 1), np.nan))).tolist() == [[[0]]]


def test_lines_make_room_for_a_level_and_for_what_follows_a_moment() -> None:
    drawn = svg.lines(
        [svg.Series("cost", "quant", [(1, 1.4), (2, 1.2)])],
        svg.show_percent,
        "epoch",
        "label",
        level=(1.0, "budget"),
        moment=(2, "decided"),
        until=4,
    )
    assert ">100\u202f%</text>" in drawn
    assert ">budget</text>" in drawn
    assert 'x="33.33%" y="0" dx="6" dy="12" class="tick">decided' in drawn
    assert [f">{epoch}</text>" in drawn for epoch in (1, 2, 3, 4)] == [True] * 4


def test_pairs_name_every_width_of_both_operands() -> None:
    drawn = svg.pairs({(2, 4): 0.75, (32, 8): 0.25, (2, 8): 0.0}, svg.show_percent, "quant", "label")
    assert drawn.count("<rect") == 4
    assert drawn.count('class="track"') == 2
    assert "weights 2, activations 4: 75\u202f%" in drawn
    assert "weights float, activations 8: 25\u202f%" in drawn
