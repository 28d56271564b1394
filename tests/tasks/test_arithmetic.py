"""The embedded arithmetic: right answers, splits that share nothing, rows whose targets are the answers."""

import pytest
import torch
import torch.nn.functional as F

from bitsmith.errors import DataError
from bitsmith.tasks.arithmetic import arithmetic, as_rows, as_text
from bitsmith.train.distillation import IGNORED
from tests.tasks.language import Ascii, Bigram, log_probability


def numbers(question):
    """(x, sign, y) of "07+12="."""
    sign = question.prompt[2]
    x, y = question.prompt.removesuffix("=").split(sign)
    return int(x), sign, int(y)


def test_every_answer_is_right():
    for questions in arithmetic().values():
        for question in questions:
            x, sign, y = numbers(question)
            assert int(question.answer) == (x + y if sign == "+" else x - y)
            assert len(question.prompt + question.answer) == 9


def test_all_sums_and_all_differences_are_there_once():
    asked = sorted(numbers(question) for questions in arithmetic().values() for question in questions)
    everything = [(x, "+", y) for x in range(100) for y in range(100)]
    everything += [(x, "-", y) for x in range(100) for y in range(x + 1)]
    assert asked == sorted(everything)


def test_no_problem_is_in_two_splits_even_turned_round():
    splits = arithmetic(largest=30, seed=5)
    pairs = {name: {frozenset(numbers(q)[::2]) for q in questions} for name, questions in splits.items()}
    assert list(pairs) == ["train", "val", "test"]
    assert not pairs["train"] & pairs["val"]
    assert not pairs["train"] & pairs["test"]
    assert not pairs["val"] & pairs["test"]
    total = 31 * 32 // 2
    assert [len(pairs[name]) for name in pairs] == [total - 2 * 50, 50, 50]


def test_the_seed_decides():
    assert arithmetic(20, seed=1) == arithmetic(20, seed=1)
    assert arithmetic(20, seed=1)["test"] != arithmetic(20, seed=2)["test"]


def test_as_text_it_is_one_line_a_problem():
    questions = arithmetic()["val"]
    lines = as_text(questions).splitlines()
    assert len(lines) == len(questions)
    assert lines[0] == questions[0].prompt + questions[0].answer


def test_the_targets_of_a_row_are_its_answer_and_the_end_of_its_line():
    questions = arithmetic()["test"][:7]
    tokens, targets = as_rows(questions, Ascii())
    assert tokens.shape == targets.shape == (7, 9)
    assert tokens.dtype == targets.dtype == torch.int64
    for question, row, target in zip(questions, tokens.tolist(), targets.tolist(), strict=True):
        assert Ascii().decode(row) == question.prompt + question.answer
        assert target[:5] == [IGNORED] * 5
        assert Ascii().decode(target[5:]) == question.answer + "\n"


def test_cross_entropy_of_the_rows_is_that_of_the_answers():
    questions = arithmetic(largest=9)["train"]
    tokens, targets = as_rows(questions, Ascii())
    loss = F.cross_entropy(Bigram()(tokens).flatten(0, 1), targets.flatten())
    total = sum(log_probability(f"{q.prompt}{q.answer}\n", len(q.prompt)) for q in questions)
    assert loss.item() == pytest.approx(-total / (len(questions) * 3), rel=1e-5)


def test_shorter_rows_are_padded_without_counting():
    short, long = arithmetic(9)["test"][0], arithmetic(99)["test"][0]
    tokens, targets = as_rows([short, long], Ascii())
    assert targets[0].tolist() == [IGNORED] * 3 + Ascii().encode(f"{short.answer}\n") + [IGNORED] * 3
    assert tokens[0, 6:].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"largest": 5}, "largest.*got 5"),
        ({"held_out": 0.5}, "held_out.*got 0.5"),
        ({"held_out": 0}, "held_out"),
    ],
)
def test_impossible_sets_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        arithmetic(**arguments)
