"""Log-likelihoods are the sum of the logs of the tokens' probabilities, however rows are batched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.errors import DataError, TrainingDiverged
from bitsmith.tasks.likelihood import log_likelihoods, split
from tests.tasks.language import SIZE, Ascii, Bigram, History, Next, Pieces, log_probability, slowly

TEXTS = [("37+48=", "085\n"), ("a", "b"), ("The cat", " sat on the mat"), ("x" * 30, "y"), ("ab", "cdefgh")]


def pairs_of(texts=TEXTS):
    return [split(Ascii(), prompt, continuation) for prompt, continuation in texts]


def test_a_bigram_scores_by_its_formula():
    found = log_likelihoods(Bigram(), pairs_of(), context=64)
    expected = [log_probability(prompt + after, len(prompt)) for prompt, after in TEXTS]
    assert [one.total for one in found] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_neither_padding_nor_batching_changes_a_score(batch_size):
    model = History().eval()
    found = log_likelihoods(model, pairs_of(), context=64, batch_size=batch_size)
    assert [one.total for one in found] == pytest.approx(
        [slowly(model, *pair) for pair in pairs_of()], rel=1e-4
    )


token_lists = st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(pairs=st.lists(st.tuples(token_lists, token_lists), min_size=1, max_size=6), size=st.integers(1, 7))
def test_any_rows_in_any_batches_score_as_one_by_one(pairs, size):
    model = History(seed=1).eval()
    found = log_likelihoods(model, pairs, context=32, batch_size=size)
    for one, (prompt, continuation) in zip(found, pairs, strict=True):
        assert one.total == pytest.approx(slowly(model, prompt, continuation), rel=1e-4, abs=1e-4)


def test_of_a_long_prompt_the_end_is_kept():
    model = History().eval()
    prompt, continuation = list(range(60)), [7, 8, 9]
    (found,) = log_likelihoods(model, [(prompt, continuation)], context=10)
    # ten tokens go in, the last of the continuation does not: 8 of the prompt, then 7, 8
    assert model.longest == 10
    assert found.total == pytest.approx(slowly(model, prompt[-8:], continuation), rel=1e-4)


def test_a_continuation_may_fill_the_context_but_not_exceed_it():
    model = History().eval()
    (found,) = log_likelihoods(model, [([1, 2, 3], list(range(10)))], context=10)
    assert found.total == pytest.approx(slowly(model, [3], list(range(10))), rel=1e-4)
    with pytest.raises(DataError, match=r"continuation 0: .*longer than the model's context; got 11 tokens"):
        log_likelihoods(model, [([1, 2, 3], list(range(11)))], context=10)


def test_greedy_says_what_greedy_decoding_would_write():
    found = log_likelihoods(Next(), pairs_of([("a", "bcd"), ("a", "bce"), ("a", "c"), ("b", "c")]), context=8)
    assert [one.greedy for one in found] == [True, False, False, True]


def test_the_seam_is_found_where_the_tokens_are_encoded_together():
    assert split(Pieces(), "a", " bc") == ([2], [0, 4])
    assert split(Pieces(), "a ", "bc") == ([2], [0, 4])  # the space became part of " b"
    assert split(Pieces(), "a ", "c") == ([2, 1], [4])


@pytest.mark.parametrize(("prompt", "after", "what"), [("", "b", "prompt"), ("a", "", "continuation")])
def test_nothing_is_scored_from_or_for_nothing(prompt, after, what):
    with pytest.raises(DataError, match=f"the {what} has no tokens"):
        split(Ascii(), prompt, after)
    ids = Ascii().encode
    with pytest.raises(DataError, match=f"the {what} has no tokens"):
        log_likelihoods(Bigram(), [(ids(prompt), ids(after))], context=8)


def test_training_goes_on_as_it_was():
    model = History().train()
    model.dropout.eval()
    log_likelihoods(model, pairs_of(), context=64)
    assert model.training
    assert not model.dropout.training
    model.dropout.train()
    first, second = (log_likelihoods(model, pairs_of(), context=64) for _ in range(2))
    assert first == second  # nothing was dropped


def test_progress_counts_rows():
    ticks = []
    pairs = pairs_of()
    log_likelihoods(Bigram(), pairs, context=64, batch_size=2, progress=lambda *tick: ticks.append(tick))
    assert ticks == [(2, 5), (4, 5), (5, 5)]


def test_a_model_that_answers_nan_is_no_model():
    model = History()
    with torch.no_grad():
        model.head.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="not a number"):
        log_likelihoods(model, pairs_of(), context=64)
