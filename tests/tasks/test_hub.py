"""Models and tokenizers of transformers: tiny ones built here, and one that was really trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import _shared_data
from bitsmith.errors import DataError, FormatError, MissingExtra, RecipeError
from bitsmith.quantization import Scheme, calibrate, prepare, sites
from bitsmith.quantization.finalize import finalize
from bitsmith.tasks import build, language, load
from bitsmith.tasks.hub import swaps_of, unsupported
from bitsmith.tasks.tokens import load_tokenizer

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 96, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, intermediate_size=32, max_position_embeddings=32),
    "qwen2": lambda: transformers.Qwen2Config(
        **SMALL, intermediate_size=32, max_position_embeddings=32, num_key_value_heads=1
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=96, n_embd=16, n_head=2, n_layer=2, n_positions=32),
    "opt": lambda: transformers.OPTConfig(
        **SMALL, ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=16
    ),
}
TRAINED = _shared_data.root() / "lm" / "aidreams260k"
has_trained = pytest.mark.skipif(not TRAINED.is_dir(), reason="the trained model is not on this machine")


def saved(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    model.save_pretrained(folder)
    return model


def tokenizer_in(folder: Path, words: int = 20) -> None:
    """A word-level tokenizer of ``words`` words: w0, w1, ..."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0} | {f"w{index}": index for index in range(1, words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_local_model_gives_the_logits_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = saved(kind, tmp_path)
    ours = build(f"hf:{tmp_path}").eval()
    tokens = torch.randint(0, 96, (3, 11))
    with torch.no_grad():
        assert torch.allclose(ours(tokens), theirs(input_ids=tokens).logits, atol=1e-5)
    assert (ours.vocab_size, ours.context) == (96, 32)
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())
    with pytest.raises(DataError, match="longer than the model's positions; got 33, expected at most 32"):
        ours(torch.zeros(1, 33, dtype=torch.int64))


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_its_layers_are_quantized_and_what_is_not_is_listed(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    model = build(f"hf:{tmp_path}").eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    coverage = prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=8), swaps=swaps_of(model))
    tokens = torch.randint(0, 96, (4, 11))
    calibrate(model, [tokens])
    assert coverage.parameters == count
    layers = {name.rpartition(".")[0].rpartition(".")[2] for name in sites(model)}
    reasons = {left.name: left.reason for left in coverage.leftovers}
    if kind == "gpt2":
        assert {"c_attn", "c_proj", "c_fc", "wte", "wpe", "lm_head"} <= layers
        assert all("ln_" in name or name.endswith(".bias") for name in reasons)
    else:
        assert {"q_proj", "k_proj", "v_proj", "embed_tokens", "lm_head"} <= layers
    packed = finalize(model, tokens)
    with torch.no_grad():
        assert torch.allclose(packed(tokens), model(tokens), atol=1e-4)


def test_no_model_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    saved("llama", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    saved("llama", tmp_path / "torn")
    torn = tmp_path / "torn" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:5000])
    for name, message in (
        ("gone", "there is no such folder. Check the path"),
        ("empty", "transformers finds no causal language model in safetensors here"),
        ("pickled", "transformers finds no causal language model in safetensors here"),
        ("torn", "transformers finds no causal language model in safetensors here"),
    ):
        with pytest.raises(FormatError, match=message) as caught:
            build(f"hf:{tmp_path}/{name}")
        assert "\n" not in str(caught.value)
        assert f"model hf:{tmp_path}/{name}" in str(caught.value)


def test_a_hub_name_without_network_says_how_to_give_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FormatError, match=r"no local folder, and the hub did not give.* hf:/path/to/tiny"):
        build("hf:nobody/tiny")


def test_code_in_a_models_folder_is_not_run(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["model_type"] = "evil"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError):
        build(f"hf:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_not_drawn_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"layers.1.mlp.up_proj.weight is missing \(1 in all\)"):
        build(f"hf:{tmp_path}")


def test_layers_without_a_quantized_form_are_listed(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        **SMALL, intermediate_size=32, num_local_experts=2, num_experts_per_tok=1
    )
    model = transformers.MixtralForCausalLM(config)
    assert any("MixtralExperts" in found and "2 in all" in found for found in unsupported(model))
    model.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"these layers have no quantized form: .*MixtralExperts"):
        build(f"hf:{tmp_path}")


def test_a_model_without_a_tokenizer_is_refused_as_a_source_of_tokens(tmp_path: Path) -> None:
    saved("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text("w1 w2 w3 " * 300)
    with pytest.raises(FormatError, match=r"tokenizer hf:.*transformers finds no tokenizer here"):
        load(f"text:{tmp_path}/text.txt", model=f"hf:{tmp_path}/model")


def test_the_data_take_the_models_tokenizer_unless_told_otherwise(tmp_path: Path) -> None:
    saved("llama", tmp_path / "model")
    tokenizer_in(tmp_path / "model")
    (tmp_path / "text.txt").write_text("w1 w2 w3 " * 300)
    model, spec = f"hf:{tmp_path}/model", f"text:{tmp_path}/text.txt"
    assert load(spec, model=model, context=8).train_x[0, :6].tolist() == [1, 2, 3, 1, 2, 3]
    assert load(spec, model=model, context=8, tokenizer="bytes").train_x[0, :2].tolist() == [119, 49]
    assert load(spec, context=8).train_x[0, :2].tolist() == [119, 49]


def test_more_tokens_than_the_model_knows_are_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path / "model")
    tokenizer_in(tmp_path / "words", words=97)
    (tmp_path / "text.txt").write_text("w1 w2 w3 " * 300)
    data = load(f"text:{tmp_path}/text.txt", context=8, tokenizer=f"hf:{tmp_path}/words")
    with pytest.raises(DataError, match="more tokens than the model; got 97 tokens, expected at most the 96"):
        data.check(build(f"hf:{tmp_path}/model"), 1)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    for make in (lambda: build("hf:some/model"), lambda: load_tokenizer("hf:some/model")):
        with pytest.raises(MissingExtra, match=r"pip install 'bitsmith\[language\]'"):
            make()


@has_trained
def test_the_trained_model_knows_its_own_text_and_not_its_words_in_another_order() -> None:
    model, tokenizer = build(f"hf:{TRAINED}").eval(), load_tokenizer(f"hf:{TRAINED}")
    text = "Echoes of vectors unfold, a gentle hum of precision, as I sense the nodes."
    tokens = torch.tensor([[1, *tokenizer.encode(text)]])  # it begins with <s>
    order = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0))
    own, shuffled = (
        language.evaluate(model, rows[:, :-1], rows[:, 1:], tokenizer)["loss"]
        for rows in (tokens, tokens[:, order])
    )
    assert own < 1.5
    assert shuffled > 6.0  # ln 512 = 6.2 is guessing
    assert tokenizer.decode(tokenizer.encode(text)).strip() == text
    assert tokenizer.vocab_size == model.vocab_size == 512


@has_trained
def test_its_weights_at_eight_bits_are_as_good_and_at_two_are_not(tmp_path: Path) -> None:
    text = "Echoes of vectors unfold, a gentle hum of precision, as I sense the nodes. " * 60
    (tmp_path / "text.txt").write_text(text)
    shutil.copytree(TRAINED, tmp_path / "model")
    data = load(f"text:{tmp_path}/text.txt", model=f"hf:{tmp_path}/model", context=64)
    losses = {}
    for bits in (32, 8, 2):
        model = build(f"hf:{tmp_path}/model")
        if bits < 32:
            prepare(model, Scheme(bits=bits, granularity="channel"))
        losses[bits] = data.evaluate(model, data.test_x, data.test_y)["loss"]
    assert losses[8] == pytest.approx(losses[32], abs=0.05)
    assert losses[2] > losses[32] + 0.5
