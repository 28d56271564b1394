"""From text to token ids and back: bytes, or the tokenizer that comes with a transformers model.

Both have the same three members and nothing else is asked of a tokenizer. Unlike transformers' own, encoding
adds no special tokens: a text is cut into windows, and a token that stands between them would be predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from bitsmith.errors import DataError, MissingExtra


class Tokenizer(Protocol):
    """What text is turned into tokens with."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 to vocab_size - 1."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids; what is no whole character becomes the replacement character."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8: no vocabulary to learn, nothing that it cannot say."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """One id a byte."""
        return list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int]) -> str:
        """Raises DataError for an id that is no byte."""
        try:
            return bytes(tokens).decode("utf-8", errors="replace")
        except ValueError:
            wrong = next(t for t in tokens if not 0 <= t < 256)
            raise DataError(
                "this token is no byte", where="ByteTokenizer", got=wrong, expected="0 to 255"
            ) from None


class HubTokenizer:
    """The tokenizer of a transformers model, behind the same three members."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)  # with added tokens, which its own vocab_size leaves out

    def encode(self, text: str) -> list[int]:
        """As transformers, without special tokens."""
        # verbose: it would warn that a whole text is longer than a model's positions, which windows see to
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """As transformers, special tokens shown and spaces left as they are."""
        text: str = self.tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name: "bytes", or "hf:PATH_OR_ID". Raises DataError, MissingExtra."""
    if name == "bytes":
        return ByteTokenizer()
    if not name.startswith("hf:"):
        raise DataError(
            "there is no such tokenizer",
            where="data tokenizer",
            got=name,
            expected="bytes, or hf:PATH of a folder with a tokenizer",
        )
    from bitsmith.tasks.hub import from_hub  # transformers is an extra

    path = name.removeprefix("hf:")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtra("language", "transformers", f"tokenizer {name}") from None
    return HubTokenizer(from_hub(AutoTokenizer, path, f"tokenizer {name}", "tokenizer"))


def byte_count(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    """Bytes of UTF-8 that ``tokens`` stand for; exact for bytes themselves, also where a character is cut."""
    return (
        len(tokens) if isinstance(tokenizer, ByteTokenizer) else len(tokenizer.decode(tokens).encode("utf-8"))
    )
