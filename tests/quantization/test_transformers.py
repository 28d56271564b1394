"""Hugging Face's GPT-2, tiny and random: Conv1D layers, an embedding tied to the head, one of positions."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitsmith.export import load, save
from bitsmith.export.native import stored_tensors
from bitsmith.quantization import Scheme, calibrate, measure, parameter_groups, prepare, sites
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.layers import QuantTransposedLinear

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(0))


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=24,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        initializer_range=0.2,  # so that its outputs are not all alike
    )
    return transformers.GPT2LMHeadModel(config).eval()


def prepared(weights: Scheme, activations: Scheme | None = None, **arguments: Any) -> Any:
    from transformers.pytorch_utils import Conv1D

    model = gpt2()
    prepare(model, weights, activations, swaps={Conv1D: QuantTransposedLinear}, **arguments)
    calibrate(model, [TOKENS])
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def test_every_matrix_is_a_site_and_the_tied_table_one() -> None:
    model = prepared(Scheme(bits=4, granularity="channel"), Scheme(bits=8))
    weights = [name for name, q in sites(model).items() if q.kind == "weight"]
    blocks = [
        f"transformer.h.{i}.{part}.weight"
        for i in (0, 1)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert weights == ["transformer.wte.weight", "transformer.wpe.weight", *blocks]
    assert sites(model)["transformer.wte.weight"].bits.whole() == 8
    assert sites(model)["lm_head.input"].bits.whole() == 8
    assert model.lm_head.weight_quantizer is model.transformer.wte.weight_quantizer
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert torch.equal(logits(twin), logits(model))


def test_at_float_it_is_the_model_and_at_eight_bits_near_it() -> None:
    plain = logits(gpt2())
    assert torch.equal(logits(prepared(Scheme(bits=32), Scheme(bits=32))), plain)
    near = logits(
        prepared(Scheme(bits=8, granularity="channel"), Scheme(bits=8, granularity="token", range="dynamic"))
    )
    assert 0 < (near - plain).norm() / plain.norm() < 0.02
    assert (near.argmax(-1) == plain.argmax(-1)).float().mean() > 0.9


FORMATS = {
    "groups": Scheme(bits=4, granularity="group", group_size=32),
    "ragged asymmetric groups": Scheme(bits=3, granularity="group", group_size=16, grid="asymmetric"),
    "channels": Scheme(bits=2, granularity="channel"),
}


@pytest.mark.parametrize("weights", FORMATS.values(), ids=FORMATS.keys())
def test_trained_packed_and_loaded_models_are_one(weights: Scheme, tmp_path: Path) -> None:
    model = prepared(weights, Scheme(bits=8, granularity="token", range="dynamic", grid="asymmetric")).train()
    optimizer = torch.optim.SGD(parameter_groups(model, learning_rate=0.01))
    losses = []
    for _ in range(4):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    packed = finalize(model, TOKENS)
    assert torch.equal(logits(packed), logits(model))
    stored = stored_tensors(packed)
    assert not any(name.startswith("lm_head.weight") for name in stored)
    report = measure(model, TOKENS).report()
    assert report["weight_bytes"] == sum(t.numel() * t.element_size() for t in stored.values())
    loaded = load(save(packed, tmp_path), into=gpt2(), kernels=False)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(logits(loaded), logits(model))


def test_products_are_those_of_linear_layers() -> None:
    report = measure(prepared(Scheme(bits=4, granularity="channel"), Scheme(bits=8)), TOKENS).report()
    kinds = {layer["name"]: (layer["kind"], layer["macs"]) for layer in report["layers"]}
    assert kinds["transformer.wte"] == ("Embedding", 0)
    assert kinds["transformer.h.0.mlp.c_fc"] == ("Linear", 12 * 24 * 96)
    assert kinds["lm_head"] == ("Linear", 12 * 24 * 50)
    assert report["float_macs"] == 2 * 2 * 12 * 12 * 24  # the two products of attention, in both blocks
