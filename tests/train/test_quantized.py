"""Training a quantized model with the same loop: it learns, averages its ranges, and resumes exactly."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bitsmith.errors import Interrupted
from bitsmith.quantization import Scheme, calibrate, prepare, reestimate_batchnorm
from bitsmith.train import TrainConfig, train
from tests.train.problem import data, network, same_state, shift
from tests.train.test_loop import accuracy

CONFIG = TrainConfig(epochs=6, batch_size=10, learning_rate=0.02, ema=0.9, distillation=0.5, device="cpu")


def quantized() -> nn.Module:
    model = network(dropout=0)
    prepare(
        model,
        weights=Scheme(bits=2, granularity="channel"),
        activations=Scheme(bits=4),
        first_last_bits=2,
    )
    calibrate(model, [data()[0]])
    return model


def test_two_bit_training_beats_its_start_and_moves_the_ranges() -> None:
    teacher, model = network(dropout=0), quantized()
    train(teacher, *data(), CONFIG, teacher=network(seed=3))
    before = {name: value.clone() for name, value in model.named_parameters()}
    start = accuracy(model)
    train(model, *data(), CONFIG, teacher=teacher, augment=shift)
    reestimate_batchnorm(model, [data()[0]])
    assert accuracy(model) > max(start, 0.9)
    ranges = [name for name in before if name.endswith("range")]
    assert ranges
    moved = dict(model.named_parameters())
    assert all(not torch.equal(moved[name], before[name]) for name in ranges)


def test_a_quantized_run_resumes_to_the_last_bit(tmp_path: Path) -> None:
    teacher, whole, parts = network(seed=3), quantized(), quantized()
    train(whole, *data(), CONFIG, teacher=teacher, augment=shift)
    count = iter(range(1, 1000))
    with pytest.raises(Interrupted):
        train(
            parts,
            *data(),
            CONFIG,
            teacher=teacher,
            augment=shift,
            checkpoint=tmp_path / "c",
            stop=lambda: next(count) == 5,
        )
    fresh = quantized()
    train(fresh, *data(), CONFIG, teacher=teacher, augment=shift, checkpoint=tmp_path / "c", resume=True)
    assert same_state(whole, fresh)
