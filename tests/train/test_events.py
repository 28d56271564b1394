"""TensorBoard events, with the package and without it."""

import builtins
import subprocess
import sys
from pathlib import Path

import pytest

from bitsmith.train import TrainConfig, train
from tests.train.problem import attached, data, network

CONFIG = TrainConfig(epochs=2, batch_size=10, device="cpu")


def test_losses_and_records_are_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = network()
    result = train(
        model, *data(), CONFIG, methods=[attached(model)], events=tmp_path / "events", validate=lambda: 0.25
    )
    assert result.notes == []
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [event.step for event in events.Scalars("step/loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("epoch/loss")] == [4, 8]
    assert [event.value for event in events.Scalars("epoch/validation_accuracy")] == [0.25, 0.25]
    assert len(events.Scalars("methods/Anchor.strength")) == 2
    for event, record in zip(events.Scalars("epoch/loss"), result.history, strict=True):
        assert event.value == pytest.approx(record["loss"])


def test_without_the_package_training_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments, **keywords):
        if name.startswith(("torch.utils.tensorboard", "tensorboard")):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    result = train(network(), *data(), CONFIG, events=tmp_path / "events")
    assert result.notes == [
        "no TensorBoard events: the package is not installed. Run: pip install 'bitsmith[tensorboard]'"
    ]
    assert not (tmp_path / "events").exists()
    assert len(result.history) == 2


@pytest.mark.slow
def test_training_without_events_does_not_import_tensorboard() -> None:
    code = "import sys, bitsmith.train; sys.exit('torch.utils.tensorboard' in sys.modules)"
    source = str(Path(__file__).parents[2] / "src")
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": source}).returncode == 0
