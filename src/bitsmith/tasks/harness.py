"""A language model as lm-evaluation-harness takes it, so that its hundreds of tasks can be run on ours.

Needs the extra lm-eval (lm_eval >= 0.4.13). The harness's class is imported, and so ours is made, when it is
asked for. It answers the three kinds of requests with log_likelihoods and generate; the harness makes the
prompts and the metrics:

    lm_eval.simple_evaluate(model=harness_model(model, tokenizer, context=1024), tasks=["arc_easy", "piqa"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bitsmith.errors import DataError, MissingExtra
from bitsmith.tasks.generation import generate
from bitsmith.tasks.likelihood import Pair, Tick, log_likelihoods, split
from bitsmith.tasks.tokens import Tokenizer

# One thing, four names; the first that is given counts, as in the harness.
MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def harness_model(
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    context: int,
    batch_size: int = 16,
    max_tokens: int = 256,
    prefix: str = "\n",
    progress: Tick | None = None,
) -> Any:
    """An ``lm_eval.api.model.LM`` around a causal model (N, T) int64 -> (N, T, V). Raises MissingExtra.

    max_tokens: written by generate_until where a task names no number. prefix: what stands before the first
    token of a text, where others have a special token; a byte-level model knows a text's beginning as that of
    a line.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise MissingExtra("lm-eval", "lm_eval", "the adapter to lm-evaluation-harness") from None
    settings: dict[str, Any] = {"context": context, "batch_size": batch_size, "progress": progress}

    class HarnessModel(LM):
        """Answers requests (objects with ``args``) in the order given."""

        def loglikelihood(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            """args: (context, continuation); (ln p, whether greedy decoding would write it) of each."""
            pairs = [split(tokenizer, request.args[0] or prefix, request.args[1]) for request in requests]
            found = log_likelihoods(model, pairs, **settings)
            return [(likelihood.total, likelihood.greedy) for likelihood in found]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            """args: (text,); ln p of each whole text, window by window."""
            parts = [windows(tokenizer, request.args[0], prefix, context) for request in requests]
            found = iter(log_likelihoods(model, [pair for part in parts for pair in part], **settings))
            return [sum(next(found).total for _ in part) for part in parts]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            """args: (context, settings of the generation); the text written after each."""
            wishes = [_wish(request.args[1], max_tokens) for request in requests]
            texts: dict[int, str] = {}
            for limit in {limit for limit, _ in wishes}:
                rows = [i for i, wish in enumerate(wishes) if wish[0] == limit]
                written = generate(
                    model,
                    tokenizer,
                    [requests[i].args[0] or prefix for i in rows],
                    [wishes[i][1] for i in rows],
                    max_tokens=limit,
                    **settings,
                )
                texts.update(zip(rows, written, strict=True))
            return [texts[i] for i in range(len(requests))]

    return HarnessModel()


def windows(tokenizer: Tokenizer, text: str, prefix: str, context: int) -> list[Pair]:
    """Pairs whose log-likelihoods add up to that of ``text``: each token once, with as much before it as
    fits.

    As in the harness: windows of ``context`` tokens side by side, the last one moved back to be full.
    """
    before, tokens = tokenizer.encode(prefix), tokenizer.encode(text)
    if not before:
        raise DataError("the prefix has no tokens", where="harness: prefix", got=repr(prefix))
    return [
        ((before + tokens[:start])[-context:], tokens[start : start + context])
        for start in range(0, len(tokens), context)
    ]


def _wish(settings: Mapping[str, Any], max_tokens: int) -> tuple[int, list[str]]:
    """(most tokens, stop strings) of the harness's settings; only greedy generation is done."""
    if settings.get("do_sample") or (settings.get("do_sample") is None and settings.get("temperature")):
        raise DataError(
            "this task draws its answers at random",
            where="generate_until",
            got=", ".join(f"{name}={settings.get(name)}" for name in ("do_sample", "temperature")),
            expected="greedy generation",
            remedy="Give simple_evaluate gen_kwargs='do_sample=False,temperature=0'",
        )
    until = settings.get("until") or []
    limits = (settings[name] for name in MAX_TOKENS if settings.get(name) is not None)
    return int(next(limits, max_tokens)), [until] if isinstance(until, str) else list(until)
