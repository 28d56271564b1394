"""Causal language models and tokenizers in the form of transformers: `hf:PATH` or `hf:NAME/MODEL`.

Only safetensors are read and no code of the model's folder is run. A name that is no local folder is left to
transformers, which looks into its cache and then asks the Hugging Face hub. Products of attention inside
transformers' modules are function calls and stay in float: the cost counts them at 32 x 32 bits.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import DataError, FormatError, MissingExtra, RecipeError
from bitsmith.quantization.layers import QuantTransposedLinear

MATRICES = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


class CausalLM(nn.Module):
    """A transformers model as every model here: tokens (N, T) int64 -> logits (N, T, vocab_size)."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm
        config: Any = lm.config
        self.vocab_size: int = config.vocab_size
        self.context: int | None = getattr(config, "max_position_embeddings", None)

    def forward(self, tokens: Tensor) -> Tensor:
        """Raises DataError where T is more than the positions: a table of positions would be read past its
        end."""
        self._check(tokens.shape[1])
        logits: Tensor = self.lm(input_ids=tokens, use_cache=False).logits
        return logits

    def read(self, tokens: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        """(logits of the next token (N, vocab_size), transformers' cache) after ``tokens`` that follow those
        in the cache ``past``, which is written to. Raises DataError as forward."""
        self._check(tokens.shape[1] + (0 if past is None else past.get_seq_length()))
        found = self.lm(input_ids=tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1], found.past_key_values

    def _check(self, length: int) -> None:
        if self.context is not None and length > self.context:
            raise DataError(
                "the sequence is longer than the model's positions",
                where=type(self.lm).__name__,
                got=length,
                expected=f"at most {self.context} tokens",
                remedy="Give the data a shorter context",
            )


def load_causal_lm(path: str) -> CausalLM:
    """The causal language model in a local folder, or of that name on the hub, in float32.

    Raises MissingExtra, FormatError (no such model, no safetensors, weights missing), RecipeError where it
    has matrices that no layer of ours stands for, as experts in one tensor.
    """
    where = f"model hf:{path}"
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise MissingExtra("language", "transformers", where) from None
    model, found = from_hub(
        AutoModelForCausalLM,
        path,
        where,
        "causal language model in safetensors",
        dtype=torch.float32,
        attn_implementation="eager",  # plain products, which the count of operations sees
        use_safetensors=True,
        output_loading_info=True,
    )
    if lacking := sorted(found["missing_keys"]):
        raise FormatError(
            f"tensor {lacking[0]} is missing ({len(lacking)} in all)",
            where=where,
            remedy="transformers would draw it at random: restore the file from a copy",
        )
    if strangers := unsupported(model):
        raise RecipeError(
            f"these layers have no quantized form: {', '.join(strangers)}",
            where=where,
            expected="nn.Linear, Conv1D and embeddings",
            remedy="Build the model with such layers in a factory of yours: model: package.module:factory",
        )
    return CausalLM(model)


def swaps_of(model: nn.Module) -> dict[type[nn.Module], type[nn.Module]]:
    """The ``swaps`` that `prepare` needs for this model: GPT-2's linear layers, transformers' Conv1D, are no
    nn.Linear. Empty for a model without such layers; transformers is not imported for it."""
    return {kind: QuantTransposedLinear for kind in map(type, model.modules()) if _is_conv1d(kind)}


def _is_conv1d(kind: type[nn.Module]) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"


def unsupported(model: nn.Module) -> list[str]:
    """Modules that hold matrices of their own and are of no kind known here: "NAME (Kind)", one a kind."""
    found: dict[str, str] = {}
    count: Counter[str] = Counter()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.ndim > 1 and min(p.shape) > 1]
        kind = type(module).__name__
        if own and not isinstance(module, MATRICES) and not _is_conv1d(type(module)):
            found.setdefault(kind, name)
            count[kind] += 1
    return [f"{name} ({kind}, {count[kind]} in all)" for kind, name in found.items()]


def from_hub(auto: Any, path: str, where: str, what: str, **options: Any) -> Any:
    """``auto.from_pretrained(path)``, every refusal of transformers as one line of ours.

    auto: one of its Auto classes; what: what is looked for, in words.
    """
    place = Path(path).expanduser()
    local = place.is_dir()
    if not local and (place.is_absolute() or path.startswith(".") or path.count("/") != 1):
        raise FormatError("there is no such folder", where=where, remedy="Check the path")
    try:
        with _quiet():
            return auto.from_pretrained(
                str(place) if local else path, trust_remote_code=False, local_files_only=local, **options
            )
    except Exception as error:  # OSError, ValueError, KeyError and the errors of three packages
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if local:
            listed = ", ".join(sorted(entry.name for entry in place.iterdir())[:6]) or "nothing"
            raise FormatError(
                f"transformers finds no {what} here ({reason})",
                where=where,
                got=f"a folder with {listed}",
                remedy="Save it with save_pretrained",
            ) from None
        raise FormatError(
            f"this is no local folder, and the hub did not give a {what} ({reason})",
            where=where,
            remedy=f"Without network, download it elsewhere and give its folder: hf:{os.sep}path{os.sep}to"
            f"{os.sep}{path.rpartition('/')[2]}",
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws a bar while it loads; whoever watches a job has one already."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
