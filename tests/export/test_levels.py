"""Files of weights whose codes index a table: codes at their width, the table, and what reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from bitsmith.errors import ExportMismatch, FormatError
from bitsmith.export import load, save
from bitsmith.export.onnx import run, session, to_onnx
from bitsmith.export.readers import read_native, read_onnx
from bitsmith.export.verify import verify
from bitsmith.files import load_tensors, save_tensors
from bitsmith.quantization import Scheme, calibrate, measure, parameter_groups, prepare, sites
from bitsmith.quantization.finalize import finalize
from tests.train.problem import data, network


class Files(NamedTuple):
    """A trained model and what was written of it."""

    case: str
    model: nn.Module
    packed: nn.Module
    native: Path
    onnx: Path


CASES: dict[str, dict[str, Any]] = {
    "powers of two": {"grid": "powers_of_two", "bits": 3, "granularity": "channel"},
    "levels in ragged groups": {"grid": "levels", "bits": 2, "granularity": "group", "group_size": 7},
}
X = data()[0]
LAST = "5.weight"


def trained(case: str) -> nn.Module:
    """A few steps away from its calibration."""
    model = network(0, dropout=0.0)
    one_scale = {"0.weight": {"granularity": "tensor"}}
    prepare(model, Scheme(**CASES[case]), Scheme(bits=8), first_last_bits=None, overrides=one_scale)
    calibrate(model, [X])
    optimizer = torch.optim.Adam(parameter_groups(model.train(), learning_rate=0.01))
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder, model = tmp_path_factory.mktemp("files"), trained(request.param)
    packed = finalize(model, X)
    onnx_file = to_onnx(packed, folder / "model.onnx", X[:2])
    return Files(request.param, model, packed, save(packed, folder / "native"), onnx_file)


def test_the_trained_codes_and_levels_are_stored_and_counted(files: Files) -> None:
    assert torch.equal(load(files.native, into=network(1))(X), files.packed(X))
    stored, _ = load_tensors(files.native / "model.safetensors")
    held = sum(t.numel() * t.element_size() for t in stored.values())
    assert held == measure(files.model, X).report()["weight_bytes"]
    for found in (read_native(files.native), read_onnx(files.onnx)):
        for site in ("0.weight", LAST):
            table, levels = sites(files.model)[site].levels().table, found[site].levels
            assert table is not None
            assert levels is not None
            assert np.array_equal(levels, table.numpy())


def test_both_runtimes_compute_what_was_trained(files: Files) -> None:
    certificate = verify(files.model, files.packed, {"native": files.native, "onnx": files.onnx}, X)
    assert all(entry["passed"] and entry["codes_equal"] for entry in certificate["exports"].values())
    for cures in (True, False):  # the options of a careful user, and none
        out = run(session(files.onnx, cures=cures), X)[0]
        torch.testing.assert_close(out, files.packed(X), rtol=0, atol=2e-5)


def test_a_weight_is_a_lookup_in_the_file(files: Files) -> None:
    graph = onnx.load(files.onnx).graph
    held = {i.name: i for i in graph.initializer}
    container = onnx.TensorProto.DataType.Name(held[f"{LAST}.codes"].data_type)
    assert container == ("UINT4" if files.case == "powers of two" else "UINT2")
    made = {output: node for node in graph.node for output in node.output}
    chain, name = [], LAST
    while name in made:
        chain.append(made[name].op_type)
        name = made[name].input[1 if made[name].op_type == "Gather" else 0]
    assert chain == ["Mul", "Gather", "Cast"]
    assert name == f"{LAST}.codes"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained("powers of two")


@pytest.fixture(scope="module")
def packed(model: nn.Module) -> nn.Module:
    return finalize(model, X)


def change_tensors(change: Callable[[dict[str, torch.Tensor]], None], directory: Path) -> None:
    """Change tensors and write a file whose digests are right: what a liar, not a bad disk, would leave."""
    tensors, metadata = load_tensors(directory / "model.safetensors")
    change(tensors)
    save_tensors(
        directory / "model.safetensors", tensors, {k: v for k, v in metadata.items() if k != "sha256"}
    )


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "no table": (lambda t: t.__delitem__(f"{LAST}.levels"), f"{LAST}.levels"),
    "a short table": (lambda t: t.update({f"{LAST}.levels": torch.zeros(6)}), "6 levels.*3 bits"),
    "integers": (
        lambda t: t.update({f"{LAST}.levels": torch.zeros(7, dtype=torch.int64)}),
        "not float32",
    ),
    "codes beyond": (lambda t: t[f"{LAST}.codes"].fill_(255), "codes beyond its 7 levels"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_refused(damage: str, packed: nn.Module, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    save(packed, tmp_path)
    change_tensors(change, tmp_path)
    with pytest.raises(FormatError, match=message):
        load(tmp_path, into=network(1))


def test_other_levels_than_the_trained_ones_are_no_certificate(
    model: nn.Module, packed: nn.Module, tmp_path: Path
) -> None:
    save(packed, tmp_path)
    change_tensors(lambda t: t[f"{LAST}.levels"].mul_(1.5), tmp_path)
    with pytest.raises(ExportMismatch, match=r"stored levels differ from the trained ones.*"):
        verify(model, packed, {"native": tmp_path}, X)


def test_the_configuration_names_the_grid_and_other_weights_have_no_table(
    packed: nn.Module, tmp_path: Path
) -> None:
    save(packed, tmp_path)
    layers = json.loads((tmp_path / "config.json").read_text())["layers"]
    assert layers["5"]["weight"]["grid"] == "powers_of_two"
    even = network(0)
    prepare(even, Scheme(bits=3), None)
    save(finalize(even.eval(), X), tmp_path)
    tensors, _ = load_tensors(tmp_path / "model.safetensors")
    assert not [name for name in tensors if name.endswith(".levels")]
