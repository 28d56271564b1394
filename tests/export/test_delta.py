"""Deltas and merges of native models: exact, small, and refused where they do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.errors import FormatError, SchemeError
from bitsmith.export.delta import apply_delta, read_delta, share_changed, write_delta
from bitsmith.export.merge import merged
from bitsmith.files import load_tensors, save_tensors
from bitsmith.numerics.pack import pack, unpack

ROWS, INPUTS = 12, 21


def text(bits: int = 4) -> bytes:
    form = {"bits": bits, "grid": "symmetric", "granularity": "channel", "shape": [ROWS, INPUTS]}
    return json.dumps({"layers": {"fc": {"kind": "linear", "weight": form}}}).encode()


def model(codes: Tensor, scale: float = 0.1, bias: float = 0.0, bits: int = 4) -> dict[str, Tensor]:
    return {
        "fc.weight.codes": pack(codes, bits, 0),
        "fc.weight.scale": torch.full((ROWS, 1), scale),
        "fc.bias": torch.full((ROWS,), bias),
        "fc.input.scale": torch.tensor([0.3]),
    }


def drawn(bits: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, (ROWS * INPUTS,), generator=torch.Generator().manual_seed(seed))


def codes_of(tensors: dict[str, Tensor], bits: int = 4) -> Tensor:
    return unpack(tensors["fc.weight.codes"], bits, ROWS * INPUTS, 0)


@settings(max_examples=40)
@given(bits=st.integers(2, 8), share=st.floats(0, 1), seed=st.integers(0, 100))
def test_a_delta_gives_the_model_that_it_was_made_from(
    tmp_path_factory: pytest.TempPathFactory, bits: int, share: float, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "delta"
    before, after = drawn(bits, seed), drawn(bits, seed + 1)
    kept = torch.rand(len(before), generator=torch.Generator().manual_seed(seed)) >= share
    after[kept] = before[kept]
    base, result = model(before, bits=bits), model(after, 0.2, 1.0, bits=bits)
    write_delta(path, text(bits), base, result)
    found = apply_delta(path, text(bits), base)
    assert found.keys() == result.keys()
    assert all(torch.equal(found[name], result[name]) for name in result)
    assert share_changed(text(bits), base, result) == pytest.approx(float((before != after).double().mean()))


def test_only_what_changed_is_in_it_in_the_smaller_form(tmp_path: Path) -> None:
    few, many = drawn(), drawn(seed=1)
    few[[3, 200]] = (few[[3, 200]] + 1) % 16
    forms = []
    for after in (few, many):
        write_delta(tmp_path / "delta", text(), model(drawn()), model(after))
        stored, facts = read_delta(tmp_path / "delta")
        assert stored.keys() == {"fc.weight.codes"}
        forms.append(json.loads(facts["changes"])["fc.weight.codes"]["kind"])
        assert stored["fc.weight.codes"].numel() <= ROWS * INPUTS // 2 + 16
    assert forms == ["codes", "xor"]


def test_a_delta_of_another_base_is_refused(tmp_path: Path) -> None:
    write_delta(tmp_path / "delta", text(), model(drawn()), model(drawn(seed=1)))
    with pytest.raises(FormatError, match="belongs to another model"):
        apply_delta(tmp_path / "delta", text(), model(drawn(), scale=0.11))
    with pytest.raises(FormatError, match="belongs to another model"):
        apply_delta(tmp_path / "delta", text() + b" ", model(drawn()))


def changed(name: str, value: Any) -> Any:
    def change(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
        changes = json.loads(facts["changes"])
        changes["fc.weight.codes"][name] = value
        facts["changes"] = json.dumps(changes)

    return change


def far(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    tensors["fc.weight.codes"][:2] = 255


def other_result(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    facts["result"] = "0" * 64


DAMAGE = {
    "kind": (changed("kind", "run"), "damaged"),
    "count": (changed("count", 10**12), "damaged"),
    "gap": (changed("gap", 3), "damaged"),
    "bits": (changed("bits", 0), "damaged"),
    "codes beyond the last": (far, "damaged"),
    "another result": (other_result, "does not give the model"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_delta_that_lies_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    few = drawn()
    few[[3, 200]] = (few[[3, 200]] + 1) % 16
    write_delta(tmp_path / "delta", text(), model(drawn()), model(few))
    tensors, facts = load_tensors(tmp_path / "delta")
    damage(tensors, facts)
    save_tensors(tmp_path / "delta", tensors, facts)
    with pytest.raises(FormatError, match=message):
        apply_delta(tmp_path / "delta", text(), model(drawn()))


def test_a_delta_of_another_version_or_another_file_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "delta", {}, {"bitsmith_delta": "2"})
    with pytest.raises(FormatError, match=r"another format version; got 2, expected 1"):
        read_delta(tmp_path / "delta")
    save_tensors(tmp_path / "delta", {}, {})
    with pytest.raises(FormatError, match="not a delta of ours"):
        read_delta(tmp_path / "delta")


def test_merged_codes_are_the_mean_of_the_changes() -> None:
    copies = [drawn(seed=seed) for seed in (1, 2, 3)]
    mean = torch.stack(copies).double().mean(0)
    models = [model(codes) for codes in copies]
    nearest = codes_of(merged(text(), model(drawn()), models, "nearest"))
    assert torch.equal(nearest, mean.round().to(torch.int16))
    every = torch.stack(
        [codes_of(merged(text(), model(drawn()), models, seed=s)) for s in range(400)]
    ).double()
    assert ((every == mean.floor()) | (every == mean.ceil())).all()
    error = every.mean(0) - mean
    assert error.abs().max() < 5 * 0.5 / 20  # five standard errors of a coin
    assert error.mean().abs() < 5 * 0.5 / 20 / (ROWS * INPUTS) ** 0.5


def test_what_the_copies_agree_on_stays_and_scales_are_averaged_as_logarithms() -> None:
    base = model(drawn(), scale=-0.1)
    copies = [model(drawn(seed=1), scale=-0.2, bias=1.0), model(drawn(seed=1), scale=-0.05, bias=4.0)]
    found = merged(text(), base, copies)
    assert torch.equal(codes_of(found), drawn(seed=1))
    torch.testing.assert_close(found["fc.weight.scale"], base["fc.weight.scale"])  # sqrt(0.2 * 0.05)
    torch.testing.assert_close(found["fc.bias"], torch.full((ROWS,), 2.5))
    again = merged(text(), base, [base, base])
    assert all(torch.equal(again[name], base[name]) for name in base)


def test_a_rounding_that_there_is_not_is_refused() -> None:
    with pytest.raises(SchemeError, match="stochastic or nearest"):
        merged(text(), model(drawn()), [model(drawn())], "up")
