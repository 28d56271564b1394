"""Text under shift: as many errors as said, of the kinds said; windows of the changed text."""

import random
from collections import Counter

import pytest
import torch

from bitsmith.tasks import build, load
from bitsmith.tasks.suites import chosen, figures, measure_shifts
from bitsmith.tasks.text_shifts import CAPITALS, TYPOS, casing, docstrings, neighbours, typos

LETTERS = "the quick brown fox jumps over the lazy dog while Nobody Watches " * 300


def test_neighbours_are_mutual_and_beside_each_other():
    near = neighbours()
    assert set("".join(near.values())) == set(near) == set("abcdefghijklmnopqrstuvwxyz")
    assert all(key in near[other] for key, others in near.items() for other in others)
    assert set(near["g"]) == set("tyfhvb")
    assert set(near["q"]) == set("wa")


@pytest.mark.parametrize("severity", [1, 3])
def test_typos_hit_their_share_of_the_letters_in_three_ways(severity):
    found = typos(LETTERS, severity, random.Random(0))
    letters = sum(letter.isalpha() for letter in LETTERS)
    dropped = len(LETTERS) - len(found)
    assert dropped / letters == pytest.approx(TYPOS[severity - 1] / 3, rel=0.25)


def test_a_typo_is_a_neighbour_an_exchange_or_a_gap():
    kinds = Counter()
    for seed in range(400):
        found = typos("flower", 5, random.Random(seed))
        if found == "flower":
            kinds["none"] += 1
        elif len(found) < 6:
            kinds["gap"] += 1
        elif sorted(found) == sorted("flower"):
            kinds["exchange"] += 1
        else:
            wrong = [(a, b) for a, b in zip("flower", found, strict=True) if a != b]
            kinds["neighbour" if all(b in neighbours()[a] for a, b in wrong) else "several"] += 1
    assert min(kinds[kind] for kind in ("none", "gap", "exchange", "neighbour")) > 30
    assert kinds["none"] / 400 == pytest.approx(0.8**6, abs=0.08)


def test_casing_changes_its_share_of_the_words_and_nothing_else():
    for severity, share in enumerate(CAPITALS, start=1):
        found = casing(LETTERS, severity, random.Random(0))
        assert found.lower() == LETTERS.lower()
        words = found.split()
        assert sum(word.isupper() for word in words) / len(words) == pytest.approx(share, abs=0.03)


def test_docstrings_are_prose_of_this_python():
    text = docstrings(5000)
    assert len(text) == 5000
    assert text == docstrings(5000)
    assert text.count(" ") > 500


def test_a_text_is_measured_in_every_figure_and_worse_when_all_shouts():
    data = load("pydoc", context=64).limited(40)
    model = build("byte_llama", width=16, depth=1, seed=0)
    shifts = chosen(data, "text")
    found = measure_shifts({"float": model}, data, shifts, severities=[1, 5])
    assert [len(entry["float"]) for entry in found.values()] == [2, 2, 1]
    assert set(found["typos"]["float"][0]) == set(data.figures)
    means = figures(found, "float", "loss")
    losses = [one["loss"] for one in found["typos"]["float"]]
    assert means["typos"] == pytest.approx(sum(losses) / 2)
    assert means["mean"] == pytest.approx((means["typos"] + means["casing"] + means["docstrings"]) / 3)
    x, y = shifts[0].rows(5, 0, None)
    assert torch.equal(x[0, 1:], y[0, :-1])
    assert torch.equal(shifts[0].rows(5, 0, None)[0], x)
    assert not torch.equal(shifts[0].rows(5, 1, None)[0][:30], x[:30])
