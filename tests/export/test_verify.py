"""verify: holds for what was exported, and finds every kind of sabotage, naming the site."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from bitsmith.errors import ExportMismatch, FormatError
from bitsmith.export import save, to_onnx, verify
from bitsmith.export.ties import Probe, first_differences, probe
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.integer_layers import PackedWeight
from tests.export.problem import inputs, prepared

X = inputs(300)
Y = torch.arange(300) % 5


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    trained = prepared(bits=4)
    return trained, finalize(trained, X)


@pytest.fixture(scope="module")
def exported(models: tuple[nn.Module, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exported")
    save(models[1], directory / "model")
    to_onnx(models[1], directory / "model.onnx", X[:2])
    return directory


def test_the_certificate_says_what_was_checked_and_what_was_not(
    models: tuple[nn.Module, nn.Module], exported: Path
) -> None:
    certificate = verify(*models, {"native": exported / "model", "onnx": exported / "model.onnx"}, X, Y)
    assert certificate["version"] == 1
    assert certificate["rows"] == 300
    assert certificate["not_checked"]
    for name, runtime in (("native", "bitsmith"), ("onnx", "onnxruntime")):
        entry = certificate["exports"][name]
        assert entry["passed"]
        assert entry["codes_equal"]
        assert entry["runtime"] == runtime
        assert entry["runtime_version"]
        assert entry["agreement"] == 1.0
        assert entry["accuracy"] == entry["accuracy_trained"]
        assert set(entry["sites"]) == {
            "stem",
            "depthwise",
            "grouped",
            "query",
            "key",
            "scores",
            "context",
            "head",
        }
        assert all(check["passed"] for check in entry["checks"])
        assert entry["activation_sites_compared"] == 10  # six inputs, two products of two operands
        assert not entry["wider_containers"]
    weights = [m for m in models[1].modules() if isinstance(m, PackedWeight)]
    assert certificate["exports"]["onnx"]["codes"] == sum(w.shape.numel() for w in weights)
    for entry in certificate["exports"].values():
        assert entry["default_options"]["rows_within_tolerance"] == 1.0
        assert entry["default_options"]["holds"]
    assert "integer products" in certificate["exports"]["native"]["default_options"]["options"]


def test_the_certificate_names_what_lies_in_wider_containers(tmp_path: Path) -> None:
    """ONNX has one type a tensor, and none of 3 bits; the codes are equal all the same."""
    overrides = {"head.weight": {"bits": [2, 4, 2, 3, 2]}, "key.weight": {"bits": 3}}
    trained = prepared(bits=4, overrides=overrides, target="onnxruntime")
    packed = finalize(trained, X)
    files = {"native": save(packed, tmp_path), "onnx": to_onnx(packed, tmp_path / "model.onnx", X[:2])}
    exports = verify(trained, packed, files, X, Y)["exports"]
    assert exports["native"]["wider_containers"] == {}
    assert exports["onnx"]["wider_containers"] == {
        "head.weight": "2-4, 2.6 on average bits in 4",
        "key.weight": "3 bits in 4",
    }
    assert exports["onnx"]["codes_equal"]
    assert exports["native"]["codes_equal"]


def test_a_model_in_training_mode_is_verified_as_it_evaluates(
    models: tuple[nn.Module, nn.Module], exported: Path
) -> None:
    trained = copy.deepcopy(models[0]).train()
    assert verify(trained, models[1], {"native": exported / "model"}, X)["exports"]["native"]["passed"]
    assert trained.training


# ---- sabotage of the ONNX file


def initializer(model: Any, name: str) -> Any:
    return next(i for i in model.graph.initializer if i.name == name)


def rewrite(model: Any, name: str, change: Callable[[Any], Any]) -> None:
    tensor = initializer(model, name)
    array = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(change(array), array.dtype), name))


def flip_a_code(model: Any) -> None:
    tensor = initializer(model, "grouped.weight.codes")
    data = bytearray(tensor.raw_data)
    data[3] ^= 1
    tensor.raw_data = bytes(data)


def swap_rows(model: Any) -> None:
    tensor = initializer(model, "query.weight.codes")
    row = len(tensor.raw_data) // 12
    tensor.raw_data = tensor.raw_data[row : 2 * row] + tensor.raw_data[:row] + tensor.raw_data[2 * row :]


def drop_the_bias(model: Any) -> None:
    node = next(n for n in model.graph.node if n.op_type == "Add" and "head.bias" in n.input)
    node.op_type = "Identity"
    del node.input[1:]


def cross_a_wire(model: Any) -> None:
    node = next(n for n in model.graph.node if n.op_type == "Gemm" and "query.weight" in n.input)
    node.input[1] = "key.weight"


def clip_less(model: Any) -> None:
    rewrite(model, "depthwise.input.high", lambda a: a * 0.5)


def other_padding(model: Any) -> None:
    node = next(n for n in model.graph.node if n.op_type == "Conv" and "stem.weight" in n.input)
    pads = next(a for a in node.attribute if a.name == "pads")
    pads.ints[:] = [0, 0, 2, 2]


SABOTAGE: dict[str, tuple[Callable[[Any], None], str]] = {
    "one flipped code": (flip_a_code, r"grouped\.weight: 1 of 144 stored codes differ"),
    "swapped rows": (swap_rows, r"query\.weight: \d+ of 144 stored codes differ"),
    "a scale off by a millionth": (
        lambda m: rewrite(m, "key.weight.scale", lambda a: a * np.where(np.arange(12) == 7, 1 + 1e-6, 1)),
        r"key\.weight: 1 of 12 stored scales differ from the trained ones, the first at 7",
    ),
    "an activation's scale": (
        lambda m: rewrite(m, "head.input.scale", lambda a: a * 1.01),
        r"head\.input: 1 of 1 stored scales differ",
    ),
    "an activation's zero point": (
        lambda m: rewrite(m, "head.input.zero_point", lambda a: a + 1),
        r"head\.input: 1 of 1 stored zero points differ",
    ),
    "a weight's zero point": (
        lambda m: rewrite(m, "stem.weight.zero_point", lambda a: a + 1),
        r"stem\.weight: 8 of 8 stored zero points differ",
    ),
    "a missing bias": (drop_the_bias, r"head: inside onnxruntime, this layer's output differs"),
    "a changed bias": (
        lambda m: rewrite(m, "stem.bias", lambda a: a + 0.01),
        r"stem: inside onnxruntime, this layer's output differs",
    ),
    "a range cut short": (clip_less, r"depthwise\.input: inside onnxruntime, activations of this site"),
    "the codes of tokens": (
        lambda m: rewrite(m, "query.input.low", lambda a: a * 0.5),
        r"query\.input: inside onnxruntime, activations of this site",
    ),
    "a crossed wire": (cross_a_wire, r"query: inside onnxruntime, this layer's output differs"),
    "another padding": (other_padding, r"stem: inside onnxruntime"),
}


@pytest.mark.parametrize("sabotage", SABOTAGE.values(), ids=SABOTAGE.keys())
def test_sabotage_of_the_file_is_found_and_its_site_named(
    sabotage: tuple[Callable[[Any], None], str],
    models: tuple[nn.Module, nn.Module],
    exported: Path,
    tmp_path: Path,
) -> None:
    model = onnx.load(exported / "model.onnx")
    sabotage[0](model)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportMismatch, match=sabotage[1]) as caught:
        verify(*models, {"native": exported / "model", "onnx": tmp_path / "model.onnx"}, X)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    exports = caught.value.certificate["exports"]  # type: ignore[attr-defined]
    assert exports["native"]["passed"]
    assert not exports["onnx"]["passed"]
    assert exports["onnx"]["failure"]


# ---- sabotage of what is saved: the file is whole, but holds another model


def native_sabotage() -> dict[str, Callable[[Any], object]]:
    return {
        r"grouped\.weight: 2 of 144 stored codes": lambda p: p.grouped.weight.codes[3].bitwise_xor_(0x11),
        r"query\.weight: 1 of 12 stored scales": lambda p: p.query.weight.scale[5].mul_(1.000001),
        r"stem: inside bitsmith, this layer's output": lambda p: p.stem.bias.add_(0.01),
        r"head\.input: 1 of 1 stored scales": lambda p: p.head.input.scale.mul_(1.01),
    }


@pytest.mark.parametrize("pattern", native_sabotage())
def test_sabotage_before_saving_is_found_too(
    pattern: str, models: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    other = copy.deepcopy(models[1])
    native_sabotage()[pattern](other)
    save(other, tmp_path)
    with pytest.raises(ExportMismatch, match=pattern):
        verify(*models, {"native": tmp_path}, X)


def test_a_wrong_packing_is_found_by_the_outputs_of_the_trained_model(
    models: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    wrong = copy.deepcopy(models[1])
    wrong.head.bias.add_(torch.linspace(-1, 1, 5))  # type: ignore[union-attr, operator]
    save(wrong, tmp_path)
    with pytest.raises(ExportMismatch, match="output: too few"):
        verify(models[0], wrong, {"native": tmp_path}, X)


def test_a_damaged_file_is_a_mismatch(
    models: tuple[nn.Module, nn.Module], exported: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes((exported / "model.onnx").read_bytes()[:-300])
    with pytest.raises(ExportMismatch) as caught:
        verify(*models, {"onnx": tmp_path / "model.onnx"}, X)
    assert "\n" not in str(caught.value)


def test_an_unknown_export_is_refused(models: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="native or onnx"):
        verify(*models, {"tflite": tmp_path}, X)


# ---- rounding ties


def steps(before: list[float], got: list[float]) -> tuple[Probe, dict[str, torch.Tensor], nn.Module]:
    """One site of ``head.input`` whose reference is ``before`` steps, one row a value; ``got`` in steps."""
    model = finalize(prepared(bits=4), X)
    scale = model.head.input.scale  # type: ignore[union-attr]
    reference = torch.tensor(before).view(-1, 1)
    seen = Probe(steps={"head.input": (reference, reference.round())}, rows=len(before))
    return seen, {"head.input": torch.tensor(got).view(-1, 1) * scale}, model


def test_a_neighbouring_code_at_the_border_is_a_tie_and_nothing_else_is() -> None:
    before = [0.50001, 1.49999, 0.3, 0.50001, 2.0, 0.4999]
    got = [0.0, 2.0, 1.0, 2.6, 2.0, float("nan")]
    first, tied = first_differences(*steps(before, got))
    assert first.tolist() == [0, 0, 0, 0, 1, 0]
    assert tied.tolist() == [True, True, False, False, True, False]


def test_rows_are_told_apart_where_a_model_flattens_them_and_shared_where_it_has_none() -> None:
    before, got = [0.3, 0.3, 0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    seen, values, model = steps(before, got)
    seen.rows = 3  # of two tokens each
    first, tied = first_differences(seen, values, model)
    assert (first.tolist(), tied.tolist()) == ([1, 0, 1], [True, False, True])
    seen.rows = 4  # six values that belong to no row: to all of them
    first, tied = first_differences(seen, values, model)
    assert (first.tolist(), tied.tolist()) == ([0] * 4, [False] * 4)


def test_a_probe_shows_sites_and_layers_in_their_order(models: tuple[nn.Module, nn.Module]) -> None:
    seen = probe(models[1], X[:3])
    assert list(seen.steps)[:3] == ["stem.input", "depthwise.input", "grouped.input"]
    assert [layer for layer, (_, before) in seen.outputs.items() if before == 1] == ["stem"]
    assert list(probe(models[0], X[:3]).steps) == list(seen.steps)
