"""A run that was interrupted ends, to the last bit, where an uninterrupted one ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from bitsmith.errors import FormatError, Interrupted, RecipeError
from bitsmith.train import Progress, TrainConfig, TrainResult, train
from bitsmith.train.checkpoint import load_checkpoint
from bitsmith.train.loop import _fingerprint
from tests.train.problem import attached, data, network, same_state, shift

ROOT = Path(__file__).parents[2]

# 40 rows in batches of 9: 5 steps an epoch, the last one small; 10 steps
CONFIG = TrainConfig(
    epochs=2, batch_size=9, learning_rate=0.01, ema=0.9, accumulation=2, gradient_clip=1.0, device="cpu"
)


def run(
    model: nn.Module, path: Path | None = None, *, after: int = 0, config=CONFIG, **arguments
) -> TrainResult:
    """Train with everything on, stopping after step ``after``."""
    done = [0]

    def count(told: Progress) -> None:
        done[0] = told.step

    method = attached(model)
    stop = (lambda: done[0] >= after) if after else None
    return train(
        model,
        *data(),
        config,
        methods=[method],
        augment=shift,
        checkpoint=path,
        progress=count,
        stop=stop,
        **arguments,
    )


@pytest.mark.parametrize("after", [1, 5, 7, 10])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, after: int, optimizer: str) -> None:
    config = TrainConfig(**{**vars(CONFIG), "optimizer": optimizer})
    whole, parts, path = network(), network(), tmp_path / "c.safetensors"
    uninterrupted = run(whole, config=config)
    with pytest.raises(Interrupted, match=f"stopped after step {after} of 10; everything is saved"):
        run(parts, path, after=after, config=config)
    fresh = network(seed=77)  # all that matters comes from the file
    torch.manual_seed(123)
    resumed = run(fresh, path, config=config, resume=True)
    assert resumed.resumed_at == after
    assert same_state(whole, fresh)
    assert resumed.history == uninterrupted.history
    assert resumed.seconds > 0


def test_stopping_at_every_step_changes_nothing(tmp_path: Path) -> None:
    whole, model = network(), network()
    run(whole)
    for after in range(1, 11):
        with pytest.raises(Interrupted):
            run(model, tmp_path / "c", after=after, resume=True)
    run(model, tmp_path / "c", resume=True)
    assert same_state(whole, model)


def test_a_finished_run_resumes_to_its_own_end(tmp_path: Path) -> None:
    first, again = network(), network(seed=9)
    done = run(first, tmp_path / "c")
    resumed = run(again, tmp_path / "c", resume=True)
    assert resumed.resumed_at == 10
    assert resumed.history == done.history
    assert same_state(first, again)


def test_without_a_checkpoint_resume_starts_at_the_beginning(tmp_path: Path) -> None:
    whole, model = network(), network()
    run(whole)
    assert run(model, tmp_path / "none", resume=True).resumed_at is None
    assert same_state(whole, model)


def test_checkpoints_are_written_as_often_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "c"
    seen: list[bool] = []

    def look(told: Progress) -> None:
        if told.record is not None:
            seen.append(path.exists())

    for seconds, expected in ((0.0, [True, True]), (3600.0, [False, True])):
        seen.clear()
        path.unlink(missing_ok=True)
        config = TrainConfig(epochs=2, batch_size=20, device="cpu")
        train(network(), *data(), config, checkpoint=path, checkpoint_seconds=seconds, progress=look)
        assert seen == expected


@pytest.mark.parametrize("change", [{"learning_rate": 0.02}, {"epochs": 3}, {"ema": 0.0}, {"seed": 1}])
def test_resuming_with_other_settings_names_the_setting(tmp_path: Path, change: dict[str, float]) -> None:
    with pytest.raises(Interrupted):
        run(network(), tmp_path / "c", after=3)
    (name,) = change
    with pytest.raises(RecipeError, match=f"written with another train.{name}"):
        run(network(), tmp_path / "c", resume=True, config=TrainConfig(**{**vars(CONFIG), **change}))


def test_resuming_on_other_data_is_refused(tmp_path: Path) -> None:
    x, y = data()
    train(network(), x, y, CONFIG, checkpoint=tmp_path / "c")
    with pytest.raises(RecipeError, match="written with another data labels"):
        train(network(), x, y.flip(0), CONFIG, checkpoint=tmp_path / "c", resume=True)


def test_resuming_another_model_names_what_does_not_fit(tmp_path: Path) -> None:
    train(network(), *data(), CONFIG, checkpoint=tmp_path / "c")
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(FormatError, match=r"another model: 0\.weight does not fit"):
        train(other, *data(), CONFIG, checkpoint=tmp_path / "c", resume=True)


def test_an_interrupted_run_keeps_the_precision_it_began_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(**{**vars(CONFIG), "precision": "auto"})
    monkeypatch.setattr("bitsmith.train.loop.choose_precision", lambda *_: ("bfloat16", "measured"))
    with pytest.raises(Interrupted):
        run(network(), tmp_path / "c", after=3, config=config)
    monkeypatch.setattr("bitsmith.train.loop.choose_precision", lambda *_: ("float32", "measured"))
    assert run(network(), tmp_path / "c", config=config, resume=True).precision == "bfloat16"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_ends(tmp_path: Path, number: signal.Signals) -> None:
    whole, model, path = network(), network(), tmp_path / "c"
    train(whole, *data(), CONFIG, augment=shift)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def send(told: Progress) -> None:
        if told.step == 3:
            signal.raise_signal(number)

    with pytest.raises(Interrupted) as error:
        train(model, *data(), CONFIG, augment=shift, checkpoint=path, progress=send)
    assert f"train: stopped by {number.name} after step 3 of 10; everything is saved" in str(error.value)
    assert error.value.exit_code == 130
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    train(model, *data(), CONFIG, augment=shift, checkpoint=path, resume=True)
    assert same_state(whole, model)


def test_a_second_interrupt_does_not_wait() -> None:
    def send(told: Progress) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(network(), *data(), CONFIG, progress=send)


def test_it_trains_outside_the_main_thread() -> None:
    whole, model = network(), network()
    train(whole, *data(), CONFIG)
    thread = threading.Thread(target=train, args=(model, *data(), CONFIG))
    thread.start()
    thread.join()
    assert same_state(whole, model)


SCRIPT = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.train.test_resume import CONFIG
from tests.train.problem import attached, data, network, shift
from bitsmith.train import train
model = network()
train(model, *data(), CONFIG, methods=[attached(model)], augment=shift, checkpoint=Path(sys.argv[1]),
      checkpoint_seconds=0, progress=lambda told: time.sleep(0 if told.step < 7 else 60))
"""


def test_a_killed_process_loses_only_what_came_after_the_last_checkpoint(tmp_path: Path) -> None:
    whole, model, path = network(), network(seed=4), tmp_path / "c"
    run(whole)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], env=environment)
    try:
        for _ in range(600):
            if path.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert path.exists()
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    resumed_at = run(model, path, resume=True).resumed_at
    assert resumed_at is not None
    assert 1 <= resumed_at <= 7
    assert same_state(whole, model)


def test_a_checkpoint_holds_the_raw_weights_beside_the_average(tmp_path: Path) -> None:
    raw, averaged, path = network(), network(), tmp_path / "c"
    train(raw, *data(), TrainConfig(**{**vars(CONFIG), "ema": 0.0}))
    train(averaged, *data(), CONFIG, checkpoint=path)
    saved = load_checkpoint(path, _fingerprint(CONFIG, [], *data()))
    assert torch.equal(saved["model"]["5.weight"], raw[-1].weight)
    assert torch.equal(saved["average"]["5.weight"], averaged[-1].weight)
    assert not torch.equal(raw[-1].weight, averaged[-1].weight)
