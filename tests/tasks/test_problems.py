"""The built-in arithmetic as data of a job: its rows, and the share of answers that a model writes right."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.tasks import TextData, build, load
from bitsmith.tasks.arithmetic import arithmetic
from bitsmith.tasks.problems import ProblemData
from bitsmith.train.distillation import IGNORED, cross_entropy


class Calculator(nn.Module):
    """Writes the answers of problems with numbers of one digit, "7+5=12"; wrong ones where x is ``wrong``."""

    def __init__(self, wrong: int = -1) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 256)
        for row, line in enumerate(tokens.tolist()):
            x, sign, y = line[0] - 48, chr(line[1]), line[2] - 48
            answer = f"{x + y if sign == '+' else x - y + (x == self.wrong):02d}\n"
            for place, character in enumerate(answer.encode(), start=3):
                if place < len(line):
                    logits[row, place, character] = 5.0
        return logits


@pytest.fixture
def digits() -> ProblemData:
    found = load("arithmetic", largest=9, held_out=0.2)
    assert isinstance(found, ProblemData)
    return found


def test_rows_are_the_problems_and_targets_their_answers(digits: ProblemData) -> None:
    assert isinstance(digits, TextData)
    splits = arithmetic(9, 0, 0.2)
    for name in ("train", "val", "test"):
        assert tuple(digits.questions(*digits.split(name))) == splits[name]
    assert digits.context == len("6-6=00")
    assert digits.facts()["tokens"]["test"] == 3 * len(splits["test"])
    assert (
        load("arithmetic", seed=1, largest=9).test_x.tolist() != load("arithmetic", largest=9).test_x.tolist()
    )


def test_exact_match_is_the_share_of_problems_whose_whole_answer_is_right(digits: ProblemData) -> None:
    x, y = digits.test_x, digits.test_y
    assert digits.evaluate(Calculator(), x, y)["exact_match"] == 1
    wrong = [q for q in digits.questions(x, y) if q.prompt.startswith("8-")]
    found = digits.evaluate(Calculator(wrong=8), x, y)
    assert 0 < len(wrong) < len(x)
    assert found["exact_match"] == pytest.approx(1 - len(wrong) / len(x))
    assert found["accuracy"] > found["exact_match"]  # of the tokens
    assert set(found) == set(digits.figures)


def test_a_single_row_can_be_asked(digits: ProblemData) -> None:
    assert digits.evaluate(Calculator(), digits.test_x[:1], digits.test_y[:1])["exact_match"] == 1
    assert digits.limited(2).evaluate(Calculator(), *digits.limited(2).split("test"))["exact_match"] == 1


def test_validation_is_the_loss_alone(digits: ProblemData) -> None:
    assert set(digits.validate(Calculator())) == {"loss"}


def test_a_model_with_more_context_than_the_rows_answers_as_well(digits: ProblemData) -> None:
    model = build("byte_llama", seed=0, width=16, depth=1, context=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(25):  # until some answers are right
        optimizer.zero_grad()
        cross_entropy(model(digits.test_x), digits.test_y).backward()
        optimizer.step()
    found = digits.evaluate(model, digits.test_x, digits.test_y)
    rows, targets = model.eval()(digits.test_x).argmax(-1), digits.test_y
    told = ((rows == targets) | (targets == IGNORED)).all(1)  # every token right, given those before it
    assert 0 < found["exact_match"] < 1
    assert found["exact_match"] == pytest.approx(told.double().mean().item())


def test_the_report_has_problems_and_what_was_written(digits: ProblemData, tmp_path: Path) -> None:
    answers = {name: digits.answers(Calculator())[1] for name in ("float", "quantized")}
    digits.write_answers(tmp_path, answers)
    samples = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert len(samples) == 6
    assert all(sample["float"].startswith(sample["prompt"]) for sample in samples)
    assert all(sample["prompt"].endswith("=") for sample in samples)


def test_wrong_arguments_are_one_line() -> None:
    with pytest.raises(DataError, match=r"too few problems.*got 5"):
        load("arithmetic", largest=5)
    with pytest.raises(DataError, match=r"unknown argument 'larges'\. Did you mean 'largest'"):
        load("arithmetic", larges=50)
    with pytest.raises(DataError, match="no such tokenizer"):
        load("arithmetic", tokenizer="words")
