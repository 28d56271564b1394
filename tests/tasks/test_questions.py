"""Files of questions: each layout becomes a prompt with what may follow it, and a wrong line is named."""

import json
import re

import pytest

from benchmarks import _shared_data
from bitsmith.errors import DataError
from bitsmith.tasks.questions import END_OF_ANSWER, MultipleChoice, OpenQuestion, parse, read_questions

ARC = (
    "Please choose the correct answer to the question: Where does rain come from?\n\n"
    "Answer1: clouds Answer2: the sea: deep down Answer3: trees\n\nAnswer format: answer1/answer2/answer3"
)
PIQA = (
    "Please choose the correct solution to the question: To boil water\n\nSolution1: Heat it.\n\n"
    "Solution2: Cool it.\n\nAnswer format: solution1/solution2"
)
BOOLQ = (
    "Please answer the following question with true or false, question: is ice cold?\n\n"
    "Answer format: true/false"
)
WINOGRANDE = (
    "Please choose the correct answer to fill in the blank to complete the given sentence: Ann thanked Eve "
    "because _ had helped.\n\nOption1: Ann Option2: Eve Answer format: option1/option2"
)


def adapters(instruction, answer):
    return {"instruction": instruction, "input": "", "answer": answer}


@pytest.mark.parametrize(
    ("fields", "question"),
    [
        (
            adapters(ARC, "answer2"),
            MultipleChoice(
                "Question: Where does rain come from?\nAnswer:",
                (" clouds", " the sea: deep down", " trees"),
                1,
            ),
        ),
        (
            adapters(PIQA, "solution1"),
            MultipleChoice("Question: To boil water\nAnswer:", (" Heat it.", " Cool it."), 0),
        ),
        (
            adapters(BOOLQ, "true"),
            MultipleChoice("Question: is ice cold?\nAnswer:", (" true", " false"), 0),
        ),
        (
            adapters(WINOGRANDE, "option2"),
            MultipleChoice("Ann thanked Eve because", (" Ann had helped.", " Eve had helped."), 1),
        ),
        (
            adapters("Tom has 3 pens and buys 2. How many has he?", "5.0"),
            OpenQuestion(
                "Question: Tom has 3 pens and buys 2. How many has he?\nAnswer:", "5.0", END_OF_ANSWER
            ),
        ),
        (
            {"instruction": "Add the numbers.", "input": "3 and 4", "answer": 7},
            OpenQuestion("Question: Add the numbers.\n3 and 4\nAnswer:", "7", END_OF_ANSWER),
        ),
        (
            {"question": "How many?", "answer": "3 + 4 = <<3+4=7>>7\nand so on.\n#### 1,007"},
            OpenQuestion("Question: How many?\nAnswer:", "1,007", END_OF_ANSWER),
        ),
        ({"question": "37+48=", "answer": "085"}, OpenQuestion("37+48=", "085")),
        ({"question": "37+48=", "answer": 85}, OpenQuestion("37+48=", "85")),
        (
            {"question": "A cat", "choices": [" meows", " barks"], "answer": 1},
            MultipleChoice("A cat", (" meows", " barks"), 1),
        ),
        (
            {"question": "A cat", "choices": [" meows", " barks"], "answer": " barks"},
            MultipleChoice("A cat", (" meows", " barks"), 1),
        ),
    ],
)
def test_each_layout(fields, question):
    assert parse(fields) == question


GOOD = {"question": "A cat", "choices": [" meows", " barks"], "answer": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: this line is not JSON .*expected one JSON object a line"),
        ("[1]", r"line 2: this line is no question; got \[1\], expected a JSON object"),
        ('{"text": 1}', "line 2: this is none of the known layouts; got the keys 'text', expected the keys"),
        ("{}", "got the keys of an empty object"),
        ({**GOOD, "answer": 2}, "line 2: answer: .*names none of the choices.*got 2, expected 0 to 1"),
        ({**GOOD, "answer": True}, "got true, expected 0 to 1"),
        ({**GOOD, "answer": "meows"}, 'got "meows", expected 0 to 1, or the text of one choice'),
        (
            {**GOOD, "choices": [" meows", " meows"], "answer": " meows"},
            "names none of the choices, or several",
        ),
        ({**GOOD, "choices": [" meows"]}, "line 2: choices: these are no choices"),
        ({**GOOD, "choices": "ab"}, "these are no choices"),
        ({**GOOD, "choices": ["a", ""]}, "these are no choices"),
        ({**GOOD, "question": " "}, "line 2: question: 'question' is no text"),
        ({"question": "a", "answer": None}, "line 2: answer: 'answer' is no text; got null"),
        (
            {"question": "a", "answer": "b"},
            "line 2: a file holds one kind of questions; got a question without",
        ),
        (adapters(ARC, "answer4"), "got 'answer4', expected answer1 or answer2 or answer3"),
        (adapters(ARC.replace("Answer2:", "2:"), "answer1"), "line 2: instruction: the options are not all"),
        (adapters(ARC, ["answer1"]), "line 2: answer: 'answer' is no text"),
    ],
)
def test_a_wrong_line_is_named(line, message, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line if isinstance(line, str) else json.dumps(line)}\n")
    with pytest.raises(DataError, match=message) as caught:
        read_questions(path)
    assert str(path) in str(caught.value)


def test_a_file_is_read_up_to_the_limit_and_empty_lines_do_not_count(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"{n}\u2028+0=", "answer": n} for n in range(5)]
    path.write_text(
        "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\nnot JSON", encoding="utf-8"
    )
    assert [question.answer for question in read_questions(path, limit=3)] == ["0", "1", "2"]
    assert len(read_questions(path, limit=5)) == 5
    for limit in (0, -1):
        with pytest.raises(DataError, match=f"no question is left to ask; got {limit}"):
            read_questions(path, limit=limit)
    with pytest.raises(DataError, match="line 10: this line is not JSON"):
        read_questions(path)


def test_a_file_that_is_no_text_or_not_there_or_empty_is_one_error(tmp_path):
    path = tmp_path / "questions.jsonl"
    with pytest.raises(DataError, match="there is no such file"):
        read_questions(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        read_questions(path)
    path.write_text("\n\n")
    with pytest.raises(DataError, match="there are no questions"):
        read_questions(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path)


EVAL = _shared_data.root() / "eval"


@pytest.mark.skipif(not EVAL.is_dir(), reason="the question sets are not on this machine")
@pytest.mark.parametrize(
    ("name", "count", "choices", "first"),
    [
        ("ARC-Challenge", 586, {3, 4, 5}, 139),
        ("ARC-Easy", 1000, {3, 4, 5}, 228),
        ("boolq", 1000, {2}, 635),
        ("openbookqa", 250, {4}, 71),
        ("piqa", 919, {2}, 445),
        ("social_i_qa", 977, {3}, 335),
        ("winogrande", 633, {2}, 305),
        ("SVAMP", 500, None, None),
        ("gsm8k_test", 660, None, None),
        ("gsm8k_train", 2000, None, None),
    ],
)
def test_the_usual_sets_are_read_whole(name, count, choices, first):
    """``first``: how often the first option is right, counted in the files with grep."""
    path = EVAL / f"{name}.jsonl"
    questions = read_questions(path)
    assert len(questions) == count == path.read_text(encoding="utf-8").count("\n")
    if choices is None:
        for question in questions:
            assert re.fullmatch(r"-?[0-9,]+(\.[0-9]+)?", question.answer)
            assert question.stop == END_OF_ANSWER
        return
    assert {len(question.choices) for question in questions} == choices
    assert sum(question.correct == 0 for question in questions) == first
    for question in questions:
        everything = question.prompt + "".join(question.choices)
        assert "Please choose" not in everything
        assert "Answer format" not in everything
        assert "1:" not in question.choices[0]
        assert all(choice == f" {choice.strip()}" for choice in question.choices)
