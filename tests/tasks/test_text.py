"""A text as windows: nothing of the test is in the training, and every token is predicted once."""

import json
import platform
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from bitsmith.errors import DataError
from bitsmith.tasks import Data, TextData, build, load
from bitsmith.tasks.text import once, text_data, windows
from bitsmith.tasks.tokens import ByteTokenizer
from bitsmith.train.distillation import IGNORED

SIMPLE = "".join(chr(33 + index % 90) for index in range(2000))


def data(text: str = SIMPLE, **arguments) -> TextData:
    return text_data(text, "mine", tokenizer=ByteTokenizer(), **{"context": 16, **arguments})


@given(st.integers(0, 70), st.integers(1, 20))
def test_windows_predict_each_token_once_from_the_one_before_it(count: int, length: int) -> None:
    x, y = windows(torch.arange(count), length)
    assert x.shape == y.shape == (max(count - 1, 0) // length, length)
    assert torch.equal(y.flatten(), torch.arange(1, x.numel() + 1))
    assert torch.equal(x + 1, y)


@given(
    st.integers(300, 3000),
    st.integers(1, 24),
    st.sampled_from([0.0, 0.1, 0.25]),
    st.sampled_from([0.1, 0.3]),
)
def test_no_token_of_one_part_is_in_another(
    length: int, context: int, validation: float, test: float
) -> None:
    class Positions:
        """The id of a character is its place in the text, so that a leak can be seen."""

        vocab_size = length

        def encode(self, text: str) -> list[int]:
            return list(range(len(text)))

        def decode(self, tokens) -> str:
            return "x" * len(tokens)

    found = text_data(
        "x" * length, "mine", tokenizer=Positions(), context=context, validation=validation, test=test
    )
    seen = [
        set(torch.cat([a.flatten(), b.flatten()]).tolist())
        for a, b in map(found.split, ("train", "val", "test"))
    ]
    assert sum(map(len, seen)) == len(set.union(*seen))
    assert max(seen[0]) < min(seen[1] | seen[2])
    assert (len(found.val_x) == 0) == (
        int(length * (1 - test)) - int(length * (1 - test - validation)) <= context
    )


def test_the_embedded_text_is_the_topics_of_this_python_without_their_repetitions() -> None:
    from pydoc_data.topics import topics

    found = load("pydoc", context=64)
    assert isinstance(found, TextData)
    assert found.name == "pydoc"
    assert f"Python {platform.python_version()}" in found.about
    assert found.facts()["text"] == found.about
    tokenizer = found.tokenizer
    start = tokenizer.decode(found.train_x[:4].flatten().tolist())
    assert next(iter(topics.values())).startswith(start)
    train, test = (tokenizer.decode(found.split(name)[0].flatten().tolist()) for name in ("train", "test"))
    shared = sum(test[at : at + 128] in train for at in range(0, len(test) - 128, 128))
    assert shared == 0  # 8 % of them, were the repeated paragraphs left in
    assert 200_000 < len(train) < 500_000


def test_a_paragraph_is_kept_once_however_it_is_wrapped() -> None:
    assert once(["a b", "c", "a\n  b", "c", "d"]) == ["a b", "c", "d"]


def test_a_file_and_a_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(SIMPLE)
    (tmp_path / "a.txt").write_text("Ärger " * 100)
    (tmp_path / "c.md").write_text("not this")
    one = load(f"text:{tmp_path}/b.txt", context=16)
    both = load(f"text:{tmp_path}", context=16)
    assert isinstance(one, TextData)
    assert isinstance(both, TextData)
    assert one.name == "b.txt"
    assert both.tokenizer.decode(both.train_x[0].tolist()).startswith("Ärger Ärger")
    assert sum(both.facts()["tokens"].values()) > sum(one.facts()["tokens"].values())


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", {}, "data mine: this text is empty"),
        (" \n ", {}, "this text is empty"),
        ("short", {}, "too short for a window in its training and its test part; got 5 tokens"),
        (SIMPLE, {"context": 300}, "expected more than 300 tokens in 80% and in 10% of it"),
        (SIMPLE, {"context": 0}, "this is no context; got 0, expected a whole number >= 1"),
        (SIMPLE, {"test": 1.5}, "this share of test is impossible; got 1.5"),
        (SIMPLE, {"test": 0.0}, "too short"),
    ],
)
def test_a_text_that_cannot_be_used_is_one_line(text: str, arguments: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        data(text, **arguments)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xe4\xf6")
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.txt").write_text("")
    for path, message in (
        ("gone.txt", "there is no such file. Check the path"),
        ("latin.txt", "it is not UTF-8 text"),
        ("empty", "there is no .txt file in this folder"),
        ("none.txt", "this text is empty"),
    ):
        with pytest.raises(DataError, match=message):
            load(f"text:{tmp_path}/{path}")
    with pytest.raises(DataError, match=r"unknown argument 'contxt'\. Did you mean 'context'"):
        load("pydoc", contxt=3)


def test_data_and_model_that_do_not_fit_are_refused_before_any_work() -> None:
    found, model = data(), build("byte_llama", width=16, depth=1, context=8)
    with pytest.raises(
        DataError, match="longer than the model's positions; got 16 tokens, expected at most 8"
    ):
        found.check(model, 1)
    with pytest.raises(
        DataError, match="more tokens than the model; got 256 tokens, expected at most the 100"
    ):
        found.check(build("byte_llama", width=16, depth=1, vocab_size=100), 1)
    model = build("byte_llama", width=16, depth=1)
    with pytest.raises(DataError, match="fewer training sequences than calibration needs; got 99"):
        found.check(model, 100)
    found.check(model, 99)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    x = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(DataError, match="t: test_y: a token is not in the vocabulary; got 0 to 256"):
        TextData(x, x, x[:0], x[:0], x, x.index_fill(1, torch.tensor(1), 256), ByteTokenizer(), name="t")
    with pytest.raises(DataError, match="t: test_x: a token is not in the vocabulary; got -100 to 0"):
        TextData(x, x, x[:0], x[:0], x.index_fill(1, torch.tensor(1), IGNORED), x, ByteTokenizer(), name="t")
    masked = x.index_fill(0, torch.tensor(1), IGNORED)
    with pytest.raises(DataError, match=r"t: train_y: a row has no target that counts.* in row 1"):
        TextData(x, masked, x[:0], x[:0], x, x, ByteTokenizer(), name="t")
    with pytest.raises(DataError, match="tokens have the wrong form"):
        TextData(x.float(), x, x, x, x, x, ByteTokenizer())


def test_what_a_job_asks_of_text() -> None:
    found, model = data(), build("byte_llama", seed=0, width=16, depth=1)
    assert found.example().shape == (1, 16)
    assert len(found.limited(3).train_x) == 3
    drawn = found.drawn(5, seed=1, batch_size=2)
    assert [len(x) for x, _ in drawn] == [2, 2, 1]
    assert all(torch.equal(x[:, 1:], y[:, :-1]) for x, y in drawn)
    assert [shift.name for shift in found.shifts()] == ["typos", "casing", "docstrings"]
    assert set(found.figures) == set(found.evaluate(model, found.test_x, found.test_y))
    assert found.validate(model)["loss"] == found.evaluate(model, found.val_x, found.val_y)["loss"]
    assert found.rank({"validation_loss": 1.0}) > found.rank({"validation_loss": 1.1})
    assert Data.unit != found.unit


def test_models_write_after_the_same_prompts_with_the_same_draws(tmp_path: Path) -> None:
    found, model = data(), build("byte_llama", seed=0, width=16, depth=1)
    answers = {name: found.answers(model)[1] for name in ("float", "quantized")}
    found.write_answers(tmp_path, answers)
    written = json.loads((tmp_path / "samples.json").read_text())
    assert len(written["samples"]) == 2
    for sample in written["samples"]:
        assert sample["float"] == sample["quantized"]
        assert sample["float"].startswith(sample["prompt"])
        assert len(sample["float"]) > len(sample["prompt"])


def test_fewer_rows_at_once_change_no_figure() -> None:
    whole = data(SIMPLE * 3)
    seen: list[int] = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return torch.nn.functional.one_hot(x, 256).float()

    class Echo(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return model(x)

    few = whole.at_most(2)
    figures = few.evaluate(Echo(), few.test_x, few.test_y)
    assert max(seen) == 2
    assert whole.batch_rows > 2
    assert figures == pytest.approx(whole.evaluate(Echo(), whole.test_x, whole.test_y))
