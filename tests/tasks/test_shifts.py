"""Shifts: each does what its name says, grows with severity, and is the same for every model."""

import pytest
import torch
from torch import nn

from bitsmith.errors import DataError
from bitsmith.tasks import evaluate_shifts, load
from bitsmith.tasks.corruptions import noise
from bitsmith.tasks.geometry import rotation, translation
from bitsmith.tasks.shifts import CORRUPTIONS, DEFAULT, SEVERITIES, generator_of, shifted

FINGERPRINTS = [42.5566, 42.6424, 40.5598, 36.1972, 33.7613]
SIZES = [(1, 8, 8), (3, 32, 32), (1, 28, 28)]


@pytest.fixture(params=SIZES, ids=str)
def images(request):
    """Smooth blobs: something to blur, turn and move."""
    channels, height, width = request.param
    coarse = torch.rand(20, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, (height, width), mode="bilinear").clamp(0, 1)


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_shifted_images_stay_images_and_move_further_with_severity(name, images):
    before = images.clone()
    distances = []
    for severity in SEVERITIES:
        result = shifted(name, images, severity)
        assert result.shape == images.shape
        assert result.dtype == torch.float32
        assert result.min() >= 0
        assert result.max() <= 1
        distances.append((result - images).square().mean().item())
    assert distances == sorted(distances)
    assert distances[0] > 0
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_equal_seeds_give_equal_images_whatever_else_was_drawn(name, images):
    first = shifted(name, images, 3, seed=4)
    torch.rand(5)
    for other in CORRUPTIONS:
        shifted(other, images, 2, seed=4)
    assert torch.equal(shifted(name, images, 3, seed=4), first)


@pytest.mark.parametrize(
    "name",
    ["noise", "rotation", "translation", "shot_noise", "impulse_noise", "motion_blur", "shear", "elastic"],
)
def test_other_seeds_give_other_images(name, images):
    assert not torch.equal(shifted(name, images, 3, seed=0), shifted(name, images, 3, seed=1))


def test_the_five_of_the_first_version_keep_their_images():
    """Fingerprints taken before there were others: figures of runs compare across versions."""
    ramp = torch.linspace(0, 1, 2 * 64).view(2, 1, 8, 8)
    sums = [round(shifted(name, ramp, 3, seed=2).double().square().sum().item(), 4) for name in DEFAULT]
    assert sums == pytest.approx(FINGERPRINTS, abs=1e-3)


def test_no_two_shifts_draw_the_same_numbers():
    seeds = [
        generator_of(number, severity, seed).initial_seed()
        for number in range(len(CORRUPTIONS))
        for severity in SEVERITIES
        for seed in range(3)
    ]
    assert len(set(seeds)) == len(seeds)


def test_uint8_images_are_shifted_as_their_fractions():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(shifted("contrast", images, 5), shifted("contrast", images.float() / 255, 5))


def test_noise_has_the_stated_standard_deviation():
    grey = torch.full((50, 1, 32, 32), 0.5)
    assert noise(grey, 2, torch.Generator().manual_seed(0)).std().item() == pytest.approx(0.1, rel=0.02)


def test_blur_keeps_a_plain_image_and_the_mean_of_a_dot():
    plain = torch.full((2, 3, 8, 8), 0.3)
    assert torch.allclose(shifted("blur", plain, 5), plain, atol=1e-6)
    dot = torch.zeros(1, 1, 33, 33)
    dot[0, 0, 16, 16] = 1
    blurred = shifted("blur", dot, 3)
    assert blurred.sum().item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(blurred, blurred.transpose(2, 3), atol=1e-7)


def test_contrast_keeps_the_mean_and_shrinks_the_spread(images):
    result = shifted("contrast", images, 3)
    assert torch.allclose(result.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-5)
    assert torch.allclose(result.std((1, 2, 3)), 0.4 * images.std((1, 2, 3)), atol=1e-5)


def test_rotation_turns_a_dot_about_the_centre_to_either_side():
    dot = torch.zeros(40, 1, 65, 65)
    dot[:, 0, 32, 57] = 1  # 25 pixels right of the centre
    turned = rotation(dot, 4, torch.Generator().manual_seed(0)).flatten(1).argmax(1)
    angles = torch.atan2(turned // 65 - 32.0, turned % 65 - 32.0).rad2deg()
    assert torch.allclose(angles.abs(), torch.tensor(24.0), atol=2.5)
    assert (angles > 0).any()
    assert (angles < 0).any()


def test_translation_moves_a_dot_by_the_stated_distance():
    dot = torch.zeros(60, 1, 101, 101)
    dot[:, 0, 50, 50] = 1
    moved = translation(dot, 4, torch.Generator().manual_seed(0)).flatten(1).argmax(1)
    rows, columns = moved // 101 - 50.0, moved % 101 - 50.0
    assert torch.allclose((rows**2 + columns**2).sqrt(), torch.tensor(16.16), atol=1.1)
    assert {(int(r), int(c)) for r, c in zip(rows.sign(), columns.sign(), strict=True)} >= {
        (1, 1),
        (-1, -1),
        (1, -1),
    }


class Confident(nn.Module):
    """Knows one split by heart: accuracy 1 on unshifted images; counts how often it is asked."""

    def __init__(self, data):
        super().__init__()
        self.register_buffer("images", data.test_x.flatten(1))
        self.register_buffer("labels", data.test_y)

    def forward(self, x):
        return nn.functional.one_hot(
            self.labels[torch.cdist(x.flatten(1), self.images).argmin(1)], 10
        ).float()


def test_evaluation_averages_severities_and_shifts():
    data = load("digits")
    model = Confident(data)
    single = {severity: evaluate_shifts(model, data, severities=[severity]) for severity in (1, 5)}
    both = evaluate_shifts(model, data, severities=[1, 5])
    assert list(both) == ["noise", "blur", "contrast", "rotation", "translation", "mean"]
    for name in both:
        assert both[name] == pytest.approx((single[1][name] + single[5][name]) / 2)
        assert single[1][name] >= single[5][name]
    assert both["mean"] == pytest.approx(sum(both[name] for name in DEFAULT) / 5)


def test_unknown_shifts_and_severities_are_named(images):
    with pytest.raises(DataError, match="unknown shift 'fog'; expected noise, blur"):
        shifted("fog", images, 1)
    with pytest.raises(DataError, match="no such severity; got 6, expected 1 to 5"):
        shifted("noise", images, 6)
    with pytest.raises(DataError, match="no severity was chosen"):
        evaluate_shifts(Confident(load("digits")), load("digits"), severities=[])
