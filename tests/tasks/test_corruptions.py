"""Corruptions against formulas and other libraries: what each is said to do is what it does."""

import colorsys
import io
import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch import nn

from bitsmith.tasks import corruptions, geometry
from bitsmith.tasks.corruptions import areas, compressed, dct_matrix, disk, quantization_table, streaks


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(channels=1, side=32, count=4):
    coarse = torch.rand(count, channels, 5, 5, generator=generator())
    return nn.functional.interpolate(coarse, (side, side), mode="bilinear").clamp(0, 1)


@pytest.mark.parametrize("severity", [1, 3])
def test_shot_noise_has_the_mean_of_the_image_and_its_variance_over_lambda(severity):
    grey = torch.full((100, 1, 40, 40), 0.2)  # few of these counts are above white
    found = corruptions.shot_noise(grey, severity, generator())
    photons = corruptions.PHOTONS[severity - 1]
    assert found.mean().item() == pytest.approx(0.2, abs=2e-3)
    assert found.var().item() == pytest.approx(0.2 / photons, rel=0.02)


def test_impulses_are_salt_as_often_as_pepper_and_spare_the_rest():
    grey = torch.full((40, 1, 40, 40), 0.5)
    found = corruptions.impulse_noise(grey, 5, generator())
    shares = [(found == value).float().mean().item() for value in (0.0, 1.0, 0.5)]
    assert shares == pytest.approx([0.135, 0.135, 0.73], abs=0.01)


@pytest.mark.parametrize("radius", [0.85, 2.3, 6.0])
def test_a_disk_sums_to_one_and_has_its_area_in_every_direction(radius):
    kernel = disk(radius)
    assert kernel.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(kernel, kernel.T)
    assert torch.equal(kernel, kernel.flip(0))
    middle = len(kernel) // 2
    assert kernel[middle, middle].item() == pytest.approx(1 / (math.pi * radius**2), rel=0.02)


def test_a_streak_sums_to_one_and_lies_along_its_angle():
    kernels = streaks(torch.tensor([0.0, math.pi / 2, math.pi / 4]), 3.0)
    assert torch.allclose(kernels.sum((1, 2)), torch.ones(3), atol=1e-5)
    assert torch.allclose(kernels[0, 3].sum(), torch.tensor(1.0), atol=1e-5)  # the middle row
    assert torch.allclose(kernels[1], kernels[0].T, atol=1e-5)
    assert torch.allclose(kernels[2], kernels[2].T, atol=1e-5)
    assert kernels[2].diagonal().sum() > 0.45


def test_motion_blurs_every_image_of_a_batch_in_its_own_direction():
    dots = torch.zeros(6, 3, 33, 33)
    dots[:, :, 16, 16] = 1
    found = corruptions.motion_blur(dots, 4, generator())
    assert torch.allclose(found.sum((2, 3)), torch.ones(6, 3), atol=1e-4)
    assert torch.equal(found[:, 0], found[:, 2])
    assert not torch.allclose(found[0], found[1])


def test_brightness_raises_the_value_of_hsv_alone():
    images = torch.rand(1, 3, 4, 4, generator=generator()) * 0.9
    images[..., 0, 0] = 0
    found = corruptions.brightness(images, 2, generator())
    for before, after in zip(images[0].flatten(1).T.tolist(), found[0].flatten(1).T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.2, 1.0))
        assert after == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("source", "target"), [(8, 4), (8, 5), (5, 8), (7, 7)])
def test_areas_are_means_over_the_overlap(source, target):
    values = torch.rand(source, generator=generator())
    fine = values.repeat_interleave(target)  # source·target points: both grids fall on them
    assert torch.allclose(areas(source, target) @ values, fine.view(target, source).mean(1), atol=1e-6)


def test_pixelated_images_keep_their_mean_and_have_few_values():
    images = smooth(side=8)
    found = corruptions.pixelate(images, 3, generator())  # 8 -> 4: blocks of two
    blocks = images.view(4, 1, 4, 2, 4, 2).mean((3, 5))
    assert torch.allclose(found[..., ::2, ::2], blocks, atol=1e-6)
    assert torch.allclose(found[..., 1::2, 1::2], blocks, atol=1e-6)


def test_the_dct_is_scipys():
    block = torch.rand(8, 8, generator=generator())
    ours = dct_matrix() @ block @ dct_matrix().T
    assert np.allclose(ours, dctn(block.numpy(), norm="ortho"), atol=1e-5)


@pytest.mark.parametrize("quality", [7, 25, 60, 95])
def test_tables_and_grey_images_are_those_of_a_jpeg_library(quality):
    from PIL import Image

    pixels = (255 * smooth(side=24)[0, 0]).round().byte()
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        assert sorted(image.quantization[0]) == sorted(quantization_table(quality).flatten().int().tolist())
        theirs = torch.from_numpy(np.array(image)).float()
    ours = 255 * compressed(pixels[None, None].float() / 255, quality)[0, 0]
    # They transform in integers and round to whole levels; a coefficient halfway may fall to either side.
    assert ((ours - theirs).abs() < 1.5).float().mean() > 0.85
    assert (ours - theirs).abs().mean() < 0.6


def test_jpeg_at_full_quality_leaves_colours_and_odd_sizes_alone():
    images = smooth(channels=3, side=13)
    assert (compressed(images, 100) - images).abs().max() < 2.5 / 255
    assert (compressed(images, 7) - images).abs().max() > 10 / 255


def test_shear_is_the_matrix_that_it_says():
    """(x, y) from (x ± 0.3·y, y): a dot moves along its row, by its height above the middle."""
    dots = torch.zeros(30, 1, 41, 41)
    dots[:, 0, 30, 20] = 1  # 10 rows below the middle
    found = geometry.shear(dots, 3, generator()).flatten(1).argmax(1)
    assert (found // 41).unique().tolist() == [30]
    assert (found % 41 - 20).unique().tolist() == [-3, 3]


def test_elastic_is_the_identity_at_no_strength_and_moves_as_far_as_said():
    images = smooth(channels=3)
    assert torch.allclose(geometry.elastically(images, 0.0, generator()), images, atol=1e-5)
    # Images of the coordinates themselves show where each pixel came from.
    ramp = (torch.arange(64) + 0.5) / 64
    places = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64)]).expand(5, 2, 64, 64)
    moved = (geometry.elastically(places, 0.02, generator()) - places)[..., 8:-8, 8:-8]
    assert moved.square().sum(1).mean().sqrt().item() == pytest.approx(0.02, rel=0.15)
    assert (moved[..., 1:] - moved[..., :-1]).abs().mean() < 0.2 * moved.abs().mean()  # neighbours together
