"""Reading and writing are timed apart, all models in turn, and each step reads one token."""

import pytest
import torch
from torch import Tensor, nn

from bitsmith.bench.rounds import in_turn
from bitsmith.bench.writing import Written, describe_writing, measure_writing
from bitsmith.tasks import build


def llama(seed: int) -> nn.Module:
    return build("byte_llama", seed=seed, width=16, depth=1, heads=2, context=16).eval()


def test_every_round_reads_the_prompt_and_writes_token_by_token() -> None:
    models, read = {"a": llama(0), "b": llama(1)}, []
    for name, model in models.items():
        model.embed_tokens.register_forward_pre_hook(
            lambda _, inputs, name=name: read.append((name, inputs[0].shape[1]))
        )
    timed = measure_writing(models, torch.zeros(1, 5, dtype=torch.int64), 3, 2)
    turn = {name: [(name, 5), (name, 1), (name, 1), (name, 1)] for name in "ab"}
    warm, first, second = ("b", "a"), ("a", "b"), ("b", "a")
    assert read == [row for name in (*warm, *first, *second) for row in turn[name]]
    assert [len(timed["a"].prompts), len(timed["a"].steps)] == [2, 6]


def test_it_writes_what_it_finds_likeliest() -> None:
    model, fed = llama(0), []
    model.embed_tokens.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].flatten().tolist()))
    prompt = torch.tensor([[3, 1, 4]])
    measure_writing({"a": model}, prompt, 4, 1)
    text: Tensor = prompt
    with torch.no_grad():
        for _ in range(4):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    assert [token for row in fed[5:10] for token in row] == text.flatten().tolist()


def test_figures_are_medians_percentiles_and_ratios_within_a_round() -> None:
    models = {name: llama(0) for name in ("float32", "native")}
    timed = {"float32": Written([0.4, 0.8], [0.01, 0.02, 0.03]), "native": Written([0.1, 0.1], [0.005] * 3)}
    found = describe_writing(models, timed, torch.zeros(1, 10, dtype=torch.int64), 3)
    native = found["models"]["native"]
    assert (found["prompt"], found["written"]) == (10, 3)
    assert native["prefill_per_s"] == pytest.approx(100)
    assert native["decode_per_s"] == pytest.approx(200)
    assert (native["prefill_speedup"], native["decode_speedup"]) == (pytest.approx(6), pytest.approx(4))
    assert found["models"]["float32"]["step_ms"] == {
        "p50": pytest.approx(20),
        "p95": pytest.approx(30),
        "p99": pytest.approx(30),
    }


def test_each_round_begins_with_another() -> None:
    assert [in_turn("abc", turn) for turn in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
