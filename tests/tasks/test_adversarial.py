"""Attacks: inside of their radius, as strong as the formula says on a linear model, blind to nothing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitsmith.quantization import Scheme, calibrate, prepare
from bitsmith.tasks.adversarial import ATTACKS, attacked, fgsm, loss_and_gradient, pgd


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=40, seed=1):
    draw = generator(seed)
    x = torch.rand(count, 1, 6, 6, generator=draw)
    return x, torch.randint(0, 3, (count,), generator=draw)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
        )


def quantized():
    model, (x, _) = network(), images(200)
    prepare(model, Scheme(bits=3, granularity="channel"), Scheme(bits=3), first_last_bits=None)
    calibrate(model, [x])
    return model


@given(st.sampled_from(sorted(ATTACKS)), st.floats(0, 0.3), st.integers(0, 3))
def test_attacked_images_stay_within_the_radius_and_are_images(name, radius, seed):
    x, y = images(6)
    found = attacked(ATTACKS[name][0], network(), x, y, radius, generator(seed))
    assert (found - x).abs().max() <= radius + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1


def test_on_a_linear_model_fgsm_gains_the_radius_times_the_l1_norm():
    """Two classes, logits (0, w·x): the margin falls by exactly ε‖w‖₁, and no image does more harm."""
    weight = torch.randn(36, generator=generator())

    class Linear(nn.Module):
        def forward(self, x):
            margin = x.flatten(1) @ weight
            return torch.stack([torch.zeros_like(margin), margin], 1)

    x = 0.25 + images()[0] / 2  # far enough from 0 and 1
    y, radius = torch.ones(len(x), dtype=torch.int64), 0.1
    for attack in (fgsm, lambda *a: pgd(*a, steps=20)):
        found = attacked(attack, Linear(), x, y, radius, generator())
        gain = (x.flatten(1) - found.flatten(1)) @ weight
        assert torch.allclose(gain, torch.full_like(gain, radius * weight.abs().sum().item()), atol=1e-4)


@pytest.mark.parametrize("model", [network(), quantized()], ids=["float", "3 bits"])
@pytest.mark.parametrize("radius", [4 / 255, 16 / 255])
def test_pgd_is_at_least_as_strong_as_fgsm_and_that_stronger_than_nothing(model, radius):
    x, y = images()
    losses = [
        loss_and_gradient(model, now, y)[0].mean().item()
        for now in (x, *(attacked(attack, model, x, y, radius, generator()) for attack in (fgsm, pgd)))
    ]
    assert losses[0] < losses[1] <= losses[2] + 1e-9


def test_gradients_go_through_quantizers_and_sure_answers():
    x, y = images()
    _, gradient = loss_and_gradient(quantized(), x, y)
    assert (gradient != 0).float().mean() > 0.9
    sure = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with torch.no_grad():
        sure[1].weight.mul_(60)
    logits = sure(x)
    assert (F.cross_entropy(logits, logits.argmax(1), reduction="none") == 0).any()  # in float32
    _, gradient = loss_and_gradient(sure, x, logits.argmax(1))
    assert (gradient.flatten(1).abs().sum(1) > 0).all()


def test_attacks_are_seeded_and_leave_the_model_as_it_was():
    model, (x, y) = network().train(), images()
    first, second, other = (attacked(pgd, model, x, y, 0.1, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
