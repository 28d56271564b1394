"""`TextData`: a text as windows of tokens in three splits, and the loaders "pydoc" and "text:PATH".

The text is cut into three contiguous parts before it is cut into windows, so that no window of one part has
a token of another. Windows do not overlap: inputs are tokens i to i + T - 1, targets i + 1 to i + T.
"""

from __future__ import annotations

import platform
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.files import write_json
from bitsmith.tasks import language
from bitsmith.tasks.augment import Augmentation
from bitsmith.tasks.examples import SPLITS, Examples
from bitsmith.tasks.shifts import Shift
from bitsmith.tasks.text_shifts import OTHER_PROSE, TEXT_SHIFTS, docstrings
from bitsmith.tasks.tokens import Tokenizer, load_tokenizer
from bitsmith.train.distillation import IGNORED

CONTEXT = 128
SHARES = 0.1  # of the text, each of validation and test
LOGITS = 2**24  # elements of the logits of one forward outside of training: 64 MB
COMPARED = 2**26  # of the logits that an exported file is compared on
TEMPERATURE, PROMPT = 0.8, 40  # of the text in the report; the latter in tokens


@dataclass(frozen=True, eq=False)
class TextData(Examples):
    """Tokens (N, T) int64 and those that follow them (N, T) int64, with the tokenizer that made them.

    Targets may be IGNORED, but not all of a row. about: what the text is, in words. Raises DataError where
    anything is amiss.
    """

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    tokenizer: Tokenizer
    name: str = "text"
    about: str = ""
    seed: int = 0  # of the text that is sampled for the report
    augment: Augmentation | None = field(default=None, init=False)

    unit: ClassVar[str] = "sequences"
    figures: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "bits_per_byte", "accuracy")
    sampled: ClassVar[int] = 120  # tokens that a model writes for the report

    def __post_init__(self) -> None:
        for split in SPLITS:
            x, y = self.split(split)
            for part, tokens in (("x", x), ("y", y)):
                self._check_tokens(tokens, f"{self.name}: {split}_{part}", may_be_empty=split == "val")
            if x.shape != y.shape or x.shape[1] != self.context:
                raise DataError(
                    "inputs and targets differ in shape, or splits in length",
                    where=f"{self.name}: {split}",
                    got=f"{tuple(x.shape)} and {tuple(y.shape)}",
                    expected=f"(N, {self.context}) twice",
                )

    def _check_tokens(self, tokens: Tensor, where: str, may_be_empty: bool) -> None:
        if tokens.dtype != torch.int64 or tokens.ndim != 2:
            got = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
            raise DataError(
                "tokens have the wrong form", where=where, got=got, expected="int64 of shape (N, T)"
            )
        if len(tokens) == 0 and not may_be_empty:
            raise DataError("there are no windows", where=where, got="0 rows", expected="at least one")
        if where.endswith("_y"):
            self._check_counted(tokens != IGNORED, where)
            tokens = tokens[tokens != IGNORED]
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.tokenizer.vocab_size:
            raise DataError(
                "a token is not in the vocabulary",
                where=where,
                got=f"{int(tokens.min())} to {int(tokens.max())}",
                expected=f"0 to {self.tokenizer.vocab_size - 1}",
            )

    def _check_counted(self, counted: Tensor, where: str) -> None:
        """A row without a target would have a loss of 0/0."""
        if bool((empty := ~counted.any(1)).any()):
            raise DataError(
                "a row has no target that counts",
                where=where,
                got=f"{IGNORED} alone in row {int(empty.nonzero()[0])}",
                expected="at least one token to predict",
            )

    @property
    def context(self) -> int:
        """T, the tokens of one window."""
        return self.train_x.shape[1]

    @property
    def batch_rows(self) -> int:
        """As many windows as their logits allow."""
        return min(self.most_rows, max(1, LOGITS // (self.context * self.tokenizer.vocab_size)))

    def inputs(self, x: Tensor) -> Tensor:
        """Tokens are taken as they are."""
        return x

    def evaluate(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
        """Loss, perplexity, bits per byte and next-token accuracy."""
        return language.evaluate(model, x, y, self.tokenizer, self.batch_rows)

    def score(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        """The same, of logits (N, T, vocabulary)."""
        return language.score(outputs, y, self.tokenizer)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """The loss."""
        x, y = self.validation()
        return {"loss": language.evaluate(model, x, y, self.tokenizer, self.batch_rows)["loss"]}

    def rank(self, standing: Mapping[str, float]) -> tuple[float, ...]:
        """The one of the lower loss."""
        return (-standing["validation_loss"],)

    def answers(self, model: nn.Module) -> tuple[dict[str, float], list[str]]:
        """The metrics, and what the model writes after each of the `prompts`."""
        generator = torch.Generator().manual_seed(self.seed)
        texts = [
            language.sample(
                model,
                self.tokenizer,
                prompt,
                self.sampled,
                TEMPERATURE,
                generator,
                getattr(model, "context", self.context),
            )
            for prompt in self.prompts()
        ]
        return self.evaluate(model, self.test_x, self.test_y), texts

    def prompts(self) -> list[str]:
        """The beginnings of two windows of the test split, from their first whole word on."""
        rows = (self.test_x[0], self.test_x[len(self.test_x) // 2])
        texts = (self.tokenizer.decode(row[:PROMPT].tolist()) for row in rows)
        return [text.partition(" ")[2].strip() or text for text in texts]

    def write_answers(self, out: Path, answers: Mapping[str, list[str]]) -> None:
        """samples.json: each prompt, and what each model wrote after it."""
        samples = [
            {"prompt": prompt, **{name: texts[at] for name, texts in answers.items()}}
            for at, prompt in enumerate(self.prompts())
        ]
        document = {"version": 1, "temperature": TEMPERATURE, "seed": self.seed, "samples": samples}
        write_json(out / "samples.json", document)

    def shifts(self) -> tuple[Shift, ...]:
        """Typing errors and capitals in the test text, and other prose (text_shifts.py)."""
        graded = (Shift(name, "text", partial(self._mistyped, name)) for name in TEXT_SHIFTS)
        return *graded, Shift(OTHER_PROSE, "text", self._other_prose, graded=False)

    def _mistyped(
        self, name: str, severity: int, seed: int, model: nn.Module | None
    ) -> tuple[Tensor, Tensor]:
        draw = random.Random(f"{seed} {name} {severity}")
        return self._windows(TEXT_SHIFTS[name](self.test_text(), severity, draw), name)

    def _other_prose(self, severity: int, seed: int, model: nn.Module | None) -> tuple[Tensor, Tensor]:
        return self._windows(docstrings(), OTHER_PROSE)

    def _windows(self, text: str, name: str) -> tuple[Tensor, Tensor]:
        found = windows(torch.tensor(self.tokenizer.encode(text), dtype=torch.int64), self.context)
        if not len(found[0]):
            raise DataError(
                "the shifted text is too short for a window",
                where=f"shift {name}",
                got=f"{len(text)} characters",
                expected=f"more than {self.context} tokens",
            )
        return found

    def test_text(self) -> str:
        """The test split as text, its windows one after the other."""
        return self.tokenizer.decode([*self.test_x.flatten().tolist(), int(self.test_y[-1, -1])])

    def verified(self) -> tuple[Tensor, Tensor]:
        """As many test windows as their logits allow."""
        rows = max(1, COMPARED // (self.context * self.tokenizer.vocab_size))
        return self.test_x[:rows], self.test_y[:rows]

    def facts(self) -> dict[str, Any]:
        """The task, what the text is, and how many tokens are predicted."""
        return {
            "task": "language",
            "text": self.about,
            "tokens": {split: int((self.split(split)[1] != IGNORED).sum()) for split in SPLITS},
        }

    def check(self, model: nn.Module, calibration_samples: int) -> None:
        """Vocabulary and positions of ``model``, where it says them, and the windows to calibrate on."""
        known, positions = getattr(model, "vocab_size", None), getattr(model, "context", None)
        if known is not None and known < self.tokenizer.vocab_size:
            raise DataError(
                "the tokenizer has more tokens than the model",
                where=f"data {self.name}",
                got=f"{self.tokenizer.vocab_size} tokens",
                expected=f"at most the {known} of the model",
                remedy="Use the tokenizer that the model was trained with (data argument tokenizer)",
            )
        if positions is not None and positions < self.context:
            raise DataError(
                "the sequences are longer than the model's positions",
                where=f"data {self.name}",
                got=f"{self.context} tokens",
                expected=f"at most {positions}",
                remedy=f"Give the data the argument context: {positions}",
            )
        if len(self.train_x) < calibration_samples:
            raise DataError(
                "there are fewer training sequences than calibration needs",
                where=f"data {self.name}",
                got=len(self.train_x),
                expected=f"quantize.calibration_samples = {calibration_samples}",
                remedy="Lower it, give the data a shorter context, or more text",
            )


def windows(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (N, length) of tokens (n,); a rest that is no whole window is left out."""
    count = max(len(tokens) - 1, 0) // length
    return tokens[: count * length].view(count, length), tokens[1 : count * length + 1].view(count, length)


def text_data(
    text: str,
    name: str,
    *,
    about: str = "",
    seed: int = 0,
    context: int = CONTEXT,
    tokenizer: Tokenizer,
    validation: float = SHARES,
    test: float = SHARES,
) -> TextData:
    """`TextData` of one text: its first part trains, then comes validation, and its end is the test."""
    where = f"data {name}"
    if not text.strip():
        raise DataError("this text is empty", where=where, expected="some thousand characters")
    for what, share in (("validation", validation), ("test", test)):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise DataError(
                f"this share of {what} is impossible", where=where, got=share, expected="0 <= share < 1"
            )
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise DataError("this is no context", where=where, got=context, expected="a whole number >= 1")
    tokens = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    ends = [int(len(tokens) * (1 - validation - test)), int(len(tokens) * (1 - test))]
    if ends[0] <= context or len(tokens) - ends[1] <= context:
        raise DataError(
            "this text is too short for a window in its training and its test part",
            where=where,
            got=f"{len(tokens)} tokens",
            expected=f"more than {context} tokens in {1 - validation - test:.0%} and in {test:.0%} of it",
            remedy="Give more text, or a shorter context",
        )
    parts = (tokens[: ends[0]], tokens[ends[0] : ends[1]], tokens[ends[1] :])
    (train_x, train_y), (val_x, val_y), (test_x, test_y) = (windows(part, context) for part in parts)
    return TextData(
        train_x, train_y, val_x, val_y, test_x, test_y, tokenizer, name=name, about=about, seed=seed
    )


def pydoc(
    seed: int = 0,
    model: str = "",
    context: int = CONTEXT,
    tokenizer: str | None = None,
    validation: float = SHARES,
    test: float = SHARES,
) -> TextData:
    """The text behind ``help("topics")``, in every Python: English about the language, 370 kB in 3.11.

    It differs between Python versions, so that losses compare within one only.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python comes without pydoc_data.topics",
            where="data pydoc",
            remedy="Give a text of yours: data: text:PATH",
        ) from None
    text = "\n\n".join(once(part for topic in topics.values() for part in topic.split("\n\n")))
    version = platform.python_version()
    return text_data(
        text,
        "pydoc",
        about=f"pydoc_data.topics of Python {version}, each paragraph once; other versions have another text",
        seed=seed,
        context=context,
        tokenizer=tokenizer_for(tokenizer, model),
        validation=validation,
        test=test,
    )


def once(paragraphs: Iterable[str]) -> list[str]:
    """The paragraphs without those that came before, however they were wrapped.

    A fifth of the topics are paragraphs of other topics: a test that they are part of measures memory.
    """
    found: dict[str, str] = {}
    for paragraph in paragraphs:
        found.setdefault(" ".join(paragraph.split()), paragraph)
    return list(found.values())


def read_text(
    path: str,
    seed: int = 0,
    model: str = "",
    context: int = CONTEXT,
    tokenizer: str | None = None,
    validation: float = SHARES,
    test: float = SHARES,
) -> TextData:
    """A text file in UTF-8, or all *.txt in a folder one after the other, in the order of their names.

    tokenizer: "bytes" or "hf:PATH"; without it that of an ``hf:`` model, and bytes with any other.
    """
    where, place = f"data text:{path}", Path(path)
    files = sorted(place.glob("*.txt")) if place.is_dir() else [place]
    if not files:
        raise DataError("there is no .txt file in this folder", where=where, remedy="Check the path")
    try:
        text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except FileNotFoundError:
        raise DataError("there is no such file", where=where, remedy="Check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"this text cannot be read ({reason})", where=where) from None
    return text_data(
        text,
        place.name,
        about=f"{len(files)} text file{'s' * (len(files) > 1)}",
        seed=seed,
        context=context,
        tokenizer=tokenizer_for(tokenizer, model),
        validation=validation,
        test=test,
    )


def tokenizer_for(name: str | None, model: str) -> Tokenizer:
    """The tokenizer of that name; without one that of an ``hf:`` model, and bytes with any other."""
    return load_tokenizer(name or (model if model.startswith("hf:") else "bytes"))
