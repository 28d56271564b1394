"""Whatever the user got wrong is one line on standard error (where, what, what to do) and an exit code."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitsmith.files import directory_lock, save_tensors
from tests.cli.conftest import QUICK, Bitsmith, write_images

# overrides of the quick run, and what the line must say: the field, the value, the cure
RECIPES = {
    "unknown key": (["modle=x"], ["modle", "Did you mean model?"]),
    "unknown key of a section": (["train.epoch=3"], ["train.epoch", "Did you mean epochs?"]),
    "unknown key of a scheme": (["quantize.weights.bit=3"], ["quantize.weights.bit", "Did you mean bits?"]),
    "override without a value": (["train.epochs"], ["--set", "train.epochs", "Write --set"]),
    "part of a single value": (["train.epochs.x=3"], ["train.epochs", "got 1", "as a whole"]),
    "list index": (["export.7=onnx"], ["export.7", "0..0", "Count list entries from 0"]),
    "broken YAML value": (["export=[onnx"], ["--set export", "line 1", "Mend that line"]),
    "wrong type": (["train.epochs=many"], ["train.epochs", "'many'", "valid integer"]),
    "out of range": (["train.epochs=-1"], ["train.epochs", "-1", "a whole number >= 0"]),
    "no epochs for a method": (["train.epochs=0"], ["train.epochs", "0", "1 or more with budget_search"]),
    "out of range, in the float stage": (["float.ema=2"], ["float.ema", "2", "a decay below 1"]),
    "choice": (["train.schedule=cosin"], ["train.schedule", "cosin", "Did you mean cosine?"]),
    "bits too many": (["quantize.weights.bits=9"], ["quantize.weights.bits", "9", "1 to 8"]),
    "bits too few": (["quantize.activations.bits=0"], ["quantize.activations.bits", "0", "1 to 8"]),
    "bits in an override": (
        ['quantize.overrides={"fc.*": {bits: 12}}'],
        ["overrides.fc.*.bits", "12", "1 to 8"],
    ),
    "granularity": (
        ["quantize.weights.granularity=chanel"],
        ["granularity", "chanel", "Did you mean channel?"],
    ),
    "glob without a match": (
        ['quantize.overrides={"conv9.weight": {bits: 4}}'],
        ["quantize.overrides.conv9.weight", "matches no site", "conv4.weight"],
    ),
    "group size that does not divide": (
        ["quantize.overrides={fc.weight: {granularity: group, group_size: 5}}"],
        ["fc.weight", "groups of 5", "group_size 2, 4, 8 or 16"],
    ),
    "what the target cannot hold": (
        ["quantize.activations.granularity=channel"],
        ["granularity", "channel", "onnxruntime", "target: native"],
    ),
    "target": (["target=onxruntime"], ["target", "onxruntime", "Did you mean onnxruntime?"]),
    "model": (["model=digit_cnn"], ["model", "digit_cnn", "digits_cnn"]),
    "model argument": (["model.arguments.clases=3"], ["digits_cnn", "clases", "classes"]),
    "model factory": (["model=nowhere:make"], ["nowhere:make", "cannot be imported", "Run from the folder"]),
    "data": (["data=digit"], ["data", "digit", "digits"]),
    "data argument": (["data.arguments.fold=7"], ["data digits", "7", "0 to 4"]),
    "missing data file": (["data=npz:nowhere.npz"], ["npz:nowhere.npz", "no such file", "Check the path"]),
    "export format": (["export=[onxx]"], ["export.0", "onxx", "Did you mean onnx?"]),
    "export that the target cannot run": (
        ["target=research", "export=[native, onnx]"],
        ["the default recipe, export", "no runtime", "[native, onnx]", "target: onnxruntime"],
    ),
    "missing weights": (
        ["pretrained=nowhere.safetensors"],
        ["nowhere.safetensors", "no such", "Check the path"],
    ),
}


def assert_one_line(err: str, *fragments: str) -> None:
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("bitsmith: ")
    for fragment in fragments:
        assert fragment in lines[0], f"{fragment!r} is not in: {lines[0]}"


@pytest.mark.parametrize(("overrides", "fragments"), RECIPES.values(), ids=RECIPES)
def test_a_wrong_recipe_is_one_line(
    overrides: list[str], fragments: list[str], bitsmith: Bitsmith, tmp_path: Path
) -> None:
    sets = [argument for override in overrides for argument in ("--set", override)]
    result = bitsmith("run", "--json", "--out", tmp_path / "run", *QUICK, *sets)
    assert_one_line(result.err, *fragments)
    assert (result.code, result.out) == (2, "")


COMMANDS = {
    "unknown command": (["rum"], ["rum", "--help"]),
    "unknown option": (["run", "--ouy", "x"], ["--ouy", "bitsmith run --help"]),
    "missing argument": (["evaluate"], ["RUN", "bitsmith evaluate --help"]),
    "missing recipe": (["run", "digits.yml"], ["digits.yml", "no such recipe", "Check the path"]),
    "nothing to inspect": (["inspect"], ["bitsmith inspect", "--system", "Try"]),
    "nothing to resume": (
        ["run", "--resume"],
        ["--out runs/digits", "no run to resume", "Leave --resume out"],
    ),
    "no such run": (["evaluate", "nowhere"], ["nowhere", "no such run directory", "Give the --out"]),
    "no such run to inspect": (["inspect", "nowhere"], ["nowhere", "no such directory", "Give the --out"]),
    "no such run to compare": (
        ["compare", "nowhere"],
        ["nowhere", "no such run directory", "Give the --out"],
    ),
}


@pytest.mark.parametrize(("arguments", "fragments"), COMMANDS.values(), ids=COMMANDS)
def test_a_wrong_command_is_one_line(
    arguments: list[str],
    fragments: list[str],
    bitsmith: Bitsmith,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = bitsmith(*arguments)
    assert_one_line(result.err, *fragments)
    assert (result.code, result.out) == (2, "")


FILES = {
    "broken YAML": ("model: digits_cnn\ntrain: {epochs: 3", ["line 2", "not valid YAML", "Mend that line"]),
    "a key given twice": ("model: a\nmodel: b\n", ["line 2", "model is given twice", "Mend that line"]),
    "a list": ("- model\n", ["not a mapping", "a list", "Start from recipes/digits.yaml"]),
    "empty": ("", ["not a mapping", "an empty file", "Start from recipes/digits.yaml"]),
    "binary": ("\x00\x01", ["not valid YAML", "Mend that line"]),
    "unknown key": ("quantise: {}\n", ["quantise", "Did you mean quantize?"]),
}


@pytest.mark.parametrize(("text", "fragments"), FILES.values(), ids=FILES)
def test_a_wrong_file_is_one_line_that_names_it(
    text: str, fragments: list[str], bitsmith: Bitsmith, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    result = bitsmith("run", tmp_path / "mine.yaml", "--out", tmp_path / "run")
    assert_one_line(result.err, str(tmp_path / "mine.yaml"), *fragments)
    assert (result.code, result.out) == (2, "")


def test_a_misspelt_recipe_file_is_answered_with_the_one_beside_it(
    bitsmith: Bitsmith, tmp_path: Path
) -> None:
    (tmp_path / "cifar.yaml").write_text("model: digits_cnn\n")
    result = bitsmith("run", tmp_path / "cifra.yaml")
    assert_one_line(result.err, "no such recipe", f"Did you mean {tmp_path / 'cifar.yaml'}?")


IMAGES = {
    "NaN": ({"nan": True}, {}, ["train_x", "NaN", "image 5", "Clean or drop"]),
    "label out of range": ({"classes": (0, 1, 12)}, {"classes": 10}, ["train_y", "12", "0 to 9", "Renumber"]),
}


@pytest.mark.parametrize(("images", "arguments", "fragments"), IMAGES.values(), ids=IMAGES)
def test_wrong_data_is_one_line(
    images: dict[str, object],
    arguments: dict[str, object],
    fragments: list[str],
    bitsmith: Bitsmith,
    tmp_path: Path,
) -> None:
    path = write_images(tmp_path / "images.npz", **images)  # type: ignore[arg-type]
    sets = [f"data=npz:{path}", f"data.arguments={arguments}", "data.arguments.validation=0"]
    result = bitsmith("run", "--out", tmp_path / "run", *QUICK, *(a for s in sets for a in ("--set", s)))
    assert_one_line(result.err, *fragments)
    assert result.code == 2


MODELS = {
    "no quantizable layer": (
        "nn.Sequential(nn.Flatten(), Scale())",
        ["no layer to quantize", "at least one nn.Linear", "modules"],
    ),
    "quantizer never called": (
        "Idle()",
        ["idle.", "never called", "bits to 32"],
    ),
}
FACTORY = """
import torch
from torch import nn

class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))
    def forward(self, x):
        return (x * self.scale)[:, :10]

class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.idle, self.last = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)
    def forward(self, x):
        return self.last(self.first(x.flatten(1)))

def make():
    return """


@pytest.mark.parametrize(("model", "fragments"), MODELS.values(), ids=MODELS)
def test_a_model_that_cannot_be_quantized_is_one_line(
    model: str, fragments: list[str], bitsmith: Bitsmith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"models_{len(model)}"
    Path(f"{name}.py").write_text(FACTORY + model)
    result = bitsmith(
        "run",
        "--json",
        "--out",
        "run",
        *QUICK,
        "--set",
        f"model={name}:make",
        "--set",
        "quantize.overrides={}",
    )
    assert_one_line(result.err, *fragments)
    assert result.code == 2


@pytest.mark.parametrize(
    ("package", "fragments"),
    [("sklearn", ["extra vision", "scikit-learn"]), ("onnx", ["extra onnx", "onnx"])],
)
def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(
    package: str,
    fragments: list[str],
    bitsmith: Bitsmith,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for module in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    command = ["export", run, "--to", "onnx"] if package == "onnx" else ["run", "--out", tmp_path / "new"]
    result = bitsmith(*command)
    assert_one_line(result.err, *fragments, "pip install 'bitsmith[")
    assert result.code == 2


def test_training_that_diverges_is_one_line_and_the_work_failed(bitsmith: Bitsmith, tmp_path: Path) -> None:
    sets = ["float.optimizer=sgd", "float.learning_rate=1e6", "float.epochs=8"]
    result = bitsmith(
        "run", "--json", "--out", tmp_path / "run", *QUICK, *(a for s in sets for a in ("--set", s))
    )
    assert_one_line(result.err, "train step", "learning_rate")
    assert result.code == 1


def test_an_export_that_does_not_hold_is_one_line_and_still_reported(
    bitsmith: Bitsmith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsmith.export import verify

    monkeypatch.setattr(sys.modules[verify.__module__], "AGREEMENT", 1.1)
    result = bitsmith("run", "--json", "--out", tmp_path / "run", *QUICK)
    assert_one_line(result.err, "same predictions", "Do not use the file")
    assert result.code == 1
    assert (tmp_path / "run" / "report.html").exists()


# ---- run directories


def test_a_directory_that_holds_a_run_is_refused(bitsmith: Bitsmith, finished: Path) -> None:
    result = bitsmith("run", "--out", finished, *QUICK)
    assert_one_line(
        result.err, f"--out {finished}", "already holds a finished run", "--resume", "another --out"
    )
    assert result.code == 2


def test_a_directory_in_use_is_refused(bitsmith: Bitsmith, tmp_path: Path) -> None:
    with directory_lock(tmp_path / "run"):
        result = bitsmith("run", "--out", tmp_path / "run", *QUICK)
    assert_one_line(result.err, str(tmp_path / "run"), "in use by process", str(os.getpid()), "another --out")
    assert result.code == 1


def test_resuming_another_recipe_names_what_differs(bitsmith: Bitsmith, finished: Path) -> None:
    result = bitsmith("run", "--resume", "--out", finished, *QUICK, "--set", "train.seed=4")
    assert_one_line(result.err, str(finished), "train.seed", "4", "0", "Resume without changes")
    assert result.code == 2


def test_a_full_disk_is_one_line_and_the_work_failed(
    bitsmith: Bitsmith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = bitsmith("run", "--out", tmp_path / "run", *QUICK)
    assert_one_line(result.err, "recipe.yaml", "disk is full", "Free some space")
    assert result.code == 1
    assert not list((tmp_path / "run").glob("*.part"))


# ---- damaged files


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def replace(path: Path) -> None:
    import torch

    save_tensors(path, {"weight": torch.zeros(3)})


DAMAGE = {
    ("checkpoint", truncate): ["float.safetensors", "checkpoint is corrupted, truncated", "Restore it"],
    ("checkpoint", flip): ["float.safetensors", "checkpoint is corrupted", "sha256"],
    ("checkpoint", replace): ["float.safetensors", "a foreign file", "--resume"],
    ("model", truncate): ["model.safetensors", "model is corrupted, truncated", "Restore it"],
    ("model", flip): ["model.safetensors", "model is corrupted", "sha256"],
    ("model", replace): ["model", "config.json", "save the model again"],
    ("plan", truncate): ["plan.json", "plan is not valid JSON", "corrupted or truncated"],
}


@pytest.mark.parametrize(
    ("damaged", "fragments"), DAMAGE.items(), ids=[f"{f.__name__} {w}" for w, f in DAMAGE]
)
def test_a_damaged_file_is_one_line(
    damaged: tuple[str, object], fragments: list[str], bitsmith: Bitsmith, finished: Path, tmp_path: Path
) -> None:
    what, damage = damaged
    run = shutil.copytree(finished, tmp_path / "run")
    paths = {
        "checkpoint": run / "checkpoints" / "float.safetensors",
        "model": run / "model" / "model.safetensors",
        "plan": run / "plan.json",
    }
    commands = {
        "checkpoint": ["run", "--resume", "--out", run],
        "model": ["evaluate", run],
        "plan": [
            "run",
            "--out",
            tmp_path / "new",
            *QUICK,
            "--set",
            "methods=[]",
            "--set",
            f"plan={run / 'plan.json'}",
        ],
    }
    (run / "report.html").unlink()  # so that resuming has something to do
    damage(paths[what])  # type: ignore[operator]
    result = bitsmith(*commands[what], *(["--json"] if what != "model" else []))
    assert_one_line(result.err, *fragments)
    assert result.code == 2


def test_a_plan_for_another_model_names_the_site(bitsmith: Bitsmith, finished: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text((finished / "plan.json").read_text().replace("conv4.weight", "conv5.weight"))
    result = bitsmith(
        "run", "--json", "--out", tmp_path / "run", *QUICK, "--set", "methods=[]", "--set", f"plan={plan}"
    )
    assert_one_line(result.err, str(plan), "conv5.weight", "conv4.weight")
    assert result.code == 2


def test_code_named_by_a_run_directory_is_not_imported(
    bitsmith: Bitsmith, finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("name: digits\n", "name: evil:make\n"))
    for command in (["evaluate", run], ["run", "--resume", "--out", run]):
        result = bitsmith(*command)
        assert_one_line(result.err, "evil:make", "is not taken from a run directory")
        assert result.code == 2


def test_the_installed_command_writes_one_line_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bitsmith", "run", "nowhere.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert_one_line(done.stderr, "nowhere.yaml", "Check the path")
    assert (done.returncode, done.stdout) == (2, "")
