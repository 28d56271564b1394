"""An exported model trains on its own codes: within its memory, whatever happens to the process."""

import dataclasses
import functools
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bitsmith as bs
from bitsmith.errors import FormatError, RecipeError, RunError, SchemeError, SiteError
from bitsmith.files import read_json
from bitsmith.recipe import adapt as adapting
from bitsmith.recipe.adapt import CHECKPOINT, RECORD, AdaptSettings, adapt
from bitsmith.recipe.adapt_files import apply_to
from bitsmith.recipe.adapt_memory import parse_bytes, step_bytes
from bitsmith.recipe.adapt_model import open_model
from bitsmith.recipe.progress import Event
from bitsmith.tasks import build, load
from tests.recipe.adapting import SETTINGS, export, wide, write_images

ROOT = Path(__file__).parents[2]


def written(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes() + (folder / "config.json").read_bytes()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, small.npz, large.npz, and what a process left there that measured its memory and
    was killed in its second adaptation."""
    folder = tmp_path_factory.mktemp("adapt")
    export(folder / "model")
    write_images(folder / "small.npz")
    write_images(folder / "large.npz", rows=128, size=32)
    command = [sys.executable, "-m", "tests.recipe.adapting", str(folder)]
    places = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=places, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return folder


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The model adapted without an interruption, with its record."""
    place = tmp_path_factory.mktemp("finished") / "model"
    shutil.copytree(prepared / "model", place)
    record = adapt(place, f"npz:{prepared / 'small.npz'}", SETTINGS, delta=place.parent / "delta")
    return place, record


def test_it_learns_in_place_and_says_what_it_did(
    prepared: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    place, record = finished
    assert record["after"]["loss"] < 0.8 * record["before"]["loss"]
    assert (place / "config.json").read_bytes() == (prepared / "model" / "config.json").read_bytes()
    assert read_json(place / RECORD) == record
    assert not (place / CHECKPOINT).exists()
    data = load(f"npz:{prepared / 'small.npz'}")
    loaded = bs.load(place, kernels=False)
    assert data.evaluate(loaded, data.test_x, data.test_y)["loss"] == pytest.approx(
        record["after"]["loss"], abs=1e-4
    )
    assert 0 < record["changed"] < 1
    assert record["layers"] == {"trained": ["conv1", "conv2", "conv3", "conv4", "fc"], "frozen": []}
    assert record["float"] == [f"{name}.bias" for name in record["layers"]["trained"]]


def test_the_codes_that_it_starts_from_are_those_of_the_file(prepared: Path) -> None:
    opened = open_model(prepared / "model")
    packed = bs.load(prepared / "model", kernels=False).state_dict()
    assert opened.text == opened.base
    for name, tensor in opened.tensors().items():
        assert torch.equal(tensor, packed[name]), name


def test_a_killed_process_leaves_the_old_file_and_resumes_to_the_same_result(
    prepared: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    killed = prepared / "killed"
    assert (killed / CHECKPOINT).exists()
    assert written(killed) == written(prepared / "model")
    data = f"npz:{prepared / 'small.npz'}"
    with pytest.raises(RecipeError, match="unfinished adaptation"):
        adapt(killed, data, SETTINGS)
    with pytest.raises(RecipeError, match="another batch size"):
        adapt(killed, data, AdaptSettings(epochs=4, batch_size=8, even_if_worse=True), resume=True)
    adapt(killed, data, SETTINGS, resume=True)
    assert written(killed) == written(finished[0])
    assert not (killed / CHECKPOINT).exists()


class PowerCut(BaseException):
    """What no code of ours catches."""


@pytest.mark.parametrize("at", ["write_json", "write_stored", "unlink"])
def test_a_cut_while_it_writes_leaves_one_of_the_two_models(
    at: str,
    prepared: Path,
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, data = tmp_path / "model", f"npz:{prepared / 'small.npz'}"
    shutil.copytree(prepared / "model", place)

    def cut(*arguments: Any, **options: Any) -> None:
        if at != "write_json" or arguments[1]["result"] is not None:
            raise PowerCut
        kept(*arguments)

    kept = adapting.write_json
    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "unlink") if at == "unlink" else (adapting, at)), cut)
        with pytest.raises(PowerCut):
            adapt(place, data, SETTINGS)
    expected = finished[0] if at == "unlink" else prepared / "model"
    assert written(place) == written(expected)
    record = adapt(place, data, SETTINGS, resume=True)
    assert written(place) == written(finished[0])
    assert record["after"] == finished[1]["after"]
    assert adapt(place, data, SETTINGS, resume=True) == record  # nothing is left to do


def test_memory_is_said_beforehand_and_kept(prepared: Path) -> None:
    memory = read_json(prepared / "memory.json")
    assert memory["batch_size"] < memory["asked"] == 64
    assert memory["growth"] <= memory["total"] <= 20_000_000
    assert memory["growth"] > memory["step"]  # it is a measurement of that very work


@pytest.mark.parametrize("mode", ["integer", "zeroth_order"])
def test_a_trial_step_changes_nothing(mode: str, prepared: Path) -> None:
    model = open_model(prepared / "model", mode=mode).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = load(f"npz:{prepared / 'small.npz'}")
    make = functools.partial(adapting._optimizer, AdaptSettings(mode=mode))
    one, two = (step_bytes(model, data, make, rows) for rows in (4, 8))
    assert one < two <= 2 * one
    for name, tensor in model.state_dict().items():
        # forward-only training rounds floats to its lattice, once
        same = torch.equal if mode == "integer" or name.endswith("codes") else nearly
        assert same(tensor, before[name]), name


def nearly(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=2.0**-20 * float(b.abs().max()))


def test_a_limit_below_the_need_is_refused_with_the_need(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--memory-limit: .* got 8 MB, expected at least 8\.\d MB with"):
        adapt(
            prepared / "model",
            f"npz:{prepared / 'small.npz'}",
            AdaptSettings(memory_limit=8_000_000),
            out=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "count"), [("200MB", 200 * 10**6), ("1.5 GiB", 1610612736), ("64k", 64000), ("512", 512)]
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text) == count


class Floats(TorchDispatchMode):
    """The sizes of all float tensors that any operator has made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        return made


@pytest.mark.parametrize("mode", ["integer", pytest.param("zeroth_order", marks=pytest.mark.slow)])
def test_no_float_weight_exists_and_no_connection_is_opened(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor alive is looked at between steps, and every one that is made within them."""
    monkeypatch.setattr(socket, "socket", None)
    model, data = export(tmp_path / "wide", wide(), first_last_bits=None), write_images(tmp_path / "x.npz")
    made, alive = Floats(), set[tuple[int, ...]]()

    def walk(event: Event) -> None:
        if event.note.startswith("needs"):
            made.__enter__()
        gc.collect()
        tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
        if event.stage == "adapt":
            alive.update(tuple(t.shape) for t in tensors if t.is_floating_point())

    rate, share = {"integer": (2e-3, 0.9), "zeroth_order": (0.05, 1.0)}[mode]
    settings = AdaptSettings(steps=20, batch_size=16, learning_rate=rate, even_if_worse=True, mode=mode)
    factory = "tests.recipe.adapting:wide"
    try:
        record = adapt(model, data, settings, factory=factory, progress=walk)
    finally:
        made.__exit__(None, None, None)
    assert record["after"]["loss"] < share * record["before"]["loss"]
    assert (500,) in alive  # biases: the walk sees what there is
    assert not {(500, 500), (500, 64), (500 * 500,)} & alive
    assert 0 < made.largest < 500 * 500


FORWARD = dataclasses.replace(SETTINGS, mode="zeroth_order", epochs=10, learning_rate=0.1)


@pytest.fixture(scope="module")
def forward(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The model adapted by forward passes alone, with its record."""
    place = tmp_path_factory.mktemp("forward") / "model"
    shutil.copytree(prepared / "model", place)
    record = adapt(place, f"npz:{prepared / 'small.npz'}", FORWARD, delta=place.parent / "delta")
    return place, record


def test_forward_passes_alone_teach_what_lies_beside_the_codes(
    prepared: Path, finished: tuple[Path, dict[str, Any]], forward: tuple[Path, dict[str, Any]]
) -> None:
    place, record = forward
    assert record["after"]["loss"] < 0.9 * record["before"]["loss"]
    assert record["settings"]["mode"] == "zeroth_order"
    assert record["changed"] == 0
    assert record["layers"] == finished[1]["layers"]
    assert (place / "config.json").read_bytes() == (prepared / "model" / "config.json").read_bytes()
    before, after = (bs.load(p, kernels=False).state_dict() for p in (prepared / "model", place))
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"conv1.weight.scale", "conv1.input.scale", "conv1.bias"} <= differing
    assert not [name for name in differing if name.endswith("codes")]
    memory, gradients = record["memory"], finished[1]["memory"]
    assert memory["optimizer"] == 0  # no state, and no activation that is saved
    assert memory["step"] < 0.6 * gradients["step"]


def test_forward_only_adaptation_is_cut_resumed_and_sent_as_a_delta(
    prepared: Path, forward: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    place, data = tmp_path / "model", f"npz:{prepared / 'small.npz'}"
    shutil.copytree(prepared / "model", place)

    def cut(event: Event) -> None:
        if event.stage == "adapt" and event.done >= 5:
            raise PowerCut

    with pytest.raises(PowerCut):
        adapt(place, data, FORWARD, progress=cut, checkpoint_seconds=0.0)
    assert written(place) == written(prepared / "model")
    with pytest.raises(RecipeError, match="begun with another mode"):
        adapt(place, data, dataclasses.replace(FORWARD, mode="integer"), resume=True)
    adapt(place, data, FORWARD, resume=True)
    assert written(place) == written(forward[0])
    apply_to(prepared / "model", forward[0].parent / "delta", tmp_path / "applied")
    assert written(tmp_path / "applied") == written(forward[0])


def test_a_mode_that_there_is_not_and_what_each_usually_takes() -> None:
    with pytest.raises(SchemeError, match=r"--mode.*expected integer or zeroth_order"):
        AdaptSettings(mode="first_order")
    assert (AdaptSettings().epochs, AdaptSettings().learning_rate) == (5, 1e-2)
    assert AdaptSettings(mode="zeroth_order").epochs == 30
    assert AdaptSettings(mode="zeroth_order", epochs=2).epochs == 2


def test_what_has_no_integer_form_stays_as_it_was_and_is_listed(prepared: Path, tmp_path: Path) -> None:
    levels = {"conv3.weight": {"grid": "powers_of_two", "bits": 4}}
    place, told = export(tmp_path / "model", overrides=levels), []
    before = bs.load(place, kernels=False).state_dict()["conv3.weight.codes"]
    settings = AdaptSettings(steps=3, batch_size=16, even_if_worse=True)
    record = adapt(place, f"npz:{prepared / 'small.npz'}", settings, progress=told.append)
    assert record["layers"]["frozen"] == ["conv3"]
    assert any("conv3" in event.note for event in told)
    assert torch.equal(bs.load(place, kernels=False).state_dict()["conv3.weight.codes"], before)


def test_what_is_worse_on_the_validation_split_is_not_written(
    prepared: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "model")
    data, reckless = f"npz:{prepared / 'small.npz'}", AdaptSettings(steps=6, batch_size=16, learning_rate=5.0)
    with pytest.raises(
        RunError, match=r"got worse on the validation split, and is left as it was\. Lower --lr"
    ):
        adapt(tmp_path / "model", data, reckless)
    assert written(tmp_path / "model") == written(finished[0])
    assert read_json(tmp_path / "model" / RECORD) == finished[1]
    assert not (tmp_path / "model" / CHECKPOINT).exists()
    with pytest.raises(RunError):
        adapt(tmp_path / "model", data, reckless, out=tmp_path / "new")
    assert not (tmp_path / "new" / RECORD).exists()


def test_a_language_model_whose_table_is_its_head(tmp_path: Path) -> None:
    model, x = build("byte_llama", width=32, depth=1, context=16, tied=True), torch.randint(128, (2, 16))
    tokens = bs.Scheme(bits=8, granularity="token", range="dynamic")
    bs.prepare(model, bs.Scheme(bits=4, granularity="channel"), tokens, target="native")
    bs.calibrate(model, [x])
    place = bs.save(bs.finalize(model, x), tmp_path / "model")
    (tmp_path / "text.txt").write_text("What is said is said again. " * 200)
    data = load(f"text:{tmp_path / 'text.txt'}", context=16)
    record = adapt(place, data, AdaptSettings(steps=20, batch_size=16, even_if_worse=True))
    assert record["after"]["loss"] < 0.9 * record["before"]["loss"]
    assert "lm_head" in record["layers"]["trained"]
    loaded = bs.load(place, kernels=False)
    found = data.evaluate(loaded, data.test_x, data.test_y)
    assert found["loss"] == pytest.approx(record["after"]["loss"], abs=1e-3)


def test_a_model_of_which_nothing_trains_is_refused(prepared: Path, tmp_path: Path) -> None:
    scheme = bs.Scheme(bits=4, grid="powers_of_two", granularity="channel")
    place = export(tmp_path / "model", weights=scheme, first_last_bits=None)
    with pytest.raises(SiteError, match="no layer of this model has an integer form"):
        adapt(place, f"npz:{prepared / 'small.npz'}")


def test_one_scale_for_all_channels_becomes_one_for_each_in_another_folder(
    prepared: Path, tmp_path: Path
) -> None:
    model = wide()
    place = export(tmp_path / "model", model, bs.Scheme(bits=4, granularity="tensor"))
    data, settings = (
        f"npz:{prepared / 'small.npz'}",
        AdaptSettings(steps=2, batch_size=16, even_if_worse=True),
    )
    factory = "tests.recipe.adapting:wide"
    with pytest.raises(RecipeError, match="one scale for all channels"):
        adapt(place, data, settings, factory=factory)
    record = adapt(place, data, settings, factory=factory, out=tmp_path / "out")
    examples = load(data)
    loaded = bs.load(tmp_path / "out", into=wide(), kernels=False)
    found = examples.evaluate(loaded, examples.test_x, examples.test_y)
    assert found["loss"] == pytest.approx(record["after"]["loss"], abs=1e-4)


def test_a_model_that_changed_meanwhile_is_not_overwritten(prepared: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(prepared / "model", place)
    data = f"npz:{prepared / 'small.npz'}"
    stopped = AdaptSettings(steps=4, batch_size=16, even_if_worse=True)

    def stop(event: Event) -> None:
        if event.stage == "adapt" and event.values:
            raise PowerCut

    with pytest.raises(PowerCut):
        adapt(place, data, stopped, progress=stop)
    write_images(tmp_path / "y.npz")
    arrays = dict(np.load(tmp_path / "y.npz"))
    np.savez(tmp_path / "y.npz", **arrays | {"train_x": arrays["train_x"] + 0.01})
    with pytest.raises(RecipeError, match="begun with other data"):
        adapt(place, f"npz:{tmp_path / 'y.npz'}", stopped, resume=True)
    other = export(tmp_path / "other", weights=bs.Scheme(bits=3, granularity="channel"))
    for file in ("model.safetensors", "config.json"):
        shutil.copy(other / file, place / file)
    with pytest.raises(FormatError, match="changed since its adaptation began"):
        adapt(place, data, stopped, resume=True)
