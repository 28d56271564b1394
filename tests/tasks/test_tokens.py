"""Tokens: what goes in comes out, and what a tokenizer cannot say is one clear line."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from bitsmith.errors import DataError
from bitsmith.tasks.tokens import ByteTokenizer, byte_count, load_tokenizer


@given(st.text())
def test_bytes_come_back_as_the_text_that_they_were(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert bytes(tokens) == text.encode()
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.decode(tokens) == text


def test_a_character_that_is_cut_is_shown_as_one_and_counted_by_its_bytes() -> None:
    tokens = ByteTokenizer().encode("é")[:1]
    assert ByteTokenizer().decode(tokens) == "\N{REPLACEMENT CHARACTER}"
    assert byte_count(ByteTokenizer(), tokens) == 1


def test_other_tokens_are_counted_by_the_bytes_of_their_text() -> None:
    class Words:
        vocab_size = 3

        def encode(self, text: str) -> list[int]:
            return [["a ", "dog ", "ö "].index(word + " ") for word in text.split()]

        def decode(self, tokens: list[int]) -> str:  # type: ignore[override]
            return "".join(["a ", "dog ", "ö "][token] for token in tokens)

    assert byte_count(Words(), [0, 1, 2, 2]) == 2 + 4 + 3 + 3  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [256, -1])
def test_a_token_that_is_no_byte_is_named(wrong: int) -> None:
    with pytest.raises(DataError, match=f"no byte; got {wrong}, expected 0 to 255"):
        ByteTokenizer().decode([65, wrong])


def test_an_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(DataError, match="no such tokenizer; got words, expected bytes, or hf:PATH"):
        load_tokenizer("words")
