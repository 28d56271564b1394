"""Models of transformers that train on integers keep codes for backward, norms, MLPs and attention."""

import copy

import pytest
import torch
from torch import nn

from bitsmith.errors import SiteError
from bitsmith.optim import IntegerSGD
from bitsmith.quantization.integer_prepare import prepare_integer
from bitsmith.tasks.attention_codes import save_attention_codes
from tests.quantization.test_integer_blocks import TOKENS, saved


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_models_of_transformers_keep_codes_without_a_change_of_theirs(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        use_cache=False,
    )
    plain = getattr(transformers, f"{family}ForCausalLM")(config)
    x, found = TOKENS[:, :32] % 40, []
    for codes in (False, True):
        model = copy.deepcopy(plain)
        prepare_integer(model, 4, save_codes=codes)
        if codes:
            save_attention_codes(model)
        optimizer = IntegerSGD(model, lr=0.1)
        loss, kept = saved(lambda model=model: model(input_ids=x, labels=x).loss)
        loss.backward()
        optimizer.step()
        norm = model.model.layers[0].input_layernorm.weight.grad
        found.append((loss.detach(), norm, sum(t.untyped_storage().nbytes() for t in kept)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).norm() < 0.1 * found[0][1].norm()
    assert found[1][2] < 0.4 * found[0][2]
    save_attention_codes(model, False)
    assert model.config._attn_implementation == "sdpa"


def test_other_attention_is_refused() -> None:
    with pytest.raises(SiteError, match="scaled dot product attention keeps codes"):
        save_attention_codes(nn.Linear(2, 2))
