"""`bitsmith bench latency`: a table of this machine's times, or one line."""

import json
from pathlib import Path

from bitsmith.quantization.cost_table import CostTable
from tests.cli.conftest import Bitsmith

QUICKLY = ("--runtime", "native", "--candidates", "4,8", "--rounds", 2)


def test_a_table_is_written_and_shown(bitsmith: Bitsmith, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    result = bitsmith("bench", "latency", finished, *QUICKLY, "--out", out, "--check", 1)
    assert result.code == 0, result.err
    assert CostTable.load(out).unit == "us"
    for text in ("Conv2d 12x12x3x3", "float x float", "mixed 1", "predicted", str(out)):
        assert text in result.out
    assert "making the model at 4 x 8" in result.err


def test_json_is_the_table_and_nothing_else(bitsmith: Bitsmith, tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    result = bitsmith(
        "bench", "latency", *QUICKLY, "--candidates", "8", "--out", out, "--json", "--set", "target=native"
    )
    assert json.loads(result.out) == json.loads(out.read_text())
    assert result.err == ""


def test_what_cannot_be_measured_is_one_line(bitsmith: Bitsmith, tmp_path: Path) -> None:
    refused = bitsmith("bench", "latency", "--candidates", "4,nine")
    assert refused.code == 2
    assert "--candidates" in refused.err
    assert "there is no such recipe file" in bitsmith("bench", "latency", tmp_path / "none.yaml").err
    assert "recipe.yaml" in bitsmith("bench", "latency", tmp_path).err
