"""A device described in a file: a fictional NPU with products of 4 x 8 and 8 x 8 bits and fused q, k, v."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bitsmith.errors import FormatError, TargetError
from bitsmith.quantization import (
    Budget,
    BudgetCost,
    Scheme,
    Target,
    allocate,
    calibrate,
    get_target,
    measure,
    plan_of,
    prepare,
)
from bitsmith.quantization.budget import limits
from bitsmith.quantization.target import load_target
from bitsmith.tasks.models import build
from tests.architecture.package import ROOT

PAGE = (ROOT / "docs/custom_targets.md").read_text(encoding="utf-8")
NPU: dict[str, Any] = json.loads(re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0])


def write(folder: Path, value: dict[str, Any]) -> str:
    path = folder / "npu.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def test_the_example_of_the_page_is_read_whole(tmp_path: Path) -> None:
    target = get_target(write(tmp_path, NPU))
    assert isinstance(target, Target)
    assert target.weight_containers == {4: 4, 8: 8}
    assert target.pairs == ((4, 8), (8, 8))
    assert target.latency is not None
    assert target.latency.unit == "us"
    assert target.energy is not None
    assert target.energy.name == "energy_45nm"
    assert get_target(target.name) == target
    assert all(
        f"| `{key}`" in PAGE or f"`{key}`" in PAGE for key in Target.__dataclass_fields__ if key != "name"
    )


def test_a_table_is_found_from_the_folder_of_the_target(tmp_path: Path) -> None:
    (tmp_path / "board.json").write_text(json.dumps(NPU["latency"]), encoding="utf-8")
    assert (
        load_target(write(tmp_path, NPU | {"latency": "board.json"})).latency
        == load_target(write(tmp_path, NPU)).latency
    )
    with pytest.raises(FormatError, match="no such cost table"):
        load_target(write(tmp_path, NPU | {"latency": "bord.json"}))


def test_a_model_is_allocated_within_the_latency_of_the_device(tmp_path: Path) -> None:
    name = write(tmp_path, NPU)
    model = build("digits_vit")
    prepare(model, Scheme(bits=8, granularity="channel"), Scheme(bits=8), target=name)
    images = torch.rand(4, 1, 8, 8)
    calibrate(model, [images])
    cost = measure(model, images)
    assert cost.target.pairs == ((4, 8), (8, 8))
    assert plan_of(model).target == name
    qkv = [site for site in cost.present if re.search(r"\.(q|k|v)\.weight$", site)]
    free = dict.fromkeys(cost.present, (4, 8))
    (slowest,) = limits(Budget(tables=[{"table": "latency", "limit": 1}]), cost).values()
    limit = 0.8 * slowest
    budget = BudgetCost(cost, Budget(tables=[{"table": "latency", "limit": limit}]), free)
    generator = torch.Generator().manual_seed(0)
    value = {site: [0.0, float(torch.rand(1, generator=generator))] for site in free}
    found = allocate(budget, value)
    assert found.used["table:npu_latency"] <= limit
    assert 4 in found.bits.values()
    for layer in cost.layers:
        assert tuple(found.bits[site] for site in layer.operands) in ((4, 8), (8, 8))
    for block in {site.rpartition(".q.")[0] for site in qkv if ".q." in site}:
        assert len({found.bits[site] for site in qkv if site.startswith(block)}) == 1


def test_what_the_device_cannot_hold_is_refused_before_training(tmp_path: Path) -> None:
    name = write(tmp_path, NPU)
    with pytest.raises(TargetError, match=r"stores no such width; got 6"):
        prepare(build("digits_cnn"), Scheme(bits=6, granularity="channel"), None, target=name)
    with pytest.raises(TargetError, match=r"multiplies no such width; got 2, expected 4 or 8"):
        prepare(build("digits_cnn"), None, Scheme(bits=2), target=name)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"version": 3}, ""),
        ({"pair": [[4, 8]]}, ": pair"),
        ({"pairs": [[4, 9]]}, ": pairs"),
        ({"pairs": []}, ": pairs"),
        ({"weight_containers": {"4": 2}}, ": weight_containers"),
        ({"weight_containers": {"x": 2}}, ": weight_containers"),
        ({"weight_grids": ["cubic"]}, ": weight_grids"),
        ({"weight_granularities": ["token"]}, ": weight_granularities"),
        ({"activation_granularities": "tensor"}, ": activation_granularities"),
        ({"dynamic_activations": 1}, ": dynamic_activations"),
        ({"runs": None}, ": runs"),
        ({"shared": [3]}, ": shared.0"),
        ({"latency": 3}, ": latency"),
        ({"latency": {"version": 1, "name": "x", "unit": "us", "entries": []}}, ": latency: entries"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, change: dict[str, Any], where: str) -> None:
    path = write(tmp_path, NPU | change)
    with pytest.raises(FormatError) as error:
        load_target(path)
    assert error.value.where == path + where


def test_a_missing_key_and_a_missing_file_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, {key: value for key, value in NPU.items() if key != "weight_grids"})
    with pytest.raises(FormatError, match="weight_grids: a target needs this; expected a list of"):
        load_target(path)
    with pytest.raises(FormatError, match="no such target file"):
        get_target(str(tmp_path / "none.json"))
