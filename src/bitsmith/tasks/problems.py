"""`ProblemData`: rows of a prompt and its answer, of which a model is asked to write the answers.

A `TextData` whose targets are the answers alone; what stands before them is IGNORED. Beside the figures of
language modelling it has `exact_match`: the share of the rows' questions that the model, decoding greedily,
answers right. The questions are read off the rows themselves, so that any part of the rows can be asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from bitsmith.tasks.questions import END_OF_LINE, OpenQuestion
from bitsmith.tasks.scoring import exact_match
from bitsmith.tasks.shifts import Shift
from bitsmith.tasks.text import TextData
from bitsmith.train.distillation import IGNORED

SHOWN = 6  # problems in the report


@dataclass(frozen=True, eq=False)
class ProblemData(TextData):
    """Rows as `as_rows` makes them: "37+48=085", whose targets are "085\\n", each answer in one piece."""

    figures: ClassVar[tuple[str, ...]] = (*TextData.figures, "exact_match")
    sampled: ClassVar[int] = 8

    def evaluate(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
        """The figures of `TextData`, and the share of the answers that the model writes as they should be."""
        found = super().evaluate(model, x, y)
        found["exact_match"] = exact_match(
            model,
            self.tokenizer,
            self.questions(x, y),
            context=getattr(model, "context", None) or self.context,
            max_tokens=int((y != IGNORED).sum(1).max()),
            batch_size=self.batch_rows,
        ).metrics()["accuracy"]
        return found

    def questions(self, x: Tensor, y: Tensor) -> list[OpenQuestion]:
        """The questions that rows (N, T) ask: what stands before the first target, and the targets."""
        found = []
        for tokens, targets in zip(x, y, strict=True):
            places = (targets != IGNORED).nonzero().flatten()
            prompt = self.tokenizer.decode(tokens[: int(places[0]) + 1].tolist())
            answer = self.tokenizer.decode(targets[places].tolist())
            found.append(OpenQuestion(prompt, answer.removesuffix("\n"), END_OF_LINE))
        return found

    def shifts(self) -> tuple[Shift, ...]:
        """None: a question with a typing error has another answer."""
        return ()

    def prompts(self) -> list[str]:
        """The first problems of the test split."""
        return [question.prompt for question in self.questions(self.test_x[:SHOWN], self.test_y[:SHOWN])]
