"""Tokens that are read one after another give what a forward over all of them gives."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import DataError
from bitsmith.quantization import Scheme, calibrate, prepare
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.integer_products import KernelLinear, run_on_kernels
from bitsmith.tasks import build
from bitsmith.tasks.generation import generate
from bitsmith.tasks.hub import CausalLM, swaps_of
from bitsmith.tasks.language import sample
from bitsmith.tasks.llama import Llama
from bitsmith.tasks.reading import reader, reads_one_by_one
from bitsmith.tasks.tokens import ByteTokenizer
from tests.tasks.language import Ascii, History

TOKENS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))
PROMPTS = ["one and", "two and", "three", "for", "a"]
PER_TOKEN: Any = {"granularity": "token", "range": "dynamic"}
KEYS_IN_FLOAT = {"*.scores.right": {"bits": 32}, "*.context.right": {"bits": 32}}


def llama(**changes: Any) -> nn.Module:
    return build(
        "byte_llama", seed=0, **{"width": 32, "depth": 2, "heads": 4, "context": 24} | changes
    ).eval()


def quantized(how: str, activations: dict[str, Any], **more: Any) -> nn.Module:
    """Prepared, packed, or packed and on kernels."""
    model = llama()
    prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=8, **activations), **more)
    calibrate(model, [TOKENS])
    if how == "prepared":
        return model
    packed = finalize(model, TOKENS)
    if how == "kernels":
        run_on_kernels(packed)
        assert isinstance(packed.lm_head, KernelLinear)
    return packed


def transformer(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=24)
        return CausalLM(transformers.GPT2LMHeadModel(config)).eval()
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=24, attn_implementation="eager",
    )  # fmt: skip
    return CausalLM(transformers.LlamaForCausalLM(config)).eval()


def quantized_transformer() -> nn.Module:
    model = transformer("gpt2")
    prepare(model, Scheme(bits=4), Scheme(bits=8, **PER_TOKEN), swaps=swaps_of(model))
    calibrate(model, [TOKENS])
    return finalize(model, TOKENS)


MODELS = {
    "float": llama,
    "tied": lambda: llama(tied=True),
    **{f"{how}, static": lambda how=how: quantized(how, {}) for how in ("prepared", "packed", "kernels")},
    "kernels, per token": lambda: quantized("kernels", PER_TOKEN, overrides=KEYS_IN_FLOAT),
    "transformers llama": lambda: transformer("llama"),
    "transformers gpt2": lambda: transformer("gpt2"),
    "transformers gpt2, 4 bits": quantized_transformer,
}


@torch.no_grad()
def close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= 2e-5 * want.abs().max())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_a_forward_over_all_tokens(name: str) -> None:
    model = MODELS[name]()
    assert reads_one_by_one(model)
    read, seen = reader(model, 3), 0
    for count in (5, 1, 1, 3, 1, 13):
        seen += count
        assert close(read(TOKENS[:, seen - count : seen]), model(TOKENS[:, :seen])[:, -1])
    with pytest.raises(DataError, match=r"longer than the model's positions; got 25, expected at most 24"):
        read(TOKENS[:, :1])


@pytest.mark.parametrize("name", ["float", "packed, static", "transformers llama"])
@torch.no_grad()
def test_rows_can_be_left_behind(name: str) -> None:
    model = MODELS[name]()
    read = reader(model, 3)
    read(TOKENS[:, :8])
    read.keep([2, 0])
    assert close(read(TOKENS[[2, 0], 8:9]), model(TOKENS[[2, 0], :9])[:, -1])
    read.keep([1])
    assert close(read(TOKENS[[0], 9:11]), model(TOKENS[[0], :11])[:, -1])


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_the_same_with_and_without_cache(name: str) -> None:
    model = MODELS[name]()
    greedy = [
        generate(model, ByteTokenizer(), PROMPTS, [["e"]] * 5, context=24, max_tokens=12, cache=cache)
        for cache in (True, False)
    ]
    assert greedy[0] == greedy[1]
    drawn = [
        sample(model, ByteTokenizer(), "ab", 40, 0.8, torch.Generator().manual_seed(3), cache=cache)
        for cache in (True, False)
    ]
    assert drawn[0] == drawn[1]  # through the end of the 24 positions


@pytest.mark.parametrize(
    ("activations", "more"),
    [
        ({"granularity": "tensor", "range": "dynamic"}, {}),
        (PER_TOKEN, {}),  # of keys: a scale for each feature, over all positions
    ],
)
@pytest.mark.parametrize("how", ["prepared", "packed"])
@torch.no_grad()
def test_ranges_over_several_tokens_are_read_again(how: str, activations: Any, more: Any) -> None:
    model = quantized(how, activations, **more)
    assert not reads_one_by_one(model)
    whole = model(TOKENS)
    assert not torch.equal(whole[:, :8], model(TOKENS[:, :8]))  # what comes later moves what was before
    read = reader(model, 3)
    read(TOKENS[:, :8])
    assert torch.equal(read(TOKENS[:, 8:]), whole[:, -1])


def test_every_token_is_read_once() -> None:
    model, seen = llama(), []
    model.embed_tokens.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    generate(model, ByteTokenizer(), ["abcdef"], [()], context=24, max_tokens=5)
    assert seen == [6, 1, 1, 1, 1]


@torch.no_grad()
def test_a_model_of_which_nothing_is_known_reads_again() -> None:
    model = History(seed=3).eval()
    read = reader(model, 1)
    row = torch.tensor([Ascii().encode("a text")])
    read(row[:, :4])
    assert torch.equal(read(row[:, 4:]), model(row)[:, -1])
    assert model.longest == 6


def test_a_memory_is_no_part_of_the_model() -> None:
    model = llama()
    assert isinstance(model, Llama)
    before = copy.deepcopy(model.state_dict())
    memory = model.memory(2, 7)
    assert [tuple(t.shape) for pair in memory.blocks for t in pair] == [(2, 4, 7, 8)] * 4
    with torch.no_grad(), pytest.raises(DataError, match="at most 7 tokens"):
        model(TOKENS[:2, :8], memory)
    with torch.no_grad():
        assert model(TOKENS[:2, :7], memory).shape == (2, 1, 256)
    assert memory.length == 7
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
