"""The loop with an optimizer of the caller's: integer codes, so many steps, checkpoints within an epoch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitsmith.errors import Interrupted, SiteError
from bitsmith.optim import IntegerSGD
from bitsmith.quantization.integer_prepare import prepare_integer
from bitsmith.train import Progress, TrainConfig, train

X = torch.rand(40, 12, generator=torch.Generator().manual_seed(0))
Y = X[:, :4].argmax(1)
CONFIG = TrainConfig(epochs=3, batch_size=8, learning_rate=0.5, device="cpu")


def integers() -> tuple[nn.Module, IntegerSGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    prepare_integer(model)
    return model, IntegerSGD(model, lr=0.5)


def trained(**options: Any) -> tuple[dict[str, Tensor], list[Progress]]:
    model, optimizer = integers()
    told: list[Progress] = []
    train(model, X, Y, CONFIG, optimizer=optimizer, progress=told.append, **options)
    return model.state_dict(), told


def test_codes_move_at_the_scheduled_rates_for_so_many_steps() -> None:
    state, told = trained(steps=7)  # an epoch has five
    assert [now.step for now in told if now.record is None] == [1, 2, 3, 4, 5, 6, 7]
    rates = [now.learning_rate for now in told if now.record is None]
    assert max(rates) == 0.5
    assert rates[-1] < 0.1
    assert told[-1].steps == 7
    untouched = integers()[0].state_dict()
    assert not torch.equal(state["0.weight.codes"], untouched["0.weight.codes"])


@pytest.mark.parametrize("stopped", [3, 5, 6])
def test_a_checkpoint_is_written_within_an_epoch_and_resumed_to_the_last_bit(
    stopped: int, tmp_path: Path
) -> None:
    class Cut(BaseException):
        pass

    def cut(now: Progress) -> None:
        if now.step == stopped:
            raise Cut

    model, optimizer = integers()
    place = {"checkpoint": tmp_path / "x", "checkpoint_seconds": 0.0}
    with pytest.raises(Cut):
        train(model, X, Y, CONFIG, optimizer=optimizer, steps=8, progress=cut, **place)  # type: ignore[arg-type]
    state, told = trained(steps=8, resume=True, **place)
    assert told[0].step in (stopped, stopped + 1)
    expected, _ = trained(steps=8)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_stop_says_where_and_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"step 1 of 4.*--resume"):
        trained(steps=4, checkpoint=tmp_path / "x", stop=lambda: True)


@pytest.mark.parametrize("change", [{"accumulation": 2}, {"gradient_clip": 1.0}])
def test_what_needs_all_gradients_at_once_is_refused(change: dict[str, Any]) -> None:
    model, optimizer = integers()
    config = TrainConfig(epochs=1, batch_size=8, device="cpu", **change)
    with pytest.raises(SiteError, match="needs all gradients at once"):
        train(model, X, Y, config, optimizer=optimizer)
