"""Sums and differences as text, "37+48=085", made here: a task on which a small model can be really good.

What rounding takes from a language model hardly shows in the perplexity of one that knows little. A
byte-level Llama of half a million parameters learns this within a minute or two of one core, and then
rounding to 3 or 2 bits costs it many answers. All numbers have leading zeros, so that digits of one place
stand at one position: without these the same model needs more than twice the steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitsmith.errors import DataError
from bitsmith.tasks.examples import SPLITS
from bitsmith.tasks.likelihood import split
from bitsmith.tasks.problems import ProblemData
from bitsmith.tasks.questions import END_OF_LINE, OpenQuestion
from bitsmith.tasks.text import tokenizer_for
from bitsmith.tasks.tokens import Tokenizer
from bitsmith.train.distillation import IGNORED


def arithmetic_data(
    seed: int = 0, model: str = "", largest: int = 99, held_out: float = 0.1, tokenizer: str | None = None
) -> ProblemData:
    """The data "arithmetic": `arithmetic` as rows, of which only the answers count.

    tokenizer: "bytes" or "hf:PATH"; without it that of an ``hf:`` model, and bytes with any other.
    """
    known = tokenizer_for(tokenizer, model)
    splits = arithmetic(largest, seed, held_out)
    train, val, test = (as_rows(splits[name], known) for name in SPLITS)
    about = f"sums and differences of numbers up to {largest}; only the answers count"
    return ProblemData(*train, *val, *test, known, name="arithmetic", about=about, seed=seed)


def arithmetic(
    largest: int = 99, seed: int = 0, held_out: float = 0.1
) -> dict[str, tuple[OpenQuestion, ...]]:
    """x+y for x, y in 0..largest, and x-y where it is not negative, in three splits, shuffled by ``seed``.

    held_out: the share of "val", and again of "test". What is split are the unordered pairs {x, y}: x+y, y+x
    and their difference lie in one split, so that no test question is a training one turned round. Raises
    DataError.
    """
    if largest < 9:
        raise DataError("too few problems", where="arithmetic: largest", got=largest, expected="at least 9")
    if not 0 < held_out <= 0.4:
        expected = "more than 0, at most 0.4"
        raise DataError(
            "this share is impossible", where="arithmetic: held_out", got=held_out, expected=expected
        )
    generator = torch.Generator().manual_seed(seed)
    pairs = [(x, y) for x in range(largest + 1) for y in range(x + 1)]
    order = torch.randperm(len(pairs), generator=generator).tolist()
    held = max(1, round(held_out * len(pairs)))
    rows = {"test": order[:held], "val": order[held : 2 * held], "train": order[2 * held :]}
    digits = len(str(largest))
    found = {}
    for name in SPLITS:
        questions = [question for row in rows[name] for question in _questions(pairs[row], digits)]
        mixed = torch.randperm(len(questions), generator=generator).tolist()
        found[name] = tuple(questions[i] for i in mixed)
    return found


def _questions(pair: tuple[int, int], digits: int) -> list[OpenQuestion]:
    """x+y, y+x and x-y of a pair x >= y."""
    x, y = pair
    problems = [(x, "+", y, x + y), (x, "-", y, x - y)] + ([(y, "+", x, x + y)] if x != y else [])
    return [
        OpenQuestion(f"{a:0{digits}d}{sign}{b:0{digits}d}=", f"{result:0{digits + 1}d}", END_OF_LINE)
        for a, sign, b, result in problems
    ]


def as_text(questions: Sequence[OpenQuestion]) -> str:
    """One line a question, its answer included: what a training that takes plain text reads."""
    return "".join(f"{question.prompt}{question.answer}\n" for question in questions)


def as_rows(questions: Sequence[OpenQuestion], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """(tokens, targets), (N, T) int64 each: row n is question n, and logits at t answer for targets[n, t].

    Only the answer and its end of line count: what belongs to the prompt, and padding, is IGNORED. Which
    numbers are asked cannot be known, and trained on whole lines the same model learns much more slowly:
    right in a tenth of the answers after steps that bring it to nine tenths on answers alone.
    """
    pairs = [split(tokenizer, question.prompt, f"{question.answer}\n") for question in questions]
    length = max((len(prompt) + len(answer) for prompt, answer in pairs), default=1) - 1
    tokens = torch.zeros(len(pairs), length, dtype=torch.int64)
    targets = torch.full((len(pairs), length), IGNORED, dtype=torch.int64)
    for row, (prompt, answer) in enumerate(pairs):
        whole = torch.tensor(prompt + answer)
        tokens[row, : len(whole) - 1] = whole[:-1]
        targets[row, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
    return tokens, targets
