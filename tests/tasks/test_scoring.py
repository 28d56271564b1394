"""Accuracies are those of the choices' known probabilities; answers count by what they say."""

import math
import statistics
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitsmith.errors import DataError
from bitsmith.tasks.questions import MultipleChoice, OpenQuestion
from bitsmith.tasks.scoring import (
    exact_match,
    last_number,
    multiple_choice,
    same_answer,
    score,
    standard_error,
)
from tests.tasks.language import Ascii, Bigram, Next, log_probability

QUESTIONS = [
    MultipleChoice("Water is", (" wet", " dry", " a kind of stone"), 0),
    MultipleChoice("Two and two are", (" four", " five"), 1),
    MultipleChoice("The sun", (" rises in the east", " sets"), 0),
    MultipleChoice("ab", ("c", "cdefghijkl", "d"), 2),
]


def expected_choices():
    """[(ln p of each choice, the likeliest, the likeliest per byte)], from the bigram's formula."""
    found = []
    for question in QUESTIONS:
        totals = [log_probability(question.prompt + c, len(question.prompt)) for c in question.choices]
        rates = [total / len(c.strip()) for total, c in zip(totals, question.choices, strict=True)]
        found.append((totals, totals.index(max(totals)), rates.index(max(rates))))
    return found


def test_each_choice_has_the_likelihood_of_its_tokens():
    answers = multiple_choice(Bigram(), Ascii(), QUESTIONS, context=64).answers
    for answer, (totals, chosen, chosen_normalized) in zip(answers, expected_choices(), strict=True):
        assert answer.log_likelihoods == pytest.approx(totals, rel=1e-5)
        assert answer.chosen == chosen
        assert answer.chosen_normalized == chosen_normalized


def test_length_decides_for_some_of_these_questions():
    assert any(chosen != normalized for _, chosen, normalized in expected_choices())


def test_accuracies_are_shares_of_right_choices():
    metrics = multiple_choice(Bigram(), Ascii(), QUESTIONS, context=64, batch_size=3).metrics()
    right = [chosen == q.correct for q, (_, chosen, _) in zip(QUESTIONS, expected_choices(), strict=True)]
    normalized = [n == q.correct for q, (_, _, n) in zip(QUESTIONS, expected_choices(), strict=True)]
    assert metrics == {
        "questions": 4,
        "accuracy": statistics.mean(right),
        "accuracy_standard_error": pytest.approx(statistics.stdev(right) / math.sqrt(4)),
        "normalized_accuracy": statistics.mean(normalized),
        "normalized_accuracy_standard_error": pytest.approx(statistics.stdev(normalized) / math.sqrt(4)),
    }


def test_length_is_counted_in_bytes_without_the_space_before():
    class Utf8(Ascii):
        def encode(self, text):
            return [byte % 128 for byte in text.encode()]

    (answer,) = multiple_choice(
        Bigram(), Utf8(), [MultipleChoice("a", (" é", " b", " "), 1)], context=8
    ).answers
    assert answer.lengths == (2, 1, 1)


def test_equal_choices_give_the_first():
    (answer,) = multiple_choice(Bigram(), Ascii(), [MultipleChoice("a", ("bc", "bc"), 1)], context=8).answers
    assert (answer.chosen, answer.chosen_normalized) == (0, 0)


def test_what_is_too_long_is_named():
    with pytest.raises(DataError, match="longer than the model's context"):
        multiple_choice(Bigram(), Ascii(), QUESTIONS, context=8)


@given(st.lists(st.booleans(), min_size=2, max_size=50))
def test_the_standard_error_is_that_of_a_mean(right):
    assert standard_error(right) == pytest.approx(statistics.stdev(map(int, right)) / math.sqrt(len(right)))


def test_one_answer_has_no_spread():
    assert standard_error([True]) == 0


def test_written_answers_are_compared_until_the_stop_string():
    questions = [
        OpenQuestion("a", "bcd", ("e",)),  # writes bcd
        OpenQuestion("a", "bcde", ("e",)),
        OpenQuestion("/", "0123", ("4",)),  # writes 0123
        OpenQuestion("+ -./", "123.0", ("4",)),
        OpenQuestion("/", "124", ("4",)),
    ]
    found = exact_match(Next(), Ascii(), questions, context=32)
    assert [answer.text for answer in found.answers] == ["bcd", "bcd", "0123", "0123", "0123"]
    assert [answer.right for answer in found.answers] == [True, False, True, True, False]
    assert found.metrics()["accuracy"] == 0.6
    assert found.metrics()["accuracy_standard_error"] == pytest.approx(math.sqrt(0.6 * 0.4 / 4))


def test_an_answer_has_half_of_the_context_unless_told():
    question = OpenQuestion("A", "?", ())
    assert len(exact_match(Next(), Ascii(), [question], context=20).answers[0].text) == 10
    assert len(exact_match(Next(), Ascii(), [question], context=20, max_tokens=3).answers[0].text) == 3


def test_score_takes_either_kind_but_not_both():
    asked = OpenQuestion("a", "b", ("c",))
    assert score(Next(), Ascii(), [asked], context=8, max_tokens=2).metrics()["accuracy"] == 1
    assert "normalized_accuracy" in score(Bigram(), Ascii(), QUESTIONS, context=64).metrics()
    with pytest.raises(DataError, match="one kind of questions at a time"):
        score(Next(), Ascii(), [asked, QUESTIONS[0]], context=64)
    with pytest.raises(DataError, match="there are no questions"):
        score(Next(), Ascii(), [], context=64)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"),
        ("The answer is 18.", "18"),
        ("She has 1,000 dollars", "1000"),
        ("$1,234,567.50 in all", "1234567.50"),
        ("3 apples and 4 pears, so 7", "7"),
        ("7-3", "3"),
        ("(2)-5", "5"),
        ("x = -3", "-3"),
        ("it is −4 degrees", "-4"),
        ("the numbers 1,2,3", "3"),
        ("085", "85"),
        (".5", "0.5"),
        ("0.1", "0.1"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@given(
    number=st.decimals(-(10**9), 10**9, places=2),
    before=st.sampled_from(["", "so ", "12 and 3 are ", "= ", "#### ", "(", "$"]),
    after=st.sampled_from(["", ".", " apples", ", I think", "\n"]),
)
def test_a_number_is_found_however_it_is_written(number, before, after):
    for written in (f"{number:f}", f"{number:,f}"):
        assert last_number(before + written + after) == number
        assert same_answer(before + written + after, f"{number:f}")
    assert not same_answer(f"{before}{number:f}{after}", f"{number + 1:f}")


@pytest.mark.parametrize(
    ("text", "expected", "same"),
    [
        (" 18.0", "18", True),
        ("1,000", "1000", True),
        ("17 + 1 = 18", "18.0", True),
        ("nothing", "18", False),
        (" Paris", "Paris", True),
        ("in Paris", "Paris", False),
        ("paris", "Paris", False),
        ("B12", "B12", True),
        ("B13 12", "B12", False),
    ],
)
def test_numbers_count_by_value_and_words_by_letter(text, expected, same):
    assert same_answer(text, expected) is same
