"""The checkpoint file: what goes in comes out, and nothing else is accepted."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitsmith.errors import FormatError, RecipeError
from bitsmith.files import load_tensors, save_tensors
from bitsmith.train.checkpoint import (
    check_keys,
    flatten,
    load_checkpoint,
    save_checkpoint,
    tensor_digest,
    unflatten,
)

FINGERPRINT = {"train.learning_rate": 0.1, "methods": ["Anchor"]}

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.text() | st.integers()
NESTS = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=8,
)


@given(NESTS)
def test_any_nest_survives_json(nest: object) -> None:
    assert unflatten(json.loads(json.dumps(flatten(nest, {}))), {}) == nest


def test_an_optimizer_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(2))]
    optimizer = torch.optim.AdamW(weights, lr=0.1, fused=True)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state_dict()
    save_checkpoint(tmp_path / "c", {"optimizer": state}, FINGERPRINT)
    loaded = load_checkpoint(tmp_path / "c", FINGERPRINT)["optimizer"]
    assert loaded["param_groups"] == state["param_groups"]
    assert loaded["state"].keys() == state["state"].keys() == {0, 1}
    for index, entry in state["state"].items():
        assert all(torch.equal(loaded["state"][index][name], value) for name, value in entry.items())


def test_something_that_only_pickle_could_hold_is_refused() -> None:
    with pytest.raises(FormatError, match="cannot be part of a checkpoint; got object"):
        flatten({"state": object()}, {})


def written(tmp_path: Path) -> Path:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"step": 3, "model": {"weight": torch.randn(20)}}, FINGERPRINT)
    return path


@pytest.mark.parametrize("position", [0, 9, 0.3, 0.6, 0.99])
def test_a_flipped_byte_is_found(tmp_path: Path, position: float) -> None:
    path = written(tmp_path)
    content = bytearray(path.read_bytes())
    content[int(position if position >= 1 else position * len(content))] ^= 0x5A
    path.write_bytes(bytes(content))
    with pytest.raises(FormatError) as error:
        load_checkpoint(path, FINGERPRINT)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("word", [b"sha256", b"format", b"kind", b"version"])
def test_a_damaged_mark_is_found(tmp_path: Path, word: bytes) -> None:
    """The order of a file's marks is not fixed, so that a flipped byte may hit any of them."""
    path = written(tmp_path)
    content = path.read_bytes()
    assert content.count(b'"' + word + b'"') == 1
    path.write_bytes(content.replace(b'"' + word + b'"', b'"' + word[:-1] + b'~"'))
    with pytest.raises(FormatError):
        load_checkpoint(path, FINGERPRINT)


@pytest.mark.parametrize("share", [0, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_found(tmp_path: Path, share: float) -> None:
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(FormatError, match="truncated"):
        load_checkpoint(path, FINGERPRINT)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "model", {"weight": torch.zeros(2)}, {"kind": "something else"})
    with pytest.raises(FormatError, match="not a training checkpoint of ours; got something else"):
        load_checkpoint(tmp_path / "model", FINGERPRINT)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, {**metadata, "version": "7"})
    with pytest.raises(FormatError, match="written by another version; got format 7, expected format 1"):
        load_checkpoint(path, FINGERPRINT)


def test_other_settings_are_named(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(RecipeError) as error:
        load_checkpoint(path, {**FINGERPRINT, "train.learning_rate": 0.2})
    assert str(error.value) == (
        f"{path}: this checkpoint was written with another train.learning_rate; got 0.2 now, expected 0.1. "
        "Use the settings that it was written with, or start anew without --resume."
    )


def test_a_setting_that_did_not_exist_then_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"another train.new; got 1 now, expected None"):
        load_checkpoint(written(tmp_path), {**FINGERPRINT, "train.new": 1})


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({}, r"another model: weight does not fit; got nothing, expected \(2,\)"),
        ({"weight": torch.zeros(3)}, r"weight does not fit; got \(3,\), expected \(2,\)"),
        (
            {"weight": torch.zeros(2), "old": torch.zeros(1)},
            r"old does not fit; got \(1,\), expected nothing",
        ),
    ],
)
def test_a_state_of_another_model_is_named(stored: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        check_keys(Path("c"), "model", stored, {"weight": torch.zeros(2)})


def test_the_digest_tells_labels_apart() -> None:
    labels = torch.arange(5)
    other = labels.clone()
    other[4] = 0
    digests = {tensor_digest(t) for t in (labels, other, labels.int(), labels.view(1, 5))}
    assert len(digests) == 4
    assert tensor_digest(labels) == tensor_digest(labels.clone())
