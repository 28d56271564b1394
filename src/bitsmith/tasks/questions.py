"""Questions from files of JSON lines: multiple choice, and questions whose answer is written out.

Three layouts, told apart by their keys: our own ({"question", "choices", "answer"} and {"question",
"answer"}), taken word for word; LLM-Adapters' ({"instruction", "input", "answer"}: ARC, BoolQ, PIQA,
WinoGrande, OpenBookQA, SocialIQA, SVAMP), whose options stand in the text; and GSM8K's, whose answer ends in
"#### 18". The latter two become "Question: ...\\nAnswer:", as lm-evaluation-harness puts them, and the
*texts* of the options are scored, not their labels ("answer3"): a small model knows the former long before it
can follow the latter. In WinoGrande a choice is the option with the rest of its sentence. Nothing is
downloaded.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsmith.errors import DataError

LAYOUTS = 'the keys "question", "answer" and, of multiple choice, "choices"; or "instruction" and "answer"'
END_OF_LINE = ("\n",)
END_OF_ANSWER = ("\n\n", "\nQuestion:")  # GSM8K reasons over several lines
_PREAMBLE = re.compile(r"Please .*?(?:question|sentence): ", re.DOTALL)
_LABELS = re.compile(r"\s*Answer format: (\w+(?:/\w+)+)\s*$")
_WORKED = re.compile(r"####\s*(\S.*?)\s*$")


@dataclass(frozen=True)
class MultipleChoice:
    """``choices`` continue ``prompt`` as they are (spaces included); ``correct`` is the index of the right
    one."""

    prompt: str
    choices: tuple[str, ...]
    correct: int


@dataclass(frozen=True)
class OpenQuestion:
    """``answer`` is what should be written after ``prompt``, before any string of ``stop``."""

    prompt: str
    answer: str
    stop: tuple[str, ...] = END_OF_LINE


Question = MultipleChoice | OpenQuestion


def read_questions(path: str | os.PathLike[str], limit: int | None = None) -> list[Question]:
    """The questions of a file, all of one kind; the first ``limit`` where given. Empty lines are skipped.

    Raises DataError with the number of the first line that is wrong.
    """
    if limit is not None and limit < 1:
        raise DataError(
            "no question is left to ask", where="limit", got=limit, expected="a whole number >= 1"
        )
    questions: list[Question] = []
    for number, line in enumerate(_lines(Path(path)), start=1):
        if limit is not None and len(questions) == limit:
            break
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        question = parse(_fields(line, where), where)
        if questions and type(question) is not type(questions[0]):
            kinds = {MultipleChoice: "multiple choice", OpenQuestion: "a question without choices"}
            raise DataError(
                "a file holds one kind of questions",
                where=where,
                got=kinds[type(question)],
                expected=f"{kinds[type(questions[0])]}, as before",
                remedy="Split the file in two",
            )
        questions.append(question)
    if not questions:
        raise DataError("there are no questions", where=str(path))
    return questions


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines(): U+2028 and its like may stand inside of a JSON string.
        return path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError("there is no such file", where=str(path), remedy="Check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"this file cannot be read as UTF-8 text ({error})", where=str(path)) from None


def _fields(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"this line is not JSON ({error})", where=where, expected="one JSON object a line"
        ) from None
    if not isinstance(fields, dict):
        raise DataError("this line is no question", where=where, got=_short(fields), expected="a JSON object")
    return fields


def parse(fields: dict[str, Any], where: str = "question") -> Question:
    """The question that one JSON object describes, in any of the layouts. Raises DataError."""
    if "answer" not in fields or not ("question" in fields or "instruction" in fields):
        raise DataError(
            "this is none of the known layouts",
            where=where,
            got=f"the keys {', '.join(map(repr, fields)) or 'of an empty object'}",
            expected=LAYOUTS,
        )
    if "instruction" in fields:
        return _adapters(fields, where)
    prompt = _text(fields, "question", where)
    if "choices" in fields:
        return _plain_choice(prompt, fields, where)
    answer = _text(fields, "answer", where)
    worked = _WORKED.search(answer)
    if worked:
        return OpenQuestion(_asked(prompt), worked[1], END_OF_ANSWER)
    return OpenQuestion(prompt, answer)


def _plain_choice(prompt: str, fields: dict[str, Any], where: str) -> MultipleChoice:
    choices, answer = fields["choices"], fields["answer"]
    good = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
    if not good:
        expected = "a list of two or more texts that are not empty"
        raise DataError(
            "these are no choices", where=f"{where}: choices", got=_short(choices), expected=expected
        )
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(
            "the answer names none of the choices, or several",
            where=f"{where}: answer",
            got=_short(answer),
            expected=f"0 to {len(choices) - 1}, or the text of one choice",
        )
    return MultipleChoice(prompt, tuple(choices), answer)


def _adapters(fields: dict[str, Any], where: str) -> Question:
    """LLM-Adapters' layout (2304.01933): "Please ...: QUESTION Answer1: A Answer2: B Answer format:
    answer1/answer2"."""
    text, answer = _text(fields, "instruction", where), _text(fields, "answer", where).strip()
    if fields.get("input"):
        text += "\n" + _text(fields, "input", where)
    listed = _LABELS.search(text)
    if listed is None:
        return OpenQuestion(_asked(text), answer, END_OF_ANSWER)
    labels = listed[1].split("/")
    if labels.count(answer) != 1:
        raise DataError(
            "the answer names none of the options",
            where=f"{where}: answer",
            got=repr(answer),
            expected=" or ".join(labels),
        )
    correct = labels.index(answer)
    stem, options = _options(text[: listed.start()], labels, where)
    stem = _PREAMBLE.sub("", stem, count=1)
    before, blank, after = stem.partition("_")
    if labels[0].startswith("option") and blank:  # WinoGrande: the sentence itself, its blank filled in
        return MultipleChoice(before.rstrip(), tuple(f" {option}{after}" for option in options), correct)
    return MultipleChoice(_asked(stem), tuple(f" {option}" for option in options), correct)


def _options(text: str, labels: list[str], where: str) -> tuple[str, list[str]]:
    """(question, options) of "QUESTION Answer1: A Answer2: B"; the labels themselves where no text has
    them."""
    if not labels[0][-1].isdigit():  # BoolQ: true/false stand for themselves
        return text, labels
    marks = [f"{label.capitalize()}:" for label in labels]
    found = re.fullmatch(r"\s*(.+?)" + "".join(rf"\s*{mark}\s*(.+?)" for mark in marks), text, re.DOTALL)
    if found is None:
        raise DataError(
            "the options are not all in the text",
            where=f"{where}: instruction",
            got=_short(text),
            expected=f"{', '.join(marks)} in this order, a text after each",
        )
    question, *options = found.groups()
    return question, [option.strip() for option in options]


def _asked(question: str) -> str:
    return f"Question: {question.strip()}\nAnswer:"


def _text(fields: dict[str, Any], key: str, where: str) -> str:
    """A text that is not empty; a bare number is taken for its digits."""
    value = fields[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{key!r} is no text",
            where=f"{where}: {key}",
            got=_short(value),
            expected="a text that is not empty",
        )
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
