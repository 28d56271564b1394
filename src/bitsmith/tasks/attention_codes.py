"""Attention of transformers' models that keeps int8 codes of queries, keys and values for backward.

It is transformers' own scaled dot product attention under another name, put in by transformers' own
interface; what is kept is quantization.integer_blocks'. Norms and gated MLPs of such models need nothing of
this.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitsmith.errors import SiteError
from bitsmith.quantization.integer_blocks import from_codes

PLAIN, CODED = "sdpa", "sdpa_saving_codes"


def save_attention_codes(model: Any, codes: bool = True) -> None:
    """Let a model of transformers keep codes in attention, or floats again (as before its configuration is
    written). Raises SiteError where its attention is not ``sdpa``."""
    before, after = (PLAIN, CODED) if codes else (CODED, PLAIN)
    found = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if found == after:
        return
    if found != before:
        raise SiteError(
            "only transformers' scaled dot product attention keeps codes",
            where="save_attention_codes",
            got=found or type(model).__name__,
            expected=before,
            remedy='Build the model with attn_implementation="sdpa"',
        )
    if codes:
        _register()
    model.set_attn_implementation(after)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sdpa_attention_forward(module, q, k, v, mask, **options)[0]

        if options.get("dropout"):  # it would draw twice
            return run(query, key, value), None
        return from_codes(run, query, key, value), None

    AttentionInterface.register(CODED, attention)
    AttentionMaskInterface.register(CODED, sdpa_mask)
