"""The byte model against an independent Llama, and that it looks at nothing that comes later."""

import pytest
import torch

from bitsmith.errors import DataError, RecipeError
from bitsmith.quantization import Scheme, prepare, sites
from bitsmith.quantization.layers import MatMul
from bitsmith.tasks import build


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_transformers_with_the_same_weights(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    ours = build("byte_llama", seed=0, width=32, depth=2, heads=4, context=24, tied=tied).eval()
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, rms_norm_eps=1e-5, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    state = {n if n.startswith("lm_head") else f"model.{n}": t for n, t in ours.state_dict().items()}
    theirs.load_state_dict(state)
    tokens = torch.randint(0, 256, (3, 24))
    with torch.no_grad():
        for length in (24, 7, 1):
            found, expected = ours(tokens[:, :length]), theirs(tokens[:, :length]).logits
            assert found.shape == (3, length, 256)
            assert torch.allclose(found, expected, atol=1e-5)


def test_a_token_changes_nothing_before_it() -> None:
    model = build("byte_llama", seed=1, width=16, depth=2).eval()
    tokens = torch.randint(0, 256, (2, 20))
    other = tokens.clone()
    other[:, 12] = (other[:, 12] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(other)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


def test_its_size_and_its_sites() -> None:
    model = build("byte_llama")
    assert sum(parameter.numel() for parameter in model.parameters()) == 381_600
    assert model(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 256)
    products = [name for name, module in model.named_modules() if isinstance(module, MatMul)]
    assert products == [f"layers.{i}.self_attn.{name}" for i in range(3) for name in ("scores", "context")]
    tied = build("byte_llama", tied=True)
    assert tied.lm_head.weight is tied.embed_tokens.weight


def test_more_tokens_than_positions_are_refused() -> None:
    model = build("byte_llama", width=16, depth=1, context=8)
    with pytest.raises(
        DataError, match="longer than the model's positions; got 9, expected at most 8 tokens"
    ):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_a_width_that_heads_cannot_share_is_refused() -> None:
    with pytest.raises(RecipeError, match="byte_llama: width 20 is not a multiple of twice the heads, 8"):
        build("byte_llama", width=20)


@pytest.mark.parametrize("tied", [False, True])
def test_every_matrix_is_a_site_and_a_tied_one_a_single_site(tied: bool) -> None:
    model = build("byte_llama", seed=0, width=32, depth=2, context=8, tied=tied)
    found = prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=8))
    assert all("norm" in left.name for left in found.leftovers)
    weights = {name: q.bits.whole() for name, q in sites(model).items() if q.kind == "weight"}
    ends = {"embed_tokens.weight": 8} | ({} if tied else {"lm_head.weight": 8})
    assert {name: bits for name, bits in weights.items() if bits == 8} == ends
    assert len(weights) == 2 * 7 + len(ends)
    assert all(bits == 4 for name, bits in weights.items() if name not in ends)
