"""The metrics of language modelling, and text sampled from a model.

    loss = mean over tokens of -ln p(token | those before it in its window)     nats
    perplexity = e^loss            bits per byte = loss / ln 2 · tokens / bytes of their text

Targets that are IGNORED, as those of a prompt, are no tokens here: they count in no mean and have no bytes.
Works on any module from tokens (N, T) int64 to logits (N, T, vocabulary): float, prepared, packed, or a
runtime's wrapper. Loss and perplexity compare models of one tokenizer, bits per byte also those of different
ones. Windows do not overlap, so the first tokens of each have little before them: evaluations that slide
the window by less than its length report lower losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.quantization.layers import in_eval_mode
from bitsmith.tasks.classification import device_of
from bitsmith.tasks.reading import reader
from bitsmith.tasks.tokens import ByteTokenizer, Tokenizer, byte_count
from bitsmith.train.distillation import IGNORED

LARGEST_LOSS = 700.0  # e^709 is the largest float: a model that is worse has no perplexity to write down


@torch.no_grad()
def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, tokenizer: Tokenizer | None = None, batch_size: int = 64
) -> dict[str, float]:
    """{"loss", "perplexity", "bits_per_byte", "accuracy"} of next tokens y (N, T) after inputs x (N, T).

    accuracy is the share of the tokens that are the likeliest one. The tokenizer, bytes where none is given,
    says how many bytes y stands for. Raises DataError where there is nothing to predict.
    """
    if not bool((y != IGNORED).any()):
        raise DataError("there is nothing to predict", where="evaluate", got="0 tokens")
    place, total, right = device_of(model), 0.0, 0
    with in_eval_mode(model):
        for rows, targets in zip(x.split(batch_size), y.split(batch_size), strict=True):
            logits = model(rows.to(place)).float().cpu()
            total += _losses(logits, targets).double().sum().item()
            right += int((logits.argmax(-1) == targets).sum())
    return _metrics(total, right, y, tokenizer)


def score(logits: Tensor, y: Tensor, tokenizer: Tokenizer | None = None) -> dict[str, float]:
    """The same metrics of logits (N, T, vocabulary) that are already there, e.g. a runtime's."""
    right = int((logits.argmax(-1) == y).sum())
    return _metrics(_losses(logits.float(), y).double().sum().item(), right, y, tokenizer)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """0 where a target is IGNORED."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")


def _metrics(total: float, right: int, y: Tensor, tokenizer: Tokenizer | None) -> dict[str, float]:
    tokens = y[y != IGNORED].tolist()
    loss = total / len(tokens)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, LARGEST_LOSS)),
        "bits_per_byte": total / math.log(2) / max(byte_count(tokenizer or ByteTokenizer(), tokens), 1),
        "accuracy": right / len(tokens),
    }


def sample(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    count: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    context: int | None = None,
    *,
    cache: bool = True,
) -> str:
    """``prompt`` and ``count`` more tokens of the model's; at temperature 0 always the likeliest one.

    context: the most tokens that the model sees, the last ones of the text; its own ``context`` where it has
    one. cache: False to read all again for each token. Raises DataError for a prompt without a token.
    """
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise DataError("a prompt needs at least one token", where="sample", got=repr(prompt))
    window = context or getattr(model, "context", None) or len(tokens) + count
    drawn = list(_continued(model, tokens, count, temperature, generator, window, cache))
    return tokenizer.decode([*tokens, *drawn])


@torch.no_grad()
def _continued(
    model: nn.Module,
    tokens: list[int],
    count: int,
    temperature: float,
    generator: torch.Generator | None,
    window: int,
    cache: bool,
) -> Iterator[int]:
    seen, place = list(tokens), device_of(model)
    new = seen
    read = reader(model, 1, min(window, len(seen) + count), cache=cache)
    with in_eval_mode(model):
        for _ in range(count):
            if len(seen) <= window:
                logits = read(torch.tensor([new], device=place))[0].float().cpu()
            else:  # the text moves through the window: every token has another position now
                logits = model(torch.tensor([seen[-window:]], device=place))[0, -1].float().cpu()
            if temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
            new = [token]
            seen += new
            yield token
