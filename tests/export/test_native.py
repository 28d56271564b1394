"""Native files: round trips, sizes, and every way in which a file can be wrong."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bitsmith.errors import FormatError
from bitsmith.export.native import CONFIG_DIGEST, load, save, stored_tensors
from bitsmith.export.readers import read_native
from bitsmith.files import load_tensors, save_tensors
from bitsmith.quantization.cost import measure
from bitsmith.quantization.finalize import finalize
from bitsmith.quantization.integer_layers import PackedWeight, packed_sites
from bitsmith.quantization.layers import MatMul
from bitsmith.quantization.observe import calibrate
from bitsmith.quantization.prepare import prepare
from bitsmith.quantization.scheme import Scheme
from bitsmith.tasks.models import build
from tests.export.problem import EACH, Small, inputs, prepared

CASES = {
    "1 bit": {"bits": 1},
    "3 bits": {"bits": 3},
    "8 bits": {"bits": 8},
    "tensor": {"bits": 4, "granularity": "tensor"},
    "groups": {"bits": 2, "granularity": "group", "group_size": 4},
    "asymmetric": {"bits": 4, "grid": "asymmetric"},
    "dynamic": {"bits": 4, "activations": Scheme(bits=8, granularity="token", range="dynamic")},
    "weight only": {"bits": 4, "activations": Scheme(bits=32)},
    "channels": {"bits": 4, "overrides": EACH},
    "channels, asymmetric": {"bits": 4, "grid": "asymmetric", "overrides": EACH},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_loaded_model_computes_what_was_saved(case: dict, tmp_path: Path) -> None:
    packed = finalize(prepared(**case), inputs())
    save(packed, tmp_path)
    loaded = load(tmp_path, into=Small(), kernels=False)
    assert torch.equal(loaded(inputs()), packed(inputs()))
    assert not loaded.training
    assert loaded.state_dict().keys() == packed.state_dict().keys()


def test_a_loaded_model_saves_to_the_same_files(tmp_path: Path) -> None:
    packed = finalize(prepared(), inputs())
    save(packed, tmp_path / "a")
    again = load(tmp_path / "a", into=Small())
    save(again, tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()
    first, second = stored_tensors(packed), stored_tensors(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_payload_bytes_are_those_of_the_plan(case: dict, tmp_path: Path) -> None:
    model = prepared(**case)
    cost = measure(model, inputs())
    path = save(finalize(model, inputs()), tmp_path) / "model.safetensors"
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert path.stat().st_size - 8 - header == cost.weight_bytes(cost.present)


@pytest.mark.parametrize("name", ["digits_cnn", "digits_vit"])
def test_a_built_in_model_is_rebuilt_by_name(name: str, tmp_path: Path) -> None:
    x = torch.rand(4, 1, 8, 8)
    model = build(name, seed=0).eval()
    prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=4))
    calibrate(model, [x])
    packed = finalize(model, x)
    assert torch.equal(load(save(packed, tmp_path), kernels=False)(x), packed(x))


def test_into_changes_the_users_model_itself(tmp_path: Path) -> None:
    packed = finalize(prepared(), inputs())
    save(packed, tmp_path)
    mine = Small()
    assert load(tmp_path, into=mine, kernels=False) is mine
    assert torch.equal(mine(inputs()), packed(inputs()))


def test_a_single_layer_can_be_the_whole_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    prepare(model, Scheme(bits=4), Scheme(bits=8))
    calibrate(model, [x])
    packed = finalize(model.eval(), x)
    assert torch.equal(load(save(packed, tmp_path), into=nn.Linear(4, 3), kernels=False)(x), packed(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.relu(self.first(x)))
        return result


def test_a_tied_weight_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    model, x = Tied(), torch.randn(4, 6)
    prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=8), first_last_bits=None)
    calibrate(model, [x])
    packed = finalize(model.eval(), x)
    assert sum(name.endswith(".codes") for name in stored_tensors(packed)) == 1
    loaded = load(save(packed, tmp_path), into=Tied(), kernels=False)
    assert loaded.first.weight is loaded.second.weight
    assert torch.equal(loaded(x), packed(x))


def test_an_independent_reader_finds_the_codes(tmp_path: Path) -> None:
    packed = finalize(prepared(bits=3, overrides=EACH), inputs())
    stored = read_native(save(packed, tmp_path))
    for name, site in packed_sites(packed).items():
        if isinstance(site, PackedWeight):
            assert stored[name].codes.tolist() == site.integers().flatten().tolist()  # type: ignore[union-attr]
        assert stored[name].scale.tolist() == site.scale.flatten().tolist()  # type: ignore[union-attr]


def test_channels_lie_in_the_file_at_their_own_width(tmp_path: Path) -> None:
    """2-bit channels take 2 bits: the stream is theirs first, then that of the next width, without a gap."""
    model = prepared(bits=4, overrides=EACH)
    tensors, _ = load_tensors(save(finalize(model, inputs()), tmp_path) / "model.safetensors")
    codes = model.head.weight_quantizer.codes(model.head.weight).long()
    order = [(2, (0, 2, 4)), (3, (3,)), (4, (1,))]
    number, place = 0, 0
    for bits, channels in order:
        for c in channels:
            for code in codes[c].tolist():
                number |= (code + 2 ** (bits - 1)) << place
                place += bits
    assert place == 12 * (2 + 4 + 2 + 3 + 2)
    assert tensors["head.weight.codes"].tolist() == list(number.to_bytes((place + 7) // 8, "little"))


# ---- wrong files


def change_config(directory: Path, change: Callable[[dict], None]) -> None:
    """Change config.json and make its digest right again: the reader itself must find the damage."""
    config = json.loads((directory / "config.json").read_text())
    change(config)
    text = json.dumps(config).encode()
    (directory / "config.json").write_bytes(text)
    tensors, metadata = load_tensors(directory / "model.safetensors")
    save_tensors(
        directory / "model.safetensors", tensors, metadata | {CONFIG_DIGEST: hashlib.sha256(text).hexdigest()}
    )


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(bytes(data))


def weight(config: dict) -> dict:
    result: dict = config["layers"]["head"]["weight"]
    return result


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (lambda d: (d / "config.json").unlink(), "there is no such model configuration"),
    "no tensors": (lambda d: (d / "model.safetensors").unlink(), "there is no such model"),
    "not JSON": (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "not one of ours"),
    "foreign": (
        lambda d: (d / "config.json").write_text('{"model_type": "llama"}'),
        "not a model of Bitsmith",
    ),
    "edited": (
        lambda d: (d / "config.json").write_text((d / "config.json").read_text() + " "),
        "not the one that",
    ),
    "truncated": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]),
        "truncated",
    ),
    "flipped": (lambda d: flip_a_byte(d / "model.safetensors"), "corrupted"),
    "other version": (lambda d: change_config(d, lambda c: c.update(version=2)), "another format version"),
    "no layers": (lambda d: change_config(d, lambda c: c.pop("layers")), "no entry 'layers'"),
    "kind": (
        lambda d: change_config(d, lambda c: c["layers"]["head"].update(kind="lstm")),
        "no entry 'lstm'",
    ),
    "bits": (lambda d: change_config(d, lambda c: weight(c).update(bits=7)), "not 7 bits each"),
    "9 bits": (lambda d: change_config(d, lambda c: weight(c).update(bits=9)), "impossible numbers"),
    "widths": (
        lambda d: change_config(d, lambda c: weight(c).update(bits=[2, 2, 3])),
        "one for each of its 5",
    ),
    "other widths": (lambda d: change_config(d, lambda c: weight(c).update(bits=[2] * 4 + [3])), "not 2-3"),
    "grids": (
        lambda d: change_config(d, lambda c: weight(c).update(grid=["seq", "seq"])),
        "2 grids for 1 widths",
    ),
    "grid": (lambda d: change_config(d, lambda c: weight(c).update(grid="log")), "unknown kind"),
    "per tensor": (lambda d: change_config(d, lambda c: weight(c).update(granularity="tensor")), "5 scales"),
    "shape": (
        lambda d: change_config(d, lambda c: weight(c).update(shape=[12, 5])),
        "another shape|scales|together",
    ),
    "layer": (
        lambda d: change_config(d, lambda c: c["layers"].update(nose=c["layers"]["head"])),
        "not in the model",
    ),
    "left out": (lambda d: change_config(d, lambda c: c["layers"].pop("head")), "lacks|more than"),
    "geometry": (
        lambda d: change_config(d, lambda c: c["layers"]["stem"]["geometry"].pop("groups")),
        "groups",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_one_line_and_leaves_the_users_model_alone(
    damage: tuple[Callable[[Path], object], str], tmp_path: Path
) -> None:
    save(finalize(prepared(), inputs()), tmp_path)
    damage[0](tmp_path)
    mine = Small()
    with pytest.raises(FormatError, match=damage[1]) as caught:
        load(tmp_path, into=mine)
    assert "\n" not in str(caught.value)
    assert type(mine.head) is nn.Linear
    assert type(mine.scores) is MatMul


@pytest.mark.parametrize(
    "name", ["os:system", "tests.export.problem:Small", "resnet", None, 3, ["digits_cnn"]]
)
def test_a_file_never_names_code_to_run(name: object, tmp_path: Path) -> None:
    save(finalize(prepared(), inputs()), tmp_path)
    change_config(tmp_path, lambda c: c.update(model={"name": name, "arguments": {}}))
    with pytest.raises(FormatError, match="not a built-in one"):
        load(tmp_path)


def test_a_file_never_names_other_files(tmp_path: Path) -> None:
    save(finalize(prepared(), inputs()), tmp_path)
    change_config(
        tmp_path, lambda c: c.update(model={"name": "resnet20", "arguments": {"weights": "/etc/passwd"}})
    )
    with pytest.raises(FormatError, match="arguments"):
        load(tmp_path)


def test_a_float_model_is_not_saved_as_a_packed_one(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no packed layer"):
        save(Small(), tmp_path)
