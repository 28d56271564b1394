"""Greedy generation writes the likeliest token each time and stops where it is told."""

import pytest
import torch

from bitsmith.errors import DataError, TrainingDiverged
from bitsmith.tasks.generation import before_stop, generate
from tests.tasks.language import Ascii, History, Next


def write(prompts, stops, model=None, **settings):
    settings = {"context": 64, "max_tokens": 6, **settings}
    return generate(model or Next(), Ascii(), prompts, stops, **settings)


def test_it_writes_until_the_stop_string_which_is_cut_off():
    assert write(["a", "a", "a"], [["e"], ["ef"], []]) == ["bcd", "bcd", "bcdefg"]


def test_the_first_stop_string_to_appear_counts():
    assert write(["a"], [["f", "d", ""]]) == ["bc"]
    assert before_stop("one two", ["two", "one"]) == ""
    assert before_stop("one two", []) == "one two"


def test_a_row_that_stopped_leaves_the_others_going():
    assert write(["a", "m", "xyzA", "e"], [["c"], ["q"], ["D"], ["c"]], batch_size=3) == [
        "b",
        "nop",
        "BC",
        "fghijk",
    ]


@torch.no_grad()
def one_by_one(model, prompt, count):
    tokens = Ascii().encode(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return Ascii().decode(tokens[len(prompt) :])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_prompts_of_any_lengths_are_answered_as_if_alone(batch_size):
    model = History(seed=3).eval()
    prompts = ["one", "two", "three", "four", "sixteen", "six", "a"]
    expected = [one_by_one(model, prompt, 6) for prompt in prompts]
    assert write(prompts, [()] * len(prompts), model, batch_size=batch_size) == expected
    assert len(set(expected)) > 3  # the prompts matter


def test_a_long_prompt_is_cut_to_leave_room_for_the_answer():
    model = History(seed=3).eval()
    prompt = "a long prompt of which only the end has room"
    assert write([prompt], [()], model, context=16, max_tokens=6) == [one_by_one(model, prompt[-11:], 6)]
    assert model.longest == 16


@pytest.mark.parametrize("max_tokens", [0, 65])
def test_an_answer_without_room_is_refused(max_tokens):
    with pytest.raises(DataError, match=f"max_tokens: .*got {max_tokens}, expected 1 to 64"):
        write(["a"], [()], max_tokens=max_tokens)


def test_an_empty_prompt_is_refused():
    with pytest.raises(DataError, match="prompt 1: the prompt has no tokens"):
        write(["a", ""], [(), ()])


def test_a_model_that_answers_nan_writes_nothing():
    model = History()
    with torch.no_grad():
        model.head.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="not a number"):
        write(["a"], [()], model)


def test_progress_counts_prompts():
    ticks = []
    write(["a", "b", "cc"], [()] * 3, progress=lambda *tick: ticks.append(tick))
    assert ticks == [(1, 3), (3, 3)]
