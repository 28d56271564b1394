"""Scores of a language model: multiple choice by log-likelihood, and answers that it writes out itself.

Models are any causal modules from tokens (N, T) int64 to logits (N, T, V): float, prepared or packed. The
measures are those of lm-evaluation-harness: acc is `accuracy`, acc_bytes is `normalized_accuracy` (length in
bytes, so that tokenizers compare), the standard error is that of a sample's mean. Few-shot prompts are not
made here: write them into the question.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from torch import nn

from bitsmith.errors import DataError
from bitsmith.tasks.generation import generate
from bitsmith.tasks.likelihood import Tick, log_likelihoods, split
from bitsmith.tasks.questions import MultipleChoice, OpenQuestion, Question
from bitsmith.tasks.tokens import Tokenizer

MOST_TOKENS = 256  # of an answer, where the context has room
# A minus after a digit, a letter or a bracket subtracts; commas count only between groups of three digits.
_NUMBER = re.compile(r"(?:(?<![\w)])[-−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)


@dataclass(frozen=True)
class Choice:
    """One question of multiple choice: ln p of each choice in nats, its length in bytes, and which is
    right."""

    log_likelihoods: tuple[float, ...]
    lengths: tuple[int, ...]
    correct: int

    @property
    def chosen(self) -> int:
        """The likeliest choice; the first of equals."""
        return self.log_likelihoods.index(max(self.log_likelihoods))

    @property
    def chosen_normalized(self) -> int:
        """The likeliest choice per byte; the first of equals."""
        rates = [total / length for total, length in zip(self.log_likelihoods, self.lengths, strict=True)]
        return rates.index(max(rates))


@dataclass(frozen=True)
class ChoiceScore:
    """The answers to a set of multiple-choice questions."""

    answers: tuple[Choice, ...]

    def metrics(self) -> dict[str, float]:
        """How many questions; the share that is right by likelihood, and by likelihood per byte."""
        plain = [answer.chosen == answer.correct for answer in self.answers]
        normalized = [answer.chosen_normalized == answer.correct for answer in self.answers]
        return {
            "questions": len(self.answers),
            **_measures("accuracy", plain),
            **_measures("normalized_accuracy", normalized),
        }


@dataclass(frozen=True)
class Written:
    """One answer that the model wrote: its text, and whether it says what was ``expected``."""

    text: str
    expected: str

    @property
    def right(self) -> bool:
        """See `same_answer`."""
        return same_answer(self.text, self.expected)


@dataclass(frozen=True)
class WrittenScore:
    """The answers to a set of open questions."""

    answers: tuple[Written, ...]

    def metrics(self) -> dict[str, float]:
        """How many questions, and the share that is right."""
        right = [answer.right for answer in self.answers]
        return {"questions": len(right), **_measures("accuracy", right)}


def _measures(name: str, right: Sequence[bool]) -> dict[str, float]:
    return {name: sum(right) / len(right), f"{name}_standard_error": standard_error(right)}


def standard_error(right: Sequence[bool]) -> float:
    """√(p(1-p)/(n-1)) of a share p of n answers: the sample's standard deviation over √n.

    0 for a single answer, which says nothing about spread.
    """
    share = sum(right) / len(right)
    return math.sqrt(share * (1 - share) / max(len(right) - 1, 1))


def multiple_choice(
    model: nn.Module,
    tokenizer: Tokenizer,
    questions: Sequence[MultipleChoice],
    *,
    context: int,
    batch_size: int = 16,
    progress: Tick | None = None,
) -> ChoiceScore:
    """Which choice the model finds likeliest after the prompt, for each question.

    context: the most tokens that the model takes; of longer prompts the end is kept, longer choices are
    refused. Lengths are those of a choice without the space around it. Raises DataError, TrainingDiverged.
    """
    _not_empty(questions)
    pairs = [
        split(tokenizer, question.prompt, choice, f"question {i}, choice {k}")
        for i, question in enumerate(questions)
        for k, choice in enumerate(question.choices)
    ]
    found = iter(log_likelihoods(model, pairs, context=context, batch_size=batch_size, progress=progress))
    return ChoiceScore(
        tuple(
            Choice(
                tuple(next(found).total for _ in question.choices),
                tuple(len(choice.strip().encode()) or len(choice.encode()) for choice in question.choices),
                question.correct,
            )
            for question in questions
        )
    )


def exact_match(
    model: nn.Module,
    tokenizer: Tokenizer,
    questions: Sequence[OpenQuestion],
    *,
    context: int,
    max_tokens: int | None = None,
    batch_size: int = 16,
    progress: Tick | None = None,
) -> WrittenScore:
    """What the model writes after each prompt, greedily, until a stop string of the question.

    max_tokens: of an answer; half of the context where not given, 256 at most. Raises DataError,
    TrainingDiverged.
    """
    _not_empty(questions)
    texts = generate(
        model,
        tokenizer,
        [question.prompt for question in questions],
        [question.stop for question in questions],
        context=context,
        max_tokens=min(MOST_TOKENS, context // 2) if max_tokens is None else max_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    pairs = zip(texts, questions, strict=True)
    return WrittenScore(tuple(Written(text, question.answer) for text, question in pairs))


def score(
    model: nn.Module,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    context: int,
    max_tokens: int | None = None,
    batch_size: int = 16,
    progress: Tick | None = None,
) -> ChoiceScore | WrittenScore:
    """`multiple_choice` or `exact_match`, whichever the questions are; one kind at a time."""
    settings = {"context": context, "batch_size": batch_size}
    choices = [question for question in questions if isinstance(question, MultipleChoice)]
    written = [question for question in questions if isinstance(question, OpenQuestion)]
    if choices and written:
        raise DataError("one kind of questions at a time", where="score", got="both kinds")
    if choices:
        return multiple_choice(model, tokenizer, choices, **settings, progress=progress)
    return exact_match(model, tokenizer, written, **settings, max_tokens=max_tokens, progress=progress)


def same_answer(text: str, expected: str) -> bool:
    """Whether ``text`` says ``expected``: its last number where a number is expected, else word for word."""
    wanted = _as_number(expected)
    if wanted is None:
        return text.strip() == expected.strip()
    return last_number(text) == wanted


def last_number(text: str) -> Decimal | None:
    """The last number in a text, exactly: "so 1,000.50 dollars." is 1000.5; None where there is none."""
    found = _NUMBER.findall(text)
    return _decimal(found[-1]) if found else None


def _as_number(text: str) -> Decimal | None:
    """The number that the whole text is ("18", "18.0", "$1,000"), or None."""
    match = _NUMBER.fullmatch(text.strip().lstrip("$"))
    return _decimal(match[0]) if match else None


def _decimal(digits: str) -> Decimal:
    return Decimal(digits.replace(",", "").replace("−", "-"))


def _not_empty(questions: Sequence[Question]) -> None:
    if not questions:
        raise DataError("there are no questions", where="scoring", got="0", expected="at least one")
