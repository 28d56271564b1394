"""The weight formats of language models: groups of 32, 64 and 128 inputs, the last one ragged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitsmith.errors import SchemeError, TargetError
from bitsmith.export import load, save
from bitsmith.export.native import stored_tensors
from bitsmith.export.verify import verify
from bitsmith.files import load_tensors, save_tensors
from bitsmith.quantization import Scheme, calibrate, measure, parameter_groups, prepare, sites
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.integer_layers import PackedWeight

GRIDS = {"symmetric": "symmetric", "asymmetric": "asymmetric"}
LENGTHS = {"whole": 256, "ragged": 200}
X = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0))


class Blocks(nn.Module):
    """A linear layer, and a convolution whose kernel belongs to the row that is split into groups."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(length, 24), nn.Conv1d(24, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(torch.relu(self.linear(x)).transpose(1, 2))
        return y


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_trained_groups_are_packed_counted_saved_and_loaded_as_they_are(
    group_size: int, grid: Any, length: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x, model = X[..., :length], Blocks(length)
    weights = Scheme(bits=4, granularity="group", group_size=group_size, grid=grid, calibration="minmax")
    prepare(model, weights, Scheme(bits=8, granularity="token", range="dynamic"), first_last_bits=None)
    calibrate(model, [x])
    optimizer = torch.optim.Adam(parameter_groups(model, learning_rate=0.01))
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(q.is_trained() for q in sites(model).values() if q.kind == "weight")
    model.eval()
    packed = finalize(model, x)
    assert torch.equal(packed(x), model(x))

    groups = {"linear": 24 * -(-length // group_size), "conv": 6 * -(-72 // group_size)}
    zeros = sum(-(-n * 4 // 8) for n in groups.values()) if grid == "asymmetric" else 0
    codes = (24 * length + 6 * 72) * 4 // 8
    expected = codes + 4 * sum(groups.values()) + zeros + 4 * (24 + 6)
    assert measure(model, x).report()["weight_bytes"] == expected
    save(packed, tmp_path)
    tensors, _ = load_tensors(tmp_path / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == expected
    assert torch.equal(load(tmp_path, into=Blocks(length), kernels=False)(x), model(x))
    assert verify(model, packed, {"native": tmp_path}, x)["exports"]["native"]["codes_equal"]


def by_hand(weight: Tensor, group_size: int, bits: int) -> Tensor:
    """Round-to-nearest on min-max, group by group, each stretched to hold 0."""
    rows = []
    for row in weight.detach().double():
        parts = []
        for group in row.split(group_size):
            low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
            scale = (high - low) / (2**bits - 1)
            zero = round(-low / scale)
            parts.append(scale * ((group / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from([3, 8, 32]), st.integers(2, 8))
@settings(max_examples=40, deadline=None)
def test_asymmetric_groups_are_round_to_nearest_between_their_ends(
    rows: int, length: int, group_size: int, bits: int
) -> None:
    torch.manual_seed(rows * 100 + length)
    model: Any = nn.Sequential(nn.Linear(length, rows, bias=False))
    scheme = Scheme(
        bits=bits, granularity="group", group_size=group_size, grid="asymmetric", calibration="minmax"
    )
    prepare(model, scheme, None, first_last_bits=None)
    values = finalize(model, torch.randn(2, length))[0].weight()  # type: ignore[index]
    torch.testing.assert_close(
        values.double(), by_hand(model[0].weight, group_size, bits), rtol=1e-5, atol=1e-6
    )


def test_files_that_hold_zero_points_in_float_still_load(tmp_path: Path) -> None:
    """As they were written before zero points were packed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6))
    scheme = Scheme(bits=3, granularity="group", group_size=4, grid="asymmetric")
    prepare(model, scheme, None, first_last_bits=None)
    x = torch.randn(2, 10)
    packed = finalize(model, x)
    weight = packed[0].weight  # type: ignore[index]
    assert isinstance(weight, PackedWeight)
    save(packed, tmp_path)
    tensors, metadata = load_tensors(tmp_path / "model.safetensors")
    zero_points = weight.zero_points()
    assert zero_points is not None
    kept = {k: v for k, v in metadata.items() if k != "sha256"}
    save_tensors(tmp_path / "model.safetensors", {**tensors, "0.weight.zero_point": zero_points}, kept)
    assert torch.equal(load(tmp_path, into=nn.Sequential(nn.Linear(10, 6)), kernels=False)(x), packed(x))


def test_onnx_refuses_what_it_cannot_hold() -> None:
    groups = Scheme(bits=4, granularity="group", group_size=32)
    with pytest.raises(SchemeError, match="do not split into groups of 32"):
        prepare(nn.Sequential(nn.Linear(40, 3)), groups, None, target="onnxruntime")
    asymmetric = groups.replace(grid="asymmetric")
    with pytest.raises(TargetError, match="does not hold this grid"):
        prepare(nn.Sequential(nn.Linear(64, 3)), asymmetric, None, target="onnxruntime")
    with pytest.raises(TargetError, match="Linear and Embedding layers only"):
        prepare(nn.Sequential(nn.Conv1d(32, 3, 1)), groups, None, target="onnxruntime")


def test_payload_of_shared_bytes_is_exact_for_single_tensors() -> None:
    model = nn.Sequential(nn.Linear(7, 3, bias=False))
    scheme = Scheme(bits=3, granularity="tensor", grid="asymmetric")
    prepare(model, scheme, None, first_last_bits=None)
    x = torch.randn(2, 7)
    payload = sum(t.numel() * t.element_size() for t in stored_tensors(finalize(model, x)).values())
    assert payload == measure(model, x).report()["weight_bytes"] == 8 + 4 + 1
