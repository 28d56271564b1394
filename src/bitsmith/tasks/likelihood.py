"""Log-likelihoods of continuations: Σ ln p(token | everything before it), of a causal language model.

Rows of a batch are padded on the right, where a causal model cannot look, so that padding changes no score.
Only activation ranges that are taken over a whole batch (dynamic, per tensor) see their batch mates: for
these, batch_size=1. Cut and batched as in lm-evaluation-harness; one difference: where prompt and
continuation share a token (byte-pair encodings merge over the seam), the seam is found by comparing tokens,
not by counting them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitsmith.errors import DataError, TrainingDiverged
from bitsmith.quantization.layers import in_eval_mode
from bitsmith.tasks.classification import device_of
from bitsmith.tasks.tokens import Tokenizer

Tick = Callable[[int, int], None]  # (done, total)
Pair = tuple[list[int], list[int]]  # (prompt, continuation), as token ids


@dataclass(frozen=True)
class Likelihood:
    """``total``: ln p of the whole continuation, in nats; ``greedy``: whether greedy decoding would write
    it."""

    total: float
    greedy: bool


def split(tokenizer: Tokenizer, prompt: str, continuation: str, where: str = "continuation") -> Pair:
    """Token ids of the prompt and of what follows it, as the two are encoded *together*.

    Raises DataError where either of them has no tokens.
    """
    alone, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + continuation)
    seam = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
    seam = min(seam, len(whole))
    if seam == 0 or seam == len(whole):
        empty = "prompt" if seam == 0 else "continuation"
        raise DataError(
            f"the {empty} has no tokens", where=where, got=repr(prompt if seam == 0 else continuation)
        )
    return whole[:seam], whole[seam:]


@torch.no_grad()
def log_likelihoods(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    context: int,
    batch_size: int = 16,
    progress: Tick | None = None,
) -> list[Likelihood]:
    """ln p(continuation | prompt) of each pair, in the order given.

    model: (N, T) int64 to logits (N, T, V), causal. context: the most tokens that it takes; of longer prompts
    the end is kept. Raises DataError where a continuation is longer than the context or anything is empty,
    and TrainingDiverged where the model answers NaN.
    """
    rows = [_cut(pair, context, f"continuation {i}") for i, pair in enumerate(pairs)]
    # Long ones first: equal lengths share a batch, and what does not fit in memory fails at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    found: dict[int, Likelihood] = {}
    with in_eval_mode(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            tokens = torch.zeros(len(batch), len(rows[batch[0]][0]), dtype=torch.int64)
            for line, i in zip(tokens, batch, strict=True):
                line[: len(rows[i][0])] = torch.tensor(rows[i][0])
            logits = model(tokens.to(device_of(model)))
            for line, i in zip(logits, batch, strict=True):
                found[i] = _likelihood(line, *rows[i])
            if progress is not None:
                progress(len(found), len(order))
    return [found[i] for i in range(len(rows))]


def _cut(pair: Pair, context: int, where: str) -> tuple[list[int], list[int]]:
    """(input, continuation): the input ends one token before the continuation's end, and fits the context."""
    prompt, continuation = pair
    if not prompt or not continuation:
        empty = "continuation" if prompt else "prompt"
        raise DataError(f"the {empty} has no tokens", where=where)
    if len(continuation) > context:
        raise DataError(
            "the continuation is longer than the model's context",
            where=where,
            got=f"{len(continuation)} tokens",
            expected=f"at most {context}",
        )
    return (prompt + continuation)[-(context + 1) : -1], continuation


def _likelihood(logits: Tensor, inputs: list[int], continuation: list[int]) -> Likelihood:
    """Of logits (T, V), T >= len(inputs); row t predicts the token after inputs[t]."""
    rows = logits[len(inputs) - len(continuation) : len(inputs)].float()
    targets = torch.tensor(continuation, device=rows.device)
    total = rows.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum(dtype=torch.float64).item()
    if math.isnan(total):
        raise TrainingDiverged("the model's output is not a number", where="log_likelihoods")
    return Likelihood(total, bool((rows.argmax(-1) == targets).all()))
