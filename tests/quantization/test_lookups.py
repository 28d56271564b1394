"""A loaded model looks rows of its table up without unpacking the rest."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bitsmith.export import load, save
from bitsmith.quantization import Scheme, calibrate, integer_layers, prepare
from bitsmith.quantization.finalize import finalize
from bitsmith.tasks import build


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_on_kernels_unpacks_the_rows_looked_up_and_no_others(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("byte_llama", seed=0, width=16, depth=1, heads=2, tied=tied)
    tokens = torch.tensor([[1, 250, 1]])
    prepare(model.eval(), Scheme(bits=4), Scheme(bits=8))
    calibrate(model, [tokens])
    loaded = load(save(finalize(model, tokens), tmp_path))
    loaded(tokens)  # the first forward packs what is multiplied
    unpacked: list[int] = []
    unpack = integer_layers.unpack

    def counted(packed: Any, bits: int, count: int, low: int) -> Any:
        unpacked.append(count)
        return unpack(packed, bits, count, low)

    monkeypatch.setattr(integer_layers, "unpack", counted)
    monkeypatch.setattr(integer_layers, "unpack_at", lambda *_: pytest.fail("code by code"))
    monkeypatch.setattr(integer_layers.PackedWeight, "integers", lambda _: pytest.fail("the whole table"))
    loaded(tokens)
    assert unpacked == [3 * 16]
