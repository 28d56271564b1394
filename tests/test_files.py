"""Files are written whole or not at all, and what is damaged is found when it is read."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from bitsmith.errors import FormatError, RunError
from bitsmith.files import (
    digest,
    directory_lock,
    load_tensors,
    read_json,
    save_tensors,
    write_atomic,
    write_json,
)

ROOT = Path(__file__).parents[1]


def tensors() -> dict[str, Tensor]:
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    return {
        "whole": values,
        "view": values[::2, 1:].t(),
        "half": values.to(torch.bfloat16),
        "codes": torch.arange(-5, 5, dtype=torch.int8),
        "flags": values > 0,
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }


# ---- writing


def test_a_file_appears_whole_with_its_folders_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomic(path, b"first")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full; the previous version of this file is intact"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_a_full_disk_leaves_the_old_file_and_no_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    path = tmp_path / "plan.json"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=words) as error:
        write_atomic(path, b"new")
    assert error.value.exit_code == 1
    assert error.value.where == str(path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match=r"cannot be written .*Check the path and its permissions"):
        write_atomic(tmp_path / "runs" / "plan.json", b"")


# ---- JSON


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {"version": 1, "name": "Größe", "list": [1, 2.5, None]}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


def test_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not valid JSON"),
        (b'{"version": 1, "si', "corrupted or truncated"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[1, 2]", "got a JSON list, expected a JSON object"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not valid JSON"),
    ],
)
def test_damaged_json_is_one_line_that_names_what_it_should_be(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=words) as error:
        read_json(path, "plan")
    assert str(error.value).startswith(f"{path}: this plan ")
    assert "\n" not in str(error.value)


def test_a_missing_or_unreadable_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="there is no such plan"):
        read_json(tmp_path / "none.json", "plan")
    with pytest.raises(FormatError, match="this plan cannot be read"):
        read_json(tmp_path, "plan")


# ---- tensors


def test_tensors_come_back_with_their_types_shapes_and_metadata(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", tensors(), {"bitsmith": "1"})
    back, metadata = load_tensors(tmp_path / "x")
    assert back.keys() == tensors().keys()
    for name, value in tensors().items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value), name
    assert metadata["bitsmith"] == "1"


def test_shared_and_training_tensors_are_stored_plainly(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3))
    save_tensors(tmp_path / "x", {"a": weight, "b": weight, "part": weight[1]})
    back, _ = load_tensors(tmp_path / "x")
    assert torch.equal(back["a"], weight)
    assert torch.equal(back["b"], weight)
    assert torch.equal(back["part"], weight[1])
    assert not any(value.requires_grad for value in back.values())


def test_the_library_reads_what_we_write_and_equal_tensors_are_equal_bytes(tmp_path: Path) -> None:
    given = {"odd": torch.arange(3, dtype=torch.uint8), **tensors(), "none": torch.zeros(0, 4)}
    save_tensors(tmp_path / "x", given, {"z": "1", "a": "2"})
    save_tensors(tmp_path / "y", dict(reversed(given.items())), {"a": "2", "z": "1"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    found = load_file(tmp_path / "x")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)


def test_the_digest_does_not_depend_on_the_order() -> None:
    assert digest(tensors()) == digest(dict(reversed(tensors().items())))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "codes": t["codes"] + (torch.arange(10) == 3).to(torch.int8)},
        lambda t: {**t, "codes": t["codes"].view(2, 5)},
        lambda t: {**t, "codes": t["codes"].view(torch.uint8)},
        lambda t: {name: value for name, value in t.items() if name != "empty"},
        lambda t: {("codex" if name == "codes" else name): value for name, value in t.items()},
    ],
    ids=["value", "shape", "dtype", "less", "name"],
)
def test_the_digest_sees_every_change(change) -> None:
    assert digest(change(tensors())) != digest(tensors())


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, position: int, bit: int) -> None:
    path = tmp_path_factory.mktemp("flip") / "x"
    save_tensors(path, {"codes": torch.arange(256, dtype=torch.uint8)})
    content = bytearray(path.read_bytes())
    payload = len(content) - 256
    content[payload + position % 256] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(FormatError, match="its content does not match its sha256"):
        load_tensors(path, "checkpoint")


@given(st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_found(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    path = tmp_path_factory.mktemp("cut") / "x"
    save_tensors(path, tensors())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(FormatError, match="corrupted, truncated or not a safetensors file"):
        load_tensors(path, "checkpoint")


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip", b"\x80\x04 a pickle", b"\xff" * 64, b""])
def test_a_foreign_file_is_refused_unread(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="this model is corrupted, truncated or not a safetensors file"):
        load_tensors(path, "model")


def test_a_missing_tensor_file_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FormatError, match="there is no such checkpoint"):
            load_tensors(path, "checkpoint")


# ---- the lock of a run directory

HOLD = """
import sys, time
from bitsmith.files import directory_lock
with directory_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_directory_in_use_names_the_process_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            with (
                pytest.raises(RunError, match=f"in use by process {process.pid}"),
                directory_lock(tmp_path / "run"),
            ):
                pass
        finally:
            process.kill()
            process.wait()
    for _ in range(2):  # and a lock can be taken again and again
        with directory_lock(tmp_path / "run"):
            assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())


def test_an_error_inside_frees_the_directory(tmp_path: Path) -> None:
    with pytest.raises(KeyError), directory_lock(tmp_path):
        raise KeyError
    with directory_lock(tmp_path):
        pass


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"), directory_lock(tmp_path / "file"):
        pass
