"""ONNX files: the trained codes at 2, 4 or 8 bits, run by ONNX Runtime at full optimization as trained."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from bitsmith.errors import FormatError, TargetError
from bitsmith.export.onnx import open_probe, run, session, to_onnx
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.integer_layers import PackedWeight, packed_sites
from bitsmith.quantization.layers import MatMul
from bitsmith.quantization.observe import calibrate
from bitsmith.quantization.prepare import prepare
from bitsmith.quantization.scheme import Scheme
from tests.export.problem import EACH, inputs, prepared

CASES = {
    "W2A2": {"bits": 2},
    "W1A4": {"bits": 1, "activations": Scheme(bits=4)},
    "W3A3 per tensor": {"bits": 3, "granularity": "tensor"},
    "W4 in groups": {"bits": 4, "granularity": "group", "group_size": 4, "activations": Scheme(bits=8)},
    "W2 in ragged groups": {
        "bits": 2,
        "granularity": "group",
        "group_size": 5,
        "activations": Scheme(bits=2),
    },
    "W2 in groups without zero": {
        "bits": 2,
        "granularity": "group",
        "group_size": 3,
        "grid": "seq",
        "first_last_bits": None,
    },
    "W8A8": {"bits": 8},
    "W4A4 asymmetric": {"bits": 4, "grid": "asymmetric", "activations": Scheme(bits=4, grid="asymmetric")},
    "W4, dynamic activations": {
        "bits": 4,
        "activations": Scheme(bits=8, granularity="token", range="dynamic"),
    },
    "W4": {"bits": 4, "activations": Scheme(bits=32)},
    "W1-8 by channel": {"bits": 4, "overrides": EACH},
    "W1-8 by channel, asymmetric": {"bits": 4, "grid": "asymmetric", "overrides": EACH},
}


# "W1-8 by channel" holds these widths too
COVERED = ("W2A2", "W4", "W1A4", "W4 in groups", "W1-8 by channel, asymmetric")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if name in COVERED else [])
        for name, case in CASES.items()
    ],
)
def test_the_runtime_computes_what_was_packed(case: dict, tmp_path: Path) -> None:
    packed, x = finalize(prepared(**case), inputs()), inputs()
    path = to_onnx(packed, tmp_path / "model.onnx", x[:2])
    want = packed(x)
    for cures in (True, False):  # the options of a careful user, and none
        # No row is allowed to be further away: this model is too small for rounding ties.
        torch.testing.assert_close(run(session(path, cures=cures), x)[0], want, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def packed() -> nn.Module:
    return finalize(prepared(bits=2), inputs())


@pytest.fixture(scope="module")
def path(packed: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(packed, tmp_path_factory.mktemp("onnx") / "model.onnx", inputs(1))


def test_any_batch_size_runs(path: Path, packed: nn.Module) -> None:
    for count in (1, 2, 3, 17):
        torch.testing.assert_close(
            run(session(path), inputs(count))[0], packed(inputs(count)), rtol=0, atol=1e-5
        )


def test_codes_lie_in_the_file_at_their_width(path: Path, packed: nn.Module) -> None:
    found = {i.name: i for i in onnx.load(path).graph.initializer}
    for name, site in packed_sites(packed).items():
        if isinstance(site, PackedWeight):
            stored = found[f"{name}.codes"]
            width = {2: onnx.TensorProto.INT2, 8: onnx.TensorProto.INT8}[site.form.bits]
            assert stored.data_type == width
            assert len(stored.raw_data) == -(-site.shape.numel() * site.form.bits // 8)
            codes = onnx.numpy_helper.to_array(stored).astype("int64").flatten()
            assert codes.tolist() == site.integers().flatten().tolist()


def test_the_file_is_standard_onnx_and_says_nothing_of_the_machine(path: Path) -> None:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {o.domain for o in model.opset_import} == {""}
    assert model.opset_import[0].version == 25
    assert str(Path.cwd()).encode() not in path.read_bytes()
    assert b"problem.py" not in path.read_bytes()
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(t.dims) for t in floats) == 12  # scales and biases: no float weight is left


def test_biases_are_added_after_the_product(path: Path) -> None:
    model = onnx.load(path)
    products = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(products) == 6
    assert all(len(node.input) == 2 for node in products)


def test_the_same_model_gives_the_same_bytes(path: Path, packed: nn.Module, tmp_path: Path) -> None:
    assert to_onnx(packed, tmp_path / "again.onnx", inputs(1)).read_bytes() == path.read_bytes()


def test_layers_and_activations_can_be_watched_inside_the_runtime(path: Path, packed: nn.Module) -> None:
    seen = open_probe(path, ["head.input"])(inputs())
    assert {"stem", "depthwise", "grouped", "query", "key", "scores", "context", "head", "head.input"} == set(
        seen
    )
    torch.testing.assert_close(seen["head"], packed(inputs()), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_larger_model_is_really_smaller_at_fewer_bits(tmp_path: Path) -> None:
    sizes = []
    for bits in (2, 4, 8):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(256, 256)), torch.randn(4, 256)
        prepare(model, Scheme(bits=bits, granularity="channel"), Scheme(bits=8), first_last_bits=None)
        calibrate(model, [x])
        sizes.append(to_onnx(finalize(model.eval(), x), tmp_path / f"{bits}.onnx", x).stat().st_size)
    codes = 256 * 256 // 8
    assert sizes[1] - sizes[0] == pytest.approx(2 * codes, abs=1500)
    assert sizes[2] - sizes[1] == pytest.approx(4 * codes, abs=1500)
    assert sizes[0] < 256 * 256 * 4 / 10


@pytest.mark.parametrize("grid", ["symmetric", "unsigned", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 8])
def test_activations_round_as_trained_also_halfway_and_outside(grid: str, bits: int, tmp_path: Path) -> None:
    model = MatMul()
    torch.manual_seed(0)
    prepare(model, None, Scheme(bits=bits, grid=grid))  # type: ignore[arg-type]
    calibrate(model, [(torch.randn(9, 4, 4) + 1, torch.randn(9, 4, 4))])
    scale = model.left_quantizer.levels().scale  # type: ignore[union-attr]
    halves = (torch.arange(-300, 300).float() + 0.5).view(-1, 1, 1) * scale
    left = torch.cat([halves, halves.nextafter(torch.tensor(1e9)), halves.nextafter(torch.tensor(-1e9))])
    left = (
        torch.cat([left, torch.tensor([0.0, -0.0, 1e30, -1e30]).view(-1, 1, 1)]).expand(-1, 4, 4).contiguous()
    )
    right = torch.eye(4).expand_as(left).contiguous()
    packed = finalize(model.eval(), (left, right))
    result = run(session(to_onnx(packed, tmp_path / "m.onnx", (left, right))), (left, right))[0]
    assert torch.equal(result, packed(left, right))


class Fixed(nn.Module):
    """A forward that works for one batch size only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x).reshape(2, 2, 2)
        return result


class Branching(Fixed):
    """A forward that looks at values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x)
        return result if result.sum() > 0 else -result


@pytest.mark.parametrize(
    ("kind", "message"), [(Fixed, "one batch size only"), (Branching, "torch.onnx cannot write this model")]
)
def test_a_model_that_cannot_be_traced_is_one_line(
    kind: type[nn.Module], message: str, tmp_path: Path
) -> None:
    model, x = kind(), torch.randn(2, 4)
    prepare(model, Scheme(bits=4), Scheme(bits=8))
    calibrate(model, [x])
    with pytest.raises(TargetError, match=message) as caught:
        to_onnx(finalize(model.eval(), x), tmp_path / "model.onnx", x)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.onnx").exists()


def test_a_foreign_onnx_file_cannot_be_watched(path: Path, tmp_path: Path) -> None:
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(FormatError, match="not written by Bitsmith"):
        open_probe(tmp_path / "foreign.onnx")


class Language(nn.Module):
    """Tokens (N, T) -> logits, the table tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.hidden(self.embedding(tokens))))
        return logits


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_rows_of_a_table_are_gathered_from_the_one_that_the_head_has(
    granularity: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, tokens = Language(), torch.randint(0, 11, (6, 5))
    size = 4 if granularity == "group" else None
    weights = Scheme(bits=4, granularity=granularity, group_size=size)  # type: ignore[arg-type]
    prepare(model, weights, Scheme(bits=8), target="onnxruntime", first_last_bits=None)
    calibrate(model, [tokens])
    packed = finalize(model.eval(), tokens)
    to_onnx(packed, tmp_path / "model.onnx", tokens)
    file = onnx.load(tmp_path / "model.onnx")
    assert sum(i.name == "embedding.weight.codes" for i in file.graph.initializer) == 1
    assert not any(i.name == "head.weight.codes" for i in file.graph.initializer)
    (found,) = run(session(tmp_path / "model.onnx"), tokens)
    torch.testing.assert_close(found, packed(tokens), rtol=1e-5, atol=1e-5)
