"""`precision: auto` follows what was measured, and says so."""

import pytest
import torch

from bitsmith.train import precision
from bitsmith.train.precision import choose_precision, matmul_seconds

CPU = torch.device("cpu")


@pytest.mark.parametrize(("half", "chosen"), [(0.5, "bfloat16"), (0.9, "float32"), (200.0, "float32")])
def test_auto_takes_bfloat16_only_where_it_is_worth_it(
    monkeypatch: pytest.MonkeyPatch, half: float, chosen: str
) -> None:
    def measured(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
        return 1e-3 * (half if dtype == torch.bfloat16 else 1.0)

    monkeypatch.setattr(precision, "matmul_seconds", measured)
    name, note = choose_precision("auto", CPU)
    assert name == chosen
    assert note.startswith(f"precision auto chose {chosen}: ")
    assert "1000 us in float32" in note
    assert f"{half * 1000:.0f} us in bfloat16" in note


def test_float32_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "matmul_seconds", None)
    assert choose_precision("float32", CPU) == ("float32", "")


def test_bfloat16_where_it_is_slow_is_obeyed_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
    monkeypatch.setattr(precision, "matmul_seconds", lambda dtype, *_, **__: times[dtype])
    name, note = choose_precision("bfloat16", CPU)
    assert name == "bfloat16"
    assert "200 times slower: precision float32 is better here" in note


def test_a_measurement_is_a_time() -> None:
    assert 0 < matmul_seconds(torch.float32, CPU) < 1
