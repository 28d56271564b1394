"""`bitsmith adapt` as a user calls it: training, deltas, merged copies, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Bitsmith
from tests.cli.test_errors import assert_one_line
from tests.recipe.adapting import export, write_images

QUICK = ("--steps", 3, "--batch-size", 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, another/ and mine.npz."""
    place = tmp_path_factory.mktemp("adapt")
    export(place / "model")
    shutil.copytree(place / "model", place / "run" / "model")
    (place / "empty").mkdir()
    export(place / "another", first_last_bits=None)
    write_images(place / "mine.npz")
    return place


@pytest.fixture
def base(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, which is the current one."""
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def tensors(model: Path) -> bytes:
    return (model / "model.safetensors").read_bytes()


def test_it_shows_before_and_after_and_what_was_float(base: Path, bitsmith: Bitsmith) -> None:
    result = bitsmith("adapt", "model", "--data", "npz:mine.npz", *QUICK, "--memory-limit", "1GB")
    assert result.code == 0, result.err
    for shown in (
        "before",
        "after",
        "accuracy",
        "loss",
        "3 steps of 16",
        "conv1.bias",
        "cut off",
        "codes changed",
    ):
        assert shown in result.out
    assert "needs" in result.err
    assert "batches of 16" in result.err


def test_copies_are_merged_and_deltas_give_the_same_file(base: Path, bitsmith: Bitsmith) -> None:
    train = ("adapt", "model", "--data", "npz:mine.npz", *QUICK, "--json")
    result = bitsmith(*train, "--out", "a", "--delta", "a.delta")
    record = json.loads(result.out)
    assert result.err == ""
    assert (base / "a.delta").stat().st_size == record["delta_bytes"]
    assert bitsmith(*train, "--out", "b", "--seed", 1).code == 0
    assert bitsmith("adapt", "model", "--apply", "a.delta", "--out", "c").code == 0
    assert tensors(base / "c") == tensors(base / "a") != tensors(base / "b")
    # a copy and its delta are the same thing to merge, and the seed decides
    merges = {"ab": ("a", "b"), "ab2": ("a.delta", "b"), "other": ("a", "b", "--seed", 1)}
    for out, copies in merges.items():
        result = bitsmith("adapt", "model", "--merge", *copies, "--out", out)
        assert result.code == 0, result.err
    assert tensors(base / "ab") == tensors(base / "ab2") != tensors(base / "other")
    # copies of copies are still of the same base; what was merged can be adapted and merged again
    result = bitsmith("adapt", "a", "--data", "npz:mine.npz", *QUICK)
    assert result.code == 0, result.err
    assert bitsmith("adapt", "model", "--merge", "a", "b", "ab", "--out", "three").code == 0
    # in place
    assert bitsmith("adapt", "model", "--apply", "a.delta").code == 0
    assert tensors(base / "model") == tensors(base / "c")


def test_what_does_not_fit_the_base_is_refused(base: Path, bitsmith: Bitsmith) -> None:
    adapted = bitsmith("adapt", "another", "--data", "npz:mine.npz", *QUICK, "--delta", "d", "--out", "other")
    assert adapted.code == 0, adapted.err
    refused = {
        ("--apply", "d"): ["d: this delta belongs to another model"],
        ("--merge", "d"): ["d: this delta belongs to another model"],
        ("--merge", "other"): [
            "other: this model does not say that it was adapted from the base",
            "adapted.json",
        ],
        ("--merge", "model"): ["model: this model does not say", "no record of it"],
        ("--apply", "mine.npz"): ["mine.npz", "not a safetensors file"],
        ("--apply", "nowhere"): ["nowhere: there is no such delta"],
    }
    before = tensors(base / "model")
    for arguments, fragments in refused.items():
        result = bitsmith("adapt", "model", *arguments)
        assert_one_line(result.err, *fragments)
        assert result.code == 2
    assert tensors(base / "model") == before


WRONG = {
    "no data": ([], ["--data", "Give --data"]),
    "unknown data": (["--data", "digts"], ["digts", "Did you mean 'digits'"]),
    "no file": (["--data", "npz:nowhere.npz"], ["npz:nowhere.npz", "no such file"]),
    "limit too low": (["--data", "npz:mine.npz", "--memory-limit", "1MB"], ["--memory-limit", "at least 8."]),
    "no amount": (["--data", "npz:mine.npz", "--memory-limit", "much"], ["--memory-limit", "much", "200MB"]),
    "learning rate": (["--data", "npz:mine.npz", "--lr", "-1"], ["--lr", "-1", "a number above 0"]),
    "batch size": (["--data", "npz:mine.npz", "--batch-size", "0"], ["--batch-size", "a whole number >= 1"]),
    "epochs": (["--data", "npz:mine.npz", "--epochs", "0"], ["--epochs", "a whole number >= 1"]),
    "nothing to resume": (
        ["--data", "npz:mine.npz", "--resume"],
        ["no adaptation to resume", "--resume out"],
    ),
    "a taken folder": (["--data", "npz:mine.npz", "--out", "another"], ["--out another", "holds a model"]),
    "a file as folder": (["--data", "npz:mine.npz", "--out", "mine.npz"], ["--out mine.npz", "a file"]),
    "merging nothing": (["--merge"], ["--merge", "nothing to merge"]),
    "copies of what": (["another"], ["another", "Give --merge"]),
    "training and merging": (
        ["--merge", "another", "--lr", "1"],
        ["--lr", "nothing is trained with --merge"],
    ),
    "applying and training": (["--apply", "d", "--data", "digits"], ["--data", "trained with --apply"]),
    "rounding of what": (["--data", "npz:mine.npz", "--rounding", "nearest"], ["--rounding", "Give --merge"]),
    "rounding": (["--merge", "another", "--rounding", "up"], ["another", "does not say"]),
}


@pytest.mark.parametrize(("arguments", "fragments"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line_and_changes_nothing(
    arguments: list[str], fragments: list[str], base: Path, bitsmith: Bitsmith
) -> None:
    before = sorted(path for path in base.rglob("*") if path.name != ".lock")
    result = bitsmith("adapt", "model", *arguments, "--json")
    assert_one_line(result.err, *fragments)
    assert (result.code, result.out) == (2, "")
    assert sorted(path for path in base.rglob("*") if path.name != ".lock") == before


MODELS = {
    "a run": ("run", ["run: this is a run", "Give run/model"]),
    "nothing": ("nowhere", ["nowhere: there is no such directory"]),
    "no model": ("empty", ["no exported model", "config.json"]),
    "another version": ("model", ["another format version", "got 9"]),
    "foreign": ("model", ["not a model of Bitsmith's"]),
}


@pytest.mark.parametrize(("kind", "path", "fragments"), [(k, *v) for k, v in MODELS.items()], ids=MODELS)
def test_what_is_no_model_of_ours_is_one_line(
    kind: str, path: str, fragments: list[str], base: Path, bitsmith: Bitsmith
) -> None:
    config = json.loads((base / "model" / "config.json").read_text())
    config |= {"another version": {"version": 9}, "foreign": {"format": "other"}}.get(kind, {})
    (base / "model" / "config.json").write_text(json.dumps(config))
    result = bitsmith("adapt", path, "--data", "npz:mine.npz")
    assert_one_line(result.err.splitlines()[-1], *fragments)
    assert result.code == 2


IMAGES = {
    "too many classes": ({"classes": 5}, ["classes are not those of the model", "got 5", "the model's 3"]),
    "other names": (
        {"classes": 2, "names": ["cat", "dog"]},
        ["classes are not those of the model", "cat, dog", "the model's 3"],
    ),
    "three colours": ({"colours": 3}, ["cannot take these images", "(3, 8, 8)"]),
}


@pytest.mark.parametrize(("images", "fragments"), IMAGES.values(), ids=IMAGES)
def test_data_that_do_not_fit_the_model_are_one_line(
    images: dict[str, object], fragments: list[str], base: Path, bitsmith: Bitsmith
) -> None:
    names = {"classes": np.array(images["names"])} if "names" in images else {}
    if "colours" in images:
        labels = np.resize(np.arange(3), 12)
        x = np.zeros((12, 3, 8, 8), np.float32)
        np.savez("x.npz", train_x=x, train_y=labels, test_x=x, test_y=labels)
    else:
        write_images(Path("y.npz"), classes=images["classes"])  # type: ignore[arg-type]
        np.savez("x.npz", **dict(np.load("y.npz")), **names)
    result = bitsmith("adapt", "model", "--data", "npz:x.npz", "--json")
    assert_one_line(result.err, *fragments)
    assert result.code == 2
