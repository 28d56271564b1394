"""The average of the weights against its formula, step by step."""

import torch
from torch import nn

from bitsmith.train.average import Average


class Searched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.range = nn.Parameter(torch.zeros(1, 1))
        self.width_logits = nn.Parameter(torch.zeros(3))
        self.register_buffer("running_mean", torch.zeros(2))


def move(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_the_average_follows_the_hand_formula() -> None:
    model = Searched()
    average = Average(model, decay=0.2)
    expected = torch.tensor([1.0, 2.0])
    for step, value in enumerate([3.0, -1.0, 5.0], start=1):
        move(model, value)
        average.update()
        decay = min(0.2, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    average.copy_to_model()
    torch.testing.assert_close(model.weight.detach(), expected)


def test_a_short_run_is_not_held_back_by_its_start() -> None:
    model = Searched()
    average = Average(model, decay=0.999)
    move(model, 7.0)
    for _ in range(50):
        average.update()
    average.copy_to_model()
    torch.testing.assert_close(model.weight.detach(), torch.full((2,), 7.0), rtol=1e-4, atol=0)


def test_ranges_are_averaged_and_logits_are_not() -> None:
    model = Searched()
    assert set(Average(model, 0.9).values) == {"weight", "range"}


def test_copying_leaves_logits_and_buffers_alone() -> None:
    model = Searched()
    average = Average(model, 0.9)
    move(model, 4.0)
    model.running_mean.fill_(9.0)
    average.update()
    average.copy_to_model()
    assert model.width_logits.tolist() == [4.0] * 3
    assert model.running_mean.tolist() == [9.0] * 2


def test_its_state_continues_in_another_average() -> None:
    first, second = Searched(), Searched()
    one, two = Average(first, 0.9), Average(second, 0.9)
    move(first, 2.0)
    one.update()
    two.load_state_dict(one.state_dict())
    move(second, 2.0)
    one.update()
    two.update()
    assert all(torch.equal(one.values[name], two.values[name]) for name in one.values)
