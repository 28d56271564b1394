"""Greedy generation, as exact-match scoring needs it: no sampling (`language.sample` does that).

A causal model without a mask argument cannot be padded on the left, so that prompts of one length share a
batch. What was read is kept in a cache where that changes nothing (`reading`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bitsmith.errors import DataError, TrainingDiverged
from bitsmith.quantization.layers import in_eval_mode
from bitsmith.tasks.classification import device_of
from bitsmith.tasks.likelihood import Tick
from bitsmith.tasks.reading import reader
from bitsmith.tasks.tokens import Tokenizer


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    stops: Sequence[Sequence[str]],
    *,
    context: int,
    max_tokens: int,
    batch_size: int = 16,
    progress: Tick | None = None,
    cache: bool = True,
) -> list[str]:
    """What the model writes after each prompt: the likeliest token each time, ``max_tokens`` at most.

    stops: for each prompt, the strings that end its text; the first to appear is cut off. Of a prompt that
    leaves no room for max_tokens in the context, the end is kept. cache: False to read all again for each
    token. Raises DataError, and TrainingDiverged where the model answers NaN.
    """
    if not 0 < max_tokens <= context:
        raise DataError(
            "there is no room in the context for prompt and answer",
            where="max_tokens",
            got=max_tokens,
            expected=f"1 to {context}, the context",
        )
    room = context - max_tokens + 1  # the last token is written, not read
    rows = [tokenizer.encode(prompt)[-room:] for prompt in prompts]
    for i, row in enumerate(rows):
        if not row:
            raise DataError("the prompt has no tokens", where=f"prompt {i}", got=repr(prompts[i]))
    texts: dict[int, str] = {}
    with in_eval_mode(model):
        for batch in _equal_lengths(rows, batch_size):
            tokens = torch.tensor([rows[i] for i in batch], device=device_of(model))
            read = reader(model, len(batch), tokens.shape[1] + max_tokens - 1, cache=cache)
            written: dict[int, list[int]] = {i: [] for i in batch}
            for _ in range(max_tokens):
                logits = read(tokens)
                if bool(logits.isnan().any()):
                    raise TrainingDiverged("the model's output is not a number", where="generate")
                following = logits.argmax(-1)
                going = []
                for line, (i, token) in enumerate(zip(batch, following.tolist(), strict=True)):
                    written[i].append(token)
                    text = tokenizer.decode(written[i])
                    texts[i] = before_stop(text, stops[i])
                    if texts[i] == text:
                        going.append(line)
                if not going:
                    break
                tokens = following[going].unsqueeze(1)
                if len(going) < len(batch):
                    read.keep(going)
                    batch = [batch[line] for line in going]
            if progress is not None:
                progress(len(texts), len(rows))
    return [texts[i] for i in range(len(rows))]


def before_stop(text: str, stop: Sequence[str]) -> str:
    """``text`` up to where the first of the stop strings begins; empty ones do not count."""
    ends = [text.find(string) for string in stop if string]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def _equal_lengths(rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices of rows in batches of one length each, the longest first."""
    lengths: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        lengths.setdefault(len(row), []).append(i)
    return [
        lengths[length][start : start + batch_size]
        for length in sorted(lengths, reverse=True)
        for start in range(0, len(lengths[length]), batch_size)
    ]
